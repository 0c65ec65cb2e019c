"""A recipe: everything a run does, as one frozen value.

Recipes are made in `rpo.recipes`, overridden by the CLI and carried out by `rpo.api`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from rpo.curation.external_pairs import BroughtStage
from rpo.curation.sample_pairs import DuelLabelStage, TwoSamplesStage
from rpo.curation.stages.candidates import AttemptStage
from rpo.curation.stages.check import CheckStage
from rpo.curation.stages.critique import CritiqueStage
from rpo.curation.stages.edit import EditStage
from rpo.curation.stages.instruct import InstructStage
from rpo.curation.stages.label import OTHER, LabelStage
from rpo.curation.stages.pairwise import PairwiseStage
from rpo.curation.stages.project import ProjectStage
from rpo.curation.stages.refine import RoundStage
from rpo.curation.stages.score import ScoreStage
from rpo.curation.stages.source import SourceStage
from rpo.curation.stages.verify import SafetyStage, VerifyStage
from rpo.engine.stage import Stage
from rpo.protocols import Framed, Model
from rpo.training.config import TrainConfig


@runtime_checkable
class PromptSource(Protocol):
    """Where prompts come from when the user brings none, and which ones are understood."""

    def prompts(self, seed: int) -> list[str]: ...

    def check(self, prompt: str) -> None:
        """Raises `ValueError`, saying what is wrong, for a prompt that the models cannot be asked for."""
        ...


@dataclass(frozen=True, kw_only=True)
class BroughtPrompts:
    """No prompts of its own: they are brought with --prompts."""

    def prompts(self, seed: int) -> list[str]:
        raise ValueError("this recipe has no prompts of its own; bring a file with --prompts")

    def check(self, prompt: str) -> None:
        if not prompt.strip():
            raise ValueError("an empty prompt")


@dataclass(frozen=True, kw_only=True)
class GivenPrompts:
    """Prompts that are known already."""

    texts: tuple[str, ...]
    """In their order."""

    def prompts(self, seed: int) -> list[str]:
        return list(self.texts)

    def check(self, prompt: str) -> None:
        """Each was checked where it came from."""


@runtime_checkable
class References(Protocol):
    """Good images that a model's own are compared with as a set."""

    def images(self) -> list[np.ndarray]: ...


@runtime_checkable
class Sampler(Model, Protocol):
    """Builds a `Generator`, of the base model or of what it was tuned to."""

    def tuned(self, weights: Path) -> "Sampler": ...

    def other(self, model: str) -> "Sampler":
        """The same over a pipeline of the Hub: owner/name, or owner/name@revision."""
        ...


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
    """Pairs that people judged, in any layout of docs/data.md, of which some are mixed in."""
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

    def stages(self, brought: Stage | None = None) -> tuple[Stage, ...]:
        """In order; `brought` makes the sources, and with each its other image, in place of samples of the policy."""
        edit, attempts, score = self.edit, self.attempts, self.score
        if "other" in self.label.combinations:
            if brought is None:
                raise ValueError("label.combinations with other is for pairs that are brought; give --sources, or leave it out")
            edit, score = replace(edit, other=True), replace(score, sides=(*score.sides, OTHER))
        if self.rounds is not None:
            edit = replace(edit, first=True)
            attempts = attempts and replace(attempts, first=True)
        source: Stage = brought or self.source
        if isinstance(source, SourceStage | BroughtStage) and isinstance(edit.editor, Framed):
            source = replace(source, frame=edit.editor.frame())
        every: Sequence[Stage | None] = (
            source, self.critique, self.instruct, edit, attempts, self.rounds, self.check, self.verify,
            self.safety, self.project, score, self.pairwise, self.label,
        )  # fmt: skip
        return tuple(stage for stage in every if stage is not None)

    @property
    def images_per_row(self) -> int:
        """Source images that a row costs."""
        return 1


@dataclass(frozen=True, kw_only=True)
class SampleCuration:
    """From prompts to pairs without critique or edit: two samples each, and the rewards say which is better."""

    prompts: PromptSource
    """Prompts when none are brought by --prompts."""
    source: TwoSamplesStage
    """Two samples of the policy."""
    score: ScoreStage
    """The rewards, of both sides."""
    label: DuelLabelStage
    """Who wins."""
    samples: int = 1
    """Pairs of images per prompt."""
    held_out_share: float = 0.1
    """Share of prompts whose pairs only watch the training."""
    seed: int = 0
    """Decides prompts and initial noise."""

    def stages(self, brought: Stage | None = None) -> tuple[Stage, ...]:
        """In order."""
        if brought is not None:
            raise ValueError("two samples of the policy are compared here, so no pairs can be brought; leave out --sources")
        return self.source, self.score, self.label

    @property
    def images_per_row(self) -> int:
        """Source images that a row costs."""
        return 2


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """From two models to numbers with intervals."""

    prompts: PromptSource
    """Prompts that the curation has not seen; this is checked."""
    judges: tuple[tuple[str, Model], ...] = ()
    """(name, builds a `Judge`, or a `Comparer` that holds each model's images against the first one's); none of them labels."""
    scorers: tuple[tuple[str, Model], ...] = ()
    """(name, builds a `Scorer`); those that labelled the training pairs are marked as such and are no evidence."""
    headline: str
    """The metric that a run is judged by, one of those that judges and scorers measure; where its reward chose the training pairs, the
    first metric that did not takes its place."""
    validation: PromptSource | None = None
    """Prompts that settings and rounds are chosen on, none of them in a test."""
    seeds_per_prompt: int = 1
    """Images per prompt and model; with two or more, diversity is measured as well."""
    references: References | None = None
    """Images for a Fréchet distance on the features of the first judge that has any."""
    batch_size: int = 32
    """Images sampled at once."""
    seed: int = 0
    """Decides the prompts and the bootstrap."""

    def __post_init__(self) -> None:
        if not self.judges and not self.scorers:
            raise ValueError("an evaluation needs judges or scorers")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A complete named configuration."""

    name: str
    """Also the name of its run folder below runs/."""
    generator: Sampler
    """The base model and its sampler."""
    train: TrainConfig
    """How the base model is tuned."""
    curate: Curation | SampleCuration | None = None
    """How pairs are made; a recipe without it trains on pairs that are brought."""
    evaluate: Evaluation | None = None
    """How the tuned model is compared with the base."""
    ready: Callable[[], object] | None = None
    """Raises `RpoError` if something that the recipe brings along, such as weights, is not there or not whole."""
    understands: Callable[[str], object] | None = None
    """Raises `ValueError` for a prompt outside the models' language, if they have one."""
    study: Callable[["Recipe", bool], "Study"] | None = None
    """Plans what `rpo study` compares, from the recipe and whether it is to be quick."""

    def with_seed(self, seed: int) -> "Recipe":
        curate = self.curate and replace(self.curate, seed=seed)
        evaluate = self.evaluate and replace(self.evaluate, seed=seed)
        return replace(self, train=replace(self.train, seed=seed), curate=curate, evaluate=evaluate)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to make pairs and to tune on them."""

    name: str
    """Letters, digits, `-` and `_`."""
    says: str
    """What it is, in a line."""
    pairs_from: tuple[str, ...]
    """Names of the curations its pairs come from, in equal parts of the source images."""
    candidates: tuple[TrainConfig, ...]
    """Settings; with more than one, the best on validation prompts is taken."""
    main: bool = False
    """Whether it is trained at every size and on every seed; the others at the largest size and on the first seeds."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """Arms that are compared at equal source images, at most as many pairs, and equal steps."""

    curations: Mapping[str, Curation | SampleCuration]
    """Ways to make pairs, by name; what two of them have in common is made once."""
    arms: tuple[Arm, ...]
    """What is compared, the first with all others."""
    sizes: tuple[int, ...]
    """Numbers of source images, rising."""
    seeds: tuple[int, ...]
    """Seeds of the main arms: each has its own prompts, noise and test prompts."""
    side_seeds: int
    """How many of them the other arms are trained on."""
    beside: tuple[str, ...] = ()
    """Metrics that the study's tables show beside the headline."""
    pairs_per_source: float
    """Pairs are cut to this many per source image, so that no arm trains on more than another."""

    def __post_init__(self) -> None:
        if not self.arms or not self.seeds or list(self.sizes) != sorted(set(self.sizes)) or not self.sizes or self.sizes[0] < 1:
            raise ValueError(
                f"a study needs arms, seeds and rising sizes, got {len(self.arms)} arms, seeds {self.seeds}, sizes {self.sizes}"
            )
        for arm in self.arms:
            if unknown := set(arm.pairs_from) - set(self.curations):
                raise ValueError(f"arm {arm.name!r} takes pairs from {sorted(unknown)}; known are {sorted(self.curations)}")
            if not arm.pairs_from or not arm.candidates:
                raise ValueError(f"arm {arm.name!r} needs pairs to train on and at least one setting")
