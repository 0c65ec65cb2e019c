"""Curates, selects and publishes ROWS rows of two 16 KB images and prints the peak memory in MB. `memory_program.py FOLDER ROWS`"""

import io
import random
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from rich.console import Console

from rpo.core.parquet import IMAGE
from rpo.core.run_folder import open_run
from rpo.data.hub import check_published, new_folder, write_tables
from rpo.data.images import EncodedImage
from rpo.data.pairs import SCHEMA, Pair, iterate_pairs, pair_tables, write_pairs
from rpo.engine.funnel import drops, funnel
from rpo.engine.layers import read_shards
from rpo.engine.local import run_stages
from rpo.engine.stage import Batch, StageCall, StageSpec, fan_out, plan

IMAGE_BYTES = 16_000


@dataclass(frozen=True, kw_only=True)
class Side:
    """Makes one large image per row."""

    name: str
    reads: str

    @property
    def spec(self) -> StageSpec:
        return StageSpec(name=self.name, version="1", inputs=("seed", self.reads), outputs={f"{self.name}_image": IMAGE}, batch_size=16)

    def build(self) -> StageCall:
        def call(batch: Batch) -> Batch:
            images = [b"\x89PNG\r\n\x1a\n" + random.Random(f"{self.name}{seed}").randbytes(IMAGE_BYTES) for seed in batch["seed"]]
            return {f"{self.name}_image": [{"bytes": image, "path": None} for image in images]}

        return call


def pairs(folder: Path) -> Iterator[Pair]:
    for table in read_shards(folder, ["prompt", "good_image", "bad_image"]):
        for row in table.to_pylist():
            sides = {side: EncodedImage.of(row[name]["bytes"]) for side, name in (("chosen", "good_image"), ("rejected", "bad_image"))}
            yield Pair(
                id=row["id"],
                prompt=row["prompt"],
                gap=1.0,
                split="train",
                critique="{}",
                instruction="",
                scores="{}",
                provenance="{}",
                **sides,
            )


def main(folder: Path, rows: int) -> None:
    planned = plan(fan_out((f"prompt {number}" for number in range(rows)), 1), seed=0, columns={"sample": pa.int32()})
    with open_run(folder) as run:
        stages = (Side(name="good", reads="prompt"), Side(name="bad", reads="good_image"))
        run_stages(run, planned, stages, console=Console(file=io.StringIO()))
    assert funnel(folder)[-1]["kept"] == sum(len(shard) for shard in drops(folder)) == rows
    assert write_pairs(folder / "pairs.parquet", pairs(folder)) == rows
    with new_folder(folder / "set") as new:
        write_tables(new / "data", "train", SCHEMA, pair_tables(iterate_pairs(folder / "pairs.parquet")))
    check_published(folder / "set")
    # Not ru_maxrss: that may hold the peak of the process that started this one, beside which nothing here would show.
    print(int(re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[0]) / 1000)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
