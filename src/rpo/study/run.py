"""Many ways to make pairs, compared: each arm trains on its own pairs of the same source images and is measured like the others.

    curations/NAME-seedS-<fp8>/          a run folder each; stages that two of them have in common are made once and linked
    pairs/ARM-SIZE-seedS-<fp8>.parquet   what an arm trains on at a size
    search/, cells/                      a training and its measurement each: result.json, rows.parquet
    study.json  study.md  rows.parquet  study.html

Every folder's name carries what it depends on, so a study goes on where it was stopped, and grows by an arm or a seed.
"""

import importlib.util
import json
import multiprocessing
import os
import shutil
import sys
import threading
from collections.abc import Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow.parquet as pq
import torch
from rich.console import Console

from rpo.api.curation import curate, planned_rows
from rpo.api.evaluation import compare
from rpo.api.folder import PAIRS, read_summary
from rpo.api.training import tune
from rpo.core.described import described
from rpo.core.hashing import digest
from rpo.core.parquet import atomic_path, write_text
from rpo.core.progress import bars_of, quiet
from rpo.core.run_folder import open_run
from rpo.core.terminal import Terminal
from rpo.curation.select import select_pairs
from rpo.data.pairs import Pair, read_pairs, write_pairs
from rpo.engine.layers import lay_out
from rpo.evaluation.judges import check_headline, declared_metrics, metric_of
from rpo.evaluation.rows import ROWS
from rpo.protocols import Metric
from rpo.recipe import Arm, Evaluation, Recipe, Sampler, Study
from rpo.study.page import write_study_page
from rpo.study.statistics import Measured, gathered, shown_effect, study_numbers, study_table
from rpo.training.config import TrainConfig
from rpo.training.objectives.preference import DiffusionDPO

STUDY = "study.json"
RESULT = "result.json"
_SHARED = ("train/cache", "evaluation")
"""Parts of a cell whose files are named by content: whoever needs the same finds it."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training and its measurement; holds values only, so that it can be sent to a process."""

    arm: str
    size: int
    seed: int
    train: TrainConfig
    generator: Sampler
    evaluate: Evaluation
    pairs: Path
    folder: Path
    shared: Path
    """What cells leave for each other."""
    threads: int


def study(recipe: Recipe, out: Path, console: Console, *, quick: bool = False, arms: Sequence[str] = (), workers: int = 2) -> Path:
    """Carries out the recipe's study in the folder `out`; returns its page. Raises `ValueError` for a recipe without one."""
    if recipe.study is None or recipe.evaluate is None:
        raise ValueError(f"the recipe {recipe.name!r} has no study; `rpo study shapes` has one")
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    check_headline(recipe.evaluate.headline, recipe.evaluate.judges, ())  # a study measures with judges alone
    declared, _ = declared_metrics(recipe.evaluate.judges, ())
    how = declared.get(recipe.evaluate.headline, Metric())
    planned = _with_arms(recipe.study(recipe, quick), arms)
    with open_run(out, resume=True):
        cells = _Cells(recipe=recipe, study=planned, out=out, threads=max(1, (os.cpu_count() or 1) // workers), console=console)
        with _pool(workers, cells.threads, sys.modules[recipe.study.__module__]) as pool:
            searched = {arm.name: cells.search(arm) for arm in planned.arms if len(arm.candidates) > 1}
            found = _carry_out(pool, [cell for group in searched.values() for cell in group], "settings", console)
            settings = {arm.name: _best(arm, searched.get(arm.name, ()), found, recipe.evaluate.headline, how) for arm in planned.arms}
            chosen = [cell for arm in planned.arms for cell in cells.trainings(arm, arm.candidates[settings[arm.name][0]])]
            results = _carry_out(pool, chosen, "trainings", console)
        drifts = winner_drifts(chosen)
        told = {cell.folder: results[cell.folder] | {"winner_drift": drifts[cell.folder]} for cell in chosen}
        measured = [Measured(arm=c.arm, size=c.size, seed=c.seed, rows=c.folder / ROWS, told=told[c.folder]) for c in chosen]
        rows = gathered(measured)
        about = {
            "recipe": recipe.name,
            "headline": recipe.evaluate.headline,
            "pairs_per_source": planned.pairs_per_source,
            "steps": planned.arms[0].candidates[0].steps,
            "arms": [
                {"name": arm.name, "says": arm.says, "pairs_from": arm.pairs_from, "search": settings[arm.name][1]} for arm in planned.arms
            ],
            "beside": planned.beside,
            "cells": study_numbers(rows, measured, recipe.evaluate.headline, declared),
            "curations": cells.yields(),
        }
        with atomic_path(out / ROWS) as part:
            pq.write_table(rows, part, compression="zstd")
        write_text(out / STUDY, json.dumps(about, indent=1) + "\n")
        write_text(out / "study.md", study_table(about))
        return write_study_page(out, about)


def _with_arms(planned: Study, names: Sequence[str]) -> Study:
    if not names:
        return planned
    known = [arm.name for arm in planned.arms]
    if unknown := set(names) - set(known):
        raise ValueError(f"there are no arms {sorted(unknown)}; known are {', '.join(known)}")
    return replace(planned, arms=tuple(arm for arm in planned.arms if arm.name in (known[0], *names)))


@dataclass(frozen=True, kw_only=True)
class _Cells:
    """Makes the cells of a study, and the pairs they need."""

    recipe: Recipe
    study: Study
    out: Path
    threads: int
    console: Console

    def search(self, arm: Arm) -> list[Cell]:
        """Every setting of an arm, at the largest size on the first seed, measured on validation prompts."""
        evaluate = self.recipe.evaluate
        if evaluate is None or evaluate.validation is None:
            raise ValueError(f"the recipe {self.recipe.name!r} has no validation prompts to choose settings on; give each arm one setting")
        validation = replace(evaluate, prompts=evaluate.validation)
        size, seed = self.study.sizes[-1], self.study.seeds[0]
        return [self._cell("search", arm, setting, size, seed, validation) for setting in arm.candidates]

    def trainings(self, arm: Arm, setting: TrainConfig) -> list[Cell]:
        """The arm with its setting at the sizes and on the seeds that it is trained on."""
        assert self.recipe.evaluate is not None
        sizes = self.study.sizes if arm.main else self.study.sizes[-1:]
        seeds = self.study.seeds if arm.main else self.study.seeds[: self.study.side_seeds]
        return [self._cell("cells", arm, setting, size, seed, self.recipe.evaluate) for size in sizes for seed in seeds]

    def _cell(self, kind: str, arm: Arm, setting: TrainConfig, size: int, seed: int, evaluation: Evaluation) -> Cell:
        evaluate = replace(evaluation, seed=seed, scorers=(), references=None)
        train, pairs = replace(setting, seed=seed), self._pairs(arm, size, seed)
        depends_on = digest([described(train), described(evaluate), pairs.stem, described(self.recipe.generator)])
        return Cell(
            arm=arm.name,
            size=size,
            seed=seed,
            train=train,
            generator=self.recipe.generator,
            evaluate=evaluate,
            pairs=pairs,
            folder=self.out / kind / f"{arm.name}-{size}-seed{seed}-{depends_on[:8]}",
            shared=self.out / "shared",
            threads=self.threads,
        )

    def _pairs(self, arm: Arm, size: int, seed: int) -> Path:
        """The arm's pairs of the first `size` source images."""
        folders = {name: self._curated(name, seed) for name in arm.pairs_from}
        share = len(folders)
        most = int(size * self.study.pairs_per_source / share)
        depends_on = digest([size, most, sorted(folder.name for folder in folders.values())])
        path = self.out / "pairs" / f"{arm.name}-{size}-seed{seed}-{depends_on[:8]}.parquet"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            pairs: list[Pair] = []
            for name, folder in folders.items():
                curation = self.study.curations[name]
                rows = size // share // curation.images_per_row
                found = list(select_pairs(folder, curation.label, held_out_share=curation.held_out_share, rows=rows))
                pairs += [replace(pair, id=f"{name}-{pair.id}") for pair in found[:most]]
            write_pairs(path, pairs)
        return path

    def _folder(self, name: str, seed: int) -> Path:
        curation = replace(self.study.curations[name], seed=seed)
        fingerprint = lay_out(self.out, planned_rows(self.recipe.name, curation), curation.stages())[-1].fingerprint
        return self.out / "curations" / f"{name}-seed{seed}-{fingerprint[:8]}"

    def _curated(self, name: str, seed: int) -> Path:
        folder = self._folder(name, seed)
        if not (folder / PAIRS).exists():
            others = [other for other in sorted(folder.parent.glob(f"*-seed{seed}-*")) if other != folder]
            self.console.print(f"curation {name}, seed {seed}", highlight=False)
            recipe = replace(self.recipe, curate=replace(self.study.curations[name], seed=seed))
            with open_run(folder, resume=True) as run:
                curate(recipe, run, self.console, adopt_from=others)
        return folder

    def yields(self) -> dict[str, dict[str, Any]]:
        """What each curation kept of how many source images, and what it cost, on the first seed."""
        told: dict[str, dict[str, Any]] = {}
        for name in dict.fromkeys(name for arm in self.study.arms for name in arm.pairs_from):
            summary, curation = read_summary(self._folder(name, self.study.seeds[0])), self.study.curations[name]
            told[name] = {
                "sources": summary["funnel"][0]["rows_in"] * curation.images_per_row,
                "pairs": summary["pairs_kept"],
                "fingerprint_auc": summary["controls"]["fingerprint_auc"],
                "core_seconds": round(sum(summary["seconds"].values()) * torch.get_num_threads(), 1),
            }
        return told


@contextmanager
def _pool(workers: int, threads: int, module: ModuleType) -> Generator[ProcessPoolExecutor]:
    assert module.__file__ is not None
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_begin,
        initargs=(threads, module.__name__, module.__file__),
    )
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()  # whatever is half done is made again
        raise
    pool.shutdown()


def _begin(threads: int, module: str, file: str) -> None:
    """In each process: what a recipe file defines can only be received where that file was loaded under the same name."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    quiet()
    if importlib.util.find_spec(module) is None:
        spec = importlib.util.spec_from_file_location(module, file)
        assert spec is not None and spec.loader is not None
        sys.modules[module] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[module])


def _end_with_parent() -> None:
    """A killed study leaves nobody behind who holds its folders; what is half done is made again."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _carry_out(pool: ProcessPoolExecutor, cells: Sequence[Cell], what: str, console: Console) -> dict[Path, dict[str, Any]]:
    """Every cell's result by folder, of those that are there already and of the others."""
    by_folder = {cell.folder: cell for cell in cells}
    results = {folder: _read(folder) for folder in by_folder if (folder / RESULT).exists()}
    todo = [cell for folder, cell in by_folder.items() if folder not in results]
    with bars_of(console) as bars:
        task = bars.add_task(what, total=len(by_folder), completed=len(results))
        for cell, result in zip(todo, pool.map(carry_out, todo), strict=True):
            results[cell.folder] = result
            bars.advance(task)
            kind = result.get("kind", "score")
            gain = shown_effect({"mean": result["gain"], "ci95": None}, {"kind": kind}) + " points" * (kind == "fraction")
            said = f"{cell.arm}, {cell.size} sources, seed {cell.seed}: {gain}"
            console.print(f"{what} {len(results)}/{len(by_folder)}: {said}", highlight=False)
    return results


def _read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / RESULT).read_text(encoding="utf-8"))


def carry_out(cell: Cell) -> dict[str, Any]:
    """Trains and measures; what a killed one had begun is gone on with."""
    console = Terminal(stderr=True, quiet=True)
    recipe = Recipe(name="study", generator=cell.generator, train=cell.train, evaluate=cell.evaluate)
    for part in _SHARED:
        _link(cell.shared / part, cell.folder / part)
    with open_run(cell.folder, resume=True) as run:
        tune(recipe, run, console, pairs_file=cell.pairs, resume=True, allow_fingerprint=True)
        compare(recipe, run, console)
    lines = _metrics(cell)
    summary = read_summary(cell.folder)
    headline = summary["evaluation"][cell.evaluate.headline]
    result = {
        "gain": headline["difference"],
        "kind": metric_of(headline).kind,
        "setting": f"lr {cell.train.lr:g}, {cell.train.objective.describe()}",
        "pairs": len(read_pairs(cell.pairs)),
        "core_seconds": round(summary["seconds"]["train"] * cell.threads, 1),
        "alarm": next((line["alarm"] for line in lines if line.get("alarm")), None),
    }
    for part in _SHARED:
        _link(cell.folder / part, cell.shared / part, leave=("tuned",))
    shutil.copyfile(cell.folder / "evaluation" / ROWS, cell.folder / ROWS)
    write_text(cell.folder / RESULT, json.dumps(result) + "\n")
    for part in ("train/weights", "train/checkpoints", *_SHARED):
        shutil.rmtree(cell.folder / part)
    return result


def _metrics(cell: Cell) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (cell.folder / "train" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def winner_drifts(cells: Sequence[Cell]) -> dict[Path, float | None]:
    """Each policy's error on chosen images less the base model's, on average over the last third of its steps: below 0 is better.

    Where an objective asks no reference, the base model's errors are those of a cell with the same pairs and noise, if there is one.
    """
    policy: dict[Path, float] = {}
    base: dict[tuple[str, TrainConfig], float] = {}
    for cell in cells:
        last = _metrics(cell)[-max(1, cell.train.steps // 3) :]
        policy[cell.folder] = sum(line["chosen_error"] for line in last) / len(last)
        if all("chosen_over_reference" in line for line in last):
            base[_seen(cell)] = sum(line["chosen_error"] - line["chosen_over_reference"] for line in last) / len(last)
    return {cell.folder: policy[cell.folder] - base[_seen(cell)] if _seen(cell) in base else None for cell in cells}


def _seen(cell: Cell) -> tuple[str, TrainConfig]:
    """What decides the errors of a model that does not move: pairs, their order and their noise."""
    return cell.pairs.stem.rsplit("-", 1)[1], replace(cell.train, objective=DiffusionDPO(), lr=1.0, ema_decay=None)


def _link(source: Path, target: Path, leave: Sequence[str] = ()) -> None:
    """Hard links of all shards below `source` that `target` lacks; folders of models named in `leave` stay where they are."""
    for file in source.rglob("*"):
        place = target / file.relative_to(source)
        if not file.is_file() or file.name.startswith(".") or any(f"-{name}-" in place.parent.name for name in leave):
            continue
        if file.parent != source or source.name == "cache":  # beside an evaluation's shards lies what it says of them: its own
            place.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileExistsError):
                os.link(file, place)


def _best(
    arm: Arm, cells: Sequence[Cell], found: dict[Path, dict[str, Any]], headline: str, how: Metric
) -> tuple[int, list[dict[str, Any]]]:
    """Which of the arm's settings gains most on validation prompts, and what each gains."""
    told = [{"setting": found[cell.folder]["setting"], headline: found[cell.folder]["gain"]} for cell in cells]
    gains = [-line[headline] if how.better == "lower" else line[headline] for line in told]
    return (gains.index(max(gains)) if gains else 0), told
