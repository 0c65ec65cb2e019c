"""Pairs come back as they were written, or not at all."""

import json
import random
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from rpo.data.images import EncodedImage, encode_png
from rpo.data.pairs import Pair, read_pairs, write_pairs
from rpo.errors import RpoError


def pair(number: int) -> Pair:
    pixels = np.random.default_rng(number).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    return Pair(
        id=f"{number:016x}",
        prompt=f"a ünlikely prompt {number}",
        chosen=EncodedImage.of(encode_png(pixels[0])),
        rejected=EncodedImage.of(encode_png(pixels[1])),
        gap=number / 7,
        weight=1.5,
        split="held_out" if number % 10 == 0 else "train",
        critique='{"issues": []}',
        instruction="make it red",
        scores="{}",
        provenance='{"rejected": "source"}',
    )


def test_round_trip_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [pair(number) for number in range(150)]
    monkeypatch.setattr("rpo.core.parquet.ROW_GROUP_BYTES", 30_000)  # not the 86 pairs that 64 KB would hold, nor one group
    write_pairs(tmp_path / "pairs.parquet", pairs)
    assert read_pairs(tmp_path / "pairs.parquet") == pairs
    file = pq.ParquetFile(tmp_path / "pairs.parquet")
    assert [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)] == [64, 64, 22]
    features = json.loads(file.schema_arrow.metadata[b"huggingface"])["info"]["features"]
    assert features["chosen"] == features["rejected"] == {"_type": "Image"}
    assert features["gap"] == {"dtype": "float64", "_type": "Value"} and list(features) == file.schema_arrow.names


def test_images_are_read_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, pairs = tmp_path / "pairs.parquet", [pair(number) for number in range(150)]
    monkeypatch.setattr("rpo.core.parquet.ROW_GROUP_BYTES", 1)
    write_pairs(path, pairs)
    found = read_pairs(path)
    for number in (0, 149, 63, 64, 0):
        assert found[number].chosen.read() == pairs[number].chosen.read(), "whatever the order"
        assert found[number].rejected.read() == pairs[number].rejected.read() != pairs[number].chosen.read()
    write_pairs(path, pairs[::-1])
    with pytest.raises(RpoError, match="written anew while it was read"):
        found[100].chosen.read()
    path.unlink()
    with pytest.raises(RpoError, match="there are no pairs at"):
        found[100].chosen.read()


def test_an_image_is_known_by_its_first_bytes() -> None:
    for encoded in (b"GIF89a", b""):
        with pytest.raises(ValueError, match="must be PNG, JPEG, WebP"):
            EncodedImage.of(encoded)


def test_no_pairs_is_a_file_too(tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs.parquet", [])
    assert read_pairs(tmp_path / "pairs.parquet") == []


def test_damage_is_noticed(tmp_path: Path) -> None:
    path, pairs = tmp_path / "pairs.parquet", [pair(number) for number in range(5)]
    write_pairs(path, pairs)
    assert read_pairs(path) == pairs
    data = path.read_bytes()
    rng = random.Random(0)
    noticed = 0
    for _ in range(400):
        damaged = bytearray(data)
        damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            assert read_pairs(path) == pairs
        except RpoError as error:
            assert "pairs.parquet is damaged" in str(error)
            noticed += 1
    assert noticed > 200
    for length in (0, 7, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(RpoError, match="is damaged"):
            read_pairs(path)


def test_an_exchanged_image_is_noticed(tmp_path: Path) -> None:
    """A rewritten file has sound pages; the images' own hashes tell."""
    path = tmp_path / "pairs.parquet"
    write_pairs(path, [pair(0), pair(1)])
    table = pq.read_table(path)
    position = table.column_names.index("chosen")
    exchanged = table.set_column(position, "chosen", table.column("chosen").take([1, 0]))
    pq.write_table(exchanged.replace_schema_metadata(table.schema.metadata), path)
    with pytest.raises(RpoError, match="the chosen image of pair 0000000000000000 is not the one that was written"):
        read_pairs(path)


def test_other_files_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(RpoError, match=r"there are no pairs at .*rpo curate"):
        read_pairs(tmp_path / "pairs.parquet")
    pq.write_table(pq.read_table(_written(tmp_path)).drop_columns(["gap"]), tmp_path / "other.parquet")
    with pytest.raises(RpoError, match="its columns are not those of a pairs file"):
        read_pairs(tmp_path / "other.parquet")


def _written(folder: Path) -> Path:
    write_pairs(folder / "some.parquet", [pair(0)])
    return folder / "some.parquet"


def test_an_id_comes_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="comes twice"):
        write_pairs(tmp_path / "pairs.parquet", [pair(0), pair(0)])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("id", "../secret"),
        ("id", ""),
        ("id", "x" * 65),
        ("gap", float("nan")),
        ("weight", -1.0),
        ("weight", float("inf")),
        ("split", "test"),
        ("critique", "not json"),
        ("scores", "{"),
    ],
)
def test_wrong_values_are_named(field: str, value: object) -> None:
    broken = pair(0)
    object.__setattr__(broken, field, value)  # past the tests' own type checker, as an untyped caller would come
    with pytest.raises(ValueError, match=field):
        broken.__post_init__()
