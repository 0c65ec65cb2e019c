"""Pairs without an edit, for comparison: two samples of one prompt, and rewards that say which is better (arXiv 2311.12908)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np

from rpo.core.parquet import IMAGE
from rpo.curation.columns import score_column
from rpo.curation.label_rules import coin, lower_bound, votes
from rpo.curation.stages.label import Combination, label_columns
from rpo.data.images import encode_png, image_cell
from rpo.engine.stage import Batch, StageCall, StageSpec, row_seed
from rpo.protocols import Generator, Model

SIDES = ("first", "second")


@dataclass(frozen=True, kw_only=True)
class TwoSamplesStage:
    """Two samples of the policy under one prompt, from different noise."""

    generator: Model
    """Builds a `Generator`."""
    batch_size: int = 16
    """Prompts sampled at once."""

    @property
    def spec(self) -> StageSpec:
        return StageSpec(
            name="samples",
            version="1",
            inputs=("prompt", "seed"),
            outputs=dict.fromkeys(SIDES, IMAGE),
            batch_size=self.batch_size,
            models=self.generator.models(),
        )

    def build(self) -> StageCall:
        generator: Generator = self.generator.build()

        def run(batch: Batch) -> Batch:
            prompts, seeds = cast(list[str], list(batch["prompt"])), cast(list[int], list(batch["seed"]))
            starts = {"first": seeds, "second": [row_seed(seed, "second") for seed in seeds]}
            return {side: [image_cell(encode_png(image)) for image in generator.generate(prompts, starts[side])] for side in SIDES}

        return run


@dataclass(frozen=True, kw_only=True)
class DuelLabelStage:
    """Which of two samples is better: the one that every reward prefers."""

    rewards: tuple[str, ...]
    """Names of the rewards that vote; none of them may be an evaluation judge."""
    rule: Literal["vote", "random"] = "vote"
    """vote: all rewards agree; random: a control, whatever they say."""

    @property
    def sides(self) -> tuple[str, str]:
        return SIDES

    @property
    def combinations(self) -> tuple[Combination, ...]:
        return ("source",)

    @property
    def weighted(self) -> bool:
        return False

    def opponent(self, combination: Combination) -> str:
        return SIDES[1]

    @property
    def spec(self) -> StageSpec:
        return StageSpec(
            name="label",
            version="1",
            inputs=("id", *(score_column(reward, side) for reward in self.rewards for side in SIDES)),
            outputs=label_columns("source"),
            batch_size=1_000_000,  # a shard at once: the gap is in units of the scores' spread over it
        )

    def build(self) -> StageCall:
        def run(batch: Batch) -> Batch:
            scores = {side: np.array([batch[score_column(r, side)] for r in self.rewards], dtype=np.float64).T for side in SIDES}
            margins = scores["first"] - scores["second"]
            spread = np.maximum(np.concatenate(list(scores.values())).std(0), 1e-9)
            first_wins = self._first_wins(cast(list[str], list(batch["id"])), votes(margins, np.zeros(len(self.rewards))))
            return {
                "chosen_side": [None if w is None else SIDES[not w] for w in first_wins],
                "rejected_side": [None if w is None else SIDES[w] for w in first_wins],
                "gap": np.abs((margins / spread).mean(1)).tolist(),
                "lower_bound": lower_bound(margins / spread, 1.0).tolist(),
                "status": ["drop:rewards_disagree" if w is None else None for w in first_wins],
            }

        return run

    def _first_wins(self, ids: Sequence[str], cast_votes: np.ndarray) -> list[bool | None]:
        if self.rule == "random":
            return [coin(row) for row in ids]
        agree = np.abs(cast_votes.sum(1)) == len(self.rewards)
        return [bool(row[0] > 0) if one else None for row, one in zip(cast_votes, agree, strict=True)]
