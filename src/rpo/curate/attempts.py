"""More than one edit for a source: attempts side by side, of which the scores choose, and rounds one after the other."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from rpo.curate.checking import CheckStage
from rpo.curate.columns import cells, first_errors, images, seeds, texts
from rpo.curate.pipeline import Batch, StageCall, StageSpec, row_seed
from rpo.curate.prompts.wording import EditorFamily, edit_request
from rpo.curate.stages import Model
from rpo.data.schema import Critique, Instructions
from rpo.data.shards import IMAGE
from rpo.errors import RowError
from rpo.protocols import Critic, Editor, Instructor, Scorer


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


@dataclass(frozen=True, kw_only=True)
class RoundStage:
    """Criticises the edit and edits it once more, so many times; each round's image stays as `round_1`, `round_2`, ...

    A row stops when the critic finds nothing more to change, or cannot say; its last image goes on as `edited`. The neutral edit goes
    through the editor as often, so that the two sides still differ by the instructions alone.
    """

    critic: Model
    """Builds a `Critic`."""
    instructor: Model
    """Builds an `Instructor`."""
    editor: Model
    """Builds an `Editor`."""
    rounds: int = 1
    """Further edits, at most."""
    family: EditorFamily = "ip2p"
    """How the editor wants to be spoken to."""
    neutral_instruction: str = "keep everything as it is"
    """What the neutral edit is asked for."""
    batch_size: int = 16
    """Images edited at once."""

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {self.rounds}")

    @property
    def spec(self) -> StageSpec:
        images = ("edited", "neutral", *(f"round_{i}" for i in range(1, self.rounds + 1)))
        return StageSpec(
            name="rounds",
            version="1",
            inputs=("prompt", "seed", "first_edited", "first_neutral"),
            outputs={name: IMAGE for name in images} | {"rounds": pa.string()},
            batch_size=self.batch_size,
            models=(*self.critic.models(), *self.instructor.models(), *self.editor.models()),
        )

    def build(self) -> StageCall:
        critic: Critic = self.critic.build()
        instructor: Instructor = self.instructor.build()
        editor: Editor = self.editor.build()

        def run(batch: Batch) -> Batch:
            prompts, row_seeds = texts(batch["prompt"]), seeds(batch["seed"])
            last, neutral = images(batch["first_edited"]), images(batch["first_neutral"])
            kept: dict[str, list[object]] = {f"round_{i}": [None] * len(prompts) for i in range(1, self.rounds + 1)}
            told: list[list[dict[str, Any]]] = [[] for _ in prompts]
            going = list(range(len(prompts)))
            for number in range(1, self.rounds + 1):
                going, requests = self._asked(critic, instructor, [last[row] for row in going], prompts, going, told)
                drawn = [row_seed(row_seeds[row], f"round {number}") for row in going]
                edits = editor.edit([last[row] for row in going], requests, drawn)
                plain = editor.edit([neutral[row] for row in going], [self.neutral_instruction] * len(going), drawn)
                for row, seed, edit, control, cell in zip(going, drawn, edits, plain, cells(edits), strict=True):
                    last[row], neutral[row], kept[f"round_{number}"][row] = edit, control, cell
                    told[row][-1]["seed"] = seed
            return {"edited": cells(last), "neutral": cells(neutral), **kept, "rounds": [json.dumps(rounds) for rounds in told]}

        return run

    def _asked(
        self, critic: Critic, instructor: Instructor, seen: list[np.ndarray], prompts: list[str], going: list[int],
        told: list[list[dict[str, Any]]],
    ) -> tuple[list[int], list[str]]:  # fmt: skip
        """(rows that go on, what the editor is asked for each); why another stops is told."""
        critiques = critic.critique(seen, [prompts[row] for row in going])
        for row, critique in zip(going, critiques, strict=True):
            told[row].append(_told(critique))
        open_rows = [(row, c) for row, c in zip(going, critiques, strict=True) if isinstance(c, Critique) and not c.no_issue]
        answers = instructor.instruct([prompts[row] for row, _ in open_rows], [critique for _, critique in open_rows])
        on: list[int] = []
        requests: list[str] = []
        for (row, critique), answer in zip(open_rows, answers, strict=True):
            if isinstance(answer, Instructions) and answer.instructions:
                on.append(row)
                requests.append(edit_request([one.instruction for one in answer.instructions], critique.keep, self.family))
                told[row][-1] |= {"instruction": requests[-1]}
            else:
                told[row][-1] |= {"stopped": str(answer) if isinstance(answer, RowError) else "no instruction"}
        return on, requests


def _told(critique: Critique | RowError) -> dict[str, Any]:
    if isinstance(critique, RowError):
        return {"stopped": str(critique)}
    return {"critique": critique.model_dump(mode="json")} | ({"stopped": "no issue"} if critique.no_issue else {})
