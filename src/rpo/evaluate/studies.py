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

from rpo.evaluate.statistics import RESAMPLES, prompt_means

BASE = "base"
_KEYS = ("arm", "sources", "seed", "prompt_id", "prompt", "seed_index")
Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Effect:
    """A mean difference over seeds and prompts."""

    mean: float
    ci95: tuple[float, float]
    """95 % interval: seeds are drawn anew, and within each its prompts; with one seed only the prompts."""
    seeds: int
    prompts: int
    """In all seeds together."""


def effect(differences: Sequence[Floats], *, resamples: int = RESAMPLES, seed: int = 0) -> Effect:
    """The mean over seeds of each seed's mean difference, of `differences` (one array over prompts per seed).

    Percentile bootstrap on two levels (Davison and Hinkley 1997, section 3.8): as both seeds and prompts are samples, both are drawn with
    replacement.
    """
    if not differences or any(part.ndim != 1 or not part.size or not np.isfinite(part).all() for part in differences):
        raise ValueError("differences must hold a non-empty vector of finite numbers for at least one seed")
    rng = np.random.default_rng(seed)
    # A seed's resampled means do not depend on which other seeds are drawn: they are drawn once for all, as many as may be needed.
    drawn = rng.integers(len(differences), size=(resamples, len(differences)))
    means = np.empty(drawn.shape)
    for i, part in enumerate(differences):
        places = drawn == i
        means[places] = part[rng.integers(part.size, size=(int(places.sum()), part.size))].mean(axis=1)
    low, high = np.quantile(means.mean(axis=1), [0.025, 0.975])
    mean = float(np.mean([part.mean() for part in differences]))
    return Effect(mean=mean, ci95=(float(low), float(high)), seeds=len(differences), prompts=sum(part.size for part in differences))


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


def study_numbers(rows: pa.Table, measured: Sequence[Measured], headline: str) -> list[dict[str, Any]]:
    """Of every arm at every size: each metric's mean, its effect over the base model, and the headline's over the first arm."""
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
            }
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
    headline, cells = about["headline"], about["cells"]
    largest, says = max(cell["sources"] for cell in cells), {arm["name"]: arm["says"] for arm in about["arms"]}
    first = about["arms"][0]["name"]
    lines = [
        f"| arm, {largest} source images | what it is | {headline}: tuned less base, points [95 %] | less `{first}`, points [95 %] "
        "| quality | winner drift | pairs | seeds | alarms | setting |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for cell in cells:
        if cell["sources"] == largest:
            quality = cell["metrics"].get("quality")
            told = f"{quality['difference']['mean']:+.3f}" if quality else ""
            drift = "" if cell["winner_drift"] is None else f"{cell['winner_drift']:+.4f}"
            lines.append(
                f"| {cell['arm']} | {says[cell['arm']]} | {points(cell['metrics'][headline]['difference'])} | {points(cell['over_first'])} "
                f"| {told} | {drift} | {np.mean(cell['pairs']):.0f} | {len(cell['seeds'])} | {cell['alarms']} | {cell['setting']} |"
            )
    sizes = sorted({cell["sources"] for cell in cells})
    several = [arm for arm in says if sum(cell["arm"] == arm for cell in cells) > 1]
    if several:
        lines += ["", f"| {headline}: tuned less base, points [95 %] | " + " | ".join(f"{size} sources" for size in sizes) + " |"]
        lines += ["|---" * (len(sizes) + 1) + "|"]
        for arm in several:
            curve = {cell["sources"]: points(cell["metrics"][headline]["difference"]) for cell in cells if cell["arm"] == arm}
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
    curves = {
        arm: {cell["sources"]: cell["metrics"][headline]["difference"]["mean"] for cell in cells if cell["arm"] == arm} for arm in arms
    }
    lines: list[str] = []
    for arm in arms[1:]:
        level = max(curves[arm].values())
        needed = sources_to_reach(curves[arms[0]], level)
        said = f"needs {needed:.0f} source images or fewer" if needed is not None else "does not reach it at any size"
        lines.append(f"For the best of `{arm}` ({100 * level:+.1f} points) `{arms[0]}` {said}.")
    return ["", *lines] if lines else []


def points(told: Mapping[str, Any] | None) -> str:
    """An effect in percentage points."""
    if told is None:
        return ""
    low, high = told["ci95"]
    return f"{100 * told['mean']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
