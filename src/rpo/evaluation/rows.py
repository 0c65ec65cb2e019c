"""The rows of an evaluation on disk, written shard by shard and read again by the report.

    evaluation/index.json                              which folders belong together, and the resulting numbers
    evaluation/images-MODEL-<fp8>/00000.parquet        prompt_id, prompt, seed_index, seed, image
    evaluation/rows-MODEL-JUDGE-<fp8>/00000.parquet    prompt_id, seed_index, one float64 column per metric, features
    evaluation/rows.parquet                            all of it in one table: model, prompt_id, prompt, category, seed_index, every metric
    evaluation/table.md                                the numbers, ready to paste
    evaluation/seconds.jsonl                           how long each shard took

A folder's eight hex digits stand for everything its rows depend on, so rows of a retrained model never meet older ones.
"""

import hashlib
import json
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rpo.core.parquet import atomic_path, damaged, read_footer, read_shard, shard_path
from rpo.core.records import SECONDS_LOG, append_line, read_lines, read_record
from rpo.errors import RpoError
from rpo.evaluation.tasks import Place

INDEX = "index.json"
ROWS = "rows.parquet"
FEATURES = "features"
KEYS = ("prompt_id", "seed_index")

Key = tuple[str, int]
"""(prompt id, seed index): the same for every model."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """What the judges measured on one image of one model."""

    model: str
    prompt_id: str
    prompt: str
    seed_index: int
    metrics: Mapping[str, float]
    """By name; a metric that does not apply to this image is absent."""

    @property
    def key(self) -> Key:
        return self.prompt_id, self.seed_index


def fingerprint(*parts: object) -> str:
    """Eight hex digits of SHA-256 over JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:8]


def is_done(path: Path, places: Collection[Place], depends_on: str | None = None) -> bool:
    """Whether a shard is there and whole; with `depends_on`, also made from images with that digest.

    Raises `RpoError` when the file is damaged or holds another number of rows than planned.
    """
    try:
        num_rows, metadata = read_footer(path)
    except FileNotFoundError:
        return False
    if num_rows != len(places):
        raise damaged(path, f"{num_rows} rows, {len(places)} were planned")
    return depends_on is None or metadata.get("images_sha256") == depends_on


def images_digest(path: Path) -> str:
    """The digest of a shard's images, from its footer."""
    return read_footer(path)[1]["images_sha256"]


def shards(folder: Path) -> Iterator[Path]:
    """The shards of a folder in order; stops at the first that is absent."""
    index = 0
    while (path := shard_path(folder, index)).exists():
        yield path
        index += 1


def read_folder(folder: Path, num_rows: int, columns: Collection[str] | None = None) -> pa.Table:
    """The first `num_rows` rows of a folder, shard after shard; a column that a shard lacks is null there.

    There may be more, of seeds that this evaluation does not ask for. Raises `RpoError` when there are fewer.
    """
    tables: list[pa.Table] = []
    found = 0
    for path in shards(folder):
        if found >= num_rows:
            break
        tables.append(read_shard(path, None if columns is None else list(columns)))
        found += tables[-1].num_rows
    if found != num_rows:
        raise RpoError(f"{folder} holds {found} of {num_rows} rows. Run `rpo evaluate` again: what is missing is made anew.")
    return pa.concat_tables(tables, promote_options="default")


def write_rows(folder: Path, tables: Mapping[str, pa.Table], prompts: Mapping[str, str], categories: Mapping[str, str]) -> None:
    """`rows.parquet`: the rows of all models with their prompts, for anyone to compute with."""
    parts: list[pa.Table] = []
    for model, table in tables.items():
        ids = table["prompt_id"].to_pylist()
        told = {
            "model": pa.array([model] * len(ids)),
            "prompt_id": table["prompt_id"],
            "prompt": pa.array([prompts[identifier] for identifier in ids]),
            "category": pa.array([categories.get(identifier) for identifier in ids], pa.string()),
        }
        parts.append(pa.table(told | {name: table[name] for name in table.column_names if name != "prompt_id"}))
    with atomic_path(folder / ROWS) as partial:
        pq.write_table(pa.concat_tables(parts, promote_options="default"), partial)


def log_seconds(path: Path, began: float) -> None:
    """Enters how long the shard at `path` took, since `began` (`time.monotonic`)."""
    shard = f"{path.parent.name}/{path.name}"
    append_line(path.parent.parent / SECONDS_LOG, {"shard": shard, "seconds": round(time.monotonic() - began, 6)})


def shard_seconds(folder: Path) -> tuple[float, bool]:
    """Seconds of drawing and measuring the images that the numbers of an evaluation rest on, over all runs that made them; and whether
    the time of every shard is known, which it is not where an earlier version made some."""
    index = read_index(folder) or {"models": {}, "num_images": 0}
    known = {entry.get("shard"): entry.get("seconds") for entry in read_lines(folder / SECONDS_LOG)[0]}
    folders = {name for entry in index["models"].values() for name in (entry["images"], *entry["rows"].values())}
    every = [known.get(f"{name}/{path.name}") for name in folders for path in shards(folder / name)]
    return sum(seconds for seconds in every if isinstance(seconds, float)), all(isinstance(seconds, float) for seconds in every)


def read_index(folder: Path) -> dict[str, Any] | None:
    """The index of an evaluation folder, `None` when nothing was evaluated there."""
    return read_record(folder / INDEX, "Remove it and run `rpo evaluate` again: it is written anew, finished shards are kept.")


def read_rows(folder: Path) -> dict[str, list[Row]]:
    """The finished evaluation's rows by model, without images, in the order of the task; empty when there is none."""
    index = read_index(folder)
    if index is None:
        return {}
    prompts = {}
    rows: dict[str, list[Row]] = {}
    for model, entry in index["models"].items():
        images = read_folder(folder / entry["images"], index["num_images"], ["prompt_id", "prompt"])
        prompts |= dict(zip(images["prompt_id"].to_pylist(), images["prompt"].to_pylist(), strict=True))
        metrics: dict[Key, dict[str, float]] = {}
        for name in entry["rows"].values():
            for record in read_folder(folder / name, index["num_images"]).drop_columns([FEATURES]).to_pylist():
                key = (record.pop("prompt_id"), record.pop("seed_index"))
                metrics.setdefault(key, {}).update({name: value for name, value in record.items() if value is not None})
        rows[model] = [
            Row(model=model, prompt_id=key[0], prompt=prompts[key[0]], seed_index=key[1], metrics=values) for key, values in metrics.items()
        ]
    return rows


def read_images(folder: Path, model: str, keys: Collection[Key]) -> dict[Key, bytes]:
    """The encoded images of some places of one model. Reads shard by shard: memory is one shard and what was asked for."""
    index = read_index(folder)
    wanted, found = set(keys), {}
    if index is None or model not in index["models"]:
        return found
    for path in shards(folder / index["models"][model]["images"]):
        here = read_shard(path, list(KEYS)).to_pylist()
        hits = [i for i, record in enumerate(here) if (record["prompt_id"], record["seed_index"]) in wanted]
        if hits:
            for i, cell in zip(hits, read_shard(path, ["image"])["image"].take(hits).to_pylist(), strict=True):
                found[here[i]["prompt_id"], here[i]["seed_index"]] = cell["bytes"]
    return found
