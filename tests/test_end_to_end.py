"""The whole method through the command line, with fakes for all but the tuned network; and the command line on wrong input."""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from rpo.cli import main
from rpo.data.pairs import read_pairs, write_pairs
from rpo.shapes.scenes import caption, scenes
from tiny_diffusion import save_pipeline

RECIPE = f"{Path(__file__).parent / 'fake_recipe.py'}:fake"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_pipeline(tmp_path_factory.mktemp("model") / "tiny", pooled=True)
    os.environ["FAKE_MODEL"] = str(folder)
    return folder


@pytest.fixture(scope="module")
def run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "fake"
    assert main(["run", RECIPE, "--out", str(folder), "--allow-fingerprint"]) == 0
    return folder


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def test_summary_has_what_programs_read(run: Path) -> None:
    found = summary(run)
    assert found["seed"] == 0 and found["recipe"] == "fake"
    assert [stage["stage"] for stage in found["funnel"]] == ["source", "critique", "instruct", "edit", "check", "score", "label"]
    for before, after in zip(found["funnel"], found["funnel"][1:], strict=False):
        assert after["rows_in"] == before["kept"]
    for stage in found["funnel"]:
        assert stage["rows_in"] == stage["kept"] + sum(stage["dropped"].values())
    assert found["funnel"][0]["rows_in"] == 100
    assert found["funnel"][-1]["kept"] == found["pairs_kept"] == len(read_pairs(run / "pairs.parquet"))
    assert {"source", "critique", "instruct", "edit", "check", "score", "label", "train", "evaluate"} <= found["seconds"].keys()
    assert found["controls"].keys() == {"fingerprint_auc", "leakage", "roundtrip", "neutral", "pattern"}
    assert all(bias["shift"] == 0 for bias in found["controls"]["roundtrip"].values()), "the fake round trip changes nothing"
    assert 0 <= found["pairs"]["judge_prefers_edit"] <= 1
    assert found["headline"] == "fully_correct"
    for metric in ("fully_correct", "quality"):
        value = found["evaluation"][metric]
        assert {"base", "tuned", "difference", "ci95", "n"} <= value.keys()
        assert value["n"] == 20 and value["ci95"][0] <= value["difference"] <= value["ci95"][1]
        assert value["difference"] == pytest.approx(value["tuned"] - value["base"])


def test_the_docs_name_every_key_of_the_summary(run: Path) -> None:
    page = (Path(__file__).parent.parent / "docs" / "run-folder.md").read_text()
    named = set(re.findall(r"^\| `([\w.]+)", page, flags=re.M)) | set(re.findall(r"`\"(\w+)\"", page)) | set(re.findall(r'"(\w+)"', page))
    found = summary(run)
    flat = {f"{part}.{key}" for part in ("controls", "pairs") for key in found[part]}
    whole = {key for key in found if key not in ("controls", "pairs", "evaluation", "comparisons", "recipe", "seed", "version")}
    assert {key for key in whole | flat if key not in named} == set()
    keys = {key for own in found["evaluation"].values() for key in own} - {"says"}
    assert keys - named == set()


def test_reasons_are_kept(run: Path) -> None:
    dropped = {reason for stage in summary(run)["funnel"] for reason in stage["dropped"]}
    assert "no_issue" in dropped
    assert any(reason.startswith("error:critique:the critic does not look") for reason in dropped)


def test_pairs_say_why(run: Path) -> None:
    for pair in read_pairs(run / "pairs.parquet"):
        assert pair.instruction and json.loads(pair.critique)["issues"]
        scores = json.loads(pair.scores)
        assert all(scores[reward]["chosen"] > scores[reward]["rejected"] for reward in ("first", "second"))


def test_recipe_and_versions_are_written(run: Path) -> None:
    record = json.loads((run / "recipe.json").read_text())
    assert record["recipe"]["train"]["steps"] == 6 and record["versions"]["torch"]


def test_report_is_written(run: Path) -> None:
    page = (run / "report.html").read_text()
    assert "fully_correct" in page or "fully correct" in page.lower()
    assert len(page.encode()) < 5_000_000


def test_resume_of_a_finished_run_changes_nothing(run: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*.parquet")}
    weights = {path: path.read_bytes() for path in (run / "train" / "weights").iterdir()}
    assert main(["run", RECIPE, "--out", str(run), "--resume", "--allow-fingerprint"]) == 0
    assert {path: path.read_bytes() for path in run.rglob("*.parquet")} == before
    assert {path: path.read_bytes() for path in (run / "train" / "weights").iterdir()} == weights


def test_parts_alone_do_the_same(run: Path, tmp_path: Path) -> None:
    folder = str(tmp_path / "parts")
    assert main(["curate", RECIPE, "--out", folder]) == 0
    assert main(["train", RECIPE, "--out", folder, "--allow-fingerprint"]) == 0
    assert main(["evaluate", RECIPE, "--out", folder]) == 0
    assert main(["report", folder]) == 0
    same = ("funnel", "pairs_kept", "controls", "evaluation", "pairs")
    assert {key: summary(tmp_path / "parts")[key] for key in same} == {key: summary(run)[key] for key in same}


def test_pairs_that_are_brought_train_and_evaluate_in_a_folder_of_their_own(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "brought"
    pairs = str(run / "pairs.parquet")
    assert main(["train", RECIPE, "--pairs", pairs, "--out", str(folder), "--allow-fingerprint"]) == 0
    assert main(["evaluate", RECIPE, "--out", str(folder)]) == 0
    assert summary(folder)["evaluation"] == summary(run)["evaluation"]


def test_a_run_is_not_compared_with_a_model_that_it_was_not_tuned_from(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    other = ["--generator.model", str(tmp_path / "sdxl"), "--out", str(run)]
    assert main(["evaluate", RECIPE, *other]) == 2
    assert "add --generator.model" in " ".join(capsys.readouterr().err.split())
    assert main(["generate", RECIPE, "--prompt", "a large red star on a gray background", *other]) == 2
    assert "was tuned on" in " ".join(capsys.readouterr().err.split())
    assert main(["run", RECIPE, "--train.model", "owner/other", "--out", str(tmp_path / "run")]) == 2
    assert "add --generator.model owner/other" in " ".join(capsys.readouterr().err.split()) and not (tmp_path / "run").exists()


def test_a_run_whose_prompts_are_brought_ends_without_an_evaluation(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    prompts = tmp_path / "mine.txt"
    prompts.write_text("\n".join(dict.fromkeys(pair.prompt for pair in read_pairs(run / "pairs.parquet"))))
    brought = f"{Path(__file__).parent / 'fake_recipe.py'}:fake_brought"
    assert main(["run", brought, "--prompts", str(prompts), "--out", str(tmp_path / "run"), "--allow-fingerprint"]) == 0
    assert "rpo evaluate fake --out" in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "run" / "report.html").exists() and "evaluation" not in summary(tmp_path / "run")


def test_recipe_record_is_the_same_for_the_same_recipe(run: Path, model: Path, tmp_path: Path) -> None:
    assert main(["curate", RECIPE, "--out", str(tmp_path / "again")]) == 0
    again, first = (json.loads((folder / "recipe.json").read_text()) for folder in (tmp_path / "again", run))
    for record in (again, first):
        assert record.pop("date") and record.pop("sha256")  # when it was written
    assert again == first
    assert " at 0x" not in (run / "recipe.json").read_text()


def test_generate_draws_base_beside_tuned(run: Path, tmp_path: Path) -> None:
    from PIL import Image

    picture = tmp_path / "both.png"
    prompt = "a large red star on a gray background"
    assert main(["generate", RECIPE, "--prompt", prompt, "--out", str(run), "--image", str(picture)]) == 0
    with Image.open(picture) as drawn:
        assert drawn.size == (32 + 4 + 32, 32)


def test_own_prompts(model: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "mine.txt"
    prompts.write_text("a large red star on a gray background\n\na small blue circle above a large green square on a white background\n")
    assert main(["curate", RECIPE, "--out", str(tmp_path / "run"), "--prompts", str(prompts)]) == 0
    assert summary(tmp_path / "run")["funnel"][0]["rows_in"] == 2


def test_overrides_reach_the_recipe(model: Path, tmp_path: Path) -> None:
    assert main(["curate", RECIPE, "--out", str(tmp_path / "run"), "--curate.prompts.count", "5", "--curate.samples", "2"]) == 0
    assert summary(tmp_path / "run")["funnel"][0]["rows_in"] == 10


def test_seed_reaches_every_part(model: Path, tmp_path: Path) -> None:
    assert main(["curate", RECIPE, "--out", str(tmp_path / "a"), "--seed", "3", "--curate.prompts.count", "5"]) == 0
    assert main(["curate", RECIPE, "--out", str(tmp_path / "b"), "--seed", "4", "--curate.prompts.count", "5"]) == 0
    drawn = [pq.read_table(next((tmp_path / name).glob("0_plan-*/*.parquet")))["prompt"].to_pylist() for name in ("a", "b")]
    assert summary(tmp_path / "a")["seed"] == 3 and drawn[0] != drawn[1]


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["curat", "x"], 2, "Did you mean 'curate'"),
        (["run", "shape"], 2, "Did you mean 'shapes'"),
        (["run", "no.such.module:fn"], 2, "no.such"),
        (["run", "no_such_file.py:fn"], 2, "no_such_file.py"),
        (["curate", RECIPE, "--prompts", "missing.txt"], 2, "missing.txt"),
        (["train", RECIPE, "--out", "nowhere"], 1, "rpo curate"),
        (["train", RECIPE, "--pairs", "missing.parquet", "--out", "t"], 1, "missing.parquet"),
        (["evaluate", RECIPE, "--out", "nowhere"], 1, "nowhere"),
        (["report", "nowhere"], 1, "nowhere"),
        (["generate", RECIPE, "--prompt", "a large purple star on a gray background"], 2, "'purple'"),
        (["generate", RECIPE, "--prompt", "a star"], 2, "SHAPE"),
        (["generate", RECIPE, "--prompt", "a large red star on a gray background", "--seed", "-1"], 2, "--seed must be at least 0"),
        (["train", RECIPE, "--out", "t", "--train.seed", "-1"], 2, "--train.seed must be at least 0 and below 2^63, got -1"),
        (["curate", RECIPE, "--out", "t", "--seed", str(2**63)], 2, f"--seed must be at least 0 and below 2^63, got {2**63}"),
        (["evaluate", RECIPE, "--out", "t", "--seed", "-3"], 2, "got -3"),
    ],
)
def test_wrong_input_says_what_and_how_to_go_on(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    arguments: list[str], code: int, told: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == code
    error = " ".join(capsys.readouterr().err.split())
    assert told in error and "Traceback" not in error and len(error) < 1500


def test_pairs_outside_the_language_are_refused_by_training(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = read_pairs(run / "pairs.parquet")
    write_pairs(tmp_path / "free.parquet", [*pairs[:-1], replace(pairs[-1], prompt="a cat number 3")])
    assert main(["train", RECIPE, "--pairs", str(tmp_path / "free.parquet"), "--out", str(tmp_path / "t"), "--allow-fingerprint"]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "does not understand the prompt 'a cat number 3'" in error and "Traceback" not in error
    assert not (tmp_path / "t" / "train" / "weights").exists()


def test_a_resumed_training_is_not_probed_again(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was probed before its first step; without a step there was no training that could be resumed."""
    probed: list[int] = []
    monkeypatch.setattr("rpo.api.training.pairs_leakage", lambda *of: probed.append(1) or "3 pairs")
    arguments = ["train", RECIPE, "--pairs", str(run / "pairs.parquet"), "--out", str(tmp_path / "t"), "--allow-fingerprint"]
    assert main(arguments) == 0 and probed == [1]
    shutil.rmtree(tmp_path / "t" / "train" / "weights")
    assert main([*arguments, "--resume"]) == 0 and probed == [1]
    shutil.rmtree(tmp_path / "t" / "train" / "weights")
    shutil.rmtree(tmp_path / "t" / "train" / "checkpoints")
    capsys.readouterr()
    assert main([*arguments, "--resume"]) == 0 and probed == [1, 1]
    assert "pair health unknown: 3 pairs" in " ".join(capsys.readouterr().err.split())


def test_prompts_outside_the_language_are_refused_with_their_line(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "mine.txt"
    prompts.write_text("a large red star on a gray background\na large red cat on a gray background\n")
    assert main(["curate", RECIPE, "--out", str(tmp_path / "run"), "--prompts", str(prompts)]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "prompt 2" in error and "'cat'" in error and "triangle" in error


def test_prompts_of_an_evaluation_are_refused_with_their_number(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "mine.txt"
    prompts.write_text("a large red cat on a gray background\n")
    assert main(["evaluate", RECIPE, "--out", str(run), "--prompts", str(prompts)]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "mine.txt, prompt 1" in error and "'cat'" in error


def test_empty_prompts_are_refused(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text(" \n\n")
    assert main(["curate", RECIPE, "--out", str(tmp_path / "run"), "--prompts", str(tmp_path / "mine.txt")]) == 2
    assert "holds no prompt" in capsys.readouterr().err


def test_an_existing_run_needs_a_decision(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["curate", RECIPE, "--out", str(run)]) == 1
    error = capsys.readouterr().err
    assert "--resume" in error and "--overwrite" in error


def test_a_changed_recipe_is_refused_and_leaves_the_old_record(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "recipe.json").read_text()
    assert main(["curate", RECIPE, "--out", str(run), "--resume", "--curate.check.change-min", "0.01"]) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert "'check'" in error and "change_min" in error and "--overwrite" in error
    assert (run / "recipe.json").read_text() == before


def test_a_damaged_shard_is_named(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    assert main(["curate", RECIPE, "--out", str(folder), "--curate.prompts.count", "8"]) == 0
    shard = next(folder.glob("4_edit-*/00000.parquet"))
    shard.write_bytes(shard.read_bytes()[:-20])
    arguments = ["curate", RECIPE, "--out", str(folder), "--resume", "--curate.prompts.count", "8"]
    assert main(arguments) == 1
    error = "".join(capsys.readouterr().err.split())
    assert str(shard.name) in error and "elete" in error
    shard.unlink()
    assert main(arguments) == 0


def test_evaluation_refuses_prompts_of_the_curation(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen = pq.read_table(next(run.glob("0_plan-*/00000.parquet")))["prompt"].to_pylist()[0]
    (tmp_path / "seen.txt").write_text(seen + "\n")
    assert main(["evaluate", RECIPE, "--out", str(run), "--prompts", str(tmp_path / "seen.txt")]) == 1
    assert "used in curation" in " ".join(capsys.readouterr().err.split())


def test_any_models_are_compared_on_a_prompts_file(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = scenes(np.random.default_rng(5), held_out=True, two_things=0.5)
    prompts = list(dict.fromkeys(caption(next(source)) for _ in range(24)))
    rows = [{"prompt": prompt, "category": "two" if " of " in prompt else "one", "id": i} for i, prompt in enumerate(prompts)]
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    compared = [
        "evaluate",
        RECIPE,
        "--out",
        str(tmp_path / "compared"),
        "--prompts",
        str(tmp_path / "set.jsonl"),
        "--images-per-prompt",
        "2",
    ]
    models = ["--models", "plain=base", f"mine={run}", f"folder={run / 'train' / 'weights'}"]
    assert main([*compared, *models]) == 0
    out = capsys.readouterr().out
    assert "plain against mine" in out and "plain against folder" in out
    found = summary(tmp_path / "compared")["comparisons"]
    assert found.keys() == {"mine", "folder"}
    plain = [json.dumps(found[name]).replace(f'"{name}":', '"it":') for name in found]
    assert plain[0] == plain[1], "they are the same weights, each under its own name"
    assert found["mine"]["first"]["used_in_labelling"], "the run that is compared was labelled by it, wherever the comparison lies"
    assert found["mine"]["quality"]["categories"].keys() <= {"one", "two"} and "diversity" in found["mine"]
    table = pq.read_table(tmp_path / "compared" / "evaluation" / "rows.parquet")
    assert table.num_rows == 3 * 2 * len(prompts) and set(table["model"].to_pylist()) == {"plain", "mine", "folder"}
    assert main([*compared, "--models", "plain"]) == 2
    assert "--models takes NAME=MODEL" in " ".join(capsys.readouterr().err.split())
    assert main([*compared, "--models", "plain=base", "mine=nowhere"]) == 2
    assert "--models mine=nowhere: give" in " ".join(capsys.readouterr().err.split())
    assert main([*compared, "--models", "plain=base", "hub=owner/name@v1"]) == 1
    assert "cannot load the model 'owner/name'" in " ".join(capsys.readouterr().err.split())


def test_rewards_that_labelled_are_marked(run: Path) -> None:
    marked = {name for name, value in summary(run)["evaluation"].items() if value.get("used_in_labelling")}
    rewards = set(json.loads(read_pairs(run / "pairs.parquet")[0].scores))
    assert marked and marked <= rewards


def test_an_unwritable_folder_is_told(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["curate", RECIPE, "--out", "/proc/rpo"]) == 1
    assert "/proc/rpo" in capsys.readouterr().err


def test_a_reward_that_labelled_is_no_headline(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, again := tmp_path / "again")
    assert main(["evaluate", RECIPE, "--out", str(again), "--evaluate.headline", "first"]) == 0
    assert summary(again)["evaluation"]["first"]["used_in_labelling"] and summary(again)["headline"] == "fully_correct"
