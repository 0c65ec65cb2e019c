"""Samples of the policy: the images that are criticized."""

from dataclasses import dataclass

import pyarrow as pa

from rpo.core.parquet import IMAGE
from rpo.curation.columns import cells as _cells
from rpo.curation.columns import seeds as _seeds
from rpo.curation.columns import texts as _texts
from rpo.data.images import Frame
from rpo.engine.stage import Batch, StageCall, StageSpec
from rpo.protocols import Generator, Model


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
