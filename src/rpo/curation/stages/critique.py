"""The critique of each source by a vision-language model (arXiv 2503.11720, section 3.1)."""

from dataclasses import dataclass

import pyarrow as pa

from rpo.curation.columns import images as _images
from rpo.curation.columns import raw_answers
from rpo.curation.columns import texts as _texts
from rpo.data.schema import Critique
from rpo.engine.stage import Batch, StageCall, StageSpec, error_status
from rpo.errors import RowError
from rpo.protocols import Critic, Model


@dataclass(frozen=True, kw_only=True)
class CritiqueStage:
    """What is wrong with each source, in the structured schema. Rows without an issue are dropped: `drop:no_issue`."""

    critic: Model
    """Builds a `Critic`."""
    batch_size: int = 32
    """Images criticised at once."""
    workers: int = 1
    """Batches at once: for a critic over a wire as many as keep the server busy, for one in this process 1."""

    @property
    def spec(self) -> StageSpec:
        return StageSpec(
            name="critique",
            version="2",
            inputs=("source", "prompt"),
            outputs={"critique": pa.string(), "critique_raw": pa.string()},
            batch_size=self.batch_size,
            workers=self.workers,
            models=self.critic.models(),
        )

    def build(self) -> StageCall:
        critic: Critic = self.critic.build()

        def run(batch: Batch) -> Batch:
            answers = critic.critique(_images(batch["source"]), _texts(batch["prompt"]))
            told = [None if isinstance(a, RowError) else a.model_dump_json() for a in answers]
            return {"critique": told, "critique_raw": raw_answers(answers), "status": [_critique_status(a) for a in answers]}

        return run


def _critique_status(answer: Critique | RowError) -> str | None:
    if isinstance(answer, RowError):
        return error_status("critique", answer)
    return "drop:no_issue" if answer.no_issue else None
