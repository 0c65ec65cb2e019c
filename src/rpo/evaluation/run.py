"""Evaluation from beginning to end: images of all models, measures of every judge, numbers with intervals.

Each metric of each judge becomes {FIRST: the first model's mean, MODEL: this one's, "difference", "ci95": [low, high] or null,
"win_rate", "win_ci95", "interval": how the intervals are made, "p_value", "p_holm", "n", "detectable", "kind", "better"}, with n the
number of prompts and the two means under the models' own names. For a reward that chose the training pairs there is also
"used_in_labelling": true; where the task knows its prompts' kinds, "categories": the same by kind. On the features of the first judge
that has any, named in "judge", "drift" is the distance of an image from the first model's, "diversity" (with several images per prompt)
the distance between them, and "frechet" that of both sets from good images. Where a judge is a `Comparer` the metric is its name, and
the value how much it prefers the model's image to the first one's, 0 to 1; the first one's is 1 minus that, its rows lack the metric,
and the numbers are marked "of_pairs".
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rpo.core.parquet import sweep, write_text
from rpo.core.records import write_record
from rpo.errors import RpoError
from rpo.evaluation.judges import DIVERSITY, DRIFT, FRECHET, OF_FEATURES, described_metric, headline_of, unknown_headline
from rpo.evaluation.rows import FEATURES, INDEX, KEYS, fingerprint, read_folder, write_rows
from rpo.evaluation.sampling import SHARD_ROWS, make_images, measure_images
from rpo.evaluation.statistics import compare, frechet_distance, holm, pairwise_distance
from rpo.evaluation.tables import TABLE, markdown
from rpo.evaluation.tasks import Place, Task, checked_overlap, overlap
from rpo.protocols import Comparer, Generator, Judge, Metric

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
    judges: Mapping[str, Callable[[], Judge | Comparer]],
    folder: Path,
    *,
    fingerprints: Mapping[str, str],
    curation_prompts: Iterable[str],
    labelled_by: Iterable[str] = (),
    declared: Mapping[str, Metric] | None = None,
    headline: str | None = None,
    allow_overlap: bool = False,
    batch_size: int = 16,
    references: Callable[[], Sequence[np.ndarray]] | None = None,
    seed: int = 0,
    progress: Progress = lambda what, done, total: None,
) -> dict[str, Numbers]:
    """Compares every model with the first one on the same prompts and noise; returns the numbers by model and metric (see the module).

    Rewards in `labelled_by` chose the training pairs. `declared` says how metrics read (others are scores, higher is better), `headline`
    which one decides; the index keeps the one that does, see `headline_of`. `references` are good images for a Fréchet distance. Rows
    stay in `folder` (see `rpo.evaluation.rows`), so a killed evaluation goes on at the first unfinished shard, and one more model, judge
    or seed costs nothing but itself. `fingerprints` says for every model and judge which weights it has: what was made under another
    one, or another batch size, is never used again. First each model makes the images that are missing, then each judge measures: one
    model or judge is in memory at a time.

    Raises `RpoError` if `curation_prompts` holds any of the task's prompts and that is not allowed, or a stored shard is damaged;
    `ValueError` for arguments, and for a headline that no judge measures.
    """
    _check(models, judges, fingerprints, batch_size)
    curation, places = set(curation_prompts), task.places()
    checked_overlap(task, curation, allowed=allow_overlap)
    planned = [task.name, [identifier for identifier, _ in task.prompts], SHARD_ROWS, batch_size, _VERSION]
    sweep(folder)
    index: dict[str, Any] = {"num_images": len(places), "models": {}}
    for model, build in models.items():
        images = f"images-{model}-{fingerprint(planned, fingerprints[model])}"
        make_images(build, places, folder / images, batch_size=batch_size, progress=_named(progress, f"{model}: images"))
        index["models"][model] = {"fingerprint": fingerprints[model], "images": images, "rows": {}}
    reference: tuple[str, np.ndarray] | None = None
    for name, build in judges.items():
        judge = build()
        _measure(index["models"], name, judge, fingerprints[name], places, folder, batch_size, progress)
        reference = reference or _reference(name, judge, references)
        del judge  # the next one may need its memory
    measured = {model: _Measured.read(folder, index, model) for model in models}
    numbers = _Numbers(task=task, declared=declared or {}, labelling=set(labelled_by) & set(judges), reference=reference, seed=seed)
    (first, base), *others = measured.items()
    result = {model: _by_name(numbers.of(base, tuned), first, model) for model, tuned in others}
    known = dict.fromkeys(name for own in result.values() for name in own if name not in OF_FEATURES)
    if headline is not None and headline not in known and headline not in (declared or {}):
        raise ValueError(unknown_headline(headline, known) + "; the images and measures that were made are kept")
    index |= _about(task, curation, fingerprints, judges, numbers.labelling, headline or "", result)
    write_rows(folder, {model: own.rows for model, own in measured.items()}, dict(task.prompts), task.categories)
    write_text(folder / TABLE, markdown(index))
    write_record(folder / INDEX, index)
    return result


def _measure(
    entries: dict[str, dict[str, Any]],
    name: str,
    judge: Judge | Comparer,
    print_of_judge: str,
    places: Sequence[Place],
    folder: Path,
    batch_size: int,
    progress: Progress,
) -> None:
    """Has a judge measure every model's images, or compare them with the first model's; enters where its rows are."""
    compares = isinstance(judge, Comparer)
    first = next(iter(entries.values()))["images"]
    for model, entry in entries.items():
        own = entry["images"]
        if compares and own == first:
            continue
        sides = (first, own) if compares else (own,)
        rows = f"rows-{model}-{name}-{fingerprint(*(side.rpartition('-')[2] for side in sides), print_of_judge)}"
        say = _named(progress, f"{model}: {name}")
        measure_images(name, judge, places, [folder / side for side in sides], folder / rows, batch_size=batch_size, progress=say)
        entry["rows"][name] = rows


def _about(
    task: Task,
    curation: set[str],
    fingerprints: Mapping[str, str],
    judges: Iterable[str],
    labelling: set[str],
    headline: str,
    result: Mapping[str, Numbers],
) -> dict[str, Any]:
    """What the index says beside where the rows are."""
    shared = overlap(task, curation)
    return {
        "task": task.described(),
        "curation_prompts": {"compared": len(curation), "shared": len(shared), "exact": len(shared.exact), "near": len(shared.near)},
        "judges": {name: fingerprints[name] for name in judges},
        "used_in_labelling": sorted(labelling),
        "headline": headline_of(headline, next(iter(result.values()))),
        "metrics": result,
    }


def _reference(name: str, judge: Judge | Comparer, references: Callable[[], Sequence[np.ndarray]] | None) -> tuple[str, np.ndarray] | None:
    """The judge's features of the good images; `None` without such images or features."""
    if references is None or isinstance(judge, Comparer):
        return None
    features = np.asarray(judge.features(references()))
    return (name, features) if features.shape[1] else None


def _by_name(numbers: Numbers, first: str, model: str) -> Numbers:
    """The same numbers with both means under the models' names."""

    def named(own: Mapping[str, Any]) -> dict[str, Any]:
        renamed = {first: own["base"], model: own["tuned"]} | {key: value for key, value in own.items() if key not in ("base", "tuned")}
        if "categories" in renamed:
            renamed["categories"] = {kind: named(told) for kind, told in renamed["categories"].items()}
        return renamed

    return {metric: named(own) for metric, own in numbers.items()}


def _named(progress: Progress, what: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(what, done, total)


_KEYS_OF_A_METRIC = {
    "difference", "ci95", "win_rate", "win_ci95", "interval", "p_value", "p_holm", "n", "detectable", "kind", "better", "says", "judge",
    "categories", "used_in_labelling", "of_pairs",
}  # fmt: skip
"""Names that a model cannot have: its mean stands beside them."""


def _check(models: Mapping[str, object], judges: Mapping[str, object], fingerprints: Mapping[str, str], batch_size: int) -> None:
    if len(models) < 2:
        raise ValueError(f"models must be at least two, the first of which the others are compared with, got {sorted(models)}")
    if not judges:
        raise ValueError("judges must hold at least one judge")
    for kind, names, taken in (("models", models, _KEYS_OF_A_METRIC), ("judges", judges, set(models))):
        for name in names:
            if not _NAME.fullmatch(name) or name in taken:
                raise ValueError(f"{kind}: {name!r} is no name for one; use 1 to 40 letters, digits and underscores, each name once")
    missing = [name for name in (*models, *judges) if not fingerprints.get(name)]
    if missing:
        raise ValueError(f"fingerprints must say which weights {', '.join(missing)} has: give a string that changes with the weights")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")


class _Measured:
    """Everything the judges measured on one model's images: one row per image, in the order of the task."""

    def __init__(self, tables: Mapping[str, pa.Table]) -> None:
        self.judge_of: dict[str, str] = {}
        """Metric -> the judge that measured it."""
        if not tables:
            raise ValueError("at least one judge must measure single images; all of them compare two")
        first = next(iter(tables.values()))
        columns = {key: first[key] for key in KEYS}
        for judge, table in tables.items():
            for metric in table.column_names:
                if metric in (*KEYS, FEATURES):
                    continue
                if metric in self.judge_of or metric in OF_FEATURES:
                    raise RpoError(f"the metric {metric!r} comes from more than one source; judges must name their metrics differently")
                self.judge_of[metric] = judge
                columns[metric] = table[metric]
        self.rows = pa.table(columns)
        self.prompts = np.array(first["prompt_id"].to_pylist())
        self.features = {judge: _vectors(table[FEATURES]) for judge, table in tables.items()}

    @classmethod
    def read(cls, folder: Path, index: Mapping[str, Any], model: str) -> "_Measured":
        return cls({judge: read_folder(folder / rows, index["num_images"]) for judge, rows in index["models"][model]["rows"].items()})

    def values(self, metric: str) -> np.ndarray:
        """Not a number where the metric does not apply to the image."""
        return self.rows[metric].to_numpy().astype(np.float64)


def _vectors(column: pa.ChunkedArray) -> np.ndarray:
    """(rows, d) of a column of lists that are all as long."""
    values = np.concatenate([chunk.flatten().to_numpy() for chunk in column.chunks])
    if values.size % len(column):
        raise RpoError(f"a judge gave features of several widths, {values.size} numbers for {len(column)} images; they must be alike")
    return values.reshape(len(column), -1)


@dataclass(frozen=True, kw_only=True)
class _Numbers:
    """Computes what is known of each metric of one model against the first."""

    task: Task
    declared: Mapping[str, Metric]
    labelling: set[str]
    reference: tuple[str, np.ndarray] | None
    seed: int

    def of(self, base: _Measured, tuned: _Measured) -> Numbers:
        """Every metric that was measured on both."""
        assert all(base.rows[key].equals(tuned.rows[key]) for key in KEYS), "all models make the same places in the same order"
        kinds = np.array([self.task.categories.get(prompt, "") for prompt in base.prompts])
        result: Numbers = {}
        for metric, judge in tuned.judge_of.items():
            after, of_pairs = tuned.values(metric), judge not in base.features
            if not of_pairs and metric not in base.judge_of:
                continue  # it applied to no image of the first model
            before = 1 - after if of_pairs else base.values(metric)
            both = ~np.isnan(before) & ~np.isnan(after)
            if not both.any():
                continue
            how = Metric(kind="probability") if of_pairs else self.declared.get(metric, Metric())
            result[metric] = self._compared(before, after, base.prompts, both, how)
            by_kind = {kind: both & (kinds == kind) for kind in sorted(set(kinds)) if kind}
            if by_kind:
                told = {kind: self._compared(before, after, base.prompts, rows, how) for kind, rows in by_kind.items() if rows.any()}
                result[metric]["categories"] = told
            marks = {"used_in_labelling": judge in self.labelling, "of_pairs": of_pairs}
            result[metric] |= {mark: True for mark, holds in marks.items() if holds}
        result |= self._of_features(base, tuned)
        for metric, value in holm({name: own["p_value"] for name, own in result.items() if "p_value" in own}).items():
            result[metric]["p_holm"] = value
        return result

    def _of_features(self, base: _Measured, tuned: _Measured) -> Numbers:
        """What the images' features say of the models: diversity, drift, distance to good images."""
        result: Numbers = {}
        judge = next((name for name, features in base.features.items() if features.shape[1]), None)
        if judge is None:
            return result
        before, after = base.features[judge], tuned.features[judge]
        if self.task.seeds_per_prompt > 1:
            apart, then = (pairwise_distance(features, base.prompts) for features in (before, after))
            every = np.ones(len(apart), dtype=bool)
            result[DIVERSITY] = self._compared(apart, then, np.arange(len(every)), every, OF_FEATURES[DIVERSITY])
        moved = float(np.linalg.norm(after - before, axis=1).mean())
        result[DRIFT] = {"base": 0.0, "tuned": moved, "difference": moved, "n": len(before)} | described_metric(OF_FEATURES[DRIFT])
        if self.reference is not None:
            a, b = (frechet_distance(model.features[self.reference[0]], self.reference[1]) for model in (base, tuned))
            result[FRECHET] = {"base": a, "tuned": b, "difference": b - a, "n": len(before)} | described_metric(OF_FEATURES[FRECHET])
        return {name: own | {"judge": judge} for name, own in result.items()}

    def _compared(self, before: np.ndarray, after: np.ndarray, prompts: np.ndarray, rows: np.ndarray, how: Metric) -> dict[str, Any]:
        comparison = asdict(compare(before[rows], after[rows], prompts[rows], bounded=how.bounded, seed=self.seed))
        if how.better == "lower":  # the lower image wins
            comparison["win_rate"] = 1 - comparison["win_rate"]
            comparison["win_ci95"] = comparison["win_ci95"] and tuple(1 - end for end in reversed(comparison["win_ci95"]))
        for name in ("ci95", "win_ci95"):
            comparison[name] = None if comparison[name] is None else list(comparison[name])
        return comparison | {"detectable": comparison["detectable"] if isfinite(comparison["detectable"]) else None} | described_metric(how)
