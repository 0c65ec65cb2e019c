"""Carries out a recipe in a run folder: curate, train, evaluate, report. Each part reads and writes only that folder."""

import json
import math
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from rpo.config import PromptSource, Recipe, Sampler
from rpo.curate.fingerprints import canonical, digest, model_identity
from rpo.curate.funnel import funnel, funnel_lines, stage_seconds
from rpo.curate.local_engine import run_stages
from rpo.curate.pipeline import fan_out, plan
from rpo.curate.select import controls, planned_prompts, select_pairs
from rpo.curate.sidecars import lay_out, refuse_changed
from rpo.data.images import decode_image, encode_png
from rpo.data.pairs import Pair, write_pairs
from rpo.data.readers import load_pairs, read_prompts
from rpo.data.run_folder import RunFolder
from rpo.data.shards import write_text
from rpo.described import described
from rpo.errors import RpoError
from rpo.evaluate.judges import ScorerJudge
from rpo.evaluate.run import evaluate
from rpo.evaluate.tasks import Task
from rpo.models.diffusers_denoiser import LORA_FILE
from rpo.train.health import check_health, fingerprint_auc
from rpo.train.loop import train
from rpo.train.parallel import launched_rank
from rpo.train.rehearsal import rehearse

PAIRS = "pairs.parquet"
SUMMARY = "summary.json"
RECIPE = "recipe.json"
SUMMARY_VERSION = 1
_PACKAGES = ("rpo", "torch", "diffusers", "transformers", "peft", "pyarrow", "numpy", "pillow")


def read_summary(folder: Path) -> dict[str, Any]:
    """What is known of the run so far; an empty one for a new folder."""
    path = folder / SUMMARY
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"version": SUMMARY_VERSION, "seconds": {}}


def _update_summary(folder: Path, changes: Mapping[str, Any], seconds: Mapping[str, float]) -> None:
    summary = read_summary(folder)
    summary |= changes
    summary["seconds"] |= {name: round(value, 2) for name, value in seconds.items()}
    write_text(folder / SUMMARY, json.dumps(summary, indent=2) + "\n")


def _git_revision() -> str | None:
    """Of the source tree this package runs from, when it is one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def write_recipe(run: RunFolder, recipe: Recipe) -> None:
    """The resolved recipe, package versions and git revision, before the first row or step."""
    record = {
        "recipe": described(recipe),
        "versions": {"python": sys.version.split()[0]} | {name: _version(name) for name in _PACKAGES},
        "git": _git_revision(),
    }
    write_text(run.path / RECIPE, json.dumps(record, indent=2) + "\n")


def _prompts(source: PromptSource, seed: int, file: Path | None) -> dict[str, str | None]:
    """The user's prompts or the recipe's own, each understood, with their kinds if known.

    Raises `ValueError` that names the file and the prompt's number.
    """
    prompts = read_prompts(file) if file else dict.fromkeys(source.prompts(seed))
    for number, prompt in enumerate(prompts, start=1):
        try:
            source.check(prompt)
        except ValueError as error:
            raise ValueError(f"{file}, prompt {number}: {error}" if file else str(error)) from error
    return prompts


def curate(recipe: Recipe, run: RunFolder, console: Console, prompts_file: Path | None = None) -> None:
    """Makes `pairs.parquet` and everything on the way to it."""
    curation = recipe.curate
    if curation is None:
        raise ValueError(f"the recipe {recipe.name!r} makes no pairs; bring them with `rpo train {recipe.name} --pairs FILE`")
    prompts = _prompts(curation.prompts, curation.seed, prompts_file)
    rows = plan(fan_out(prompts, curation.samples), seed=curation.seed, columns={"sample": pa.int32()})
    refuse_changed(run.path, lay_out(run.path, rows, curation.stages()))
    write_recipe(run, recipe)
    run_stages(run, rows, curation.stages(), console=console)
    began = time.monotonic()
    stages, seconds = funnel(run.path), stage_seconds(run.path)
    for line in funnel_lines(stages, seconds):
        console.print(line, highlight=False)
    pairs = select_pairs(run.path, curation.label, held_out_share=curation.held_out_share)
    write_pairs(run.path / PAIRS, pairs)
    auc = _fingerprint(pairs, curation.seed)
    health = {**controls(run.path), "fingerprint_auc": None if math.isnan(auc) else auc}
    _update_summary(
        run.path,
        {"recipe": recipe.name, "seed": curation.seed, "funnel": stages, "pairs_kept": len(pairs), "controls": health},
        seconds | {"select": time.monotonic() - began},
    )
    console.print(f"{len(pairs)} pairs kept in {run.path / PAIRS}", highlight=False)


def _fingerprint(pairs: Sequence[Pair], seed: int) -> float:
    chosen, rejected = ([decode_image(getattr(pair, side)) for pair in pairs] for side in ("chosen", "rejected"))
    return fingerprint_auc(chosen, rejected, seed)


def _healthy_pairs(recipe: Recipe, path: Path, console: Console, allow_fingerprint: bool) -> list[Pair]:
    """Says what was dropped and how the rest looks. Raises `RpoError` when one side carries a fingerprint."""
    pairs, dropped = load_pairs(path)
    if dropped:
        reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(dropped.items()))
        console.print(f"{len(pairs)} pairs of {path}; dropped rows: {reasons}", highlight=False)
    console.print(check_health(_fingerprint(pairs, recipe.train.seed), allow_fingerprint=allow_fingerprint), highlight=False)
    return pairs


def rehearse_tuning(recipe: Recipe, pairs_file: Path, console: Console) -> None:
    """What `tune` would take, without a trace in any run folder."""
    pairs = _healthy_pairs(recipe, pairs_file, console, allow_fingerprint=True)
    rehearse(recipe.train, pairs, lambda line: console.print(line, highlight=False))


def tune(
    recipe: Recipe,
    run: RunFolder,
    console: Console,
    *,
    pairs_file: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    allow_fingerprint: bool = False,
) -> None:
    """Pair health first, then training on `pairs.parquet` or on a file that is brought.

    Of several processes that train together the first does all else.
    """
    path = pairs_file or run.path / PAIRS

    def draw(weights: Path, prompts: Sequence[str]) -> list[np.ndarray]:
        return recipe.generator.tuned(weights).build().generate(prompts, range(len(prompts)))

    if launched_rank():
        train(recipe.train, load_pairs(path)[0], run.path, resume=resume, overwrite=overwrite, draw=draw)
        return
    pairs = _healthy_pairs(recipe, path, console, allow_fingerprint)
    began = time.monotonic()
    result = train(recipe.train, pairs, run.path, resume=resume, overwrite=overwrite, draw=draw)
    metrics = {name: value for name, value in result.metrics.items() if name != "seconds"}
    seconds = time.monotonic() - began
    earlier = read_summary(run.path)["seconds"].get("train", 0.0)
    training = {"weights": result.weights.relative_to(run.path).as_posix(), "lora": result.lora, "last": metrics}
    if pairs_file:
        training["pairs"] = str(pairs_file)
    # A resumed run that had nothing left to do keeps the time of the one that did the work.
    _update_summary(run.path, {"training": training}, {"train": max(seconds, earlier)})
    console.print(f"tuned weights in {result.weights}", highlight=False)


def _weights(run: RunFolder) -> Path:
    weights = run.path / "train" / "weights"
    if not weights.exists():
        raise RpoError(f"{run.path} holds no tuned weights; make them with `rpo train`")
    return weights


def _samplers(recipe: Recipe, run: RunFolder, models: Sequence[str]) -> dict[str, Sampler]:
    """The models to compare, by name. Raises `ValueError` for a wrong NAME=MODEL."""
    if not models:
        return {"base": recipe.generator, "tuned": recipe.generator.tuned(_weights(run))}
    samplers: dict[str, Sampler] = {}
    for text in models:
        name, equals, model = text.partition("=")
        if not equals or not name or not model or name in samplers:
            raise ValueError(f"--models takes NAME=MODEL, each name once, got {text!r}")
        folder = Path(model)
        if model == "base":
            samplers[name] = recipe.generator
        elif (folder / "train" / "weights").is_dir():
            samplers[name] = recipe.generator.tuned(folder / "train" / "weights")
        elif (folder / "model_index.json").is_file() or (folder / LORA_FILE).is_file():
            samplers[name] = recipe.generator.tuned(folder)
        else:
            raise ValueError(
                f"--models {name}={model}: give `base`, a run folder with tuned weights, a folder of a pipeline, or one with {LORA_FILE}"
            )
    return samplers


def _training_pairs(folder: Path, console: Console) -> list[Pair]:
    """What a run was tuned on: its own pairs or the file that was brought. Says so if that is gone."""
    brought = read_summary(folder).get("training", {}).get("pairs")
    path = Path(brought or folder / PAIRS)
    if path.exists():
        return load_pairs(path)[0]
    if brought:
        console.print(f"warning: {path} is gone, which {folder} was tuned on: its prompts and rewards are not checked", highlight=False)
    return []


def _trained_on(run: RunFolder, models: Sequence[str], console: Console) -> tuple[list[Pair], set[str], set[str]]:
    """The run's own pairs; prompts that it or any compared run has seen; rewards that chose the pairs of any of them."""
    named = [Path(text.partition("=")[2]) for text in models]
    runs = dict.fromkeys([run.path, *(folder for folder in named if (folder / "train" / "weights").is_dir())])
    pairs = {folder: _training_pairs(folder, console) for folder in runs}
    every = [pair for own in pairs.values() for pair in own]
    seen = {prompt for folder in runs for prompt in planned_prompts(folder)} | {pair.prompt for pair in every}
    return pairs[run.path], seen, {reward for pair in every for reward in json.loads(pair.scores)}


def compare(
    recipe: Recipe,
    run: RunFolder,
    console: Console,
    prompts_file: Path | None = None,
    *,
    models: Sequence[str] = (),
    images_per_prompt: int | None = None,
    allow_overlap: bool = False,
) -> None:
    """Base against tuned, or the first of `models` (NAME=MODEL) against the others, on prompts that the training has not seen."""
    evaluation = recipe.evaluate
    if evaluation is None:
        raise ValueError(f"the recipe {recipe.name!r} has no judge, so there is nothing to evaluate with")
    samplers = _samplers(recipe, run, models)
    prompts = _prompts(evaluation.prompts, evaluation.seed, prompts_file)
    pairs, seen, rewards = _trained_on(run, models, console)
    judges: dict[str, Any] = {name: config.build() for name, config in evaluation.judges}
    judges |= {name: ScorerJudge(name, config.build()) for name, config in evaluation.scorers}
    references, first = None, evaluation.judges[0][0]
    if evaluation.references is not None:
        references = (first, judges[first].features(evaluation.references.images()))
    configs = {**samplers, **dict(evaluation.judges), **dict(evaluation.scorers)}
    task = Task.of(
        f"{recipe.name}-{evaluation.seed}" if prompts_file is None else f"{prompts_file.stem}-{evaluation.seed}",
        prompts,
        seeds_per_prompt=images_per_prompt or evaluation.seeds_per_prompt,
        categories={prompt: kind for prompt, kind in prompts.items() if kind},
    )
    began = time.monotonic()
    with _bars(console) as bars:
        numbers = evaluate(
            task,
            {name: sampler.build for name, sampler in samplers.items()},
            judges,
            run.path / "evaluation",
            fingerprints={name: _identity(config) for name, config in configs.items()},
            curation_prompts=seen,
            labelled_by=rewards,
            allow_overlap=allow_overlap,
            batch_size=evaluation.batch_size,
            reference_features=references,
            seed=evaluation.seed,
            progress=_reporter(bars),
        )
    seed = read_summary(run.path).get("seed", evaluation.seed)  # a run on pairs that were brought has had no curation
    told = {"recipe": recipe.name, "seed": seed, "headline": evaluation.headline}
    preferred = _judge_prefers_edit(pairs, judges[first], evaluation.headline)
    _update_summary(
        run.path,
        {
            "evaluation": numbers.get("tuned") or next(iter(numbers.values())),
            "comparisons": numbers,
            "pairs": {"judge_prefers_edit": preferred},
            **told,
        },
        {"evaluate": max(time.monotonic() - began, read_summary(run.path)["seconds"].get("evaluate", 0.0))},
    )


def _identity(config: Any) -> str:
    models = {model: model_identity(model) for model in config.models()}
    return digest(canonical(config, models))


def _judge_prefers_edit(pairs: Sequence[Pair], judge: Any, metric: str) -> float | None:
    """Share of edited pairs in which the judge's metric is higher for the edit than for its opponent, a tie as half."""
    pairs = [pair for pair in pairs if "chosen" in json.loads(pair.provenance)]
    if not pairs:
        return None
    edit_won = [json.loads(pair.provenance)["chosen"].startswith("edited") for pair in pairs]
    prompts = [pair.prompt for pair in pairs]
    chosen, rejected = (
        np.array([m[metric] for m in judge.measure([decode_image(getattr(p, side)) for p in pairs], prompts)])
        for side in ("chosen", "rejected")
    )
    preferred = (1 + np.sign(chosen - rejected)) / 2
    return float(np.where(edit_won, preferred, 1 - preferred).mean())


def _bars(console: Console) -> Progress:
    columns = (TextColumn("{task.description:>20}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)


def _reporter(bars: Progress):
    tasks: dict[str, TaskID] = {}

    def report(what: str, done: int, total: int) -> None:
        if what not in tasks:
            tasks[what] = bars.add_task(what, total=total)
        bars.update(tasks[what], completed=done)
        if done == total and not bars.console.is_terminal:
            bars.console.print(f"{what:>20}  {total} images done", highlight=False)

    return report


def generate(recipe: Recipe, run: RunFolder | None, prompt: str, seed: int, out: Path) -> None:
    """A picture of the prompt; with a run, base beside tuned from the same noise."""
    if recipe.understands is not None:
        recipe.understands(prompt)
    samplers = [recipe.generator] + ([recipe.generator.tuned(_weights(run))] if run else [])
    pictures = [sampler.build().generate([prompt], [seed])[0] for sampler in samplers]
    gap = np.full((pictures[0].shape[0], 4, 3), 255, dtype=np.uint8)
    row = pictures[0] if len(pictures) == 1 else np.concatenate([pictures[0], gap, pictures[1]], axis=1)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(encode_png(row))


def results_tables(summary: Mapping[str, Any], first: str = "base") -> list[Table]:
    """The numbers of a finished evaluation, a table for each model against the first, the headline on top."""
    tables: list[Table] = []
    for model, numbers in summary["comparisons"].items():
        title = f"{summary['recipe']}, seed {summary['seed']}: {first} against {model}"
        table = Table(title=title, title_justify="left")
        for column in ("metric", first, model, "difference", "95 % interval", "n"):
            table.add_column(column, justify="left" if column == "metric" else "right")
        order = sorted(
            numbers, key=lambda name: (name != summary["headline"], "used_in_labelling" in numbers[name], list(numbers).index(name))
        )
        for name in order:
            value = numbers[name]
            interval = "[{:+.3f}, {:+.3f}]".format(*value["ci95"]) if "ci95" in value else ""
            cells = (f"{value['base']:.3f}", f"{value['tuned']:.3f}", f"{value['difference']:+.3f}", interval, str(value["n"]))
            shown = f"{name} (used in labelling)" if "used_in_labelling" in value else name
            table.add_row(shown, *cells, style="bold" if name == summary["headline"] else None)
        tables.append(table)
    return tables
