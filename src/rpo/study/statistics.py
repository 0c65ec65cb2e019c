"""What a study may say: effects over several training seeds, each with its own prompts, computed from the rows that it leaves."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rpo.evaluation.judges import described_metric, metric_of
from rpo.evaluation.statistics import BOOTSTRAP_MIN, RESAMPLES, mean_interval, prompt_means
from rpo.protocols import Metric

BASE = "base"
_KEYS = ("arm", "sources", "seed", "prompt_id", "prompt", "seed_index")
Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Effect:
    """A mean difference over seeds and prompts."""

    mean: float
    ci95: tuple[float, float] | None
    """95 % interval: seeds are drawn anew, and within each its prompts; with one seed only the prompts, and none of fewer than three."""
    seeds: int
    prompts: int
    """In all seeds together."""


def effect(differences: Sequence[Floats], *, resamples: int = RESAMPLES, seed: int = 0) -> Effect:
    """The mean over seeds of each seed's mean difference, of `differences` (one array over prompts per seed).

    Percentile bootstrap on two levels (Davison and Hinkley 1997, section 3.8): as both seeds and prompts are samples, both are drawn with
    replacement. With few seeds it is right as long as they differ no more than prompts make them: with three seeds it covers in 98, 93,
    86 and 77 of 100 studies where the standard deviation between seeds is 0, 1, 2 and 5 times the standard error within one; with five
    in 98, 95, 91 and 85 (simulated; a test repeats it).
    """
    if not differences or any(part.ndim != 1 or not part.size or not np.isfinite(part).all() for part in differences):
        raise ValueError("differences must hold a non-empty vector of finite numbers for at least one seed")
    mean, prompts = float(np.mean([part.mean() for part in differences])), sum(part.size for part in differences)
    if len(differences) == 1 and prompts < BOOTSTRAP_MIN:
        return Effect(mean=mean, ci95=mean_interval(differences[0]), seeds=1, prompts=prompts)
    rng = np.random.default_rng(seed)
    # A seed's resampled means do not depend on which other seeds are drawn: they are drawn once for all, as many as may be needed.
    drawn = rng.integers(len(differences), size=(resamples, len(differences)))
    means = np.empty(drawn.shape)
    for i, part in enumerate(differences):
        places = drawn == i
        means[places] = part[rng.integers(part.size, size=(int(places.sum()), part.size))].mean(axis=1)
    low, high = np.quantile(means.mean(axis=1), [0.025, 0.975])
    return Effect(mean=mean, ci95=(float(low), float(high)), seeds=len(differences), prompts=prompts)


def sources_to_reach(curve: Mapping[int, float], level: float) -> float | None:
    """How many source images it takes to reach `level`, by straight lines between the measured sizes; `None` if none of them does."""
    sizes = sorted(curve)
    for smaller, larger in zip([None, *sizes], sizes, strict=False):
        if curve[larger] >= level:
            if smaller is None:
                return float(larger)
            return smaller + (larger - smaller) * (level - curve[smaller]) / (curve[larger] - curve[smaller])
    return None


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was measured of one arm at one size on one seed."""

    arm: str
    size: int
    """Source images."""
    seed: int
    rows: Path
    """`rows.parquet` of its evaluation: the models `base` and `tuned` on the same prompts."""
    told: Mapping[str, Any]
    """What else is known of it: "setting", "pairs", "core_seconds", "alarm", "winner_drift"."""


def gathered(measured: Sequence[Measured]) -> pa.Table:
    """Every row of a study: arm, sources, seed, prompt, metrics. The base model's are there once per seed, with no sources."""
    parts: list[pa.Table] = []
    with_base: set[int] = set()
    for cell in measured:
        table = pq.read_table(cell.rows)
        models = {"tuned": (cell.arm, cell.size)} | ({BASE: (BASE, 0)} if cell.seed not in with_base else {})
        with_base.add(cell.seed)
        for model, (arm, size) in models.items():
            own = table.filter(pc.equal(table["model"], model)).drop_columns(["model", "category"])  # pyright: ignore[reportAttributeAccessIssue]
            keys = {"arm": [arm] * len(own), "sources": [size] * len(own), "seed": [cell.seed] * len(own)}
            parts.append(pa.table(keys | {name: own[name] for name in own.column_names}))
    return pa.concat_tables(parts, promote_options="default")


def study_numbers(
    rows: pa.Table, measured: Sequence[Measured], headline: str, declared: Mapping[str, Metric] | None = None
) -> list[dict[str, Any]]:
    """Of every arm at every size: each metric's mean, its effect over the base model, and the headline's over the first arm.

    `declared` says how metrics read; others are scores.
    """
    known = declared or {}
    metrics = [name for name in rows.column_names if name not in _KEYS]
    values = _values(rows, metrics)
    first = measured[0].arm
    found: list[dict[str, Any]] = []
    for arm, size in dict.fromkeys((cell.arm, cell.size) for cell in measured):
        mine = [cell for cell in measured if (cell.arm, cell.size) == (arm, size)]
        seeds = [cell.seed for cell in mine]
        numbers: dict[str, Any] = {}
        for metric in metrics:
            tuned, base = ([values[name, at, seed][metric] for seed in seeds] for name, at in ((arm, size), (BASE, 0)))
            over_base = effect([after - before for after, before in zip(tuned, base, strict=True)])
            numbers[metric] = {
                "base": float(np.mean([part.mean() for part in base])),
                "tuned": float(np.mean([part.mean() for part in tuned])),
                "difference": asdict(over_base),
                "by_seed": [float(after.mean() - before.mean()) for after, before in zip(tuned, base, strict=True)],
            } | described_metric(known.get(metric, Metric()))
        common = [seed for seed in seeds if (first, size, seed) in values]
        against = [values[arm, size, seed][headline] - values[first, size, seed][headline] for seed in common] if arm != first else []
        told = {name: [cell.told[name] for cell in mine] for name in ("setting", "pairs", "core_seconds", "alarm", "winner_drift")}
        drifts = [drift for drift in told["winner_drift"] if drift is not None]
        found.append(
            {
                "arm": arm,
                "sources": size,
                "seeds": seeds,
                "setting": told["setting"][0],
                "pairs": told["pairs"],
                "core_seconds": told["core_seconds"],
                "alarms": sum(alarm is not None for alarm in told["alarm"]),
                "winner_drift": float(np.mean(drifts)) if drifts else None,
                "metrics": numbers,
                "over_first": asdict(effect(against)) if against else None,
            }
        )
    return found


def _values(rows: pa.Table, metrics: Sequence[str]) -> dict[tuple[str, int, int], dict[str, Floats]]:
    """(arm, sources, seed) -> metric -> one value per prompt, in the order of the prompts' ids."""
    keys = list(zip(*(rows[name].to_pylist() for name in ("arm", "sources", "seed")), strict=True))
    prompts, columns = np.array(rows["prompt_id"].to_pylist()), {name: rows[name].to_numpy() for name in metrics}
    places: dict[tuple[str, int, int], list[int]] = {}
    for place, key in enumerate(keys):
        places.setdefault(key, []).append(place)
    return {key: {m: prompt_means(columns[m][own], prompts[own]) for m in metrics} for key, own in places.items()}


def study_table(about: Mapping[str, Any]) -> str:
    """The study as Markdown, ready to paste: at the largest size, then over the sizes, then what each curation kept."""
    headline, cells, beside = about["headline"], about["cells"], about.get("beside", ())
    largest, says = max(cell["sources"] for cell in cells), {arm["name"]: arm["says"] for arm in about["arms"]}
    first, unit = about["arms"][0]["name"], ", points" if metric_of(cells[0]["metrics"][headline]).kind == "fraction" else ""

    def of_headline(cell: Mapping[str, Any], effect: Mapping[str, Any] | None) -> str:
        return shown_effect(effect, cell["metrics"][headline])

    lines = [
        f"| arm, {largest} source images | what it is | {headline}: tuned less base{unit} [95 %] | less `{first}`{unit} [95 %] "
        f"{''.join(f'| {name} ' for name in beside)}| winner drift | pairs | seeds | alarms | setting |",
        "|---|---|---|---|" + "---|" * (len(beside) + 5),
    ]
    for cell in cells:
        if cell["sources"] == largest:
            told = [shown_effect(own["difference"], own) if (own := cell["metrics"].get(name)) else "" for name in beside]
            drift = "" if cell["winner_drift"] is None else f"{cell['winner_drift']:+.4f}"
            effects = [of_headline(cell, effect) for effect in (cell["metrics"][headline]["difference"], cell["over_first"])]
            row = [cell["arm"], says[cell["arm"]], *effects, *told, drift, f"{np.mean(cell['pairs']):.0f}", str(len(cell["seeds"]))]
            lines.append("| " + " | ".join([*row, str(cell["alarms"]), cell["setting"]]) + " |")
    sizes = sorted({cell["sources"] for cell in cells})
    several = [arm for arm in says if sum(cell["arm"] == arm for cell in cells) > 1]
    if several:
        lines += ["", f"| {headline}: tuned less base{unit} [95 %] | " + " | ".join(f"{size} sources" for size in sizes) + " |"]
        lines += ["|---" * (len(sizes) + 1) + "|"]
        for arm in several:
            curve = {cell["sources"]: of_headline(cell, cell["metrics"][headline]["difference"]) for cell in cells if cell["arm"] == arm}
            lines.append(f"| {arm} | " + " | ".join(curve.get(size, "") for size in sizes) + " |")
        lines += _reached(cells, several, headline)
    lines += ["", "| curation | source images | pairs kept | per source | fingerprint AUC | core-seconds |", "|---|---|---|---|---|---|"]
    for name, told in about["curations"].items():
        auc = "" if told["fingerprint_auc"] is None else f"{told['fingerprint_auc']:.2f}"
        share = told["pairs"] / told["sources"]
        lines.append(f"| {name} | {told['sources']} | {told['pairs']} | {share:.2f} | {auc} | {told['core_seconds']:.0f} |")
    return "\n".join(lines) + "\n"


def _reached(cells: Sequence[Mapping[str, Any]], arms: Sequence[str], headline: str) -> list[str]:
    """How many source images the first arm needs for the best that each of the others reaches."""
    how = metric_of(cells[0]["metrics"][headline])
    sign = -1 if how.better == "lower" else 1
    curves = {
        arm: {cell["sources"]: sign * cell["metrics"][headline]["difference"]["mean"] for cell in cells if cell["arm"] == arm}
        for arm in arms
    }
    lines: list[str] = []
    for arm in arms[1:]:
        level = max(curves[arm].values())
        needed = sources_to_reach(curves[arms[0]], level)
        said = f"needs {needed:.0f} source images or fewer" if needed is not None else "does not reach it at any size"
        best = f"{100 * sign * level:+.1f} points" if how.kind == "fraction" else f"{sign * level:+.3f}"
        lines.append(f"For the best of `{arm}` ({best}) `{arms[0]}` {said}.")
    return ["", *lines] if lines else []


def shown_effect(told: Mapping[str, Any] | None, numbers: Mapping[str, Any]) -> str:
    """An effect with its interval: of a fraction in percentage points, else in the metric's own unit."""
    if told is None:
        return ""
    factor, digits = (100, 1) if metric_of(numbers).kind == "fraction" else (1, 3)
    ends = "" if told["ci95"] is None else " [{:+.{d}f}, {:+.{d}f}]".format(*(factor * end for end in told["ci95"]), d=digits)
    return f"{factor * told['mean']:+.{digits}f}{ends}"


def points(told: Mapping[str, Any] | None) -> str:
    """An effect in percentage points."""
    return shown_effect(told, {"kind": "fraction"})
