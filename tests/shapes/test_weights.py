"""Weights are checked against their card; those that ship are small enough and as good as they say."""

import json
from pathlib import Path

import pytest

from rpo.errors import RpoError
from rpo.shapes.measure import recogniser_accuracy
from rpo.shapes.recognition import Recogniser
from rpo.shapes.weights import CARD, checked_weights, file_hashes, weights_folder

MODELS = ("base", "editor", "critic", "checklist", "clip", "judge")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "judge").mkdir()
    (tmp_path / "judge" / "model.safetensors").write_bytes(bytes(range(256)) * 4)
    (tmp_path / "judge" / "config.json").write_text("{}")
    (tmp_path / CARD).write_text(json.dumps({"sha256": file_hashes(tmp_path)}))
    return tmp_path


def test_whole_weights_pass(folder: Path) -> None:
    assert checked_weights(folder) == folder


def test_a_flipped_bit_is_found(folder: Path) -> None:
    file = folder / "judge" / "model.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(RpoError, match=r"judge/model.safetensors is not what its card says.*rpo shapes train"):
        checked_weights(folder)


def test_a_missing_file_is_found(folder: Path) -> None:
    (folder / "judge" / "config.json").unlink()
    with pytest.raises(RpoError, match=r"judge/config.json is missing"):
        checked_weights(folder)


def test_a_foreign_file_is_found(folder: Path) -> None:
    (folder / "extra.bin").write_bytes(b"x")
    with pytest.raises(RpoError, match=r"extra.bin"):
        checked_weights(folder)


@pytest.mark.parametrize("card", [None, "{", "{}", "[]"])
def test_no_card_no_weights(folder: Path, card: str | None) -> None:
    (folder / CARD).unlink()
    if card is not None:
        (folder / CARD).write_text(card)
    with pytest.raises(RpoError, match=r"no card of weights.*rpo shapes train"):
        checked_weights(folder)


def test_every_model_is_there_and_small() -> None:
    folder = checked_weights(weights_folder())
    assert all((folder / name).is_dir() for name in MODELS)
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 40_000_000
    assert all(path.suffix in (".safetensors", ".json", ".txt") for path in folder.rglob("*") if path.is_file())
    assert len(json.loads((folder / CARD).read_text())["figures"]) >= 10


def test_the_judge_reads_held_out_renders() -> None:
    assert recogniser_accuracy(Recogniser.load(weights_folder() / "judge"), count=400) >= 0.99


def test_judge_critic_and_checklist_are_different_networks() -> None:
    kinds = {name: json.loads((weights_folder() / name / "config.json").read_text())["kind"] for name in ("critic", "checklist", "judge")}
    assert len(set(kinds.values())) == 3
