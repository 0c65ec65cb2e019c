"""Stages that look at an edit and drop what should not become a pair, each with its measure as a column."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from rpo.curate.checks import change_fraction, pattern_levels, shift_px, zoom
from rpo.curate.columns import first_errors, images, texts
from rpo.curate.pipeline import Batch, StageCall, StageSpec
from rpo.curate.stages import Model
from rpo.data.schema import Instructions
from rpo.errors import RowError
from rpo.protocols import Comparer, Embedder, SafetyChecker, Verifier


@dataclass(frozen=True, kw_only=True)
class CheckStage:
    """Drops edits that changed nothing, changed almost everything, or moved or zoomed the whole picture."""

    change_min: float = 0.005
    """Least share of pixels that an edit changes; below it falls as `drop:no_op`."""
    change_max: float = 0.9
    """Largest share of pixels that an edit may change; above it falls as `drop:over_edit`."""
    shift_max_px: float = 2.0
    """Largest displacement of the whole picture; above it falls as `drop:shifted`."""
    zoom_max: float | None = None
    """Largest change of scale (0.02 is two per cent); above it falls as `drop:zoomed`. Not measured if not given."""
    embedder: Model | None = None
    """Builds an `Embedder`, such as the CLIP of a reward, for the perceptual distance (1 - cosine); not measured if not given."""
    distance_min: float = 0.0
    """Least perceptual distance; below it falls as `drop:no_op`."""
    distance_max: float = 1.0
    """Largest perceptual distance; above it falls as `drop:over_edit`."""

    def __post_init__(self) -> None:
        if not 0 <= self.change_min < self.change_max <= 1:
            raise ValueError(f"change_min and change_max must satisfy 0 <= min < max <= 1, got {self.change_min} and {self.change_max}")
        if not 0 <= self.distance_min < self.distance_max <= 2:
            low, high = self.distance_min, self.distance_max
            raise ValueError(f"distance_min and distance_max must satisfy 0 <= min < max <= 2, got {low} and {high}")
        if self.embedder is None and (self.distance_min, self.distance_max) != (0.0, 1.0):
            raise ValueError("distance_min and distance_max need an embedder to measure by")

    @property
    def spec(self) -> StageSpec:
        names = ["change_fraction", "shift_px"] + ["zoom"] * (self.zoom_max is not None) + ["distance"] * (self.embedder is not None)
        return StageSpec(
            name="check",
            version="1",
            inputs=("original", "edited"),
            outputs={name: pa.float64() for name in names},
            batch_size=64,
            models=self.embedder.models() if self.embedder else (),
        )

    def _status(self, measured: Mapping[str, float]) -> str | None:
        distance, zoom = measured.get("distance"), measured.get("zoom")
        if measured["change_fraction"] < self.change_min or (distance is not None and distance < self.distance_min):
            return "drop:no_op"
        if measured["change_fraction"] > self.change_max or (distance is not None and distance > self.distance_max):
            return "drop:over_edit"
        if measured["shift_px"] > self.shift_max_px:
            return "drop:shifted"
        return "drop:zoomed" if zoom is not None and self.zoom_max is not None and zoom > self.zoom_max else None

    def verdicts(self, embedder: Embedder | None) -> Callable[[list[np.ndarray], list[np.ndarray]], list[dict[str, Any]]]:
        """What is measured of each (original, edited), and its `status`."""

        def verdict(originals: list[np.ndarray], edits: list[np.ndarray]) -> list[dict[str, Any]]:
            distances = [] if embedder is None else (1 - (embedder.features(originals) * embedder.features(edits)).sum(1)).tolist()
            rows: list[dict[str, Any]] = []
            for i, (original, edited) in enumerate(zip(originals, edits, strict=True)):
                measured: dict[str, float] = {
                    "change_fraction": change_fraction(original, edited),
                    "shift_px": shift_px(original, edited),
                }
                if self.zoom_max is not None:
                    measured["zoom"] = zoom(original, edited)
                if embedder is not None:
                    measured["distance"] = distances[i]
                rows.append({**measured, "status": self._status(measured)})
            return rows

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
class FingerprintStage:
    """A faint pattern that the editor leaves on everything, measured over a shard: above the limit all its rows fall."""

    levels_max: float = 1.0
    """Strongest pattern, in levels of 255; above it rows fall as `drop:fingerprint`."""

    @property
    def spec(self) -> StageSpec:
        return StageSpec(
            name="fingerprint",
            version="1",
            inputs=("original", "edited"),
            outputs={"pattern_levels": pa.float64()},
            batch_size=1_000_000,  # a shard at once: one picture cannot tell a pattern from an edit
        )

    def build(self) -> StageCall:
        def run(batch: Batch) -> Batch:
            levels = pattern_levels(images(batch["original"]), images(batch["edited"]))
            fell = levels is not None and levels > self.levels_max
            rows = len(batch["edited"])
            return {"pattern_levels": [levels] * rows, "status": ["drop:fingerprint" if fell else None] * rows}

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
