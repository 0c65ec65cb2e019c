"""Making a task's images and measuring them, one shard at a time: what is finished is on disk and never made again."""

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path

import numpy as np
import pyarrow as pa

from rpo.core.parquet import IMAGE, read_shard, shard_path, sweep, write_shard
from rpo.data.images import decode_cell, encode_png, image_cell
from rpo.errors import RowError, RpoError, answered
from rpo.evaluation.rows import FEATURES, KEYS, images_digest, is_done, log_seconds
from rpo.evaluation.tasks import Place
from rpo.protocols import Comparer, Generator, Judge

SHARD_ROWS = 64
Progress = Callable[[int, int], None]
"""Called with (images done, images in all) after every shard, finished ones included."""

_IMAGES = pa.schema(
    [("prompt_id", pa.string()), ("prompt", pa.string()), ("seed_index", pa.int32()), ("seed", pa.int64()), ("image", IMAGE)]
)

_VECTOR = pa.list_(pa.field("element", pa.float32()))  # the item's name that Parquet gives back


def _chunks(places: Sequence[Place], size: int) -> Iterator[list[Place]]:
    rest = iter(places)
    while chunk := list(islice(rest, size)):
        yield chunk


def planned_shards(folder: Path, places: Sequence[Place]) -> list[tuple[Path, list[Place]]]:
    """The shards of a folder and what belongs into each: a pure function of the task's order. None holds images of two seed indices."""
    of_seed = [list(group) for _, group in groupby(places, key=lambda place: place.seed_index)]
    parts = [chunk for group in of_seed for chunk in _chunks(group, SHARD_ROWS)]
    return [(shard_path(folder, index), chunk) for index, chunk in enumerate(parts)]


def make_images(build: Callable[[], Generator], places: Sequence[Place], folder: Path, *, batch_size: int, progress: Progress) -> None:
    """Generates the images that `folder` lacks. The generator is built only if there are any, and let go at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    generator: Generator | None = None
    done = 0
    for path, chunk in planned_shards(folder, places):
        if not is_done(path, chunk):
            began = time.monotonic()
            generator = generator or build()
            encoded = [png for batch in _chunks(chunk, batch_size) for png in _generate(generator, batch)]
            table = pa.Table.from_pylist(
                [
                    {"prompt_id": p.prompt_id, "prompt": p.prompt, "seed_index": p.seed_index, "seed": p.seed, "image": image_cell(png)}
                    for p, png in zip(chunk, encoded, strict=True)
                ],
                schema=_IMAGES,
            )
            write_shard(path, table, {"images_sha256": hashlib.sha256(b"".join(encoded)).hexdigest()})
            log_seconds(path, began)
        done += len(chunk)
        progress(done, len(places))


def _generate(generator: Generator, batch: Sequence[Place]) -> list[bytes]:
    images = generator.generate([place.prompt for place in batch], [place.seed for place in batch])
    if len(images) != len(batch):
        raise RpoError(f"{type(generator).__name__}.generate gave {len(images)} images for {len(batch)} prompts; it owes one each")
    return [encode_png(image) for image in images]


def measure_images(
    name: str,
    judge: Judge | Comparer,
    places: Sequence[Place],
    images: Sequence[Path],
    folder: Path,
    *,
    batch_size: int,
    progress: Progress,
) -> None:
    """Measures the images that `folder` has no rows for; a shard whose images were made anew is redone.

    `images` is the folder of the images; for a comparer, called `name`, that of the first model's and that of those it may prefer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    done = 0
    for path, chunk in planned_shards(folder, places):
        sources = [side / path.name for side in images]
        digest = " ".join(images_digest(source) for source in sources)
        if not is_done(path, chunk, depends_on=digest):
            began = time.monotonic()
            arrays = [_stored(source, chunk) for source in sources]
            if isinstance(judge, Comparer):
                rows = _prefer(name, judge, chunk, arrays[0], arrays[1], batch_size)
            else:
                rows = _measure(judge, chunk, arrays[0], batch_size)
            write_shard(path, rows, {"images_sha256": digest})
            log_seconds(path, began)
        done += len(chunk)
        progress(done, len(places))


Arrays = list[np.ndarray]


def _stored(source: Path, chunk: Sequence[Place]) -> Arrays:
    stored = read_shard(source)
    keys = [(place.prompt_id, place.seed_index) for place in chunk]
    if list(zip(*(stored[key].to_pylist() for key in KEYS), strict=True)) != keys:
        raise RpoError(f"{source} holds other images than were planned. Delete it and run again: it is made anew.")
    return [decode_cell(cell) for cell in stored["image"].to_pylist()]


def _measure(judge: Judge, places: Sequence[Place], images: Sequence[np.ndarray], batch_size: int) -> pa.Table:
    metrics: list[dict[str, float]] = []
    features: list[np.ndarray] = []
    for start in range(0, len(places), batch_size):
        batch = images[start : start + batch_size]
        measured = judge.measure(batch, [place.prompt for place in places[start : start + batch_size]])
        vectors = np.asarray(judge.features(batch), dtype=np.float32)
        if len(measured) != len(batch) or vectors.ndim != 2 or len(vectors) != len(batch):
            raise RpoError(f"{type(judge).__name__} gave {len(measured)} measures and features {vectors.shape} for {len(batch)} images")
        metrics += measured
        features += list(vectors)
    for place, values in zip(places, metrics, strict=True):
        for name, value in values.items():
            if name in (*KEYS, FEATURES) or not math.isfinite(value):
                raise RpoError(f"{type(judge).__name__} gave {name}={value} for prompt {place.prompt!r}; metrics are finite numbers")
    return _rows(places, metrics, features)


def _prefer(name: str, comparer: Comparer, places: Sequence[Place], first: Arrays, second: Arrays, batch_size: int) -> pa.Table:
    preferred: list[dict[str, float]] = []
    for start in range(0, len(places), batch_size):
        batch = slice(start, start + batch_size)
        said = comparer.compare(second[batch], first[batch], [place.prompt for place in places[batch]])
        preferred += [{} if isinstance(value, RowError) else {name: float(value)} for value in answered(said, name)]
    return _rows(places, preferred, [np.zeros(0, dtype=np.float32)] * len(places))


def _rows(places: Sequence[Place], metrics: Sequence[dict[str, float]], features: Sequence[np.ndarray]) -> pa.Table:
    columns: dict[str, pa.Array] = {
        "prompt_id": pa.array([place.prompt_id for place in places], pa.string()),
        "seed_index": pa.array([place.seed_index for place in places], pa.int32()),
    }
    for name in dict.fromkeys(name for values in metrics for name in values):
        columns[name] = pa.array([values.get(name) for values in metrics], pa.float64())
    return pa.table(columns | {FEATURES: pa.array(features, _VECTOR)})
