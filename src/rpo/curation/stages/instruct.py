"""Edit instructions from the critique."""

from dataclasses import dataclass

import pyarrow as pa

from rpo.curation.columns import raw_answers
from rpo.curation.columns import texts as _texts
from rpo.curation.vlm.editor_style import EditorFamily, edit_request
from rpo.data.schema import Critique, Instructions
from rpo.engine.stage import Batch, StageCall, StageSpec, error_status
from rpo.errors import RowError
from rpo.protocols import Instructor, Model


@dataclass(frozen=True, kw_only=True)
class InstructStage:
    """At most three atomic changes per critique, joined into the one request the editor reads."""

    instructor: Model
    """Builds an `Instructor`."""
    family: EditorFamily = "ip2p"
    """How the editor wants to be spoken to: how changes are joined, and whether it is told what to keep."""
    batch_size: int = 32
    """Critiques read at once."""
    workers: int = 1
    """Batches at once, as in `CritiqueStage`."""

    @property
    def spec(self) -> StageSpec:
        return StageSpec(
            name="instruct",
            version="2",
            inputs=("prompt", "critique"),
            outputs={"instructions": pa.string(), "instruction": pa.string(), "instruct_raw": pa.string()},
            batch_size=self.batch_size,
            workers=self.workers,
            models=self.instructor.models(),
        )

    def _request(self, answer: Instructions | RowError, critique: Critique) -> str | None:
        if isinstance(answer, RowError):
            return None
        return edit_request([one.instruction for one in answer.instructions], critique.keep, self.family)

    def build(self) -> StageCall:
        instructor: Instructor = self.instructor.build()

        def run(batch: Batch) -> Batch:
            critiques = [Critique.model_validate_json(text) for text in _texts(batch["critique"])]
            answers = instructor.instruct(_texts(batch["prompt"]), critiques)
            told = [None if isinstance(a, RowError) else a.model_dump_json() for a in answers]
            return {
                "instructions": told,
                "instruction": [self._request(a, critique) for a, critique in zip(answers, critiques, strict=True)],
                "instruct_raw": raw_answers(answers),
                "status": [_instruct_status(a) for a in answers],
            }

        return run


def _instruct_status(answer: Instructions | RowError) -> str | None:
    if isinstance(answer, RowError):
        return error_status("instruct", answer)
    return None if answer.instructions else "drop:no_instruction"
