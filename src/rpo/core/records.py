"""JSON files of a run folder: written with a digest of their content, read by one function that names the file and the way out."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rpo.core.parquet import write_text
from rpo.errors import RpoError, disk_errors

SECONDS_LOG = "seconds.jsonl"
"""Log of the seconds that each shard took."""
DIGEST = "sha256"
"""Key of a record's digest: sha256 over the other entries as canonical JSON. Files of earlier versions have none."""
_LINE_DIGITS = 12
MAX_BYTES = 256 * 2**20
"""A larger file is none of ours."""


def digest_of(record: Mapping[str, Any]) -> str:
    """sha256 (hex) of a record without its digest."""
    content = {name: value for name, value in record.items() if name != DIGEST}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_record(path: Path, record: Mapping[str, Any], *, indent: int = 2) -> None:
    """Writes a JSON object with its digest, whole or not at all."""
    write_text(path, record_text(record, indent=indent))


def record_text(record: Mapping[str, Any], *, indent: int = 2) -> str:
    """The file of a record."""
    return json.dumps({**record, DIGEST: digest_of(record)}, indent=indent) + "\n"


def read_record(path: Path, way_out: str) -> dict[str, Any] | None:
    """The JSON object in `path` without its digest, or `None` when there is no file.

    Raises `RpoError` with the file, the damage and `way_out` when it is cut, changed, or no object, and when it cannot be read.
    """
    try:
        with disk_errors(path):
            if path.stat().st_size > MAX_BYTES:
                raise RpoError(f"{path} is damaged ({path.stat().st_size} bytes). {way_out}")
            data = path.read_bytes()
    except RpoError as error:
        if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
            return None
        raise
    try:
        return parsed(data)
    except (ValueError, RecursionError) as error:
        raise RpoError(f"{path} is damaged ({error}). {way_out}") from error


def parsed(data: bytes | str, digits: int = 64) -> dict[str, Any]:
    """The object in a record's text, without its digest. Raises `ValueError` when it is none, or not what was written."""
    record = json.loads(data)
    if not isinstance(record, dict):
        raise ValueError(f"a JSON object was expected, found {type(record).__name__}")
    return _undigested(record, digits)


def _undigested(record: dict[str, Any], digits: int) -> dict[str, Any]:
    """A record without its digest of so many digits. Raises `ValueError` when that is not the record's."""
    last = next(reversed(record), "")
    digest_there = DIGEST in record or record.get(last) == digest_of({key: value for key, value in record.items() if key != last})[:digits]
    if digest_there and record.pop(DIGEST, None) != digest_of(record)[:digits]:  # under another name it is its own damage
        raise ValueError("its content is not what was written: the digest differs")
    return record


def record_line(record: Mapping[str, Any]) -> str:
    """One line of a JSON Lines log, with a short digest."""
    return json.dumps({**record, DIGEST: digest_of(record)[:_LINE_DIGITS]}) + "\n"


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Adds a line to a log. Several processes may write it: one call each, on a line of its own even after one that was cut."""
    with disk_errors(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            os.write(descriptor, f"\n{record_line(record)}".encode())
        finally:
            os.close(descriptor)


def read_lines(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """(the sound lines of a log, numbers of those that are cut or changed); none without a file. Empty lines are passed over."""
    try:
        with disk_errors(path):
            lines = path.read_bytes().split(b"\n")
    except RpoError as error:
        if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
            return [], []
        raise
    sound: list[dict[str, Any]] = []
    damaged: list[int] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            sound.append(parsed(line, _LINE_DIGITS))
        except (ValueError, RecursionError):
            damaged.append(number)
    return sound, damaged
