"""The weights that ship: whole, small enough, and as good as their card says, on a small sample."""

import json
import shutil
from pathlib import Path

import pytest

from rpo.errors import RpoError
from rpo.shapes.measure import recogniser_accuracy
from rpo.shapes.recognition import Recogniser
from rpo.shapes.weights import CARD, checked_weights, file_hashes, weights_folder

MODELS = ("base", "editor", "critic", "checklist", "clip", "judge")


def test_every_model_is_there_and_small() -> None:
    folder = weights_folder()
    assert all((folder / name).is_dir() for name in MODELS)
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 40_000_000
    assert all(path.suffix in (".safetensors", ".json", ".txt") for path in folder.rglob("*") if path.is_file())


def test_the_card_says_what_was_measured() -> None:
    card = json.loads((weights_folder() / CARD).read_text())
    assert card["sha256"] == file_hashes(weights_folder())
    assert len(card["figures"]) >= 10


def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(weights_folder(), tmp_path / "weights"))


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    file = folder / "judge" / "model.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(RpoError, match="judge/model.safetensors.*not what its card says"):
        checked_weights(folder)


def test_a_missing_file_and_a_foreign_one_are_found(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    (folder / "critic" / "config.json").unlink()
    with pytest.raises(RpoError, match="critic/config.json is missing"):
        checked_weights(folder)
    shutil.rmtree(folder)
    folder = copied(tmp_path)
    (folder / "extra.bin").write_bytes(b"x")
    with pytest.raises(RpoError, match="extra.bin"):
        checked_weights(folder)


def test_no_card_no_weights(tmp_path: Path) -> None:
    with pytest.raises(RpoError, match="rpo shapes train"):
        checked_weights(tmp_path)


def test_the_judge_reads_held_out_renders() -> None:
    assert recogniser_accuracy(Recogniser.load(weights_folder() / "judge"), count=400) >= 0.99


def test_judge_critic_and_scorer_are_different_networks() -> None:
    kinds = {name: json.loads((weights_folder() / name / "config.json").read_text())["kind"] for name in ("critic", "checklist", "judge")}
    assert len(set(kinds.values())) == 3
