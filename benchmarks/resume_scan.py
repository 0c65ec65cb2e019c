"""Time and memory to plan a run, and to find out on resume that everything is done. `python benchmarks/resume_scan.py [ROWS]`

Bar: 1,000,000 rows, plan and resume scan together within 60 s and 1 GB. Making the finished stages' files is not counted.
"""

import argparse
import resource
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from rpo.curate.local_engine import run_stages
from rpo.curate.pipeline import Batch, StageCall, StageSpec, fan_out, plan
from rpo.curate.sidecars import SHARD_ROWS, lay_out, prepare, scan_shard, shard_sizes, write_layer_shard
from rpo.data.run_folder import open_run

STAGES = 7


@dataclass(frozen=True, kw_only=True)
class Number:
    """A stage of one column."""

    name: str

    @property
    def spec(self) -> StageSpec:
        return StageSpec(name=self.name, version="1", inputs=("id",), outputs={f"{self.name}_number": pa.int32()}, batch_size=SHARD_ROWS)

    def build(self) -> StageCall:
        def call(batch: Batch) -> Batch:
            return {f"{self.name}_number": [0] * len(batch["id"])}

        return call


def planned(rows: int) -> pa.Table:
    return plan(
        fan_out((f"a photo of thing number {number} on a table" for number in range(rows)), 1), seed=0, columns={"sample": pa.int32()}
    )


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main(rows: int, folder: Path) -> None:
    stages = [Number(name=f"stage{number}") for number in range(STAGES)]
    began = time.perf_counter()
    with open_run(folder) as run:
        table = planned(rows)
        layers = lay_out(folder, table, stages)
        prepare(run, table, layers)
        plan_s = time.perf_counter() - began

        def make(shard: tuple[int, int]) -> None:
            index, size = shard
            chain = scan_shard(layers, index, size)[0]
            ids = table.column("id").slice(index * SHARD_ROWS, size)
            for layer in layers[1:]:
                columns = {"id": ids, layer.columns[0]: pa.array([0] * size, pa.int32()), "status": pa.nulls(size, pa.string())}
                chain = write_layer_shard(layer, index, pa.table(columns), chain)

        with ThreadPoolExecutor(8) as threads:
            list(threads.map(make, enumerate(shard_sizes(layers))))
    began = time.perf_counter()
    with open_run(folder, resume=True) as run:
        run_stages(run, planned(rows), stages)
    scan_s = time.perf_counter() - began
    files = (STAGES + 1) * len(shard_sizes(layers))
    print(f"{rows:,} rows, {files:,} files: plan {plan_s:.1f} s, resume {scan_s:.1f} s, peak {peak_gb():.2f} GB")


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("rows", type=int, nargs="?", default=100_000)
    with tempfile.TemporaryDirectory() as temporary:
        main(arguments.parse_args().rows, Path(temporary) / "run")
