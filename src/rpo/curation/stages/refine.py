"""Refinement: critique and edit of the edit."""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from rpo.core.parquet import IMAGE
from rpo.curation.columns import cells, images, seeds, texts
from rpo.curation.vlm.editor_style import EditorFamily, edit_request
from rpo.data.schema import Critique, Instructions
from rpo.engine.stage import Batch, StageCall, StageSpec, row_seed
from rpo.errors import RowError
from rpo.protocols import Critic, Editor, Instructor, Model


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
            outputs=dict.fromkeys(images, IMAGE) | {"rounds": pa.string()},
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
