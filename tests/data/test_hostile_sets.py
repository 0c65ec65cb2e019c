"""Sets as they are found: cut off, mixed up, linked, compressed, with marks; and any bytes at all."""

import gzip
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_preference_sets import A, B, C, folders, lines, parquet, png, tar, text  # type: ignore[import-not-found]

from rpo.curation.select import mixed
from rpo.data.formats.rows import Unusable
from rpo.data.preference_sets import comparisons, open_set
from rpo.data.readers import load_pairs
from rpo.errors import RpoError

ROW = {"image_0": text(A), "image_1": text(B), "prompt": "a cat", "prefer_0": 1, "prefer_1": 0}
OTHER = {"image_0": text(A), "image_1": text(C), "prompt": "a dog", "prefer_0": 0, "prefer_1": 1}


def pick(captions: list[str], **more: Any) -> dict[str, Any]:
    count = len(captions)
    columns = {"caption": captions, "jpg_0": [png(2 * i) for i in range(count)], "jpg_1": [png(2 * i + 1) for i in range(count)]}
    return columns | {"label_0": [1.0] * count} | more


def test_a_tiny_image_is_a_dropped_row(tmp_path: Path) -> None:
    columns = pick(["a", "b", "c"])
    columns["jpg_0"][1] = png(9, 1)
    out = io.BytesIO()
    Image.new("RGB", (300, 8)).save(out, "PNG")
    columns["jpg_1"][2] = out.getvalue()
    pairs, dropped = load_pairs(parquet(tmp_path / "set.parquet", columns))
    assert [pair.prompt for pair in pairs] == ["a"] and dropped == {"image with a side under 16 pixels": 2}
    assert dropped.rows["image with a side under 16 pixels"] == ["set.parquet, row 2", "set.parquet, row 3"]
    dropped.write(tmp_path / "dropped.json")
    assert json.loads((tmp_path / "dropped.json").read_text())["dropped"]["image with a side under 16 pixels"]["rows"] == 2


@pytest.mark.parametrize(
    ("name", "content", "prompt"),
    [
        ("cp1252", "café".encode("cp1252"), None),
        ("gbk", "红色的猫".encode("gbk"), None),
        ("utf16", "a cat".encode("utf-16"), None),
        ("mark", b"\xef\xbb\xbfa cat\n", "a cat"),
        ("lines", b"a cat\nun chat\n", "a cat"),
    ],
)
def test_captions_are_utf_8_or_dropped(tmp_path: Path, name: str, content: bytes, prompt: str | None) -> None:
    names = {
        f"{side}/{stem}.png": image for side, stem, image in (("chosen", 1, A), ("rejected", 1, B), ("chosen", 2, A), ("rejected", 2, C))
    }
    home = folders(tmp_path / "kohya", {**names, "chosen/1.txt": content, "chosen/2.txt": b"a dog"})
    packed = tar(
        tmp_path / "t.tar",
        {"1.refined.png": A, "1.flawed.png": B, "1.txt": content, "2.refined.png": A, "2.flawed.png": C, "2.txt": b"a dog"},
    )
    for path in (home, packed):
        pairs, dropped = load_pairs(path)
        assert [pair.prompt for pair in pairs] == ([prompt] if prompt else []) + ["a dog"]
        assert dropped == ({} if prompt else {"caption is not UTF-8": 1})
        assert dropped.notes == (["first line of a caption with several: 1"] if name == "lines" else [])


def whole_tar(path: Path, rows: int) -> bytes:
    members = {
        f"{n}.{k}": v
        for n in range(rows)
        for k, v in (("refined.png", png(n)), ("flawed.png", png(n + 50)), ("json", b'{"prompt": "p%d"}' % n))
    }
    return tar(path, members).read_bytes()


def test_a_tar_that_is_cut_anywhere_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "set.tar"
    whole = whole_tar(path, 10)
    with tarfile.open(path) as file:
        offsets = [member.offset for member in file.getmembers()]
    assert len(load_pairs(path)[0]) == 10
    for cut in (offsets[15], offsets[1], offsets[29] + 512, offsets[15] + 100):
        path.write_bytes(whole[:cut])
        with pytest.raises(RpoError, match="is damaged"):
            load_pairs(path)
    for place in (offsets[3] + 4, offsets[3] + 130, offsets[3] + 150):
        broken = bytearray(whole)
        broken[place] ^= 0xFF
        path.write_bytes(bytes(broken))
        with pytest.raises(RpoError, match="is damaged"):
            load_pairs(path)


def header(name: str, size: bytes, kind: bytes = b"0") -> bytes:
    block = bytearray(512)
    block[:100] = name.encode().ljust(100, b"\0")
    block[124 : 124 + len(size)] = size
    block[156:157] = kind
    block[257:265] = b"ustar\x0000"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize("kind", ["negative", "pax of 6 GB", "long name of 6 GB", "pax size", "endless pax", "no number"])
def test_a_hostile_tar_ends_at_once(tmp_path: Path, kind: str) -> None:
    sound = whole_tar(tmp_path / "set.tar", 1).rstrip(b"\0")
    sound += bytes(-len(sound) % 512)
    further = {
        "negative": header("1.refined.png", b"\xff" * 10 + b"\xfe\x00"),
        "pax of 6 GB": header("x", b"\x80\0\0\0\0\0\0\1\x65\xa0\xbc\0", b"x"),
        "long name of 6 GB": header("x", b"\x80\0\0\0\0\0\0\1\x65\xa0\xbc\0", b"L"),
        "pax size": header("x", b"%011o\0" % 13, b"x") + b"13 size=-512\n".ljust(512, b"\0") + header("1.refined.png", b"%011o\0" % 0),
        "endless pax": (header("x", b"%011o\0" % 0, b"x")) * 5000,
        "no number": header("1.refined.png", b"99999999999\0"),
    }[kind]
    with (tmp_path / "set.tar").open("wb") as file:
        file.write(sound + further)
        if "GB" in kind:
            file.truncate(7_000_000_000)
    with pytest.raises(RpoError, match="is damaged"):
        load_pairs(tmp_path / "set.tar")


def test_a_repeated_member_pairs_nothing_with_another_row(tmp_path: Path) -> None:
    path = tmp_path / "set.tar"
    with tarfile.open(path, "w") as file:
        rows = [
            ("0.refined.png", A),
            ("0.flawed.png", B),
            ("0.json", b'{"prompt": "p"}'),
            ("0.refined.png", C),
            ("1.refined.png", A),
            ("1.flawed.png", C),
        ]
        for name, data in [*rows, ("1.json", b'{"prompt": "q"}')]:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    pairs, dropped = load_pairs(path)
    assert [pair.prompt for pair in pairs] == ["q"] and dropped == {"repeated member of one name": 1}


def test_files_of_other_columns_are_named_and_dot_files_are_no_data(tmp_path: Path) -> None:
    home = tmp_path / "set"
    parquet(home / "data" / "train-0.parquet", pick(["a"]))
    (home / "data" / "._train-0.parquet").write_bytes(b"\0\5\x16\7")
    assert len(load_pairs(home)[0]) == 1
    parquet(home / "data" / "train-1.parquet", {"prompt": ["b"], "chosen": [A], "rejected": [B]})
    with pytest.raises(RpoError, match=r"train-1.parquet has other columns than .*train-0.parquet"):
        load_pairs(home)


def test_labels_that_do_not_add_up_are_no_labels(tmp_path: Path) -> None:
    more = {"label_0": [0.0, 1.0, 1.0, None], "label_1": [0.0, 1.0, 0.0, 1.0], "has_label": [True, True, True, True]}
    pairs, dropped = load_pairs(parquet(tmp_path / "a.parquet", pick(["a", "b", "c", "d"], **more)))
    assert [pair.prompt for pair in pairs] == ["c"] and dropped == {"no label": 3}
    pairs, dropped = load_pairs(parquet(tmp_path / "b.parquet", pick(["a", "b"], has_label=[False, True])))
    assert [pair.prompt for pair in pairs] == ["b"] and dropped == {"no label": 1}


def test_splits_of_file_names_are_kept(tmp_path: Path) -> None:
    for number, part in enumerate(("train", "validation", "test")):
        names = [f"{part} {i}" for i in range(3)]
        columns = pick(names) | {side: [png(10 * number + 2 * i + k + 100) for i in range(3)] for k, side in enumerate(("jpg_0", "jpg_1"))}
        parquet(tmp_path / "set" / "data" / f"{part}-00000-of-00001.parquet", columns)
    pairs, dropped = load_pairs(tmp_path / "set")
    assert {pair.prompt: pair.split for pair in pairs} == {f"train {i}": "train" for i in range(3)} | {
        f"validation {i}": "held_out" for i in range(3)
    }
    assert dropped == {"row of a test split": 3}
    assert {pair.split for pair in load_pairs(tmp_path / "set" / "data" / "test-00000-of-00001.parquet")[0]} == {"train"}, "chosen by name"


@pytest.mark.parametrize("name", ["a.JSONL", "a.ndjson", "a.json"])
def test_endings_of_any_case_are_read(tmp_path: Path, name: str) -> None:
    assert len(load_pairs(lines(tmp_path / name, [ROW, OTHER]))[0]) == 2


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("a.jsonl.gz", "is compressed"),
        ("a.csv", "by its ending '.csv'"),
        ("prompts.txt", "no preference set by its ending"),
        ("T.tar.gz", "compressed"),
        ("a", "by its ending ''"),
    ],
)
def test_endings_that_are_not_read_are_named(tmp_path: Path, name: str, told: str) -> None:
    (tmp_path / name).write_bytes(gzip.compress(b"x"))
    with pytest.raises(RpoError, match=told):
        load_pairs(tmp_path / name)


def test_json_arrays_marks_and_objects(tmp_path: Path) -> None:
    array = json.dumps([ROW, OTHER], indent=1)
    for number, content in enumerate((b"\xef\xbb\xbf" + array.encode(), b"\n  " + array.encode(), array.encode())):
        (tmp_path / f"{number}.json").write_bytes(content)
        assert len(load_pairs(tmp_path / f"{number}.json")[0]) == 2
    for content, told in (
        (json.dumps({"data": [ROW]}), "one JSON object with rows under 'data'"),
        (json.dumps(ROW, indent=1), "neither a JSON array nor"),
    ):
        (tmp_path / "object.json").write_text(content)
        with pytest.raises(RpoError, match=told):
            load_pairs(tmp_path / "object.json")
    for content in (array[:-40], array + "x", array.replace("}, {", "} {").replace("},\n", "}\n")):
        (tmp_path / "cut.json").write_text(content)
        with pytest.raises(RpoError, match=r"cut.json is damaged"):
            load_pairs(tmp_path / "cut.json")


@pytest.mark.parametrize(
    "row", [{"prefer_0": 10**400}, {"prefer_0": float("inf")}, {"human_preference": [10**400, 1], "image_path": ["a", "b"]}]
)
def test_numbers_of_any_size_are_one_rows_reason(tmp_path: Path, row: dict[str, Any]) -> None:
    wrong = {key: value for key, value in ROW.items() if not ("image_path" in row and key.startswith("image"))} | row
    path = tmp_path / "set.jsonl"
    path.write_text(json.dumps(wrong) + "\n" + "[" * 50_000 + "\n" + json.dumps(OTHER) + "\n")
    pairs, dropped = load_pairs(path)
    assert [pair.prompt for pair in pairs] == ["a dog"] and sum(dropped.values()) == 2


def test_names_below_the_folder_base64_with_breaks_and_named_sides(tmp_path: Path) -> None:
    home = folders(tmp_path / "rel", {"images/a.png": A, "images/b.png": B, "images/deep/c.png": C})
    broken = "\n".join(text(A)[i : i + 76] for i in range(0, len(text(A)), 76))
    for first, second in (
        ("images/a.png", "b.png"),
        ("./images/a.png", "images/b.png"),
        ("images\\a.png", "images\\b.png"),
        (broken, text(B)),
    ):
        ((pair,), _) = load_pairs(lines(home / "t.jsonl", [ROW | {"image_0": first, "image_1": second}]))
        assert (pair.chosen.read(), pair.rejected.read()) == (A, B)
    ((pair,), _) = load_pairs(
        lines(home / "t.jsonl", [{"prompt": "p", "chosen": "a.png", "rejected": "images/deep/c.png", "critique": "dim"}])
    )
    assert (pair.chosen.read(), pair.rejected.read(), json.loads(pair.critique)) == (A, C, {"reasoning": "dim"})


def test_one_prompt_is_trained_on(tmp_path: Path) -> None:
    pairs, _ = load_pairs(parquet(tmp_path / "set.parquet", pick(["prompt 47"] * 30)))
    held_out = next(f"p{i}" for i in range(1000) if load_split(f"p{i}") == "held_out")
    pairs, _ = load_pairs(parquet(tmp_path / "set.parquet", pick([held_out] * 30)))
    assert sum(pair.split == "train" for pair in pairs) >= 20
    ((pair,), _) = load_pairs(parquet(tmp_path / "one.parquet", pick([held_out])))
    assert pair.split == "train"


def load_split(prompt: str) -> str:
    from rpo.data.pairs import split_of

    return split_of(prompt, 0.05)


def test_links_pipes_and_devices_are_not_opened(tmp_path: Path) -> None:
    parquet(tmp_path / "real.parquet", pick(["a"]))
    for suffix in (".parquet", ".tar", ".jsonl", ".json"):
        os.mkfifo(tmp_path / f"pipe{suffix}")
        (tmp_path / f"link{suffix}").symlink_to("/dev/zero")
        for name in ("pipe", "link"):
            with pytest.raises(RpoError, match=r"is a link|no regular file"):
                load_pairs(tmp_path / f"{name}{suffix}")
    home = tmp_path / "hub"
    home.mkdir()
    (home / "train-0.parquet").symlink_to(tmp_path / "real.parquet")
    with pytest.raises(RpoError, match="1 links or devices, which are not followed; copy the files"):
        load_pairs(home)
    kohya = folders(tmp_path / "kohya", {"chosen/1.txt": b"a cat"})
    (kohya / "rejected").mkdir()
    for side in ("chosen", "rejected"):
        (kohya / side / "1.png").symlink_to(tmp_path / "real.parquet")
    with pytest.raises(RpoError, match="image is a link, which is not followed: 1"):
        load_pairs(kohya)


def test_no_file_of_a_folder_vanishes(tmp_path: Path) -> None:
    names = {f"chosen/{i}.{suffix}": A for i, suffix in enumerate(("png", "tif", "bmp", "avif", "heic", "jfif", "gif"))}
    home = folders(
        tmp_path / "kohya", {**names, **{f"rejected/{i}.png": B for i in range(9)}, **{f"chosen/{i}.txt": b"p%d" % i for i in range(8)}}
    )
    (home / "chosen" / "3.avif").write_bytes(b"II*\0" + A)
    pairs, dropped = load_pairs(home)
    assert len(pairs) + sum(dropped.values()) == 9 and dropped == {"unreadable image: TIFF is not read": 1, "no image": 1, "no prompt": 1}


def test_a_parquet_bomb_takes_little_memory(tmp_path: Path) -> None:
    import resource
    import subprocess
    import sys

    table = pa.table({"caption": ["p"] * 64, "jpg_0": [bytes(31_000_000)] * 64, "jpg_1": [A] * 64, "label_0": [1.0] * 64})
    pq.write_table(table, tmp_path / "set.parquet", compression="zstd", dictionary_pagesize_limit=2**30)
    del table
    assert (tmp_path / "set.parquet").stat().st_size < 20_000
    program = f"from pathlib import Path; from rpo.data.readers import load_pairs; load_pairs(Path({str(tmp_path / 'set.parquet')!r}))"
    limit = lambda: resource.setrlimit(resource.RLIMIT_DATA, (3_000_000_000, 3_000_000_000))  # noqa: E731
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, preexec_fn=limit)
    assert "unreadable image: not an image: 64" in found.stderr, found.stderr[-500:]


def test_a_mixture_gives_each_prompt_one_split_and_reads_forward(tmp_path: Path) -> None:
    from rpo.data.pairs import split_of
    from tiny_diffusion import make_pairs

    prompts = [f"prompt {i}" for i in range(200)]
    human, _ = load_pairs(parquet(tmp_path / "human.parquet", pick(prompts)))
    from dataclasses import replace

    ours = [replace(make_pairs(1)[0], id=f"o{i}", prompt=prompt, split=split_of(prompt, 0.1)) for i, prompt in enumerate(prompts)]
    both = list(mixed(ours, human, 0.4, 0.1))
    splits = {prompt: {pair.split for pair in both if pair.prompt == prompt} for prompt in prompts}
    assert all(len(split) == 1 for split in splits.values()) and {"held_out"} in splits.values()
    drawn = [human.index(replace(pair, split=human[[h.id for h in human].index(pair.id)].split)) for pair in both[200:]]
    assert len(drawn) == 133 and drawn == sorted(drawn)


def test_an_unchanged_set_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, cache = parquet(tmp_path / "set.parquet", pick(["a", "b", "c"], label_0=[1.0, 0.5, 1.0])), tmp_path / "cache"
    first, dropped = load_pairs(path, cache)
    with monkeypatch.context() as patch:
        patch.setattr("rpo.data.readers.check_images", lambda row: pytest.fail("an image was decoded"))
        again, same = load_pairs(path, cache)
        assert again == first and same == dropped == {"tie": 1} and same.rows == dropped.rows
        assert [pair.chosen.read() for pair in again] == [pair.chosen.read() for pair in first]
    index = next(cache.glob("index-*.parquet"))
    whole = index.read_bytes()
    for place in (10, len(whole) // 2, len(whole) - 20):
        index.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert load_pairs(path, cache)[0] == first, "a damaged index is made anew"
    parquet(path, pick(["x", "y"]))
    assert [pair.prompt for pair in load_pairs(path, cache)[0]] == ["x", "y"]


KINDS = [".parquet", ".tar", ".jsonl", ".ndjson", ".json"]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(KINDS), content=st.binary(max_size=600), cut=st.integers(0, 20_000), flip=st.integers(0, 20_000))
def test_any_bytes_are_rows_or_one_line(tmp_path: Path, kind: str, content: bytes, cut: int, flip: int) -> None:
    """Bytes of nothing, and sound files that are cut off and have bytes in place of others."""
    path = tmp_path / f"set{kind}"
    sound = SOUND(tmp_path)[kind]
    for data in (content, sound[:cut], sound[:flip] + content[:20] + sound[flip + 20 :]):
        path.write_bytes(data)
        try:
            rows = list(comparisons(open_set(path)))
            pairs, dropped = load_pairs(path)
        except RpoError as error:
            assert "\n" not in str(error)
            continue
        assert len(pairs) + sum(dropped.values()) == len(rows)
        assert sum(isinstance(row, Unusable) for _, _, row in rows) <= sum(dropped.values())


_MADE: dict[str, bytes] = {}


def SOUND(folder: Path) -> dict[str, bytes]:
    """A sound file of each kind, made once."""
    if not _MADE:
        _MADE[".parquet"] = parquet(folder / "s.parquet", pick(["a", "b"])).read_bytes()
        _MADE[".tar"] = whole_tar(folder / "s.tar", 2)
        _MADE[".jsonl"] = _MADE[".ndjson"] = lines(folder / "s.jsonl", [ROW, OTHER]).read_bytes()
        _MADE[".json"] = json.dumps([ROW, OTHER]).encode()
    return _MADE


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.sampled_from([f"{side}/{n}{s}" for side in ("chosen", "rejected") for n in "123" for s in (".png", ".txt", ".GIF", ".caption")]),
        st.sampled_from([A, B, b"a cat", b"\xff\xfe", b""]),
        min_size=1,
    )
)
def test_any_folder_is_rows_or_one_line(tmp_path_factory: pytest.TempPathFactory, names: dict[str, bytes]) -> None:
    home = folders(tmp_path_factory.mktemp("set"), names)
    for side in ("chosen", "rejected"):
        (home / side).mkdir(exist_ok=True)
    stems = {Path(name).stem for name in names}
    rows = list(comparisons(open_set(home)))
    assert len(rows) == len(stems)
    try:
        pairs, dropped = load_pairs(home)
        assert len(pairs) + sum(dropped.values()) == len(stems)
    except RpoError as error:
        assert "no usable pair" in str(error)
