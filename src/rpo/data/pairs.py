"""The selected pairs of a run: one Parquet file that training reads, `datasets` loads, and anyone can look at."""

import hashlib
import json
import math
import re
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from rpo.core.parquet import CORRUPT, IMAGE, ROW_GROUP_BYTES, atomic_path, check_written, open_writer, refusal
from rpo.data.images import EncodedImage, image_cell
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
_TABLE_PAIRS = 64


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two images for one prompt, which is better, and why."""

    id: str
    """1 to 64 characters of A-Z, a-z, 0-9, `_`, `-`; unique in a file."""
    prompt: str
    chosen: EncodedImage
    """The better image."""
    rejected: EncodedImage
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
        if not math.isfinite(self.gap):
            raise ValueError(f"pair {self.id}: gap must be finite, got {self.gap}")
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise ValueError(f"pair {self.id}: weight must be finite and at least 0, got {self.weight}")
        if self.split not in ("train", "held_out"):
            raise ValueError(f"pair {self.id}: split must be 'train' or 'held_out', got {self.split!r}")
        for name in ("critique", "scores", "provenance"):
            text = getattr(self, name)
            try:
                if text != "{}":  # millions of times
                    json.loads(text)
            except ValueError as error:
                raise ValueError(f"pair {self.id}: {name} must be JSON ({error})") from error


def split_of(prompt: str, held_out_share: float) -> Split:
    """Which pairs are kept from training to watch it: all of a prompt's or none, by its hash."""
    place = int.from_bytes(hashlib.sha256(f"split:{prompt}".encode()).digest()[:4]) / 2**32
    return "held_out" if place < held_out_share else "train"


_NAMES = tuple(field.name for field in fields(Pair))


def pair_tables(pairs: Iterable[Pair]) -> Iterator[pa.Table]:
    """The pairs as tables of at most 64 rows, fewer where images are large. Raises `ValueError` when an id comes twice."""
    seen: set[str] = set()
    part: list[dict[str, object]] = []
    size = 0
    for pair in pairs:
        if pair.id in seen:
            raise ValueError(f"pair id {pair.id!r} comes twice; ids must be unique")
        seen.add(pair.id)
        images = {"chosen": pair.chosen.read(), "rejected": pair.rejected.read()}
        cells: dict[str, object] = {side: image_cell(image) for side, image in images.items()}
        part.append({**vars(pair), **cells, "chosen_sha256": pair.chosen.sha256, "rejected_sha256": pair.rejected.sha256})
        size += sum(map(len, images.values()))
        if len(part) == _TABLE_PAIRS or size >= ROW_GROUP_BYTES:
            yield pa.Table.from_pylist(part, schema=SCHEMA)
            part, size = [], 0
    if part:
        yield pa.Table.from_pylist(part, schema=SCHEMA)


def write_pairs(path: Path, pairs: Iterable[Pair]) -> int:
    """Writes all pairs to `path`, whole or not at all, and returns how many; memory is that of a row group.

    Raises `ValueError` when an id comes twice.
    """
    with atomic_path(path) as partial, open_writer(partial, SCHEMA) as writer:
        for table in pair_tables(pairs):
            writer.write(table)
    return writer.rows


def _pairs(table: pa.Table) -> list[Pair]:
    """The pairs of a row group, their images in memory and proven to be those that were written."""
    pairs: list[Pair] = []
    for row in table.to_pylist():
        for side in ("chosen", "rejected"):
            cell = row[side]
            encoded = cell and cell["bytes"]
            row[side] = EncodedImage.of(encoded) if isinstance(encoded, bytes) else None
            if row[side] is None or row[side].sha256 != row[f"{side}_sha256"]:
                raise ValueError(f"the {side} image of pair {row['id']} is not the one that was written")
        pairs.append(Pair(**{name: row[name] for name in _NAMES}))
    return pairs


@contextmanager
def _opened(path: Path) -> Generator[pq.ParquetFile, None, None]:
    """The file at `path`, every page checked as it is read. Raises `RpoError` when it is missing, damaged, or holds no pairs."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            if not file.schema_arrow.remove_metadata().equals(SCHEMA):
                raise ValueError("its columns are not those of a pairs file")
            yield file
    except FileNotFoundError as error:
        raise RpoError(f"there are no pairs at {path}; make them with `rpo curate` on this run folder") from error
    except (*CORRUPT, TypeError) as error:
        damage = RpoError(f"{path} is damaged or no pairs file ({error}). Delete it and run `rpo curate` with --resume.")
        raise refusal(path, error) or damage from error


def _groups(path: Path) -> Iterator[list[Pair]]:
    with _opened(path) as file:
        rows = 0
        for group in range(file.num_row_groups):
            pairs = _pairs(file.read_row_group(group))
            rows += len(pairs)
            yield pairs
        check_written(file, rows)


def iterate_pairs(path: Path) -> Iterator[Pair]:
    """All pairs of a file, in its order, every page and image checked; memory is that of a row group.

    Raises `RpoError` when the file is missing or damaged, which for its last rows may be after pairs were given.
    """
    for pairs in _groups(path):
        yield from pairs


class _Stored:
    """The images of a file, by row group; the last group that was read stays in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.version = self._version()
        self.group: tuple[int, pa.Table] | None = None

    def _version(self) -> tuple[int, ...] | None:
        """Another one when the file is written anew."""
        try:
            found = self.path.stat()
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_size, found.st_mtime_ns

    def read(self, group: int, row: int, side: str) -> bytes:
        if self.group is None or self.group[0] != group:
            with _opened(self.path) as file:
                if self._version() != self.version:
                    raise RpoError(f"{self.path} was written anew while it was read. Run again.")
                self.group = group, file.read_row_group(group, columns=["chosen.bytes", "rejected.bytes"])
        return self.group[1].column(side).chunk(0).field("bytes")[row].as_py()


def read_pairs(path: Path) -> list[Pair]:
    """All pairs of a file, checked as `iterate_pairs` does; their images stay in it and are read when asked for."""
    stored, pairs = _Stored(path), list[Pair]()
    for group, found in enumerate(_groups(path)):
        for row, pair in enumerate(found):
            chosen, rejected = (
                EncodedImage(image.sha256, partial(stored.read, group, row, side))
                for side, image in (("chosen", pair.chosen), ("rejected", pair.rejected))
            )
            pairs.append(replace(pair, chosen=chosen, rejected=rejected))
    return pairs
