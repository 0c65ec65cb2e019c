"""Projection of both sides through the policy: noise is added, then removed under the prompt."""

from dataclasses import dataclass

from rpo.core.parquet import IMAGE
from rpo.curation.columns import cells as _cells
from rpo.curation.columns import images as _images
from rpo.curation.columns import seeds as _seeds
from rpo.curation.columns import texts as _texts
from rpo.engine.stage import Batch, StageCall, StageSpec
from rpo.protocols import Model


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
