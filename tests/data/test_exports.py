"""Each export is what others read: our own readers bring the same pairs back, and `datasets` opens it."""

from pathlib import Path

import numpy as np
import pytest

from rpo.data.exports import EXPORTS
from rpo.data.readers import load_pairs
from tiny_diffusion import make_pairs

PAIRS = make_pairs(20)


@pytest.mark.parametrize("layout", ["pickapic", "jsonl", "folders", "webdataset"])
def test_the_pairs_come_back(tmp_path: Path, layout: str) -> None:
    EXPORTS[layout](tmp_path, "train", iter(PAIRS))  # type: ignore[index]
    found, dropped = load_pairs(tmp_path)
    key = {(pair.prompt, pair.chosen, pair.rejected) for pair in PAIRS}
    assert {(pair.prompt, pair.chosen, pair.rejected) for pair in found} == key and len(found) == len(PAIRS) and not dropped
    again = tmp_path / "again"
    EXPORTS[layout](again, "train", iter(PAIRS))  # type: ignore[index]
    for file in again.rglob("*"):
        if file.is_file():
            assert file.read_bytes() == (tmp_path / file.relative_to(again)).read_bytes(), "equal pairs make equal files"


def load(path: Path, **more: str) -> list[dict]:
    import datasets

    return list(datasets.load_dataset(str(path), split="train", cache_dir=str(path.parent / "cache"), **more))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_datasets_opens_them(tmp_path: Path) -> None:
    for layout in ("pickapic", "diffusers"):
        EXPORTS[layout](tmp_path / layout, "train", iter(PAIRS))  # type: ignore[index]
    rows = load(tmp_path / "pickapic")
    chosen = [row["jpg_0"] if row["label_0"] == 1 else row["jpg_1"] for row in rows]
    assert [row["caption"] for row in rows] == [pair.prompt for pair in PAIRS] and chosen == [pair.chosen.read() for pair in PAIRS]
    assert {row["label_0"] for row in rows} == {0.0, 1.0}, "the place of the better image says nothing"
    seen = [
        (row["text"], *(np.array(row[side].convert("RGB")).tobytes() for side in ("chosen", "rejected")))
        for row in load(tmp_path / "diffusers")
    ]
    assert sorted(seen) == sorted((p.prompt, p.chosen.decode().tobytes(), p.rejected.decode().tobytes()) for p in PAIRS)
