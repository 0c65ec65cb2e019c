"""A model compares both sides in both orders."""

from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from rpo.curation.columns import first_errors, images, texts
from rpo.engine.stage import Batch, StageCall, StageSpec
from rpo.protocols import Comparer, Model


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
