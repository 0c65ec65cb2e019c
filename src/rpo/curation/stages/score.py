"""Scores of every side by every reward."""

import json
from dataclasses import dataclass

import pyarrow as pa

from rpo.curation.columns import first_errors, score_column
from rpo.curation.columns import images as _images
from rpo.curation.columns import texts as _texts
from rpo.curation.provenance import made_by
from rpo.engine.stage import Batch, StageCall, StageSpec
from rpo.protocols import Model, Scorer


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
