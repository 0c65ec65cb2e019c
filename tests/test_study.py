"""A whole study through the command line, with fakes for all but the tuned network; run again, it has nothing left to do."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from fake_recipe import fake
from rpo.cli import main
from rpo.data.pairs import read_pairs
from rpo.study.run import Cell, winner_drifts
from rpo.training.config import TrainConfig
from rpo.training.objectives.preference import SFT
from tiny_diffusion import save_pipeline

RECIPE = f"{Path(__file__).parent / 'fake_recipe.py'}:fake"


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    os.environ["FAKE_MODEL"] = str(save_pipeline(tmp_path_factory.mktemp("model") / "tiny", pooled=True))
    folder = tmp_path_factory.mktemp("studies") / "fake"
    assert main(["study", RECIPE, "--out", str(folder), "--workers", "1"]) == 0
    return folder


def test_every_arm_is_there_at_its_sizes_and_seeds(study: Path) -> None:
    about = json.loads((study / "study.json").read_text())
    assert [(cell["arm"], cell["sources"], cell["seeds"]) for cell in about["cells"]] == [
        ("rpo", 64, [0, 1]), ("rpo", 100, [0, 1]), ("mixture", 100, [0]),
    ]  # fmt: skip
    assert [len(arm["search"]) for arm in about["arms"]] == [2, 0]
    assert {name: told["sources"] for name, told in about["curations"].items()} == {"rpo": 100, "samples": 100, "trusted": 100}


def test_no_arm_trains_on_more_than_its_share(study: Path) -> None:
    for path in (study / "pairs").glob("*.parquet"):
        size, pairs = int(path.stem.split("-")[1]), read_pairs(path)
        assert 0 < len(pairs) <= 0.2 * size
        if path.stem.startswith("mixture"):
            assert {pair.id.split("-")[0] for pair in pairs} == {"trusted", "samples"} and len({pair.id for pair in pairs}) == len(pairs)


def test_numbers_follow_from_the_rows(study: Path) -> None:
    about, rows = json.loads((study / "study.json").read_text()), pq.read_table(study / "rows.parquet").to_pylist()
    for cell in about["cells"]:
        gains = []
        for seed in cell["seeds"]:
            values = {
                arm: np.mean([row["quality"] for row in rows if (row["arm"], row["sources"], row["seed"]) == (arm, size, seed)])
                for arm, size in ((cell["arm"], cell["sources"]), ("base", 0))
            }
            gains.append(values[cell["arm"]] - values["base"])
        assert cell["metrics"]["quality"]["difference"]["mean"] == pytest.approx(np.mean(gains))


def test_the_winner_drift_is_that_of_the_last_third_of_the_steps(study: Path) -> None:
    for cell in json.loads((study / "study.json").read_text())["cells"]:
        drifts = []
        for path in study.glob(f"cells/{cell['arm']}-{cell['sources']}-seed*/train/metrics.jsonl"):
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            last = lines[-max(1, len(lines) // 3) :]
            drifts.append(np.mean([line["chosen_over_reference"] for line in last]))
        assert len(drifts) == len(cell["seeds"]) and cell["winner_drift"] == pytest.approx(np.mean(drifts), abs=1e-9)
        if cell["sources"] == 100:  # the table is of the largest size
            assert f"{cell['winner_drift']:+.4f}" in (study / "study.md").read_text()


def test_without_a_reference_the_drift_is_told_from_a_cell_that_saw_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_MODEL", str(tmp_path))
    recipe = fake()
    assert recipe.evaluate is not None
    train = replace(recipe.train, steps=6)

    def cell(name: str, config: TrainConfig, pairs: str, lines: list[dict[str, float]]) -> Cell:
        folder = tmp_path / name
        (folder / "train").mkdir(parents=True)
        (folder / "train" / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        return Cell(
            arm=name, size=1, seed=0, train=config, generator=recipe.generator, evaluate=recipe.evaluate,
            pairs=tmp_path / f"{name}-1-seed0-{pairs}.parquet", folder=folder, shared=tmp_path, threads=1,
        )  # fmt: skip

    referenced = [{"chosen_error": 0.5, "chosen_over_reference": -0.5 + 0.1 * i} for i in range(6)]  # the last two: base 0.6 and 0.5
    alone = [{"chosen_error": 0.25}] * 6
    sft = replace(train, objective=SFT(), lr=0.5)
    cells = [
        cell("dpo", train, "a", referenced),
        cell("sft", sft, "a", alone),
        cell("other-pairs", sft, "b", alone),
        cell("other-noise", replace(sft, seed=7), "a", alone),
    ]
    drifts = {folder.name: drift for folder, drift in winner_drifts(cells).items()}
    assert drifts == {"dpo": pytest.approx(-0.05), "sft": pytest.approx(0.25 - 0.55), "other-pairs": None, "other-noise": None}


def test_common_stages_are_made_once(study: Path) -> None:
    shards = {name: next((study / "curations").glob(f"{name}-seed0-*")).glob("4_edit-*/00000.parquet") for name in ("rpo", "trusted")}
    first, second = (next(found) for found in shards.values())
    assert first.stat().st_ino == second.stat().st_ino


def test_a_finished_study_does_nothing_again(study: Path) -> None:
    before = {path: path.stat().st_mtime_ns for kind in ("search", "cells", "pairs") for path in (study / kind).rglob("*")}
    table = (study / "study.md").read_text()
    assert main(["study", RECIPE, "--out", str(study), "--workers", "1"]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in before} and (study / "study.md").read_text() == table


def test_the_page_shows_the_arms(study: Path) -> None:
    page = (study / "study.html").read_text()
    assert "mixture" in page and "<svg" in page and "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")


def test_a_killed_study_leaves_no_process_behind(study: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rpo", "study", RECIPE, "--out", str(tmp_path), "--workers", "1"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, start_new_session=True)
    while not any(tmp_path.glob("search/*/train")):  # a worker is at it
        assert process.poll() is None
        time.sleep(0.1)
    process.kill()
    process.wait()
    ends = time.monotonic() + 10
    while _alive(process.pid) and time.monotonic() < ends:
        time.sleep(0.1)
    assert not _alive(process.pid)


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_an_unknown_arm_is_named(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", RECIPE, "--out", str(study), "--arms", "rop"]) == 2
    assert "rop" in capsys.readouterr().err
