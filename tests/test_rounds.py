"""Several rounds through the command line, with fakes for all but the tuned network: each starts where the last one ended."""

import json
import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from rpo.cli import main
from rpo.curation.select import planned_prompts
from tiny_diffusion import save_pipeline

RECIPE = f"{Path(__file__).parent / 'fake_recipe.py'}:fake"
COMMAND = ["run", RECIPE, "--rounds", "2", "--allow-fingerprint", "--train.steps", "2", "--train.eval-every", "2"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    os.environ["FAKE_MODEL"] = str(save_pipeline(tmp_path_factory.mktemp("model") / "tiny", pooled=True))
    folder = tmp_path_factory.mktemp("runs") / "rounds"
    assert main([*COMMAND, "--reference", "first", "--out", str(folder)]) == 0
    return folder


def test_rounds_share_the_prompts_and_none_comes_twice(run: Path) -> None:
    dealt = [set(planned_prompts(run / "rounds" / number)) for number in ("1", "2")]
    assert [len(part) for part in dealt] == [50, 50] and not dealt[0] & dealt[1]


def test_the_second_round_starts_from_the_first_and_is_measured_against_the_base(run: Path) -> None:
    trained = json.loads((run / "rounds" / "2" / "train" / "config.json").read_text())
    sampled = json.loads((run / "rounds" / "2" / "recipe.json").read_text())["recipe"]["curate"]["source"]["generator"]
    assert sampled["weights"] == str(run / "rounds" / "1" / "policy")
    assert trained["model"] == str(run / "rounds" / "1" / "policy") and trained["reference_model"] == os.environ["FAKE_MODEL"]
    steps = [json.loads(line) for line in (run / "rounds" / "2" / "train" / "metrics.jsonl").read_text().splitlines()]
    assert steps[0]["margin_p50"] != 0, "a policy that has moved differs from the base at its first step"


def test_every_round_is_tested_and_the_best_one_left(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert [line["round"] for line in summary["rounds"]] == [1, 2] and {"round_1", "round_2"} == summary["comparisons"].keys()
    best = max(summary["rounds"], key=lambda line: line["validation_gain"])["round"]
    assert summary["evaluation"] == summary["comparisons"][f"round_{best}"]
    left = run / "train" / "weights" / "unet" / "diffusion_pytorch_model.safetensors"
    assert left.samefile(run / "rounds" / str(best) / "policy" / "unet" / left.name)
    assert set(pq.read_table(run / "evaluation" / "rows.parquet")["model"].to_pylist()) == {"base", "round_1", "round_2"}
    assert all(line["drift"] > 0 and line["diversity"]["base"] > 0 for line in summary["rounds"])


def test_the_report_tells_the_rounds(run: Path) -> None:
    assert "Round by round" in (run / "report.html").read_text()


def test_a_finished_run_goes_on_without_work(run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (run / "rounds").rglob("*.parquet")}
    assert main([*COMMAND, "--reference", "first", "--resume", "--out", str(run)]) == 0
    kept = {path: path.stat().st_mtime_ns for path in before if path.parent.name not in ("evaluation",) and path.name != "pairs.parquet"}
    assert kept == {path: before[path] for path in kept}


def test_one_round_and_several_are_not_mixed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", RECIPE, "--resume", "--out", str(run)]) == 1
    assert "several rounds" in capsys.readouterr().err


def test_a_cap_that_cannot_be_held_is_refused(tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMMAND, "--max-calls", "5", "--out", str(tmp_path / "capped")]) == 2
    assert "--max-calls" in capsys.readouterr().err
