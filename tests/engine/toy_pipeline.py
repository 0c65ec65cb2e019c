"""A four-stage pipeline of fakes that logs its calls.

As a program: `toy_pipeline.py RUN_FOLDER CALL_LOG ROWS DELAY_S [STUCK_STAGE [ENGINE]]`.
"""

import hashlib
import json
import os
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from rpo.core.parquet import IMAGE
from rpo.core.run_folder import open_run
from rpo.engine import local as local_engine
from rpo.engine import ray as ray_engine
from rpo.engine.stage import Batch, Stage, StageCall, StageSpec, fan_out, plan
from rpo.errors import Interrupted

SHARD_ROWS = 4
NAMES = ("source", "critique", "edit", "score")


@dataclass(frozen=True, kw_only=True)
class Toy:
    """Turns the text of the stage before into another, which depends on the whole batch, as pixels do."""

    name: str
    reads: str
    salt: str = ""
    delay_s: float = 0.0
    stuck: bool = False
    batch_size: int = 2
    workers: int = 1

    @property
    def spec(self) -> StageSpec:
        outputs = {f"{self.name}_text": pa.string(), f"{self.name}_image": IMAGE}
        inputs = ("id", "seed", self.reads)
        return StageSpec(name=self.name, version="1", inputs=inputs, outputs=outputs, batch_size=self.batch_size, workers=self.workers)

    def build(self) -> StageCall:
        thread = threading.get_ident()

        def call(batch: Batch) -> Batch:
            assert threading.get_ident() == thread, "a callable is built in the thread that calls it"
            log(self.name, list(batch["id"]))
            if self.stuck:
                time.sleep(60)
            time.sleep(self.delay_s)
            whole = "|".join(map(str, (*batch["id"], *batch[self.reads])))
            texts = [hashlib.sha256(f"{self.salt}{self.name}{seed}{whole}".encode()).hexdigest() for seed in batch["seed"]]
            status = [f"drop:{self.name}_odd" if int(text[:2], 16) < 40 else None for text in texts]
            images = [{"bytes": bytes.fromhex(text) * 8, "path": None} for text in texts]
            return {f"{self.name}_text": texts, f"{self.name}_image": images, "status": status}

        return call


def log(name: str, ids: list[object]) -> None:
    """One line per call in the file $TOY_CALLS, which is no part of a stage's configuration."""
    descriptor = os.open(os.environ["TOY_CALLS"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(descriptor, (json.dumps({"process": os.getpid(), "stage": name, "ids": ids}) + "\n").encode())
    os.close(descriptor)


def read_calls(calls: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []


def toy_rows(count: int) -> pa.Table:
    prompts = [f"prompt {number}" for number in range(count // 2)]
    return plan(fan_out(prompts, 2), seed=7, columns={"sample": pa.int32()})


def toy_stages(calls: Path, delay_s: float = 0.0, stuck: str = "", **changes: object) -> list[Stage]:
    os.environ["TOY_CALLS"] = str(calls)
    reads = ("prompt", *(f"{name}_text" for name in NAMES))
    return [
        Toy(name=name, reads=read, delay_s=delay_s, stuck=name == stuck, **changes)  # type: ignore[arg-type]
        for name, read in zip(NAMES, reads, strict=False)
    ]


def main(folder: str, calls: str, rows: str, delay_s: str, stuck: str = "", engine: str = "local") -> None:
    planned = toy_rows(int(rows))
    with open_run(Path(folder), resume=True) as run:
        print("ready", flush=True)
        try:
            engines = {"local": local_engine, "ray": ray_engine}
            engines[engine].run_stages(run, planned, toy_stages(Path(calls), float(delay_s), stuck), shard_rows=SHARD_ROWS)
        except Interrupted as stop:
            sys.exit(stop.exit_code)


if __name__ == "__main__":
    main(*sys.argv[1:])
