"""The functions of `import rpo`: a recipe and a run folder in, typed results out. The command line calls the same parts."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rpo.api.curation import Caps
from rpo.api.curation import curate as make_pairs
from rpo.api.evaluation import compare
from rpo.api.folder import PAIRS, check_drawn_by, read_summary, read_weights, write_recipe
from rpo.api.training import tune
from rpo.core.run_folder import RunFolder, open_run
from rpo.core.terminal import Terminal
from rpo.data.pairs import Pair, iterate_pairs, write_pairs
from rpo.engine.funnel import FunnelStage
from rpo.recipe import GivenPrompts, PromptSource, Recipe
from rpo.recipes import load
from rpo.training.loop import TrainResult


@dataclass(frozen=True)
class Run:
    """A run folder: what `rpo.curate`, `rpo.train` and `rpo.evaluate` read and write."""

    path: Path

    def pairs(self) -> Iterator[Pair]:
        """Preference pairs, one after the other; memory is that of a few."""
        return iterate_pairs(self.path / PAIRS)

    @property
    def summary(self) -> Mapping[str, Any]:
        """All figures of the run so far (`summary.json`, docs/run-folder.md)."""
        return read_summary(self.path)

    @property
    def funnel(self) -> Sequence[FunnelStage]:
        """Rows in, kept and dropped with reasons, per stage of the curation."""
        return self.summary.get("funnel", [])

    @property
    def weights(self) -> Path:
        """The tuned LoRA or pipeline folder. Raises `RpoError` before `rpo.train`, or when a file is damaged."""
        return read_weights(RunFolder(self.path))


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One metric of the tuned model against the base, over the same prompts."""

    base: float
    """Mean over prompts."""
    tuned: float
    """Mean over prompts."""
    difference: float
    """tuned - base."""
    interval: tuple[float, float] | None
    """95 % interval of the difference, bootstrapped over prompts; `None` for a metric of whole sets of images."""
    prompts: int
    """Prompts that were measured for both models."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Result of `rpo.evaluate`."""

    headline: str
    """The metric by which the recipe judges the run."""
    metrics: Mapping[str, Difference]
    """By name, all metrics of the recipe's judges and scorers."""

    @property
    def gain(self) -> Difference:
        """The headline's difference."""
        return self.metrics[self.headline]


def load_recipe(name: str) -> Recipe:
    """A complete named configuration.

    Args:
        name: a built-in recipe such as `shapes`, or your own as `package.module:function` or `file.py:function`.

    Raises:
        ValueError: there is no such recipe; the message names the known ones.
    """
    return load(name)


def curate(
    recipe: Recipe,
    *,
    out: Path | str,
    prompts: Sequence[str] | Path | str | None = None,
    sources: Path | str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    max_cost: float | None = None,
    max_calls: int | None = None,
    quiet: bool = False,
) -> Run:
    """Makes preference pairs in the run folder `out`.

    Args:
        prompts: texts, or a file of them; the recipe's own if not given.
        sources: pairs or captioned images to criticize in place of samples of the policy.
        resume: goes on with a run in `out`; what is done is not done again.
        overwrite: removes a run in `out` first.
        max_cost: US dollars for remote models; the run stops there with all that is done kept.
        max_calls: requests to remote models, likewise.
        quiet: prints no progress.

    Raises:
        ValueError: a prompt, file or setting is unusable; the message says which and what to do.
        RpoError: the run cannot go on, or no pair is left. The folder keeps what is done.
    """
    if recipe.curate is not None:
        source, file = _prompts(recipe.curate.prompts, prompts)
        recipe = replace(recipe, curate=replace(recipe.curate, prompts=source))
    else:
        file = None
    with open_run(Path(out), resume=resume, overwrite=overwrite) as folder:
        caps = Caps(max_cost=max_cost, max_calls=max_calls)
        make_pairs(recipe, folder, _console(quiet), file, caps, sources=None if sources is None else Path(sources))
    return Run(Path(out))


def train(
    recipe: Recipe,
    run: Run | Path | str | None = None,
    *,
    pairs: Sequence[Pair] | Path | str | None = None,
    out: Path | str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    allow_leakage: bool = False,
    quiet: bool = False,
) -> TrainResult:
    """Tunes the recipe's model on the pairs of a run, or on `pairs` (values, or a file or folder in any layout of docs/data.md) in `out`.

    Args:
        resume: goes on from the newest checkpoint.
        overwrite: discards an earlier training in the folder.
        allow_leakage: trains although one side can be told apart without the prompt.
        quiet: prints no progress.

    Raises:
        ValueError: neither or both of `run` and `pairs` are given, or a setting is unusable.
        RpoError: the pairs or the folder forbid it; the message says why and what to do.
    """
    if (run is None) == (pairs is None) or (pairs is None) != (out is None):
        raise ValueError("train on the pairs of a run (run=...), or on other pairs in a folder of their own (pairs=..., out=...)")
    path = _path(run) if run is not None else Path(out or ".")
    file = Path(pairs) if isinstance(pairs, str | Path) else None
    with open_run(path, resume=resume or pairs is None, overwrite=overwrite and pairs is not None) as folder:
        if pairs is not None:
            write_recipe(folder, recipe)
            if not isinstance(pairs, str | Path):
                write_pairs(path / PAIRS, pairs)
        console = _console(quiet)
        return tune(recipe, folder, console, pairs_file=file, resume=resume, overwrite=overwrite, allow_fingerprint=allow_leakage)


def evaluate(
    recipe: Recipe, run: Run | Path | str, *, prompts: Sequence[str] | Path | str | None = None, quiet: bool = False
) -> Evaluation:
    """Compares the tuned model of a run with the base on test prompts that nothing was tuned on.

    Args:
        prompts: texts, or a file of them; the recipe's own if not given.
        quiet: prints no progress.

    Raises:
        ValueError: the recipe has no evaluation, a prompt was curated, or a judge chose the pairs.
        RpoError: the run holds no tuned weights.
    """
    if recipe.evaluate is None:
        raise ValueError(f"the recipe {recipe.name!r} has no evaluation")
    source, file = _prompts(recipe.evaluate.prompts, prompts)
    recipe = replace(recipe, evaluate=replace(recipe.evaluate, prompts=source))
    check_drawn_by(recipe.generator, recipe.train.model)
    path = _path(run)
    with open_run(path, resume=True) as folder:
        compare(recipe, folder, _console(quiet), file)
    summary = read_summary(path)
    return Evaluation(headline=summary["headline"], metrics={name: _difference(numbers) for name, numbers in summary["evaluation"].items()})


def _difference(numbers: Mapping[str, Any]) -> Difference:
    interval = numbers.get("ci95")
    return Difference(
        base=numbers["base"],
        tuned=numbers["tuned"],
        difference=numbers["difference"],
        interval=None if interval is None else (interval[0], interval[1]),
        prompts=numbers["n"],
    )


def _prompts(source: PromptSource, prompts: Sequence[str] | Path | str | None) -> tuple[PromptSource, Path | None]:
    """(source of the prompts, file of them): texts are checked by the recipe's own source, a file by whoever reads it."""
    if prompts is None or isinstance(prompts, str | Path):
        return source, None if prompts is None else Path(prompts)
    for number, text in enumerate(prompts, start=1):
        try:
            source.check(text)
        except ValueError as error:
            raise ValueError(f"prompts, number {number}: {error}") from error
    return GivenPrompts(texts=tuple(prompts)), None


def _path(run: Run | Path | str) -> Path:
    return run.path if isinstance(run, Run) else Path(run)


def _console(quiet: bool) -> Terminal:
    return Terminal(stderr=True, quiet=quiet)
