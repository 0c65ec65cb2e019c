"""A run folder of version 0.1.0, made by the fake recipe from ten prompts: it opens, is reported, exported, evaluated and trained on."""

import json
import tarfile
from pathlib import Path

import pytest

import rpo
from rpo.cli import main
from rpo.core.hashing import _MODULE_IN_FINGERPRINTS, canonical
from rpo.curation.stages.check import CheckStage
from rpo.data.readers import load_pairs
from tiny_diffusion import save_pipeline

RECIPE = f"{Path(__file__).parent / 'fake_recipe.py'}:fake"
ARCHIVE = Path(__file__).parent / "fixtures" / "run_0_1_0.tar.xz"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FAKE_MODEL", "tiny")
    save_pipeline(Path("tiny"), pooled=True)
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "run_0_1_0"


def test_it_is_read_reported_and_exported(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = json.loads((run / "summary.json").read_text())
    pairs = list(rpo.Run(run).pairs())
    assert len(pairs) == kept["pairs_kept"] > 0
    assert all(pair.chosen.decode().shape == pair.rejected.decode().shape for pair in pairs)
    assert rpo.Run(run).funnel == kept["funnel"]
    assert rpo.Run(run).weights == run / "train" / "weights"
    assert main(["report", str(run)]) == 0 and (run / "report.html").stat().st_size > 10_000
    assert main(["show", str(run), "--rows", "1"]) == 0
    assert main(["export", str(run), "--to", str(run.parent / "exported")]) == 0
    exported, dropped = load_pairs(run.parent / "exported")
    assert not dropped
    assert {(pair.prompt, pair.chosen.sha256, pair.rejected.sha256) for pair in exported} == {
        (pair.prompt, pair.chosen.sha256, pair.rejected.sha256) for pair in pairs
    }


def test_it_is_evaluated_with_the_same_numbers(run: Path) -> None:
    before = json.loads((run / "summary.json").read_text())["evaluation"]["fully_correct"]
    assert main(["evaluate", RECIPE, "--out", str(run), "--evaluate.prompts.count", "4"]) == 0
    after = json.loads((run / "summary.json").read_text())["evaluation"]["fully_correct"]
    assert [after[name] for name in ("base", "tuned", "difference", "n")] == [before[name] for name in ("base", "tuned", "difference", "n")]


def test_a_finished_training_is_finished_and_its_pairs_train_anew(run: Path, tmp_path: Path) -> None:
    weights = run / "train" / "weights" / "pytorch_lora_weights.safetensors"
    before = weights.read_bytes()
    assert main(["train", RECIPE, "--out", str(run), "--resume", "--allow-fingerprint"]) == 0
    assert weights.read_bytes() == before
    assert main(["train", RECIPE, "--pairs", str(run / "pairs.parquet"), "--out", str(tmp_path / "new"), "--allow-fingerprint"]) == 0


def test_the_curation_says_what_differs(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its stages have gained settings since: nothing is mixed and nothing is removed."""
    files = sorted(path for path in run.rglob("*.parquet"))
    assert main(["curate", RECIPE, "--out", str(run), "--resume", "--curate.prompts.count", "10"]) == 1
    assert "was made with another recipe or version of rpo: the fingerprint of stage 'source' differs" in " ".join(
        capsys.readouterr().err.split()
    )
    assert sorted(path for path in run.rglob("*.parquet")) == files


def test_classes_that_moved_keep_their_identity() -> None:
    assert canonical(CheckStage())["class"] == "rpo.curate.checking.CheckStage"
    for module in _MODULE_IN_FINGERPRINTS:
        __import__(module)
