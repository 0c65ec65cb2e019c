"""Evaluation from beginning to end: images of both models, measures of every judge, numbers with intervals."""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from rpo.data.shards import write_text
from rpo.errors import RpoError
from rpo.evaluate.rows import FEATURES, INDEX, KEYS, fingerprint, read_folder
from rpo.evaluate.sampling import SHARD_ROWS, make_images, measure_images
from rpo.evaluate.statistics import compare, frechet_distance, holm
from rpo.evaluate.tasks import Task, refuse_overlap
from rpo.protocols import Generator, Judge

MODELS = ("base", "tuned")
FRECHET = "frechet"
_VERSION = 1
"""Raised when rows made by older code must not be used again."""
_NAME = re.compile(r"[A-Za-z0-9_]{1,40}")

Progress = Callable[[str, int, int], None]
"""Called with (what, images done, images in all) after every shard."""


def evaluate(
    task: Task,
    models: Mapping[str, Callable[[], Generator]],
    judges: Mapping[str, Judge],
    folder: Path,
    *,
    fingerprints: Mapping[str, str],
    curation_prompts: Iterable[str],
    batch_size: int = 16,
    reference_features: tuple[str, np.ndarray] | None = None,
    seed: int = 0,
    progress: Progress = lambda what, done, total: None,
) -> dict[str, dict[str, Any]]:
    """Compares `models["base"]` and `models["tuned"]` on the same prompts and noise; returns the numbers by metric.

    Each metric of each judge becomes {"base", "tuned", "difference", "ci95": [low, high], "win_rate", "p_value", "p_holm", "n",
    "detectable"}, with n the number of prompts. `reference_features` = (judge name, (m, d) features) adds "frechet": {"base", "tuned",
    "difference", "n"}.

    Rows stay in `folder` (see `rpo.evaluate.rows`), so a killed evaluation goes on at the first unfinished shard. `fingerprints` says
    for every model and judge which weights it has: what was made under another one, or another batch size, is never used again.
    A model is built only if it still has images to make, and one at a time.

    Raises `RpoError` if `curation_prompts` holds any of the task's prompts, or a stored shard is damaged; `ValueError` for arguments.
    """
    _check(models, judges, fingerprints, batch_size, reference_features)
    curation = set(curation_prompts)
    refuse_overlap(task, curation)
    places = task.places()
    planned = [task.name, [(p.prompt_id, p.seed_index) for p in places], SHARD_ROWS, batch_size, _VERSION]
    index: dict[str, Any] = {"num_images": len(places), "models": {}}
    for model, build in models.items():
        key = fingerprint(planned, fingerprints[model])
        images = f"images-{model}-{key}"
        make_images(build, places, folder / images, batch_size=batch_size, progress=_named(progress, f"{model}: images"))
        index["models"][model] = {"fingerprint": fingerprints[model], "images": images, "rows": {}}
        for name, judge in judges.items():
            rows = f"rows-{model}-{name}-{fingerprint(key, fingerprints[name])}"
            told = _named(progress, f"{model}: {name}")
            measure_images(judge, places, folder / images, folder / rows, batch_size=batch_size, progress=told)
            index["models"][model]["rows"][name] = rows
    result = _numbers(folder, index, list(judges), reference_features, seed)
    index |= {
        "task": {"name": task.name, "prompts": len(task.prompts), "seeds_per_prompt": task.seeds_per_prompt},
        "curation_prompts": {"compared": len(curation), "shared": 0},
        "metrics": result,
    }
    write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")
    return result


def _named(progress: Progress, what: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(what, done, total)


def _check(
    models: Mapping[str, object],
    judges: Mapping[str, Judge],
    fingerprints: Mapping[str, str],
    batch_size: int,
    reference_features: tuple[str, np.ndarray] | None,
) -> None:
    if set(models) != set(MODELS):
        raise ValueError(f"models must be exactly {MODELS[0]!r} and {MODELS[1]!r}, got {sorted(models)}")
    if not judges:
        raise ValueError("judges must hold at least one judge")
    for name in judges:
        if not _NAME.fullmatch(name) or name in models:
            raise ValueError(f"judges: {name!r} is no name for a judge; use 1 to 40 letters, digits and underscores, other than a model's")
    missing = [name for name in (*models, *judges) if not fingerprints.get(name)]
    if missing:
        raise ValueError(f"fingerprints must say which weights {', '.join(missing)} has: give a string that changes with the weights")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if reference_features is not None and reference_features[0] not in judges:
        raise ValueError(f"reference_features names the judge {reference_features[0]!r}, known are {sorted(judges)}")


def _numbers(
    folder: Path, index: Mapping[str, Any], judges: list[str], reference: tuple[str, np.ndarray] | None, seed: int
) -> dict[str, dict[str, Any]]:
    result: dict[str, dict[str, Any]] = {}
    for judge in judges:
        base, tuned = (read_folder(folder / index["models"][model]["rows"][judge], index["num_images"]) for model in MODELS)
        assert all(base[key].equals(tuned[key]) for key in KEYS), "both models make the same places in the same order"
        prompts = np.array(base["prompt_id"].to_pylist())
        for metric in [name for name in base.column_names if name in tuned.column_names and name not in (*KEYS, FEATURES)]:
            if metric in result or metric == FRECHET:
                raise RpoError(f"the metric {metric!r} comes from more than one source; judges must name their metrics differently")
            before, after = (table[metric].to_numpy().astype(np.float64) for table in (base, tuned))
            both = ~np.isnan(before) & ~np.isnan(after)  # null where the metric does not apply to the image
            if both.any():
                comparison = asdict(compare(before[both], after[both], prompts[both], seed=seed))
                comparison["ci95"] = list(comparison["ci95"])
                comparison["detectable"] = comparison["detectable"] if isfinite(comparison["detectable"]) else None
                result[metric] = comparison
        if reference is not None and reference[0] == judge:
            distances = [frechet_distance(np.stack(table[FEATURES].to_pylist()), reference[1]) for table in (base, tuned)]
            result[FRECHET] = dict(zip(MODELS, distances, strict=True)) | {"difference": distances[1] - distances[0], "n": base.num_rows}
    for metric, value in holm({metric: found["p_value"] for metric, found in result.items() if "p_value" in found}).items():
        result[metric]["p_holm"] = value
    return result
