"""A recipe: everything a run does, as one frozen value.

Recipes are made in `rpo.recipes`, overridden by the CLI and carried out by `rpo.workflow`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from rpo.curate.pipeline import Stage
from rpo.curate.select import LabelStage
from rpo.curate.stages import CheckStage, CritiqueStage, EditStage, InstructStage, Model, ProjectStage, ScoreStage, SourceStage
from rpo.train.config import TrainConfig


@runtime_checkable
class PromptSource(Protocol):
    """Where prompts come from when the user brings none, and which ones are understood."""

    def prompts(self, seed: int) -> list[str]: ...

    def check(self, prompt: str) -> None:
        """Raises `ValueError`, saying what is wrong, for a prompt that the models cannot be asked for."""
        ...


@runtime_checkable
class References(Protocol):
    """Good images that a model's own are compared with as a set."""

    def images(self) -> list[np.ndarray]: ...


@runtime_checkable
class Sampler(Model, Protocol):
    """Builds a `Generator`, of the base model or of what it was tuned to."""

    def tuned(self, weights: Path) -> "Sampler": ...


@dataclass(frozen=True, kw_only=True)
class Curation:
    """From prompts to pairs."""

    prompts: PromptSource
    """Prompts when none are brought by --prompts."""
    source: SourceStage
    """Samples of the policy."""
    critique: CritiqueStage
    """What is wrong."""
    instruct: InstructStage
    """What to change."""
    edit: EditStage
    """The edit and its controls."""
    project: ProjectStage | None = None
    """Brings the sides back onto the policy's distribution, if set."""
    check: CheckStage = field(default_factory=CheckStage)
    """Edits that did nothing or too much."""
    score: ScoreStage
    """The rewards."""
    label: LabelStage
    """Who wins."""
    samples: int = 1
    """Images per prompt."""
    held_out_share: float = 0.1
    """Share of prompts whose pairs only watch the training."""
    seed: int = 0
    """Decides prompts and initial noise."""

    def stages(self, brought: Stage | None = None) -> tuple[Stage, ...]:
        """In order; `brought` makes the sources in place of samples of the policy."""
        every: Sequence[Stage | None] = (
            brought or self.source, self.critique, self.instruct, self.edit, self.check, self.project, self.score, self.label
        )  # fmt: skip
        return tuple(stage for stage in every if stage is not None)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """From two models to numbers with intervals."""

    prompts: PromptSource
    """Prompts that the curation has not seen; this is checked."""
    judges: tuple[tuple[str, Model], ...]
    """(name, builds a `Judge`); none of them labels."""
    scorers: tuple[tuple[str, Model], ...] = ()
    """(name, builds a `Scorer`); those that labelled the training pairs are marked as such and are no evidence."""
    headline: str
    """The metric that a run is judged by."""
    seeds_per_prompt: int = 1
    """Images per prompt and model; with two or more, diversity is measured as well."""
    references: References | None = None
    """Images for a Fréchet distance on the first judge's features."""
    batch_size: int = 32
    """Images sampled at once."""
    seed: int = 0
    """Decides the prompts and the bootstrap."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A complete named configuration."""

    name: str
    """Also the name of its run folder below runs/."""
    generator: Sampler
    """The base model and its sampler."""
    train: TrainConfig
    """How the base model is tuned."""
    curate: Curation | None = None
    """How pairs are made; a recipe without it trains on pairs that are brought."""
    evaluate: Evaluation | None = None
    """How the tuned model is compared with the base."""
    ready: Callable[[], object] | None = None
    """Raises `RpoError` if something that the recipe brings along, such as weights, is not there or not whole."""
    understands: Callable[[str], object] | None = None
    """Raises `ValueError` for a prompt outside the models' language, if they have one."""

    def with_seed(self, seed: int) -> "Recipe":
        curate = self.curate and replace(self.curate, seed=seed)
        evaluate = self.evaluate and replace(self.evaluate, seed=seed)
        return replace(self, train=replace(self.train, seed=seed), curate=curate, evaluate=evaluate)
