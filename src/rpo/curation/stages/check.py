"""Checks of an edit: no change, over-edit, shift, zoom and rotation."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from rpo.curation.columns import images
from rpo.curation.image_metrics import visible_change
from rpo.curation.registration import Motion, register
from rpo.engine.stage import Batch, StageCall, StageSpec
from rpo.protocols import Embedder, Model

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
