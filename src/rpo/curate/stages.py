"""The stages of curation (arXiv 2503.11720): source, critique, instruct, edit, check, score, label.

Each is a frozen configuration whose `build` makes a callable `Batch -> Batch` in the worker that runs it. Images stay encoded in
the rows and are decoded inside a stage.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa

from rpo.curate.columns import cells as _cells
from rpo.curate.columns import first_errors
from rpo.curate.columns import images as _images
from rpo.curate.columns import seeds as _seeds
from rpo.curate.columns import texts as _texts
from rpo.curate.pipeline import Batch, StageCall, StageSpec, error_status, row_seed
from rpo.curate.prompts.wording import EditorFamily, edit_request
from rpo.curate.provenance import made_by
from rpo.data.images import Frame, recompressed
from rpo.data.schema import Critique, Instructions
from rpo.data.shards import IMAGE
from rpo.errors import RowError
from rpo.protocols import Critic, Editor, Generator, Instructor, SampledEditor, Scorer


@runtime_checkable
class Model(Protocol):
    """A frozen configuration that builds one of the package's five kinds of model."""

    def models(self) -> tuple[str, ...]:
        """Folders or hub ids whose content decides what it answers."""
        ...

    def build(self) -> Any: ...


@runtime_checkable
class Framed(Protocol):
    """A configuration of an editor that knows the geometry of its input. Sources of any other editor stay as they come."""

    def frame(self) -> Frame: ...


@dataclass(frozen=True, kw_only=True)
class SourceStage:
    """Samples of the policy: the images that will be criticised."""

    generator: Model
    """Builds a `Generator`."""
    batch_size: int = 16
    """Images sampled at once."""
    frame: Frame | None = None
    """What sources are fitted to; a curation takes it from its editor."""

    @property
    def spec(self) -> StageSpec:
        return StageSpec(
            name="source",
            version="1",
            inputs=("prompt", "seed"),
            outputs={"source": IMAGE, "cut": pa.float64()},
            batch_size=self.batch_size,
            models=self.generator.models(),
        )

    def build(self) -> StageCall:
        generator: Generator = self.generator.build()

        def run(batch: Batch) -> Batch:
            images = generator.generate(_texts(batch["prompt"]), _seeds(batch["seed"]))
            fitted = [image if self.frame is None else self.frame.fitted(image) for image in images]
            return {"source": _cells(fitted), "cut": [0.0 if self.frame is None else self.frame.cut(image) for image in images]}

        return run


@dataclass(frozen=True, kw_only=True)
class CritiqueStage:
    """What is wrong with each source, in the structured schema. Rows without a fault fall: `drop:no_issue`."""

    critic: Model
    """Builds a `Critic`."""
    batch_size: int = 32
    """Images criticised at once."""
    workers: int = 1
    """Batches at once: for a critic over a wire as many as keep the server busy, for one in this process 1."""

    @property
    def spec(self) -> StageSpec:
        return StageSpec(
            name="critique",
            version="2",
            inputs=("source", "prompt"),
            outputs={"critique": pa.string(), "critique_raw": pa.string()},
            batch_size=self.batch_size,
            workers=self.workers,
            models=self.critic.models(),
        )

    def build(self) -> StageCall:
        critic: Critic = self.critic.build()

        def run(batch: Batch) -> Batch:
            answers = critic.critique(_images(batch["source"]), _texts(batch["prompt"]))
            told = [None if isinstance(a, RowError) else a.model_dump_json() for a in answers]
            return {"critique": told, "critique_raw": _raw(answers), "status": [_critique_status(a) for a in answers]}

        return run


def _raw(answers: Sequence[object]) -> list[str | None]:
    """What could not be read, of rows that ended in an error for that."""
    return [answer.raw or None if isinstance(answer, RowError) else None for answer in answers]


def _critique_status(answer: Critique | RowError) -> str | None:
    if isinstance(answer, RowError):
        return error_status("critique", answer)
    return "drop:no_issue" if answer.no_issue else None


@dataclass(frozen=True, kw_only=True)
class InstructStage:
    """At most three atomic changes per critique, joined into the one request the editor reads."""

    instructor: Model
    """Builds an `Instructor`."""
    family: EditorFamily = "ip2p"
    """How the editor wants to be spoken to: how changes are joined, and whether it is told what to keep."""
    batch_size: int = 32
    """Critiques read at once."""
    workers: int = 1
    """Batches at once, as in `CritiqueStage`."""

    @property
    def spec(self) -> StageSpec:
        return StageSpec(
            name="instruct",
            version="2",
            inputs=("prompt", "critique"),
            outputs={"instructions": pa.string(), "instruction": pa.string(), "instruct_raw": pa.string()},
            batch_size=self.batch_size,
            workers=self.workers,
            models=self.instructor.models(),
        )

    def _request(self, answer: Instructions | RowError, critique: Critique) -> str | None:
        if isinstance(answer, RowError):
            return None
        return edit_request([one.instruction for one in answer.instructions], critique.keep, self.family)

    def build(self) -> StageCall:
        instructor: Instructor = self.instructor.build()

        def run(batch: Batch) -> Batch:
            critiques = [Critique.model_validate_json(text) for text in _texts(batch["critique"])]
            answers = instructor.instruct(_texts(batch["prompt"]), critiques)
            told = [None if isinstance(a, RowError) else a.model_dump_json() for a in answers]
            return {
                "instructions": told,
                "instruction": [self._request(a, critique) for a, critique in zip(answers, critiques, strict=True)],
                "instruct_raw": _raw(answers),
                "status": [_instruct_status(a) for a in answers],
            }

        return run


def _instruct_status(answer: Instructions | RowError) -> str | None:
    if isinstance(answer, RowError):
        return error_status("instruct", answer)
    return None if answer.instructions else "drop:no_instruction"


def attempt_seed(seed: int, attempt: int) -> int:
    """The seed of a row's attempt, in [0, 2^63); the first has the row's own."""
    return seed if attempt == 0 else row_seed(seed, f"attempt {attempt}")


@dataclass(frozen=True, kw_only=True)
class EditStage:
    """The edit, and what it is held against: the source after the editor's round trip (`original`), and a neutral edit (same seed).

    `second` is an independent encoding of the source: how much scores differ between it and `original` is their noise. The source passes a
    codec, then the round trip, with a seeded sample of the autoencoder's posterior where the editor has one.

    With several attempts each has a column `attempt_0`, `attempt_1`, ...; an `AttemptStage` says which goes on.
    """

    editor: Model
    """Builds an `Editor`."""
    neutral_instruction: str = "keep everything as it is"
    """What the neutral edit is asked for."""
    attempts: int = 1
    """Edits of each instruction, each with a seed of its own."""
    guidances: tuple[float, ...] = ()
    """Guidance of the attempts, taken in turn; the editor's own if empty. The neutral edit has the first."""
    second_quality: int | None = 90
    """JPEG quality of the source before it is encoded a second time; none to rest on the sample of the posterior alone, or on a round
    trip that is random by itself. The posterior of most autoencoders is too narrow for that: a sample differs by less than a level."""
    other: bool = False
    """Whether rows bring the prompt's second image in a column `other`; it passes the same round trip, as `other_original`."""
    first: bool = False
    """Whether rounds follow, which make the columns `edited` and `neutral` from `first_edited` and `first_neutral`."""
    batch_size: int = 16
    """Images edited at once."""

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise ValueError(f"attempts must be at least 1, got {self.attempts}")
        if self.second_quality is not None and not 1 <= self.second_quality <= 100:
            raise ValueError(f"second_quality must be 1 to 100, or None for no codec, got {self.second_quality}")
        if any(guidance <= 0 for guidance in self.guidances):
            raise ValueError(f"guidances must be above 0, got {self.guidances}")

    @property
    def columns(self) -> tuple[str, ...]:
        """Of the edits, one for each attempt."""
        prefix = "first_" if self.first else ""
        return (f"{prefix}edited",) if self.attempts == 1 else tuple(f"attempt_{i}" for i in range(self.attempts))

    @property
    def spec(self) -> StageSpec:
        neutral = "first_neutral" if self.first else "neutral"
        images = ("original", "second", neutral, *self.columns, *(["other_original"] if self.other else []))
        return StageSpec(
            name="edit",
            version="4",
            inputs=("source", "instruction", "seed", *(["other"] if self.other else [])),
            outputs={name: IMAGE for name in images} | {"edited_by": pa.string()},
            batch_size=self.batch_size,
            models=self.editor.models(),
        )

    def _second(self, editor: Editor, sources: Sequence[np.ndarray], seeds: Sequence[int]) -> list[np.ndarray]:
        """The independent encoding of each source."""
        quality = self.second_quality
        coded = [source if quality is None else recompressed(source, quality) for source in sources]
        if isinstance(editor, SampledEditor):
            return editor.sampled_round_trip(coded, [row_seed(seed, "second") for seed in seeds])
        return editor.round_trip(coded)

    def _second_by(self, editor: Editor) -> str:
        """What the independent encoding consists of."""
        codec = [] if self.second_quality is None else [f"JPEG {self.second_quality}"]
        sampled = isinstance(editor, SampledEditor)
        return ", ".join([*codec, "a sample of the autoencoder's posterior" if sampled else "the editor's round trip"])

    def _guidance(self, attempt: int) -> float | None:
        return self.guidances[attempt % len(self.guidances)] if self.guidances else None

    def build(self) -> StageCall:
        editor: Editor = self.editor.build()
        made = made_by(self.editor, self.editor.models()) | {"second": self._second_by(editor)}
        neutral = "first_neutral" if self.first else "neutral"

        def edit(images: list[np.ndarray], texts: list[str], seeds: list[int], attempt: int) -> list[object]:
            if (guidance := self._guidance(attempt)) is None:
                return _cells(editor.edit(images, texts, seeds))
            return _cells(editor.edit(images, texts, seeds, guidance=guidance))

        def run(batch: Batch) -> Batch:
            sources, seeds, texts = _images(batch["source"]), _seeds(batch["seed"]), _texts(batch["instruction"])
            tried = [[attempt_seed(seed, i) for seed in seeds] for i in range(self.attempts)]
            made_columns: dict[str, Sequence[object]] = {
                "original": _cells(editor.round_trip(sources)),
                "second": _cells(self._second(editor, sources, seeds)),
                **{name: edit(sources, texts, tried[i], i) for i, name in enumerate(self.columns)},
                neutral: edit(sources, [self.neutral_instruction] * len(sources), seeds, 0),
            }
            if self.other:
                made_columns["other_original"] = _cells(editor.round_trip(_images(batch["other"])))
            told = [[{"seed": column[row], "guidance": self._guidance(i)} for i, column in enumerate(tried)] for row in range(len(seeds))]
            return {**made_columns, "edited_by": [json.dumps(made | {"attempts": attempts}) for attempts in told]}

        return run


@dataclass(frozen=True, kw_only=True)
class ProjectStage:
    """Brings every side back onto the policy's distribution: re-noised to a strength and denoised under the prompt."""

    projector: Model
    """Builds a callable `(images, prompts, seeds) -> images`."""
    batch_size: int = 16
    """Images projected at once."""

    @property
    def spec(self) -> StageSpec:
        return StageSpec(
            name="project",
            version="1",
            inputs=("original", "edited", "neutral", "prompt", "seed"),
            outputs={f"{side}_projected": IMAGE for side in ("original", "edited", "neutral")},
            batch_size=self.batch_size,
            models=self.projector.models(),
        )

    def build(self) -> StageCall:
        project = self.projector.build()

        def run(batch: Batch) -> Batch:
            prompts, seeds = _texts(batch["prompt"]), _seeds(batch["seed"])
            sides = ("original", "edited", "neutral")
            return {f"{side}_projected": _cells(project(_images(batch[side]), prompts, seeds)) for side in sides}

        return run


def score_column(reward: str, side: str) -> str:
    return f"{reward}_{side}"


@dataclass(frozen=True, kw_only=True)
class ScoreStage:
    """Every reward's score of every side, the controls included."""

    rewards: tuple[tuple[str, Model], ...]
    """(name, builds a `Scorer`) of each reward."""
    sides: tuple[str, ...] = ("source", "original", "second", "edited", "neutral")
    """Image columns to score."""
    batch_size: int = 32
    """Images scored at once."""

    @property
    def spec(self) -> StageSpec:
        scores = {score_column(reward, side): pa.float64() for reward, _ in self.rewards for side in self.sides}
        return StageSpec(
            name="score",
            version="2",
            inputs=("prompt", *self.sides),
            outputs={**scores, "scored_by": pa.string()},
            batch_size=self.batch_size,
            models=tuple(model for _, config in self.rewards for model in config.models()),
        )

    def build(self) -> StageCall:
        scorers: dict[str, Scorer] = {name: config.build() for name, config in self.rewards}
        made = json.dumps({name: made_by(config, config.models()) for name, config in self.rewards})

        def run(batch: Batch) -> Batch:
            prompts = _texts(batch["prompt"])
            images = {side: _images(batch[side]) for side in self.sides}
            said = {
                score_column(reward, side): scorer.score(images[side], prompts) for reward, scorer in scorers.items() for side in self.sides
            }
            status, scores = first_errors("score", said, len(prompts))
            return {**scores, "scored_by": [made] * len(prompts), "status": status}

        return run
