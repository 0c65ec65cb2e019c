"""Each export is what others read: our own readers bring the same pairs back, and `datasets` opens it."""

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rpo.data.card import Facts, card
from rpo.data.export import EXPORTS, _first_is_chosen
from rpo.data.hub import configs
from rpo.data.readers import load_pairs
from tiny_diffusion import make_pairs

PAIRS = make_pairs(20)


LAYOUTS = ["pickapic", "jsonl", "folders", "webdataset", "diffusers"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_held_out_pairs_stay_held_out(tmp_path: Path, layout: str) -> None:
    """Read back by our own reader, and by `datasets` from the card's `configs`."""
    import datasets

    named = [replace(pair, prompt=f"{pair.prompt} {number}") for number, pair in enumerate(PAIRS)]
    parts = {"train": named[:15], "held_out": named[15:]}
    for split, pairs in parts.items():
        EXPORTS[layout](tmp_path / "set", split, iter(pairs))  # type: ignore[index]
    (tmp_path / "set" / "examples").mkdir()
    (tmp_path / "set" / "examples" / "x.png").write_bytes(PAIRS[0].chosen.read())
    found, dropped = load_pairs(tmp_path / "set")
    assert {(pair.prompt, pair.chosen, pair.split) for pair in found} == {
        (pair.prompt, pair.chosen, split) for split, pairs in parts.items() for pair in pairs
    }
    assert not dropped
    facts = Facts(
        name="x",
        layout=layout,
        licence="mit",
        pairs={},
        rows=0,
        dropped=0,
        summary={},
        record={},
        configs=configs(tmp_path / "set", layout),
    )
    (tmp_path / "set" / "README.md").write_text(card(facts, []))
    name = next(iter(configs(tmp_path / "set", layout)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = datasets.load_dataset(str(tmp_path / "set"), name, cache_dir=str(tmp_path / "cache"))
    assert {split: len(rows) for split, rows in loaded.items()} == {"train": 15, "held_out": 5}


@pytest.mark.parametrize("ending", ["r", "n", "0"])
def test_the_place_of_the_chosen_side_is_not_in_the_ids_ending(ending: str) -> None:
    """Ids of one combination end alike."""
    firsts = [_first_is_chosen(replace(PAIRS[0], id=f"{number:016x}-{ending}")) for number in range(1000)]
    assert 430 < sum(firsts) < 570


@pytest.mark.parametrize("layout", LAYOUTS)
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
