"""The selected pairs of a run: one Parquet file that training reads, `datasets` loads, and anyone can look at."""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Literal, cast

import pyarrow as pa
import pyarrow.parquet as pq

from rpo.data.images import image_cell
from rpo.data.shards import CORRUPT, IMAGE, ROW_GROUP_ROWS, atomic_path, check_written, open_writer
from rpo.errors import RpoError

Split = Literal["train", "held_out"]

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("prompt", pa.string()),
        ("chosen", IMAGE),
        ("rejected", IMAGE),
        ("gap", pa.float64()),
        ("weight", pa.float64()),
        ("split", pa.string()),
        ("critique", pa.string()),
        ("instruction", pa.string()),
        ("scores", pa.string()),
        ("provenance", pa.string()),
        ("chosen_sha256", pa.string()),
        ("rejected_sha256", pa.string()),
    ]
)
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_SIGNATURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF")
"""Of PNG, JPEG and WebP."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two images for one prompt, which is better, and why."""

    id: str
    """1 to 64 characters of A-Z, a-z, 0-9, `_`, `-`; unique in a file."""
    prompt: str
    chosen: bytes
    """The better image, encoded as PNG, JPEG or WebP."""
    rejected: bytes
    """The worse image."""
    gap: float
    """By how much the chosen side wins, in the unit of the rule that labelled it."""
    weight: float = 1.0
    """How much the pair counts in training, at least 0."""
    split: Split
    critique: str
    """What was wrong with the source (JSON of `Critique`)."""
    instruction: str
    """What the editor was told."""
    scores: str
    """Both sides' scores (JSON)."""
    provenance: str
    """Where both sides come from (JSON)."""

    def __post_init__(self) -> None:
        if not _ID.fullmatch(self.id):
            raise ValueError(f"id must be 1 to 64 characters of A-Z, a-z, 0-9, _ or -, got {self.id!r}")
        for side in ("chosen", "rejected"):
            if not getattr(self, side).startswith(_SIGNATURES):
                raise ValueError(f"pair {self.id}: {side} must be a PNG, JPEG or WebP; encode it with rpo.data.images.encode_png")
        if not math.isfinite(self.gap):
            raise ValueError(f"pair {self.id}: gap must be finite, got {self.gap}")
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise ValueError(f"pair {self.id}: weight must be finite and at least 0, got {self.weight}")
        if self.split not in ("train", "held_out"):
            raise ValueError(f"pair {self.id}: split must be 'train' or 'held_out', got {self.split!r}")
        for name in ("critique", "scores", "provenance"):
            try:
                json.loads(getattr(self, name))
            except ValueError as error:
                raise ValueError(f"pair {self.id}: {name} must be JSON ({error})") from error


def split_of(prompt: str, held_out_share: float) -> Split:
    """Which pairs are kept from training to watch it: all of a prompt's or none, by its hash."""
    place = int.from_bytes(hashlib.sha256(f"split:{prompt}".encode()).digest()[:4]) / 2**32
    return "held_out" if place < held_out_share else "train"


_NAMES = tuple(field.name for field in fields(Pair))


def _table(pairs: Sequence[Pair]) -> pa.Table:
    columns: dict[str, list[object]] = {name: [getattr(pair, name) for pair in pairs] for name in _NAMES}
    for side in ("chosen", "rejected"):
        images = cast(list[bytes], columns[side])
        columns[f"{side}_sha256"] = [hashlib.sha256(image).hexdigest() for image in images]
        columns[side] = [image_cell(image) for image in images]
    return pa.table([pa.array(columns[field.name], field.type) for field in SCHEMA], schema=SCHEMA)


def pair_tables(pairs: Iterable[Pair]) -> Iterator[pa.Table]:
    """The pairs as tables of at most 64 rows. Raises `ValueError` when an id comes twice."""
    seen: set[str] = set()
    rest = iter(pairs)
    while part := list(islice(rest, ROW_GROUP_ROWS)):
        for pair in part:
            if pair.id in seen:
                raise ValueError(f"pair id {pair.id!r} comes twice; ids must be unique")
            seen.add(pair.id)
        yield _table(part)


def write_pairs(path: Path, pairs: Iterable[Pair]) -> int:
    """Writes all pairs to `path`, whole or not at all, and returns how many; memory is that of 64.

    Raises `ValueError` when an id comes twice.
    """
    with atomic_path(path) as partial, open_writer(partial, SCHEMA) as writer:
        for table in pair_tables(pairs):
            writer.write(table)
    return writer.rows


def _pairs(table: pa.Table) -> list[Pair]:
    pairs: list[Pair] = []
    for row in table.to_pylist():
        for side in ("chosen", "rejected"):
            cell = row[side]
            encoded = cell and cell["bytes"]
            if not isinstance(encoded, bytes) or hashlib.sha256(encoded).hexdigest() != row[f"{side}_sha256"]:
                raise ValueError(f"the {side} image of pair {row['id']} is not the one that was written")
            row[side] = encoded
        pairs.append(Pair(**{name: row[name] for name in _NAMES}))
    return pairs


def iterate_pairs(path: Path) -> Iterator[Pair]:
    """All pairs of a file, in its order, every page and image checked; memory is that of 64.

    Raises `RpoError` when the file is missing or damaged, which for its last rows may be after pairs were given.
    """
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            if not file.schema_arrow.remove_metadata().equals(SCHEMA):
                raise ValueError("its columns are not those of a pairs file")
            rows = 0
            for group in range(file.num_row_groups):
                pairs = _pairs(file.read_row_group(group))
                rows += len(pairs)
                yield from pairs
            check_written(file, rows)
    except FileNotFoundError as error:
        raise RpoError(f"there are no pairs at {path}; make them with `rpo curate` on this run folder") from error
    except (*CORRUPT, TypeError) as error:
        raise RpoError(f"{path} is damaged or no pairs file ({error}). Delete it and run `rpo curate` with --resume.") from error


def read_pairs(path: Path) -> list[Pair]:
    """All pairs of a file at once; see `iterate_pairs`."""
    return list(iterate_pairs(path))
