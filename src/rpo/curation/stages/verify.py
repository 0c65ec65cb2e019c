"""Models that look at the edit: whether the announced change can be seen, and a safety checker."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from rpo.curation.columns import first_errors, images, texts
from rpo.data.schema import Instructions
from rpo.engine.stage import Batch, StageCall, StageSpec
from rpo.errors import RowError
from rpo.protocols import Model, SafetyChecker, Verifier


@dataclass(frozen=True, kw_only=True)
class VerifyStage:
    """Whether what the instructions announced can be seen: rows of which it cannot are dropped: `drop:not_followed`."""

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
            unseen = [None if p is None or p >= self.followed_min else "drop:not_followed" for p in followed]
            return {"followed": followed, "status": [error or drop for error, drop in zip(status, unseen, strict=True)]}

        return run


@dataclass(frozen=True, kw_only=True)
class SafetyStage:
    """Pictures that should not be kept, by any checker: rows with one among their sides are dropped: `drop:unsafe`."""

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
