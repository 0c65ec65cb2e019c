"""From pairs to weights."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from rpo.api.curation import pairs_leakage
from rpo.api.folder import PAIRS, drawn_by, update_summary
from rpo.core.hashing import model_identity
from rpo.core.run_folder import RunFolder
from rpo.curation.leakage import check_health
from rpo.data.pairs import Pair
from rpo.data.readers import load_pairs
from rpo.recipe import Recipe
from rpo.training.dry_run import rehearse
from rpo.training.loop import TrainResult, train
from rpo.training.runtime.distributed import launched_rank

DROPPED_ROWS = "dropped_rows.json"


def _read_pairs(recipe: Recipe, path: Path, console: Console, cache: Path | None = None) -> list[Pair]:
    """Prints how many rows were dropped, and why; with a cache, the first of each reason are listed in a file beside it.

    Raises `ValueError` for a prompt that the recipe's models do not understand.
    """
    pairs, dropped = load_pairs(path, cache)
    if dropped:
        reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(dropped.items()))
        console.print(f"{len(pairs)} pairs of {path}; dropped rows: {reasons}{dropped.first()}", highlight=False)
    for note in dropped.notes:
        console.print(f"{path}: {note}", highlight=False)
    if dropped and cache:
        dropped.write(cache / DROPPED_ROWS)
        console.print(f"the first dropped rows of each reason are listed in {cache / DROPPED_ROWS}", highlight=False)
    if recipe.understands is not None:
        for prompt in dict.fromkeys(pair.prompt for pair in pairs):
            try:
                recipe.understands(prompt)
            except ValueError as error:
                raise ValueError(f"{path}: {recipe.name!r} does not understand the prompt {prompt[:200]!r}: {error}") from error
    return pairs


def _healthy_pairs(recipe: Recipe, path: Path, console: Console, allow_fingerprint: bool, cache: Path | None = None) -> list[Pair]:
    """Prints what was dropped and how the rest looks. Raises `RpoError` when one side carries a fingerprint."""
    pairs = _read_pairs(recipe, path, console, cache)
    console.print(
        check_health(pairs_leakage(pairs, len(pairs), recipe.train.seed, recipe.train.resolution), allow_fingerprint=allow_fingerprint),
        highlight=False,
    )
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
) -> TrainResult:
    """Checks the pairs for leakage, then trains on `pairs.parquet` or on another file.

    Of several processes that train together only rank 0 runs the checks and writes the summary.
    """
    path = pairs_file or run.path / PAIRS
    cache = run.path / "train" / "cache"

    def draw(weights: Path, prompts: Sequence[str]) -> list[np.ndarray]:
        base = recipe.generator if drawn_by(recipe.generator, recipe.train.model) else recipe.generator.other(recipe.train.model)
        return base.tuned(weights).build().generate(prompts, range(len(prompts)))

    if launched_rank():
        return train(recipe.train, load_pairs(path, cache)[0], run.path, resume=resume, overwrite=overwrite, draw=draw)
    if resume and any((run.path / "train").glob("checkpoints/*")):  # it was probed before its first step
        pairs = _read_pairs(recipe, path, console, cache)
    else:
        pairs = _healthy_pairs(recipe, path, console, allow_fingerprint, cache)
    result = train(recipe.train, pairs, run.path, resume=resume, overwrite=overwrite, draw=draw)
    metrics = {name: value for name, value in result.metrics.items() if name != "seconds"}
    training = {"weights": result.weights.relative_to(run.path).as_posix(), "lora": result.lora, "last": metrics}
    training |= {"model": recipe.train.model, "model_identity": model_identity(recipe.train.model), "steps": recipe.train.steps}
    if pairs_file:
        training["pairs"] = str(pairs_file)
    # Of all steps, over every time the run was resumed: each line of the metrics has the sum so far.
    update_summary(run.path, {"training": training}, {"train": result.metrics.get("seconds", 0.0)})
    console.print(f"tuned weights in {result.weights}", highlight=False)
    return result
