"""Source, critique and instruct with a chat over a wire. As a program: `vlm_pipeline.py RUN_FOLDER URL ROWS`, to be killed at will."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx2  # noqa: F401  (loaded before "ready", so that kills hit work)
import numpy as np

from rpo.accounting.metering import account_in, metered
from rpo.backends.chat.openai import ChatServer, OpenAIChatConfig, hang_up
from rpo.backends.chat.pacing import Pacing
from rpo.core.run_folder import open_run
from rpo.curation.stages.critique import CritiqueStage
from rpo.curation.stages.instruct import InstructStage
from rpo.curation.stages.source import SourceStage
from rpo.curation.vlm.critic import VlmCriticConfig
from rpo.curation.vlm.instructor import VlmInstructorConfig
from rpo.engine.local import run_stages
from rpo.engine.stage import Stage, plan
from rpo.errors import Interrupted
from rpo.testing.server import Asked

CONCURRENCY = 4


@dataclass(frozen=True, kw_only=True)
class Noise:
    """A generator whose pictures are all different."""

    def models(self) -> tuple[str, ...]:
        return ()

    def build(self) -> "Noise":
        return self

    def generate(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[np.ndarray]:
        return [np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8) for seed in seeds]


def answer(asked: Asked) -> str:
    """What a model might say; one prompt in ten has no issue, one in ten it will not be read, one in ten has a region in pixels and one
    in ten an address that does not exist."""
    text = asked.texts[0] if len(asked.texts) == 1 else "".join(asked.texts)
    number = int(text.split('Prompt: "picture ')[1].split('"')[0])
    if number % 10 == 3:
        return "I would rather not."
    region = [10, 20, 30, 40] if number % 10 == 5 else None
    issue = {"aspect": "count", "severity": 2, "evidence": f"one of {number}", "region": region, "prompt_span": "", "fixable_by_edit": True}
    if asked.schema_name == "critique":
        fine = number % 10 == 7
        issues = [] if fine else [issue]
        said = {"reasoning": f"I see {number}.", "aspects": [], "issues": issues, "keep": ["the rest"], "overall": 3, "no_issue": fine}
        return json.dumps(said)
    change = {"op": "add", "target": f"thing {number}", "location": "", "instruction": f"add thing {number}",
              "addresses": [0, 9] if number % 10 == 6 else [0],
              "expected_visible_change": "it is seen"}  # fmt: skip
    return json.dumps({"instructions": [change], "skip_reason": None})


def stages(folder: Path, url: str) -> tuple[Stage, ...]:
    pacing = Pacing(concurrency_start=CONCURRENCY, concurrency_max=CONCURRENCY)
    chat = OpenAIChatConfig(model="m", server=ChatServer(base_url=url, pacing=pacing))
    given = (
        SourceStage(generator=Noise()),
        CritiqueStage(critic=VlmCriticConfig(chat=chat), batch_size=8),
        InstructStage(instructor=VlmInstructorConfig(chat=chat), batch_size=8),
    )
    return metered(given, account_in(folder, None, None, None))


def main(folder: str, url: str, rows: str) -> None:
    planned = plan([{"prompt": f"picture {number}"} for number in range(int(rows))], seed=1)
    with open_run(Path(folder), resume=True) as run:
        print("ready", flush=True)
        try:
            run_stages(run, planned, stages(run.path, url), shard_rows=8)
        except Interrupted as stop:
            sys.exit(stop.exit_code)
        finally:
            hang_up()


if __name__ == "__main__":
    main(*sys.argv[1:])
