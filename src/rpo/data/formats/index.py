"""Index of a foreign preference set: what its rows are, so that a set that has not changed is not read again before training.

One Parquet file beside the latents' cache, named by the set's files, their sizes and times. Images are not in it: their sha256 is, and
each is held against it when it is read.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from rpo.core.parquet import CORRUPT, atomic_path
from rpo.data.formats.dropped import Dropped
from rpo.data.formats.rows import HELD_OUT_SHARE, MIN_SIDE
from rpo.data.formats.tables import JSON_FOLDERS
from rpo.data.pairs import Split
from rpo.data.preference_sets import PreferenceSet

VERSION = "1"
"""Of the readers: another one makes every set be read again."""
SCHEMA = pa.schema(
    [
        ("file", pa.int32()),
        ("row", pa.int64()),
        ("prompt", pa.string()),
        ("critique", pa.string()),
        ("chosen", pa.string()),
        ("rejected", pa.string()),
        ("split", pa.string()),
    ]
)
_DROPPED = b"rpo.dropped"


@dataclass(frozen=True)
class PairRow:
    """A pair of a foreign set: all of it but the images, which stay in their file."""

    file: int
    row: int
    prompt: str
    critique: str
    chosen: str
    """sha256 of the image."""
    rejected: str
    split: Split


@dataclass(frozen=True)
class ForeignRows:
    """What a foreign set holds."""

    layout: str
    pairs: list[PairRow]
    dropped: Dropped


def _identity(found: PreferenceSet) -> str:
    """Of the set's files, or of those below its folders, by name, size, time and inode, and of the rules that they are read by."""
    total = hashlib.sha256(f"{VERSION} {HELD_OUT_SHARE} {MIN_SIDE} {found.layout} {found.splits}".encode())
    for place, file in enumerate(found.files):
        inside = [Path(home) / name for home, _, names in os.walk(file) for name in names]
        for path in sorted(inside) or [file]:
            stat = os.lstat(path)
            total.update(f"{place}\0{path}\0{stat.st_size}\0{stat.st_mtime_ns}\0{stat.st_ino}\n".encode(errors="surrogateescape"))
    return total.hexdigest()


def _folders(found: PreferenceSet) -> list[int]:
    """Times of the folders in which JSON rows name images: a missing image may have come."""
    homes = {file.parent for file in found.files} if found.layout == "json" else set[Path]()
    places = [place for home in sorted(homes) for place in (home, *(home / name for name in JSON_FOLDERS)) if place.is_dir()]
    return [place.stat().st_mtime_ns for place in places]


def _path(cache: Path, found: PreferenceSet) -> Path:
    return cache / f"index-{_identity(found)[:20]}.parquet"


def read_index(cache: Path, found: PreferenceSet) -> ForeignRows | None:
    """What `write_index` kept of the set as it is now; `None` where there is nothing, or the file is damaged."""
    path = _path(cache, found)
    try:
        table = pq.read_table(path, page_checksum_verification=True)
        if not table.schema.remove_metadata().equals(SCHEMA):
            return None
        kept = json.loads((table.schema.metadata or {})[_DROPPED])
        if kept["sha256"] != _digest(table) or kept["pairs"] != table.num_rows:
            return None
        if "no image" in kept["counts"] and kept["folders"] != _folders(found):
            return None
        dropped = Dropped(kept["counts"], kept["rows"])
        dropped.notes += kept["notes"]
        return ForeignRows(found.layout, [PairRow(*values) for values in zip(*table.to_pydict().values(), strict=True)], dropped)
    except (*CORRUPT, KeyError, TypeError, AttributeError):
        return None


def write_index(cache: Path, found: PreferenceSet, rows: ForeignRows) -> None:
    """Keeps what the set holds, if it is not there already."""
    path = _path(cache, found)
    if path.exists() and read_index(cache, found) is not None:
        return
    columns = [[getattr(pair, name) for pair in rows.pairs] for name in SCHEMA.names]
    table = pa.table([pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)], schema=SCHEMA)
    kept = {
        "sha256": _digest(table),
        "pairs": table.num_rows,
        "counts": dict(rows.dropped),
        "rows": rows.dropped.rows,
        "notes": rows.dropped.notes,
        "folders": _folders(found),
    }
    cache.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as partial:
        pq.write_table(table.replace_schema_metadata({_DROPPED: json.dumps(kept)}), partial, write_page_checksum=True)


def _digest(table: pa.Table) -> str:
    total = hashlib.sha256()
    for name in SCHEMA.names:
        for value in table.column(name).to_pylist():
            total.update(f"{value}\0".encode(errors="replace"))
    return total.hexdigest()
