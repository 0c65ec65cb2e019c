"""Foreign preference sets: what is read, what is dropped and counted, what is refused."""

import io
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rpo.data.images import encode_png
from rpo.data.pairs import read_pairs, write_pairs
from rpo.data.readers import load_pairs
from rpo.errors import RpoError
from tiny_diffusion import make_pairs


def jpeg(number: int, kind: str = "JPEG") -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out, format=kind)
    return out.getvalue()


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    columns = {name: [row[name] for row in rows] for name in ("caption", "jpg_0", "jpg_1", "label_0")}
    types = {"caption": pa.string(), "jpg_0": pa.binary(), "jpg_1": pa.binary(), "label_0": pa.float64()}
    extra = {"best_image_uid": ["x"] * len(rows)}
    table = pa.table({name: pa.array(values, types[name]) for name, values in columns.items()} | extra)
    pq.write_table(table, path, row_group_size=100)
    return path


def row(caption: str | None = "a cat", first: object = None, second: object = None, label: float | None = 1.0) -> dict[str, object]:
    return {"caption": caption, "jpg_0": first or jpeg(0), "jpg_1": second or jpeg(1), "label_0": label}


def test_the_label_says_which_image_is_chosen(tmp_path: Path) -> None:
    rows = [row("a cat", jpeg(0), jpeg(1), 1.0), row("a dog", jpeg(2), jpeg(3), 0.0)]
    pairs, dropped = load_pairs(write(tmp_path / "set.parquet", rows))
    assert [(p.prompt, p.chosen.read(), p.rejected.read()) for p in pairs] == [("a cat", jpeg(0), jpeg(1)), ("a dog", jpeg(3), jpeg(2))]
    assert not dropped
    assert load_pairs(tmp_path / "set.parquet") == (pairs, dropped)


def test_rows_that_are_no_pairs_are_counted(tmp_path: Path) -> None:
    bomb = jpeg(0)[:60]
    rows = [
        row(),
        row(),
        row("tie", label=0.5),
        row("unlabelled", label=None),
        row("nothing", label=float("nan")),
        row(None),
        row("   "),
        row("x" * 3000),
        row("same", jpeg(4), jpeg(4)),
        row("broken", bomb),
        row("animated", jpeg(5, "GIF")),
        row("webp", jpeg(6, "WEBP"), jpeg(7, "PNG")),
    ]
    pairs, dropped = load_pairs(write(tmp_path / "set.parquet", rows))
    assert [pair.prompt for pair in pairs] == ["a cat", "webp"]
    assert dropped == {
        "repeated": 1,
        "tie": 1,
        "no label": 2,
        "no prompt": 2,
        "prompt over 2000 characters": 1,
        "both images are the same": 1,
        "unreadable image: damaged or cut off": 1,
        "unreadable image: GIF is not read": 1,
    }
    assert len(pairs) + sum(dropped.values()) == len(rows)


def test_images_stay_encoded_as_they_came(tmp_path: Path) -> None:
    pairs, _ = load_pairs(write(tmp_path / "set.parquet", [row("webp", jpeg(6, "WEBP"), jpeg(7))]))
    write_pairs(tmp_path / "ours.parquet", pairs)
    assert read_pairs(tmp_path / "ours.parquet") == pairs
    assert pairs[0].chosen.decode().shape == (16, 16, 3)


def test_a_path_in_a_cell_is_never_opened(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(jpeg(0, "PNG"))
    cell = pa.array([{"bytes": None, "path": str(tmp_path / "secret.png")}], pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    table = pa.table({"caption": ["a cat"], "jpg_0": cell, "jpg_1": cell, "label_0": [1.0]})
    pq.write_table(table, tmp_path / "set.parquet")
    with pytest.raises(RpoError, match=r"no usable pair \(no image: 1\)"):
        load_pairs(tmp_path / "set.parquet")


def test_our_own_files_are_read_as_ever(tmp_path: Path) -> None:
    pairs = make_pairs(3)
    write_pairs(tmp_path / "pairs.parquet", pairs)
    assert load_pairs(tmp_path / "pairs.parquet") == (pairs, {})


def test_what_cannot_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(RpoError, match="there are no pairs at"):
        load_pairs(tmp_path / "nothing.parquet")
    path = write(tmp_path / "set.parquet", [row()])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(RpoError, match="is damaged"):
        load_pairs(path)
    with pytest.raises(RpoError, match="no rows"):
        load_pairs(write(tmp_path / "empty.parquet", []))


@pytest.mark.parametrize("ours", [True, False])
def test_images_are_not_held_in_memory(tmp_path: Path, ours: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rpo.core.parquet.ROW_GROUP_BYTES", 1_000_000)
    rng = np.random.default_rng(0)
    images = [encode_png(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(1200)]
    path = write(tmp_path / "set.parquet", [row(f"a cat {i}", images[2 * i], images[2 * i + 1]) for i in range(600)])
    if ours:
        write_pairs(tmp_path / "ours.parquet", load_pairs(path)[0])
        path = tmp_path / "ours.parquet"
    total = sum(map(len, images))
    del images
    tracemalloc.start()
    pairs, _ = load_pairs(path)
    read = sum(len(pair.chosen.read()) + len(pair.rejected.read()) for pair in pairs)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert read == total and peak < total / 2, f"{peak:,} bytes held of {total:,}"
