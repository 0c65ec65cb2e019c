"""Preference sets in every layout that is read; and rows that want to be more than rows."""

import base64
import io
import json
import os
import re
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rpo.data.formats.rows import Comparison, Unusable
from rpo.data.images import MAX_ENCODED_BYTES
from rpo.data.pairs import Pair, write_pairs
from rpo.data.preference_sets import comparisons, open_set
from rpo.data.readers import load_pairs
from rpo.errors import RpoError
from tiny_diffusion import make_pairs


def png(number: int, side: int = 16, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out, format=kind)
    return out.getvalue()


A, B, C = png(0), png(1), png(2)
CELL = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def parquet(path: Path, columns: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=2)
    return path


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as file:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    return path


def folders(path: Path, names: dict[str, bytes]) -> Path:
    for name, data in names.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def cells(*images: bytes) -> pa.Array:
    return pa.array([{"bytes": image, "path": "../../etc/passwd"} for image in images], CELL)


def text(image: bytes) -> str:
    return base64.b64encode(image).decode()


def layouts(folder: Path) -> dict[str, Path]:
    """The same two comparisons (A over B for "a cat", C over A for "a dog") in every layout."""
    pick = {"caption": ["a cat", "a dog"], "jpg_0": [A, A], "jpg_1": [B, C], "label_0": [1.0, 0.0]}
    ranked = {"prompt": ["a cat", "a dog"], "rank": [[2, 1], [1, 2, 3]], "image": [[B, A], [C, B, A]]}
    voted = {"prompt": ["a cat", "a dog"], "human_preference": [[0, 1], [1, 0]], "images": [[B, A], [C, A]]}
    rows = [{"image_0": text(A), "image_1": "data:image/png;base64," + text(B), "prompt": "a cat", "prefer_0": 1, "prefer_1": 0},
            {"image_0": "a.png", "image_1": "c.png", "prompt": "a dog", "prefer_0": 0.2, "prefer_1": 0.9}]  # fmt: skip
    files = {
        "chosen/1.png": A,
        "rejected/1.png": B,
        "chosen/1.txt": b"a cat\n",
        "chosen/2.png": C,
        "rejected/2.png": A,
        "rejected/2.caption": b"a dog",
    }
    said = json.dumps({"prompt": "a cat", "reflection": "no ears"}).encode()
    triplets = {"x/000.good_image.png": A, "x/000.bad_image.png": B, "x/000.json": said}
    triplets |= {"001.rejected.png": A, "001.refined.png": C, "001.txt": b"a dog"}
    hpd = [{"prompt": "a cat", "image_path": ["b.png", "a.png"], "human_preference": [0, 1]},
           {"prompt": "a dog", "image_path": ["c.png", "b.png", "a.png"], "rank": [1, 2, 3]}]  # fmt: skip
    (folder / "lines").mkdir()
    folders(folder / "lines" / "images", {"a.png": A, "c.png": C})
    (folder / "hpd").mkdir()
    folders(folder / "hpd" / "train", {"a.png": A, "b.png": B, "c.png": C})
    (folder / "hpd" / "train.json").write_text(json.dumps(hpd))
    parquet(folder / "shards" / "data" / "train-0.parquet", {name: values[:1] for name, values in pick.items()})
    parquet(folder / "shards" / "data" / "train-1.parquet", {name: values[1:] for name, values in pick.items()})
    return {
        "pickapic": parquet(folder / "pick.parquet", pick),
        "decoded": parquet(folder / "decoded.parquet", pick | {"jpg_0": cells(A, A), "jpg_1": cells(B, C)}),
        "shards": folder / "shards",
        "ranking": parquet(folder / "ranked.parquet", ranked),
        "votes": parquet(folder / "voted.parquet", voted),
        "lines": lines(folder / "lines" / "pairs.jsonl", rows),
        "hpd": folder / "hpd" / "train.json",
        "folders": folders(folder / "kohya", files),
        "triplets": tar(folder / "triplets.tar", triplets),
        "chosen": parquet(folder / "dpo.parquet", {"prompt": ["a cat", "a dog"], "chosen": cells(A, C), "rejected": cells(B, A)}),
    }


def test_every_layout_gives_the_same_pairs(tmp_path: Path) -> None:
    found = {name: load_pairs(path) for name, path in layouts(tmp_path).items()}
    for name, (pairs, dropped) in found.items():
        assert [(p.prompt, p.chosen.read(), p.rejected.read()) for p in pairs] == [("a cat", A, B), ("a dog", C, A)], name
        assert not dropped and [p.id for p in pairs] == [p.id for p in found["pickapic"][0]], name
    assert json.loads(found["triplets"][0][0].critique) == {"reasoning": "no ears"}


def test_images_stay_in_their_set_until_they_are_asked_for(tmp_path: Path) -> None:
    for name, path in layouts(tmp_path).items():
        pairs, _ = load_pairs(path)
        assert [pairs[at].rejected.read() for at in (1, 0, 1)] == [A, B, A], name
    path = tmp_path / "pick.parquet"
    pairs, _ = load_pairs(path)
    columns = {"caption": ["a cat", "a dog"], "jpg_0": [A, A], "jpg_1": [B, C], "label_0": [1.0, 0.0]}
    parquet(path, columns | {"jpg_1": [C, B]})
    with pytest.raises(RpoError, match="is not the preference set that this run was begun with"):
        pairs[0].rejected.read()
    parquet(path, {name: values[:1] for name, values in columns.items()})
    with pytest.raises(RpoError, match="is not the preference set"):
        pairs[1].chosen.read()
    pairs, _ = load_pairs(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(RpoError, match="is damaged"):
        pairs[0].chosen.read()


def test_reading_can_begin_at_any_row(tmp_path: Path) -> None:
    for path in layouts(tmp_path).values():
        found = open_set(path)
        every = list(comparisons(found))
        assert len(every) == 2
        for file, row, value in every:
            assert next(comparisons(found, file, row)) == (file, row, value)


def test_ties_repetitions_and_contradictions_are_no_pairs(tmp_path: Path) -> None:
    rows = [
        ("a cat", A, B, 1.0),
        ("a cat", B, A, 0.0),
        ("a dog", A, B, 1.0),
        ("a dog", A, B, 0.0),
        ("a fox", A, C, 0.5),
        ("a hen", A, C, 1.0),
    ]
    columns = dict(zip(("caption", "jpg_0", "jpg_1", "label_0"), map(list, zip(*rows, strict=True)), strict=True))
    pairs, dropped = load_pairs(parquet(tmp_path / "set.parquet", columns))
    assert [pair.prompt for pair in pairs] == ["a cat", "a hen"]
    assert dropped == {"repeated": 1, "contradicted": 2, "tie": 1}


def test_what_is_no_set_is_told(tmp_path: Path) -> None:
    cases = {"gone": (tmp_path / "gone", "there are no pairs at"),
             "empty": (folders(tmp_path / "empty", {"x.bin": b""}), "holds no preference set"),
             "other": (parquet(tmp_path / "other.parquet", {"x": [1]}), "no columns of a preference set that is known; it has x"),
             "cut": (tar(tmp_path / "cut.tar", {"0.refined.png": A, "0.flawed.png": B * 50}), "is damaged")}  # fmt: skip
    cut = cases["cut"][0]
    cut.write_bytes(cut.read_bytes()[:-9000])
    for path, told in cases.values():
        with pytest.raises(RpoError, match=told):
            load_pairs(path)


SECRET = png(99)
_OPENED: list[str] | None = None


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if _OPENED is not None and event in ("open", "os.listdir", "os.scandir", "socket.connect", "socket.getaddrinfo", "subprocess.Popen"):
        _OPENED.append(f"{event} {arguments[0]}")


sys.addaudithook(_note)  # the interpreter tells of every file and connection; a hook cannot be taken off again, so it has a switch


@contextmanager
def touched() -> Iterator[list[str]]:
    """What the block opens, lists or connects to, modules of Python left out."""
    global _OPENED
    _OPENED = found = []
    try:
        yield found
    finally:
        _OPENED = None
        found[:] = [line for line in found if not re.search(r"\.(py|pyc|so)$|/site-packages(/|$)|__pycache__|lib/python3|^open \d+$", line)]


def hostile_rows(secret: Path) -> list[dict[str, Any]]:
    """Rows of JSON that ask for what is not theirs, or are not what they seem."""
    outside = [str(secret), "../secret.png", "../../secret.png", "images/../../secret.png", f"file://{secret}", "./../secret.png"]
    outside += ["~/secret.png", "http://127.0.0.1:9/x.png", "https://example.invalid/x.png", "//127.0.0.1/x.png", "s3://bucket/x.png"]
    outside += ["hf://datasets/a/b/x.png", "/dev/zero", "/dev/stdin", "/proc/self/environ", "link.png", "folder.png", "pipe.png"]
    outside += ["\x00.png", "a.png\x00", "", ".", "..", "data:image/png;base64,!!!", "data:text/html;base64," + text(A)]
    outside += ["$(touch pwned).png", "| touch pwned"]
    sound = {"image_1": text(A), "prefer_0": 1, "prefer_1": 0}
    rows: list[dict[str, Any]] = [sound | {"image_0": path, "prompt": f"row {i}"} for i, path in enumerate(outside)]
    whole = {"image_0": text(A), "image_1": text(B), "prompt": "p", "prefer_0": 1, "prefer_1": 0}
    images: list[Any] = [text(b"GIF89a" + A), text(A[:40]), text(png(3, kind="GIF")), None, 5, {"bytes": "x", "path": str(secret)}]
    wrong: list[dict[str, Any]] = [{"image_0": image} for image in images]
    wrong += [{"prompt": prompt} for prompt in (None, 7, "x" * 2001, "bell \x07", "\ud800")]
    wrong += [{"prefer_0": label} for label in (None, "1", float("nan"))]
    return rows + [whole | change for change in wrong]


def test_hostile_rows_read_nothing_of_ours_and_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    secret = tmp_path / "secret.png"
    secret.write_bytes(SECRET)
    home = tmp_path / "set"
    (home / "images").mkdir(parents=True)
    (home / "images" / "link.png").symlink_to(secret)
    (home / "images" / "folder.png").mkdir()
    os.mkfifo(home / "images" / "pipe.png")
    rows = hostile_rows(secret)
    assert len(rows) >= 40
    path = lines(home / "set.jsonl", [*rows, {"image_0": text(A), "image_1": text(B), "prompt": "sound", "prefer_0": 1, "prefer_1": 0}])
    before = sorted(str(file) for file in tmp_path.rglob("*"))
    with touched() as found:
        pairs, dropped = load_pairs(path)
    allowed = [f"open {path}", *(f"os.scandir {home}{folder}" for folder in ("", "/images", "/test", "/train"))]
    assert set(found) <= set(allowed) and f"open {path}" in found, "nothing but the set itself"
    assert [pair.prompt for pair in pairs] == ["sound"] and sum(dropped.values()) == len(rows)
    assert sorted(str(file) for file in tmp_path.rglob("*")) == before
    assert set(dropped) == {"no image", "unreadable image: GIF is not read", "unreadable image: not an image",
                            "no prompt", "prompt over 2000 characters", "prompt with control characters",
                            "prompt that is no text", "no label"}  # fmt: skip


def test_links_and_devices_in_folders_and_tars_are_passed_over(tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(SECRET)
    kohya = folders(tmp_path / "kohya", {"chosen/1.png": A, "rejected/1.png": B, "chosen/2.png": A, "rejected/x": b""})
    (kohya / "chosen" / "1.txt").symlink_to(secret)
    (kohya / "rejected" / "2.png").symlink_to(secret)
    with pytest.raises(RpoError, match=r"no prompt: 3\); for instance kohya, 1: no prompt"):
        load_pairs(kohya)
    path = tar(tmp_path / "set.tar", {"0.refined.png": A, "0.txt": b"a cat"})
    with tarfile.open(path, "a") as file:
        for kind, name in ((tarfile.SYMTYPE, "0.flawed.png"), (tarfile.LNKTYPE, "1.flawed.png"), (tarfile.CHRTYPE, "2.flawed.png")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, str(secret)
            file.addfile(member)
        evil = tarfile.TarInfo("../../../tmp/evil.refined.png")
        evil.size = len(A)
        file.addfile(evil, io.BytesIO(A))
    before = sorted(tmp_path.rglob("*"))
    with touched() as found, pytest.raises(RpoError, match=r"no usable pair \(link or device in the tar: 3, no prompt: 1\)"):
        load_pairs(path)
    assert set(found) == {f"open {path}"}
    assert sorted(tmp_path.rglob("*")) == before


def test_no_image_larger_than_the_limit_is_taken_from_a_file(tmp_path: Path) -> None:
    kohya = folders(tmp_path / "kohya", {"chosen/1.png": A, "chosen/1.txt": b"a cat", "rejected/1.png": b""})
    with (kohya / "rejected" / "1.png").open("wb") as file:
        file.truncate(MAX_ENCODED_BYTES + 1)
    with pytest.raises(RpoError, match="image file that is too large or cannot be read: 1"):
        load_pairs(kohya)


@pytest.mark.parametrize("name", ["../../evil", "/etc/passwd", "a/b", "a\\b", "..", "", "a" * 65, "nul\x00", "é", "a b"])
def test_an_id_cannot_name_a_file_elsewhere(name: str) -> None:
    (pair,) = make_pairs(1)
    with pytest.raises(ValueError, match="id must be"):
        Pair(**{**vars(pair), "id": name})


def test_ids_of_a_set_are_of_its_content(tmp_path: Path) -> None:
    columns = {"caption": ["a cat"], "jpg_0": [A], "jpg_1": [B], "label_0": [1.0], "image_0_uid": ["../../evil"], "id": ["/etc/passwd"]}
    (pair,), _ = load_pairs(parquet(tmp_path / "set.parquet", columns))
    assert len(pair.id) == 32 and int(pair.id, 16)


def test_a_row_is_a_comparison_or_a_reason(tmp_path: Path) -> None:
    write_pairs(tmp_path / "ours.parquet", make_pairs(3))
    rows = [row for _, _, row in comparisons(open_set(tmp_path / "ours.parquet"))]
    assert len(rows) == 3 and all(isinstance(row, Comparison) for row in rows)
    assert isinstance(next(comparisons(open_set(lines(tmp_path / "x.jsonl", ["no object"]))))[2], Unusable)
