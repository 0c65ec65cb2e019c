"""Evaluation from beginning to end: images of all models, measures of every judge, numbers with intervals."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rpo.data.records import write_record
from rpo.data.shards import sweep, write_text
from rpo.errors import RpoError
from rpo.evaluate.rows import FEATURES, INDEX, KEYS, fingerprint, read_folder, write_rows
from rpo.evaluate.sampling import SHARD_ROWS, make_images, measure_images
from rpo.evaluate.statistics import compare, frechet_distance, holm, pairwise_distance
from rpo.evaluate.tables import TABLE, markdown
from rpo.evaluate.tasks import Place, Task, checked_overlap
from rpo.protocols import Comparer, Generator, Judge

FRECHET = "frechet"
DIVERSITY = "diversity"
DRIFT = "drift"
_VERSION = 2
"""Raised when rows made by older code must not be used again."""
_NAME = re.compile(r"[A-Za-z0-9_]{1,40}")

Progress = Callable[[str, int, int], None]
"""Called with (what, images done, images in all) after every shard."""
Numbers = dict[str, dict[str, Any]]
"""What is known of each metric."""


def evaluate(
    task: Task,
    models: Mapping[str, Callable[[], Generator]],
    judges: Mapping[str, Judge | Comparer],
    folder: Path,
    *,
    fingerprints: Mapping[str, str],
    curation_prompts: Iterable[str],
    labelled_by: Iterable[str] = (),
    allow_overlap: bool = False,
    batch_size: int = 16,
    reference_features: tuple[str, np.ndarray] | None = None,
    seed: int = 0,
    progress: Progress = lambda what, done, total: None,
) -> dict[str, Numbers]:
    """Compares every model with the first one on the same prompts and noise; returns the numbers by model and metric.

    Each metric of each judge becomes {"base" (the first model's mean), "tuned" (this one's), "difference", "ci95": [low, high],
    "win_rate", "win_ci95", "p_value", "p_holm", "n", "detectable"}, with n the number of prompts; for a judge in `labelled_by`, whose
    scores chose the training pairs, also "used_in_labelling": true. Where the task knows its prompts' kinds there is "categories": the
    same by kind. On the first judge's features "drift" says how far an image lies from the first model's, and with several images
    per prompt "diversity" how far apart they lie. Where a judge is a `Comparer` the metric is its name, and the value how much it
    prefers the model's image to the other's, 0 to 1; in the rows only the later model has it, the first one's is 1 minus that.
    `reference_features` = (judge name, (m, d) features) adds "frechet".

    Rows stay in `folder` (see `rpo.evaluate.rows`), so a killed evaluation goes on at the first unfinished shard, and one more model,
    judge or seed costs nothing but itself. `fingerprints` says for every model and judge which weights it has: what was made
    under another one, or another batch size, is never used again. A model is built only if it still has images to make, and one at a time.

    Raises `RpoError` if `curation_prompts` holds any of the task's prompts and that is not allowed, or a stored shard is damaged;
    `ValueError` for arguments.
    """
    _check(models, judges, fingerprints, batch_size, reference_features)
    curation, places = set(curation_prompts), task.places()
    shared = checked_overlap(task, curation, allowed=allow_overlap)
    planned = [task.name, [identifier for identifier, _ in task.prompts], SHARD_ROWS, batch_size, _VERSION]
    sweep(folder)
    index: dict[str, Any] = {"num_images": len(places), "models": {}}
    for model, build in models.items():
        images = f"images-{model}-{fingerprint(planned, fingerprints[model])}"
        make_images(build, places, folder / images, batch_size=batch_size, progress=_named(progress, f"{model}: images"))
        index["models"][model] = {"fingerprint": fingerprints[model], "images": images, "rows": {}}
        _measure(index["models"], model, judges, fingerprints, places, folder, batch_size, progress)
    measured = {model: _Measured.read(folder, index, model) for model in models}
    (_, base), *others = measured.items()
    labelling = set(labelled_by) & set(judges)
    result = {model: _numbers(task, base, tuned, labelling, reference_features, seed) for model, tuned in others}
    index |= {
        "task": task.described(),
        "curation_prompts": {"compared": len(curation), "shared": len(shared), "exact": len(shared.exact), "near": len(shared.near)},
        "judges": {name: fingerprints[name] for name in judges},
        "used_in_labelling": sorted(labelling),
        "metrics": result,
    }
    write_rows(folder, {model: own.rows for model, own in measured.items()}, dict(task.prompts), task.categories)
    write_text(folder / TABLE, markdown(index))
    write_record(folder / INDEX, index)
    return result


def _measure(
    entries: dict[str, dict[str, Any]],
    model: str,
    judges: Mapping[str, Judge | Comparer],
    fingerprints: Mapping[str, str],
    places: Sequence[Place],
    folder: Path,
    batch_size: int,
    progress: Progress,
) -> None:
    """Has every judge measure the model's images, or compare them with the first model's; enters where its rows are."""
    first, own = (entry["images"] for entry in (next(iter(entries.values())), entries[model]))
    for name, judge in judges.items():
        compares = isinstance(judge, Comparer)
        if compares and own == first:
            continue
        sides = (first, own) if compares else (own,)
        rows = f"rows-{model}-{name}-{fingerprint(*(side.rpartition('-')[2] for side in sides), fingerprints[name])}"
        say = _named(progress, f"{model}: {name}")
        measure_images(name, judge, places, [folder / side for side in sides], folder / rows, batch_size=batch_size, progress=say)
        entries[model]["rows"][name] = rows


def _named(progress: Progress, what: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(what, done, total)


def _check(
    models: Mapping[str, object],
    judges: Mapping[str, Judge | Comparer],
    fingerprints: Mapping[str, str],
    batch_size: int,
    reference_features: tuple[str, np.ndarray] | None,
) -> None:
    if len(models) < 2:
        raise ValueError(f"models must be at least two, the first of which the others are compared with, got {sorted(models)}")
    if not judges:
        raise ValueError("judges must hold at least one judge")
    for kind, names in (("models", models), ("judges", judges)):
        for name in names:
            if not _NAME.fullmatch(name) or (kind == "judges" and name in models):
                raise ValueError(f"{kind}: {name!r} is no name for one; use 1 to 40 letters, digits and underscores, each name once")
    if isinstance(next(iter(judges.values())), Comparer):
        raise ValueError("judges must begin with one that measures single images, not with one that compares two")
    missing = [name for name in (*models, *judges) if not fingerprints.get(name)]
    if missing:
        raise ValueError(f"fingerprints must say which weights {', '.join(missing)} has: give a string that changes with the weights")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if reference_features is not None and reference_features[0] not in judges:
        raise ValueError(f"reference_features names the judge {reference_features[0]!r}, known are {sorted(judges)}")


class _Measured:
    """Everything the judges measured on one model's images: one row per image, in the order of the task."""

    def __init__(self, tables: Mapping[str, pa.Table]) -> None:
        self.judge_of: dict[str, str] = {}
        """Metric -> the judge that measured it."""
        first = next(iter(tables.values()))
        columns = {key: first[key] for key in KEYS}
        for judge, table in tables.items():
            for metric in table.column_names:
                if metric in (*KEYS, FEATURES):
                    continue
                if metric in self.judge_of or metric in (FRECHET, DIVERSITY, DRIFT):
                    raise RpoError(f"the metric {metric!r} comes from more than one source; judges must name their metrics differently")
                self.judge_of[metric] = judge
                columns[metric] = table[metric]
        self.rows = pa.table(columns)
        self.prompts = np.array(first["prompt_id"].to_pylist())
        self.features = {judge: np.stack(table[FEATURES].to_pylist()) for judge, table in tables.items()}

    @classmethod
    def read(cls, folder: Path, index: Mapping[str, Any], model: str) -> "_Measured":
        return cls({judge: read_folder(folder / rows, index["num_images"]) for judge, rows in index["models"][model]["rows"].items()})

    def values(self, metric: str) -> np.ndarray:
        """Not a number where the metric does not apply to the image."""
        return self.rows[metric].to_numpy().astype(np.float64)


def _numbers(
    task: Task,
    base: _Measured,
    tuned: _Measured,
    labelling: set[str],
    reference: tuple[str, np.ndarray] | None,
    seed: int,
) -> Numbers:
    assert all(base.rows[key].equals(tuned.rows[key]) for key in KEYS), "all models make the same places in the same order"
    kinds = np.array([task.categories.get(prompt, "") for prompt in base.prompts])
    result: Numbers = {}
    for metric, judge in tuned.judge_of.items():
        after = tuned.values(metric)
        if judge in base.features and metric not in base.judge_of:
            continue  # what applied to no image of the first model
        before = base.values(metric) if judge in base.features else 1 - after
        both = ~np.isnan(before) & ~np.isnan(after)
        if not both.any():
            continue
        result[metric] = _compared(before, after, base.prompts, both, seed)
        by_kind = {kind: both & (kinds == kind) for kind in sorted(set(kinds)) if kind}
        if by_kind:
            told = {kind: _compared(before, after, base.prompts, rows, seed) for kind, rows in by_kind.items() if rows.any()}
            result[metric]["categories"] = told
        if judge in labelling:
            result[metric]["used_in_labelling"] = True
    for metric, value in holm({metric: found["p_value"] for metric, found in result.items()}).items():
        result[metric]["p_holm"] = value
    return result | _of_features(task, base, tuned, reference, seed)


def _of_features(task: Task, base: _Measured, tuned: _Measured, reference: tuple[str, np.ndarray] | None, seed: int) -> Numbers:
    """What the images' features say of the models: diversity, drift, distance to good images."""
    result: Numbers = {}
    judge = next(iter(base.features))
    if task.seeds_per_prompt > 1 and base.features[judge].shape[1]:
        before, after = (pairwise_distance(model.features[judge], model.prompts) for model in (base, tuned))
        result[DIVERSITY] = _compared(before, after, np.arange(len(before)), np.ones(len(before), dtype=bool), seed)
    if base.features[judge].shape[1]:
        moved = float(np.linalg.norm(tuned.features[judge] - base.features[judge], axis=1).mean())
        result[DRIFT] = {"base": 0.0, "tuned": moved, "difference": moved, "n": len(base.prompts)}
    if reference is not None:
        distances = [frechet_distance(model.features[reference[0]], reference[1]) for model in (base, tuned)]
        result[FRECHET] = {"base": distances[0], "tuned": distances[1], "difference": distances[1] - distances[0], "n": len(base.prompts)}
    return result


def _compared(before: np.ndarray, after: np.ndarray, prompts: np.ndarray, rows: np.ndarray, seed: int) -> dict[str, Any]:
    comparison = asdict(compare(before[rows], after[rows], prompts[rows], seed=seed))
    for interval in ("ci95", "win_ci95"):
        comparison[interval] = list(comparison[interval])
    return comparison | {"detectable": comparison["detectable"] if isfinite(comparison["detectable"]) else None}
