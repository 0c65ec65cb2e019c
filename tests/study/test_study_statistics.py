"""Effects over seeds and prompts, and what a study's rows say."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rpo.evaluation.statistics import bootstrap_interval, t_interval
from rpo.protocols import Metric
from rpo.study.statistics import Measured, effect, gathered, points, sources_to_reach, study_numbers, study_table


def test_with_one_seed_the_interval_is_that_over_prompts() -> None:
    differences = np.random.default_rng(0).normal(0.1, 1.0, 300)
    found = effect([differences])
    low, high = bootstrap_interval(differences)
    assert found.mean == pytest.approx(differences.mean()) and found.prompts == 300 and found.seeds == 1
    assert found.ci95 == pytest.approx((low, high), abs=0.01)


def test_one_seed_with_few_prompts_has_a_t_interval_or_none() -> None:
    few = np.array([0.1, 0.4, 0.2, 0.3, 0.0])
    assert effect([few]).ci95 == pytest.approx(t_interval(few)) and effect([few[:2]]).ci95 is None
    assert points(asdict(effect([few[:2]]))) == "+25.0", "no interval, and no brackets"


@pytest.mark.parametrize(("seeds", "ratio", "low", "high"), [(3, 0, 0.94, 1.0), (3, 1, 0.89, 0.97), (3, 5, 0.68, 0.86), (5, 1, 0.91, 0.98)])
def test_the_two_level_interval_covers_as_often_as_the_docstring_says(seeds: int, ratio: float, low: float, high: float) -> None:
    """`ratio` is the standard deviation between seeds over the standard error within one."""
    rng, studies, prompts = np.random.default_rng(seeds), 400, 100
    covered = 0
    for study in range(studies):
        shifts = rng.normal(0, ratio / np.sqrt(prompts), seeds)
        found = effect([rng.normal(0.1 + shift, 1, prompts) for shift in shifts], resamples=400, seed=study).ci95
        assert found is not None
        covered += found[0] <= 0.1 <= found[1]
    assert low <= covered / studies <= high


def test_seeds_that_disagree_widen_the_interval() -> None:
    rng = np.random.default_rng(1)
    same = [rng.normal(0.1, 0.1, 400) for _ in range(5)]
    apart = [part + shift for part, shift in zip(same, (-0.2, -0.1, 0, 0.1, 0.2), strict=True)]
    widths = [np.ptp(effect(parts).ci95) for parts in (same, apart)]
    assert effect(apart).mean == pytest.approx(effect(same).mean) and widths[1] > 5 * widths[0]


def test_an_independent_resampling_agrees() -> None:
    rng = np.random.default_rng(2)
    parts = [rng.normal(shift, 1.0, 60) for shift in (0.0, 0.3, 0.5)]
    means = []
    for _ in range(4000):
        drawn = [parts[i] for i in rng.integers(3, size=3)]
        means.append(np.mean([rng.choice(part, part.size).mean() for part in drawn]))
    assert effect(parts).ci95 == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.03)


def test_bad_values_are_refused() -> None:
    for parts in ([], [np.array([])], [np.array([1.0, np.nan])]):
        with pytest.raises(ValueError, match="finite"):
            effect(parts)


def test_sources_to_reach_a_level() -> None:
    curve = {250: 0.4, 500: 0.5, 1000: 0.6}
    assert sources_to_reach(curve, 0.55) == pytest.approx(750)
    assert sources_to_reach(curve, 0.3) == 250 and sources_to_reach(curve, 0.7) is None


def rows_file(path: Path, base: list[float], tuned: list[float]) -> Path:
    ids = [f"{i:016x}" for i in range(len(base))]
    parts = [
        pa.table(
            {
                "model": [model] * len(ids), "prompt_id": ids, "prompt": ids, "category": pa.nulls(len(ids), pa.string()),
                "seed_index": [0] * len(ids), "good": values, "quality": [0.5] * len(ids),
            }
        )
        for model, values in (("base", base), ("tuned", tuned))
    ]  # fmt: skip
    pq.write_table(pa.concat_tables(parts), path)
    return path


def test_a_study_says_what_its_rows_say(tmp_path: Path) -> None:
    told = {"setting": "lr 1", "pairs": 10, "core_seconds": 60.0, "alarm": None, "winner_drift": None}
    base = [0.0, 0.0, 1.0, 1.0]
    tuned = {
        ("rpo", 8): [1.0, 1.0, 1.0, 1.0],
        ("rpo", 4): [1.0, 0.0, 1.0, 1.0],
        ("samples", 8): [0.0, 0.0, 1.0, 0.0],
        ("samples", 4): [1.0, 0.0, 1.0, 1.0],
    }
    drift = {"rpo": {"winner_drift": -0.25}, "samples": {}}
    measured = [
        Measured(arm=arm, size=size, seed=seed, rows=rows_file(tmp_path / f"{arm}{size}{seed}", base, values), told=told | drift[arm])
        for (arm, size), values in tuned.items()
        for seed in (0, 1)
    ]
    rows = gathered(measured)
    assert rows.filter(pa.array([arm == "base" for arm in rows["arm"].to_pylist()])).num_rows == 8, "once per seed"
    cells = {(cell["arm"], cell["sources"]): cell for cell in study_numbers(rows, measured, "good", {"good": Metric(kind="fraction")})}
    assert cells["rpo", 8]["metrics"]["good"]["difference"]["mean"] == 0.5 and cells["rpo", 8]["over_first"] is None
    assert cells["rpo", 4]["metrics"]["good"]["difference"]["mean"] == 0.25
    assert cells["samples", 8]["over_first"]["mean"] == -0.75 and cells["samples", 8]["over_first"]["ci95"][1] < 0
    assert cells["rpo", 8]["winner_drift"] == -0.25 and cells["samples", 8]["winner_drift"] is None
    about = {
        "headline": "good", "cells": list(cells.values()), "beside": ("quality",),
        "arms": [{"name": name, "says": f"what {name} is"} for name in ("rpo", "samples")],
        "curations": {"rpo": {"sources": 8, "pairs": 4, "fingerprint_auc": 0.5, "core_seconds": 9.0}},
    }  # fmt: skip
    table = study_table(about)
    assert "| rpo | what rpo is | +50.0 [" in table and "| samples | what samples is | -25.0 [" in table and "| rpo | +25.0 [" in table
    assert table.splitlines()[0].count("| quality |") == 1 and "| +0.000 [+0.000, +0.000] | -0.2500 |" in table, "in its own unit"
    assert "For the best of `samples` (+25.0 points) `rpo` needs 4 source images or fewer." in table


@pytest.mark.parametrize(("folder", "page_name"), [("study", "study.md"), ("study/objectives", "objectives.md")])
def test_the_published_figures_follow_from_the_published_rows(folder: str, page_name: str) -> None:
    docs = Path(__file__).parents[2] / "docs"
    about, page = json.loads((docs / folder / "study.json").read_text()), (docs / page_name).read_text()
    right: dict[tuple[str, int, int], dict[str, float]] = {}
    for row in pq.read_table(docs / folder / "rows.parquet").to_pylist():
        right.setdefault((row["arm"], row["sources"], row["seed"]), {})[row["prompt_id"]] = row["fully_correct"]
    for cell in about["cells"]:
        gains = []
        for seed in cell["seeds"]:
            tuned, base = right[cell["arm"], cell["sources"], seed], right["base", 0, seed]
            gains.append(np.mean([tuned[prompt] - base[prompt] for prompt in tuned]))
        assert len(gains) == len(cell["seeds"]) and cell["metrics"]["fully_correct"]["difference"]["mean"] == pytest.approx(np.mean(gains))
        assert points(cell["metrics"]["fully_correct"]["difference"]) in page
