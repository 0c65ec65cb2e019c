"""Stages that look at an edit and drop what should not become a pair, each with its measure as a column."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from rpo.curate.checks import visible_change
from rpo.curate.columns import first_errors, images, texts
from rpo.curate.pipeline import Batch, StageCall, StageSpec
from rpo.curate.registration import Motion, register
from rpo.curate.stages import Model
from rpo.data.schema import Instructions
from rpo.errors import RowError
from rpo.protocols import Comparer, Embedder, SafetyChecker, Verifier

MEASURES = ("change", "agreement", "shift_px", "zoom", "rotation_deg")
"""Columns of `CheckStage`."""


@dataclass(frozen=True, kw_only=True)
class CheckStage:
    """Drops edits that changed nothing visible, replaced the image, or moved, zoomed, rotated or mirrored all of it."""

    change_min: float = 1.0
    """Least visible change, in multiples of what is just visible; rows below it are dropped as `no_op`."""
    agreement_min: float = 0.1
    """Least agreement of the structure before and after, -1 to 1, whatever became of color and light; below it `over_edit`."""
    moved_max: float = 0.005
    """Largest displacement of any corner by a motion of the whole image, as a share of its longer side; above it `moved`, as
    is a mirror image."""
    embedder: Model | None = None
    """Builds an `Embedder`, such as the CLIP of a reward, for the perceptual distance (1 - cosine); not measured if not given."""
    distance_min: float = 0.0
    """Least perceptual distance; below it `no_op`."""
    distance_max: float = 1.0
    """Largest perceptual distance; above it `over_edit`."""

    def __post_init__(self) -> None:
        if self.change_min < 0:
            raise ValueError(f"change_min must be at least 0, got {self.change_min}")
        if not -1 <= self.agreement_min < 1:
            raise ValueError(f"agreement_min must be -1 to 1, got {self.agreement_min}")
        if self.moved_max < 0:
            raise ValueError(f"moved_max must be at least 0, a share of the longer side, got {self.moved_max}")
        if not 0 <= self.distance_min < self.distance_max <= 2:
            low, high = self.distance_min, self.distance_max
            raise ValueError(f"distance_min and distance_max must satisfy 0 <= min < max <= 2, got {low} and {high}")
        if self.embedder is None and (self.distance_min, self.distance_max) != (0.0, 1.0):
            raise ValueError("distance_min and distance_max need an embedder to measure by")

    @property
    def spec(self) -> StageSpec:
        names = [*MEASURES, *(["distance"] if self.embedder is not None else [])]
        return StageSpec(
            name="check",
            version="2",
            inputs=("original", "edited"),
            outputs={name: pa.float64() for name in names},
            batch_size=64,
            models=self.embedder.models() if self.embedder else (),
        )

    def verdict(self, original: np.ndarray, edited: np.ndarray, distance: float | None = None) -> dict[str, Any]:
        """What is measured of an edit, and its `status`."""
        change, motion = visible_change(original, edited), register(original, edited)
        measured = {
            "change": change,
            "agreement": motion.agreement,
            "shift_px": motion.shift_px,
            "zoom": motion.zoom,
            "rotation_deg": motion.rotation_deg,
        } | ({} if distance is None else {"distance": distance})
        return measured | {"status": self._status(change, motion, max(original.shape), distance)}

    def _status(self, change: float, motion: Motion, side: int, distance: float | None) -> str | None:
        if change < self.change_min or (distance is not None and distance < self.distance_min):
            return "drop:no_op"
        corner = motion.shift_px / side + math.sqrt(0.5) * (motion.zoom + math.radians(motion.rotation_deg))
        if motion.mirrored or corner > self.moved_max:
            return "drop:moved"
        return (
            "drop:over_edit" if motion.agreement < self.agreement_min or (distance is not None and distance > self.distance_max) else None
        )

    def verdicts(self, embedder: Embedder | None) -> Callable[[list[np.ndarray], list[np.ndarray]], list[dict[str, Any]]]:
        """What is measured of each (original, edited), and its `status`."""

        def verdict(originals: list[np.ndarray], edits: list[np.ndarray]) -> list[dict[str, Any]]:
            far: list[float | None] = [None] * len(edits)
            if embedder is not None:
                far = (1 - (embedder.features(originals) * embedder.features(edits)).sum(1)).tolist()
            return [self.verdict(a, b, distance) for a, b, distance in zip(originals, edits, far, strict=True)]

        return verdict

    def build(self) -> StageCall:
        verdict = self.verdicts(self.embedder.build() if self.embedder else None)
        names = (*self.spec.outputs, "status")

        def run(batch: Batch) -> Batch:
            rows = verdict(images(batch["original"]), images(batch["edited"]))
            return {name: [row[name] for row in rows] for name in names}

        return run


@dataclass(frozen=True, kw_only=True)
class VerifyStage:
    """Whether what the instructions announced can be seen: rows of which it cannot fall as `drop:not_followed`."""

    verifier: Model
    """Builds a `Verifier`."""
    followed_min: float = 0.5
    """Least probability, of every change that was announced."""
    batch_size: int = 32
    """Edits looked at together."""

    @property
    def spec(self) -> StageSpec:
        return StageSpec(
            name="verify",
            version="1",
            inputs=("original", "edited", "instructions"),
            outputs={"followed": pa.float64()},
            batch_size=self.batch_size,
            models=self.verifier.models(),
        )

    def build(self) -> StageCall:
        verifier: Verifier = self.verifier.build()

        def run(batch: Batch) -> Batch:
            originals, edits = images(batch["original"]), images(batch["edited"])
            told = [Instructions.model_validate_json(text).instructions for text in texts(batch["instructions"])]
            asked = [(row, one.expected_visible_change) for row, every in enumerate(told) for one in every]
            rows = [row for row, _ in asked]
            said = verifier.verify([originals[row] for row in rows], [edits[row] for row in rows], [change for _, change in asked])
            least: list[float | RowError] = [1.0] * len(told)
            for row, answer in zip(rows, said, strict=True):
                worst = least[row]
                if not isinstance(worst, RowError):
                    least[row] = answer if isinstance(answer, RowError) else min(worst, answer)
            status, columns = first_errors("verify", {"followed": least}, len(told))
            followed = columns["followed"]
            fell = [None if p is None or p >= self.followed_min else "drop:not_followed" for p in followed]
            return {"followed": followed, "status": [error or drop for error, drop in zip(status, fell, strict=True)]}

        return run


@dataclass(frozen=True, kw_only=True)
class SafetyStage:
    """Pictures that should not be kept, by any checker: rows with one among their sides fall as `drop:unsafe`."""

    checker: Model
    """Builds a `SafetyChecker`."""
    sides: tuple[str, ...] = ("source", "edited")
    """Image columns to look at."""
    unsafe_max: float = 0.5
    """Largest probability that is kept."""
    batch_size: int = 32
    """Rows looked at together."""

    @property
    def spec(self) -> StageSpec:
        return StageSpec(
            name="safety",
            version="1",
            inputs=self.sides,
            outputs={"unsafe": pa.float64()},
            batch_size=self.batch_size,
            models=self.checker.models(),
        )

    def build(self) -> StageCall:
        checker: SafetyChecker = self.checker.build()

        def run(batch: Batch) -> Batch:
            worst = np.max([list(checker.unsafe(images(batch[side]))) for side in self.sides], axis=0).tolist()
            return {"unsafe": worst, "status": ["drop:unsafe" if p > self.unsafe_max else None for p in worst]}

        return run


@dataclass(frozen=True, kw_only=True)
class PairwiseStage:
    """Asks a model which of two sides is better, in both orders; the label rule `pairwise` reads it."""

    comparer: Model
    """Builds a `Comparer`."""
    edited: str = "edited"
    """Column of the edit."""
    opponent: Literal["original", "neutral", "original_projected", "neutral_projected"] = "neutral"
    """Column it is held against: the rejected side of the labels."""
    batch_size: int = 32
    """Rows asked about together."""

    @property
    def spec(self) -> StageSpec:
        return StageSpec(
            name="pairwise",
            version="1",
            inputs=("prompt", self.edited, self.opponent),
            outputs={"prefers_edit": pa.float64()},
            batch_size=self.batch_size,
            models=self.comparer.models(),
        )

    def build(self) -> StageCall:
        comparer: Comparer = self.comparer.build()

        def run(batch: Batch) -> Batch:
            prompts = texts(batch["prompt"])
            said = comparer.compare(images(batch[self.edited]), images(batch[self.opponent]), prompts)
            status, columns = first_errors("pairwise", {"prefers_edit": said}, len(prompts))
            return {**columns, "status": status}

        return run
