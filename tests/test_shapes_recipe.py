"""The default recipe on the shipped weights, small: the real models through the real command line."""

import json
import re
import shutil
from pathlib import Path

import pytest

from rpo.cli import main
from rpo.recipes import load
from rpo.recipes.shapes import HeldOutRenders
from rpo.shapes.measure import renders
from rpo.shapes.scenes import is_held_out, parse_caption
from rpo.shapes.weights import weights_folder
from test_docs import commands

SMALL = ["--curate.prompts.count", "40", "--train.steps", "3", "--train.eval-every", "3", "--train.checkpoint-every", "3"]
SMALL += ["--evaluate.prompts.count", "12"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "shapes"
    assert main(["run", "shapes", "--out", str(folder), *SMALL, "--allow-fingerprint"]) == 0
    return folder


def test_a_small_run_ends_with_numbers_and_a_page(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert summary["funnel"][0]["rows_in"] == 40 and summary["pairs_kept"] > 0
    assert summary["evaluation"]["fully_correct"]["n"] == 12
    metrics = {"fully_correct", "quality", "color", "shape", "size", "relation", "background", "count", "frechet"}
    assert metrics <= summary["evaluation"].keys()
    assert (run / "report.html").stat().st_size < 5_000_000


def test_curation_and_evaluation_prompts_are_apart() -> None:
    recipe = load("shapes")
    assert not any(is_held_out(parse_caption(prompt)) for prompt in recipe.curate.prompts.prompts(0))
    assert all(is_held_out(parse_caption(prompt)) for prompt in recipe.evaluate.prompts.prompts(0))


def test_no_judge_labels() -> None:
    recipe = load("shapes")
    labelling = {model for _, reward in recipe.curate.score.rewards for model in reward.models()}
    labelling |= set(recipe.curate.critique.critic.models())
    judging = {model for _, judge in recipe.evaluate.judges for model in judge.models()}
    assert not labelling & judging


def test_a_held_out_caption_is_refused_in_curation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held_out = load("shapes").evaluate.prompts.prompts(0)[0]
    (tmp_path / "mine.txt").write_text(held_out + "\n")
    assert main(["curate", "shapes", "--out", str(tmp_path / "run"), "--prompts", str(tmp_path / "mine.txt")]) == 2
    assert "kept for evaluation" in " ".join(capsys.readouterr().err.split())


def test_the_commands_of_the_readme_run_as_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In their order, in an empty folder, with a prompts file of one's own; only made smaller."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(HeldOutRenders, "images", lambda self: renders(40, seed=900)[0])
    (example,) = re.findall("One caption a line, such as `(.*?)`", (Path(__file__).parent.parent / "README.md").read_text())
    mine = [example, *load("shapes").curate.prompts.prompts(7)[:39]]
    Path("my_prompts.txt").write_text("\n".join(mine) + "\n")
    evaluate = ["--evaluate.prompts.count", "12"]
    train = ["--train.steps", "3", "--train.eval-every", "3", "--train.checkpoint-every", "3"]
    smaller = {"run": [*train, *evaluate, "--allow-fingerprint"], "curate": ["--curate.prompts.count", "40"]}
    smaller |= {"train": [*train, "--allow-fingerprint"], "evaluate": evaluate, "report": [], "generate": [], "export": []}
    ran = []
    for page, words in commands():
        if page != "README.md" or words[0] != "rpo":
            continue
        if words[2] == "sd15_dpo":
            shutil.copy("runs/mine/pairs.parquet", "pairs.parquet")
            words = [*words, "--train.model", str(weights_folder() / "base"), "--train.batch-pairs", "4", "--train.resolution", "64"]
        assert main([*words[1:], *smaller[words[1]]]) == 0, " ".join(words)
        ran.append(words[1])
    assert set(ran) == smaller.keys()
    for made in (
        "runs/mine/summary.json",
        "runs/mine/report.html",
        "runs/parts/report.html",
        "runs/parts/published/rpo",
        "generated.png",
        "runs/mine-sd15/train/weights",
    ):
        assert Path(made).exists()
