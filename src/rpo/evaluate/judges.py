"""Reward models as judges: what they say is measured like all else, and marked where they chose the training pairs."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rpo.errors import RowError, RpoError
from rpo.protocols import Embedder, Scorer


@dataclass(frozen=True)
class ScorerJudge:
    """A `Judge` with one metric, named as the scorer; features if the scorer embeds images, else none."""

    name: str
    scorer: Scorer

    def measure(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[dict[str, float]]:
        scores = self.scorer.score(images, prompts)
        for score in scores:
            if isinstance(score, RowError):
                raise RpoError(f"{self.name} has no score for one of the images: {score}")
        return [{self.name: score} for score in scores if not isinstance(score, RowError)]

    def features(self, images: Sequence[np.ndarray]) -> np.ndarray:
        return self.scorer.features(images) if isinstance(self.scorer, Embedder) else np.zeros((len(images), 0))
