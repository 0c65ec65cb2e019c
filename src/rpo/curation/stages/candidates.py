"""Several candidates of one edit: the scores choose one."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from rpo.core.parquet import IMAGE
from rpo.curation.columns import first_errors, images, texts
from rpo.curation.stages.check import CheckStage
from rpo.engine.stage import Batch, StageCall, StageSpec
from rpo.protocols import Model, Scorer


def ranks(scores: np.ndarray) -> np.ndarray:
    """Borda count of (attempts, rewards): over all rewards, how many other attempts each beats, a tie as half. Scales do not matter."""
    ahead = scores[:, None] - scores[None]
    return ((ahead > 0) + 0.5 * (ahead == 0)).sum(axis=(1, 2))


def choose(scores: np.ndarray, passed: Sequence[bool]) -> int:
    """The attempt that goes on: the highest rank among those that passed the checks, among all if none did; the first of equals."""
    allowed = np.array(passed) if any(passed) else np.ones(len(passed), dtype=bool)
    rank = np.full(len(passed), -1.0)
    rank[allowed] = ranks(scores[allowed])
    return int(rank.argmax())


@dataclass(frozen=True, kw_only=True)
class AttemptStage:
    """Scores and checks every attempt of an edit and lets the best go on as `edited`; all stay, with what was measured, in `attempts`."""

    count: int
    """How many attempts the edit stage makes."""
    rewards: tuple[tuple[str, Model], ...]
    """(name, builds a `Scorer`) of each reward that has a say; together they rank the attempts."""
    check: CheckStage = field(default_factory=CheckStage)
    """Attempts that fail it go on only if all do."""
    first: bool = False
    """Whether rounds follow: the edit is then `first_edited`."""
    batch_size: int = 16
    """Rows scored together."""

    def __post_init__(self) -> None:
        if self.count < 2:
            raise ValueError(f"count must be at least 2, got {self.count}; for one attempt leave the stage out")
        if not self.rewards:
            raise ValueError("rewards is empty: nothing would choose between the attempts")

    @property
    def spec(self) -> StageSpec:
        edited = "first_edited" if self.first else "edited"
        models = [model for _, config in self.rewards for model in config.models()]
        return StageSpec(
            name="attempts",
            version="1",
            inputs=("prompt", "original", "edited_by", *(f"attempt_{i}" for i in range(self.count))),
            outputs={edited: IMAGE, "attempt": pa.int32(), "attempts": pa.string()},
            batch_size=self.batch_size,
            models=(*models, *self.check.spec.models),
        )

    def build(self) -> StageCall:
        scorers: dict[str, Scorer] = {name: config.build() for name, config in self.rewards}
        verdict = self.check.verdicts(self.check.embedder.build() if self.check.embedder else None)
        edited = "first_edited" if self.first else "edited"
        columns = [f"attempt_{i}" for i in range(self.count)]

        def run(batch: Batch) -> Batch:
            prompts, originals = texts(batch["prompt"]), images(batch["original"])
            tried = [images(batch[name]) for name in columns]
            checked = [verdict(originals, attempt) for attempt in tried]
            said = {f"{reward} {i}": scorer.score(tried[i], prompts) for reward, scorer in scorers.items() for i in range(self.count)}
            status, scores = first_errors("attempts", said, len(prompts))
            picked = [0 if status[row] else self._choice(row, scores, checked) for row in range(len(prompts))]
            settings = [json.loads(text)["attempts"] for text in texts(batch["edited_by"])]
            told = [
                [
                    {**settings[row][i], **checked[i][row], "scores": {reward: scores[f"{reward} {i}"][row] for reward in scorers}}
                    for i in range(self.count)
                ]
                for row in range(len(prompts))
            ]
            return {
                edited: [batch[columns[attempt]][row] for row, attempt in enumerate(picked)],
                "attempt": picked,
                "attempts": [json.dumps(row) for row in told],
                "status": status,
            }

        return run

    def _choice(self, row: int, scores: Mapping[str, Sequence[float | None]], checked: Sequence[Sequence[Mapping[str, Any]]]) -> int:
        table = np.array([[scores[f"{reward} {i}"][row] for reward, _ in self.rewards] for i in range(self.count)], dtype=np.float64)
        return choose(table, [checked[i][row]["status"] is None for i in range(self.count)])
