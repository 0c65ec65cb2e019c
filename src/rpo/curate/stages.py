"""The stages of curation (arXiv 2503.11720): source, critique, instruct, edit, check, score, label.

Each is a frozen configuration whose `build` makes a callable `Batch -> Batch` in the worker that runs it. Images stay encoded in
the rows and are decoded inside a stage.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import pyarrow as pa

from rpo.curate.checks import change_fraction, shift_px
from rpo.curate.pipeline import Batch, StageCall, StageSpec, error_status
from rpo.curate.prompts.wording import EditorFamily, edit_request
from rpo.data.images import decode_cell, encode_png, image_cell
from rpo.data.schema import Critique, Instructions
from rpo.data.shards import IMAGE
from rpo.errors import RowError
from rpo.protocols import Critic, Editor, Generator, Instructor, Scorer


@runtime_checkable
class Model(Protocol):
    """A frozen configuration that builds one of the package's five kinds of model."""

    def models(self) -> tuple[str, ...]:
        """Folders or hub ids whose content decides what it answers."""
        ...

    def build(self) -> Any: ...


def _images(cells: Sequence[object]) -> list[np.ndarray]:
    return [decode_cell(cast(Any, cell)) for cell in cells]


def _cells(images: Sequence[np.ndarray]) -> list[object]:
    return [image_cell(encode_png(image)) for image in images]


def _texts(values: Sequence[object]) -> list[str]:
    return cast(list[str], list(values))


def _seeds(values: Sequence[object]) -> list[int]:
    return cast(list[int], list(values))


@dataclass(frozen=True, kw_only=True)
class SourceStage:
    """Samples of the policy: the images that will be criticised."""

    generator: Model
    """Builds a `Generator`."""
    batch_size: int = 16
    """Images sampled at once."""

    @property
    def spec(self) -> StageSpec:
        return StageSpec(
            name="source",
            version="1",
            inputs=("prompt", "seed"),
            outputs={"source": IMAGE},
            batch_size=self.batch_size,
            models=self.generator.models(),
        )

    def build(self) -> StageCall:
        generator: Generator = self.generator.build()

        def run(batch: Batch) -> Batch:
            return {"source": _cells(generator.generate(_texts(batch["prompt"]), _seeds(batch["seed"])))}

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


@dataclass(frozen=True, kw_only=True)
class EditStage:
    """The edit, and two controls: the source after the editor's round trip (`original`), and a neutral edit (same seed)."""

    editor: Model
    """Builds an `Editor`."""
    neutral_instruction: str = "keep everything as it is"
    """What the neutral edit is asked for."""
    batch_size: int = 16
    """Images edited at once."""

    @property
    def spec(self) -> StageSpec:
        return StageSpec(
            name="edit",
            version="1",
            inputs=("source", "instruction", "seed"),
            outputs={"original": IMAGE, "edited": IMAGE, "neutral": IMAGE},
            batch_size=self.batch_size,
            models=self.editor.models(),
        )

    def build(self) -> StageCall:
        editor: Editor = self.editor.build()

        def run(batch: Batch) -> Batch:
            sources, seeds = _images(batch["source"]), _seeds(batch["seed"])
            return {
                "original": _cells(editor.round_trip(sources)),
                "edited": _cells(editor.edit(sources, _texts(batch["instruction"]), seeds)),
                "neutral": _cells(editor.edit(sources, [self.neutral_instruction] * len(sources), seeds)),
            }

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


@dataclass(frozen=True, kw_only=True)
class CheckStage:
    """Drops edits that changed nothing, changed almost everything, or moved the whole picture."""

    change_min: float = 0.005
    """Least share of pixels that an edit changes; below it falls as `drop:no_op`."""
    change_max: float = 0.9
    """Largest share of pixels that an edit may change; above it falls as `drop:over_edit`."""
    shift_max_px: float = 2.0
    """Largest displacement of the whole picture; above it falls as `drop:shifted`."""

    def __post_init__(self) -> None:
        if not 0 <= self.change_min < self.change_max <= 1:
            raise ValueError(f"change_min and change_max must satisfy 0 <= min < max <= 1, got {self.change_min} and {self.change_max}")

    @property
    def spec(self) -> StageSpec:
        outputs = {"change_fraction": pa.float64(), "shift_px": pa.float64()}
        return StageSpec(name="check", version="1", inputs=("original", "edited"), outputs=outputs, batch_size=64)

    def _status(self, change: float, shift: float) -> str | None:
        if change < self.change_min:
            return "drop:no_op"
        if change > self.change_max:
            return "drop:over_edit"
        return "drop:shifted" if shift > self.shift_max_px else None

    def build(self) -> StageCall:
        def run(batch: Batch) -> Batch:
            pairs = list(zip(_images(batch["original"]), _images(batch["edited"]), strict=True))
            changes = [change_fraction(original, edited) for original, edited in pairs]
            shifts = [shift_px(original, edited) for original, edited in pairs]
            return {
                "change_fraction": changes,
                "shift_px": shifts,
                "status": [self._status(change, shift) for change, shift in zip(changes, shifts, strict=True)],
            }

        return run


def score_column(reward: str, side: str) -> str:
    return f"{reward}_{side}"


@dataclass(frozen=True, kw_only=True)
class ScoreStage:
    """Every reward's score of every side, the controls included."""

    rewards: tuple[tuple[str, Model], ...]
    """(name, builds a `Scorer`) of each reward."""
    sides: tuple[str, ...] = ("source", "original", "edited", "neutral")
    """Image columns to score."""
    batch_size: int = 32
    """Images scored at once."""

    @property
    def spec(self) -> StageSpec:
        return StageSpec(
            name="score",
            version="1",
            inputs=("prompt", *self.sides),
            outputs={score_column(reward, side): pa.float64() for reward, _ in self.rewards for side in self.sides},
            batch_size=self.batch_size,
            models=tuple(model for _, config in self.rewards for model in config.models()),
        )

    def build(self) -> StageCall:
        scorers: dict[str, Scorer] = {name: config.build() for name, config in self.rewards}

        def run(batch: Batch) -> Batch:
            prompts = _texts(batch["prompt"])
            images = {side: _images(batch[side]) for side in self.sides}
            return {
                score_column(reward, side): scorer.score(images[side], prompts) for reward, scorer in scorers.items() for side in self.sides
            }

        return run
