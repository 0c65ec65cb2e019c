"""The program that makes and measures every embedded model, run with next to no training: all parts fit, all files load."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rpo.backends.diffusers.edit import EditorConfig
from rpo.backends.diffusers.generate import GeneratorConfig
from rpo.backends.scorers.clip import ClipScorerConfig
from rpo.cli import main
from rpo.shapes.measure import renders
from rpo.shapes.scenes import caption
from rpo.shapes.scoring import ChecklistScorerConfig, ShapesJudgeConfig
from rpo.shapes.weights import CARD, checked_weights


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes") / "weights"
    assert main(["shapes", "train", "--out", str(folder), "--share", "0.0005"]) == 0
    assert main(["shapes", "measure", "--folder", str(folder), "--images", "10"]) == 0
    return folder


def test_every_model_is_made_and_hashed(weights: Path) -> None:
    assert {path.name for path in weights.iterdir()} == {"base", "editor", "critic", "checklist", "clip", "judge", CARD}
    assert checked_weights(weights) == weights
    assert json.loads((weights / CARD).read_text())["figures"].keys() >= {"base: samples fully correct"}


def test_a_second_call_trains_nothing_again(weights: Path) -> None:
    logs = weights.with_name("weights-making")
    before = {path.name: path.read_text() for path in logs.glob("*.jsonl")}
    files = {path: path.read_bytes() for path in weights.rglob("*.safetensors")}
    assert main(["shapes", "train", "--out", str(weights), "--share", "0.0005"]) == 0
    assert {path.name: path.read_text() for path in logs.glob("*.jsonl")} == before
    assert {path: path.read_bytes() for path in weights.rglob("*.safetensors")} == files


def test_the_files_load_by_the_code_of_the_big_ones(weights: Path) -> None:
    images, shown = renders(4, seed=0)
    prompts = [caption(scene) for scene in shown]
    drawn = GeneratorConfig(model=str(weights / "base"), steps=2, guidance=1.5).build().generate(prompts, [0, 1, 2, 3])
    again = GeneratorConfig(model=str(weights / "base"), steps=2, guidance=1.5).build().generate(prompts, [0, 1, 2, 3])
    assert all((a == b).all() for a, b in zip(drawn, again, strict=True)) and drawn[0].shape == (64, 64, 3)
    editor = EditorConfig(model=str(weights / "editor"), steps=2, guidance=1.0, image_guidance=1.0).build()
    edited = editor.edit(images, ["make the background gray"] * 4, [0, 1, 2, 3])
    assert edited[0].shape == editor.round_trip(images)[0].shape == (64, 64, 3)
    for scorer in (ClipScorerConfig(model=str(weights / "clip")), ChecklistScorerConfig(model=str(weights / "checklist"))):
        assert len(scorer.build().score(images, prompts)) == 4
    judge = ShapesJudgeConfig(model=str(weights / "judge")).build()
    assert all(0 <= row["quality"] <= 1 for row in judge.measure(images, prompts))
    assert judge.features(images).shape[0] == 4


def test_checkpoints_of_other_settings_are_refused(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shapes", "train", "--out", str(weights), "--share", "0.0005", "--seed", "1"]) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert "another seed" in error and "delete it" in error


def test_training_goes_on_from_other_weights(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "further"
    again = ["shapes", "train", "--out", str(out), "--share", "0.0005", "--seed", "1"]
    assert main([*again, "--begin-from", str(weights)]) == 0
    for name in (
        "critic/model.safetensors",
        "base/unet/diffusion_pytorch_model.safetensors",
        "editor/unet/diffusion_pytorch_model.safetensors",
    ):
        before, after = load_file(weights / name), load_file(out / name)
        assert all(torch.allclose(after[key].float(), before[key].float(), atol=0.01) for key in before), "two short steps away"
        assert not all(torch.equal(after[key], before[key]) for key in before)
    assert main(again) == 1
    assert "another begin_from" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("share", ["0", "1.5"])
def test_a_wrong_share_is_named(share: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["shapes", "train", "--share", share])
    assert "share must be above 0" in "".join(capsys.readouterr())
