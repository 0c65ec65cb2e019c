"""A recipe: everything a run does, as one frozen value.

Recipes are made in `rpo.recipes`, overridden by the CLI and carried out by `rpo.workflow`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from rpo.curate.attempts import AttemptStage, RoundStage
from rpo.curate.checking import CheckStage, FingerprintStage, PairwiseStage, SafetyStage, VerifyStage
from rpo.curate.pipeline import Stage
from rpo.curate.select import LabelStage
from rpo.curate.stages import CritiqueStage, EditStage, InstructStage, Model, ProjectStage, ScoreStage, SourceStage
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
    attempts: AttemptStage | None = None
    """Which of several attempts goes on; set exactly when the edit stage makes several."""
    rounds: RoundStage | None = None
    """Criticises and edits the edit again, if set."""
    project: ProjectStage | None = None
    """Brings the sides back onto the policy's distribution, if set."""
    check: CheckStage = field(default_factory=CheckStage)
    """Edits that did nothing or too much."""
    fingerprint: FingerprintStage | None = None
    """A pattern that the editor leaves on everything, if set."""
    verify: VerifyStage | None = None
    """Whether the announced change can be seen, if set."""
    safety: SafetyStage | None = None
    """Pictures that should not be kept, if set."""
    score: ScoreStage
    """The rewards."""
    pairwise: PairwiseStage | None = None
    """Asks a model which side is better; the label rule pairwise needs it."""
    label: LabelStage
    """Who wins."""
    samples: int = 1
    """Images per prompt."""
    held_out_share: float = 0.1
    """Share of prompts whose pairs only watch the training."""
    pairs_per_prompt_max: int | None = None
    """Pairs kept of a prompt, those with the widest gap; all if not given."""
    human_pairs: Path | None = None
    """Pairs file, ours or Pick-a-Pic's, of which some are mixed in."""
    human_share: float = 0.5
    """Share of human pairs among all, where a file of them is given."""
    seed: int = 0
    """Decides prompts and initial noise."""

    def __post_init__(self) -> None:
        made = self.attempts.count if self.attempts else 1
        if self.edit.attempts != made:
            raise ValueError(f"edit.attempts is {self.edit.attempts} and attempts.count {made}; every attempt that is made must be judged")
        if self.pairs_per_prompt_max is not None and self.pairs_per_prompt_max < 1:
            raise ValueError(f"pairs_per_prompt_max must be at least 1, got {self.pairs_per_prompt_max}")
        if not 0 < self.human_share < 1:
            raise ValueError(f"human_share must be above 0 and below 1, got {self.human_share}")
        if self.label.rule == "pairwise" and self.pairwise is None:
            raise ValueError("label.rule pairwise needs a pairwise stage that asks")
        if self.pairwise is not None and (self.pairwise.edited, self.pairwise.opponent) != self.label.sides:
            shown = (self.pairwise.edited, self.pairwise.opponent)
            raise ValueError(f"the pairwise stage shows {shown} and the label holds {self.label.sides} against each other; name the same")

    def stages(self) -> tuple[Stage, ...]:
        edit, attempts = self.edit, self.attempts
        if self.rounds is not None:
            edit = replace(edit, first=True)
            attempts = attempts and replace(attempts, first=True)
        every: Sequence[Stage | None] = (
            self.source, self.critique, self.instruct, edit, attempts, self.rounds, self.check, self.fingerprint, self.verify,
            self.safety, self.project, self.score, self.pairwise, self.label,
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
