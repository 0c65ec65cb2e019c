"""What the curation engines cost: overlap of stages, overhead, planning and resuming of many rows, reading of pairs.

    python benchmarks/curate.py overlap [--engine local|ray] [--shards 24] [--work-ms 4]
    python benchmarks/curate.py overhead
    python benchmarks/curate.py rows [1000000]
    python benchmarks/curate.py reads

`overlap` runs three stages of known real work (chained sha256, which releases the GIL as a GPU call does) of which the second is
the slowest. Efficiency is the measured rate over the rate of the slowest stage alone in one thread; 0.9 is the bar, and it takes as
many free cores as stages whose work is not small against it. `rows` prints time and peak memory to plan a run and, when all is done,
to find that out again; making the finished stages' files is not counted. Bar: 1,000,000 rows in 60 s and 1 GB.
"""

import argparse
import hashlib
import io
import json
import os
import random
import re
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from rich.console import Console

from rpo.core.run_folder import open_run
from rpo.data.images import EncodedImage, encode_png
from rpo.data.pairs import Pair, read_pairs, write_pairs
from rpo.engine import local as local_engine
from rpo.engine import ray as ray_engine
from rpo.engine.layers import SHARD_ROWS, lay_out, prepare, scan_shard, shard_sizes, write_layer_shard
from rpo.engine.stage import Batch, StageCall, StageSpec, fan_out, plan
from rpo.training.inputs.cache import SHARD_ROWS as CACHE_ROWS
from rpo.training.inputs.cache import Rows, Shards, keep

STAGES = 7
BLOCK = bytes(1 << 20)


@dataclass(frozen=True, kw_only=True)
class Work:
    """A stage of one column and so many MiB hashed per row."""

    name: str
    mib_per_row: float = 0.0

    @property
    def spec(self) -> StageSpec:
        return StageSpec(name=self.name, version="1", inputs=("id",), outputs={f"{self.name}_number": pa.int32()}, batch_size=8)

    def build(self) -> StageCall:
        def call(batch: Batch) -> Batch:
            block = memoryview(BLOCK)
            for _ in batch["id"]:
                left = round(self.mib_per_row * len(block))
                while left > 0:
                    hashlib.sha256(block[: min(left, len(block))]).digest()
                    left -= len(block)
            return {f"{self.name}_number": [0] * len(batch["id"])}

        return call


def planned(rows: int) -> pa.Table:
    prompts = (f"a photo of thing number {number} on a table" for number in range(rows))
    return plan(fan_out(prompts, 1), seed=0, columns={"sample": pa.int32()})


def seconds_of(engine: object, rows: int, stages: list[Work], folder: Path) -> float:
    with open_run(folder) as run:
        table = planned(rows)
        prepare(run, table, lay_out(folder, table, stages))
        began = time.perf_counter()
        engine.run_stages(run, table, stages, console=Console(file=io.StringIO()))  # type: ignore[attr-defined]
        return time.perf_counter() - began


def overlap(arguments: argparse.Namespace, folder: Path) -> dict[str, object]:
    rows = arguments.shards * SHARD_ROWS
    began = time.perf_counter()
    hashlib.sha256(BLOCK * 64).digest()
    mib = arguments.work_ms / ((time.perf_counter() - began) / 64 * 1000)
    stages = [Work(name="source", mib_per_row=0.2 * mib), Work(name="edit", mib_per_row=mib), Work(name="score", mib_per_row=0.2 * mib)]
    slowest = stages[1].build()
    batch = {"id": ["x"] * 8}
    began = time.perf_counter()
    for _ in range(rows // 8):
        slowest(batch)
    alone_s = time.perf_counter() - began
    engine = {"local": local_engine, "ray": ray_engine}[arguments.engine]
    seconds = seconds_of(engine, rows, stages, folder)
    # After start-up, which for Ray takes seconds: from the first shard of the last stage to the last one.
    ends = sorted(path.stat().st_mtime for path in folder.glob("*_score-*/*.parquet"))
    rate, slowest_rate = (len(ends) - 1) * SHARD_ROWS / (ends[-1] - ends[0]), rows / alone_s
    figures = {
        "rows_per_s": round(rate, 1),
        "slowest_stage_alone_per_s": round(slowest_rate, 1),
        "efficiency": round(rate / slowest_rate, 3),
    }
    return {"engine": arguments.engine, "cores": os.cpu_count(), "rows": rows, **figures, "seconds": round(seconds, 1)}


def overhead(arguments: argparse.Namespace, folder: Path) -> dict[str, object]:
    rows, stages = 64 * 100, [Work(name=f"stage{number}") for number in range(4)]
    seconds = seconds_of(local_engine, rows, stages, folder)
    return {"rows": rows, "stages": len(stages), "ms_per_row_and_stage": round(seconds * 1000 / rows / len(stages), 3)}


def peak_gb() -> float:
    """Of this program alone: `ru_maxrss` may hold what the process that started it had in memory."""
    told = Path("/proc/self/status").read_text()
    return int(re.findall(r"VmHWM:\s*(\d+) kB", told)[0]) / 2**20


def many_rows(arguments: argparse.Namespace, folder: Path) -> dict[str, object]:
    stages = [Work(name=f"stage{number}") for number in range(STAGES)]
    began, cpu = time.perf_counter(), time.process_time()
    with open_run(folder) as run:
        table = planned(arguments.count)
        layers = lay_out(folder, table, stages)
        prepare(run, table, layers)
        figures = {"plan_s": round(time.perf_counter() - began, 1), "plan_cpu_s": round(time.process_time() - cpu, 1)}

        def make(shard: tuple[int, int]) -> None:
            index, size = shard
            chain = scan_shard(layers, index, size)[0]
            ids = table.column("id").slice(index * SHARD_ROWS, size)
            for layer in layers[1:]:
                columns = {"id": ids, layer.columns[0]: pa.array([0] * size, pa.int32()), "status": pa.nulls(size, pa.string())}
                chain = write_layer_shard(layer, index, pa.table(columns), chain)

        with ThreadPoolExecutor(8) as threads:
            list(threads.map(make, enumerate(shard_sizes(layers))))
    began, cpu = time.perf_counter(), time.process_time()
    with open_run(folder, resume=True) as run:
        local_engine.run_stages(run, planned(arguments.count), stages, console=Console(file=io.StringIO()))
    figures |= {"resume_s": round(time.perf_counter() - began, 1), "resume_cpu_s": round(time.process_time() - cpu, 1)}
    figures["peak_gb"] = round(peak_gb(), 2)
    return {"rows": arguments.count, "files": (STAGES + 1) * len(shard_sizes(layers)), **figures}


def reads(arguments: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Images per second: all of a pairs file once, as the latents' cache reads them, and of decoding alone; then latents at random,
    as training draws them."""
    figures: dict[str, object] = {}
    for side, count in ((64, 4000), (512, 64)):
        rng = np.random.default_rng(0)
        images = [EncodedImage.of(encode_png(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))) for _ in range(64)]
        rest = {"gap": 1.0, "split": "train", "critique": "{}", "instruction": "", "scores": "{}", "provenance": "{}"}
        made = (Pair(id=f"{i:08x}", prompt=f"p{i}", chosen=images[i % 64], rejected=images[(i + 1) % 64], **rest) for i in range(count))
        write_pairs(folder / f"{side}.parquet", made)
        began = time.perf_counter()
        for pair in read_pairs(folder / f"{side}.parquet"):
            pair.chosen.decode(), pair.rejected.decode()
        figures[f"{side}px_per_s"] = round(2 * count / (time.perf_counter() - began))
        began = time.perf_counter()
        for number in range(2 * count):
            images[number % 64].decode()
        figures[f"{side}px_decoding_alone_per_s"] = round(2 * count / (time.perf_counter() - began))
    for side in (64, 512):
        latents = {"mean": torch.randn(CACHE_ROWS, 4, side // 8, side // 8).half()}
        paths = [folder / f"{side}-{number}.safetensors" for number in range(50)]
        for path in paths:
            keep(path, partial(dict, latents))
        rows = Rows(Shards(paths))
        picks = [random.Random(0).choices(range(50 * CACHE_ROWS), k=64) for _ in range(100)]
        began = time.perf_counter()
        for pick in picks:
            rows.take("mean", pick)
        figures[f"{side}px_latents_at_random_per_s"] = round(6400 / (time.perf_counter() - began))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("overlap", "overhead", "rows", "reads"))
    parser.add_argument("count", type=int, nargs="?", default=100_000)
    parser.add_argument("--engine", choices=("local", "ray"), default="local")
    parser.add_argument("--shards", type=int, default=24)
    parser.add_argument("--work-ms", type=float, default=4.0)
    arguments = parser.parse_args()
    work = {"overlap": overlap, "overhead": overhead, "rows": many_rows, "reads": reads}[arguments.what]
    with tempfile.TemporaryDirectory() as temporary:
        print(json.dumps(work(arguments, Path(temporary) if arguments.what == "reads" else Path(temporary) / "run")))


if __name__ == "__main__":
    main()
