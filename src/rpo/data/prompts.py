"""Prompts that are brought, from files or the Hub. Their rows are hostile until read."""

import csv
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pyarrow.parquet as pq

from rpo.core.parquet import CORRUPT
from rpo.data.formats.files import array_values, is_array, json_value, lines_of, open_regular, text_of
from rpo.data.formats.rows import MAX_PROMPT_CHARACTERS, Unusable, prompt_of
from rpo.errors import RpoError

PROMPT_COLUMNS = ("prompt", "text", "caption", "Prompt", "prompts")
CATEGORY_COLUMNS = ("category", "tag", "Category")
SPLIT_COLUMNS = ("split", "subset")
MAX_ROW_BYTES = 4_000_000
"""Of a line, or a row of CSV."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
_Rows = Iterator[Mapping[str, Any]]
_BROKEN = (OSError, csv.Error, RecursionError, MemoryError, *CORRUPT)


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt, and where it comes from."""

    text: str
    kind: str | None = None
    """Category in its set, such as "counting"."""
    source: str
    """The set: a file's name without its ending, or a Hub id."""
    split: str | None = None
    """Part of the set, where it has parts."""


def read_prompts(path: Path) -> dict[str, str | None]:
    """The prompts at `path`, each once and in its order, and their kinds where it names them; see `read_prompt_set`."""
    return {prompt.text: prompt.kind for prompt in read_prompt_set(path)}


def read_prompt_set(path: Path) -> list[Prompt]:
    """The prompts of a file or of a dataset of the Hub (`owner/name` or `owner/name:split`), each once and in its order.

    A text file has one a line; `.jsonl`, `.ndjson`, `.json`, `.csv`, `.tsv`, `.parquet` and datasets have a column prompt, text or
    caption, and may have category or tag, and split. Blank rows are passed over; prompts that are too long are left out, and rows that
    repeat a prompt are read once, with a warning that counts them. Raises `ValueError`, which names file and row, for what is missing,
    cannot be read or holds no prompt.
    """
    source = path.stem if path.is_file() else str(path).partition(":")[0]
    found: dict[str, Prompt] = {}
    too_long: Counter[int] = Counter()
    repeated = 0
    for number, row in enumerate(_prompt_rows(path), start=1):
        value = _first(row, PROMPT_COLUMNS)
        if isinstance(value, str) and not value.strip():
            continue
        if isinstance(value, str) and len(value) > MAX_PROMPT_CHARACTERS:
            too_long[number] = len(value)
            continue
        try:
            words = " ".join(prompt_of(value).split())
        except Unusable as why:
            reason = f"no text in a column {', '.join(PROMPT_COLUMNS[:3])}" if str(why) == "no prompt" else str(why)
            raise ValueError(f"{path}, row {number}: {reason}") from None
        kind, split = (_first(row, columns) for columns in (CATEGORY_COLUMNS, SPLIT_COLUMNS))
        kind, split = (value if isinstance(value, str) else None for value in (kind, split))
        repeated += words in found
        found.setdefault(words, Prompt(text=words, kind=kind, source=source, split=split))
    left_out = _left_out(path, too_long)
    if not found:
        raise ValueError(left_out or f"the prompts file {path} holds no prompt; write one a line")
    if left_out:
        warnings.warn(left_out, stacklevel=2)
    if repeated:
        warnings.warn(f"{path}: {repeated} rows repeat the prompt of an earlier row, which is read once", stacklevel=2)
    return list(found.values())


def _left_out(path: Path, too_long: Mapping[int, int]) -> str:
    if not too_long:
        return ""
    row, length = next(iter(too_long.items()))
    first = f"row {row} has {length:,} characters"
    return f"{path}: {len(too_long)} prompts left out for over {MAX_PROMPT_CHARACTERS} characters ({first})"


def _first(row: Mapping[str, Any], columns: tuple[str, ...]) -> Any:
    """The first of the columns that is filled with text; else the first that is there."""
    there = [row[name] for name in columns if row.get(name) is not None]
    return next((value for value in there if isinstance(value, str) and value.strip()), there[0] if there else None)


def _prompt_rows(path: Path) -> _Rows:
    suffix = path.suffix.lower()
    on_hub = _HUB_ID.fullmatch(str(path)) and suffix not in _ROWS and not os.path.lexists(path)
    if path.is_dir() or on_hub:
        yield from _dataset_rows(str(path))
        return
    if not os.path.lexists(path):
        raise ValueError(f"cannot read the prompts file {path}: it does not exist")
    if suffix not in _ROWS:
        known = ", ".join(_ROWS)
        raise ValueError(f"prompts are read from {known}, folders and datasets of the Hub, and {path} ends in {suffix or 'nothing'!r}")
    row = 0
    try:
        for row, value in enumerate(_ROWS[suffix](path), start=1):  # noqa: B007
            yield value
    except RpoError as error:
        raise ValueError(f"cannot read the prompts file: {error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"cannot read the prompts file {path}, row {row + 1}: it is not UTF-8 ({error.reason}); save it as UTF-8"
        ) from error
    except _BROKEN as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"cannot read the prompts file {path}, row {row + 1}: {reason}") from error


def _texts(path: Path) -> Iterator[str]:
    with open_regular(path) as file:
        for line in lines_of(file, MAX_ROW_BYTES):
            if line is None:
                raise ValueError(f"a line of over {MAX_ROW_BYTES:,} bytes")
            yield text_of(line)


def _lines(path: Path) -> _Rows:
    for line in _texts(path):
        yield {"prompt": line}


def _json(path: Path) -> _Rows:
    with open_regular(path) as file:
        values = array_values(file) if is_array(file) else None
        for value in values if values is not None else (json_value(line) for line in _texts(path) if line.strip()):
            yield {"prompt": value} if isinstance(value, str) else cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _comma_separated(path: Path) -> _Rows:
    for row in csv.DictReader((line + "\n" for line in _texts(path)), strict=True):
        if None in row:
            raise ValueError("it has more cells than the first row; a comma inside a prompt needs quotes around the prompt")
        yield row


def _tab_separated(path: Path) -> _Rows:
    """Published `.tsv` files quote nothing: a quotation mark is part of the prompt."""
    names: list[str] | None = None
    for line in _texts(path):
        cells = line.split("\t")
        if names is None:
            names = cells
        elif line.strip():
            yield dict(zip(names, cells, strict=False))


def _parquet(path: Path) -> _Rows:
    wanted = (*PROMPT_COLUMNS, *CATEGORY_COLUMNS, *SPLIT_COLUMNS)
    with open_regular(path) as opened, pq.ParquetFile(opened) as file:
        names = [name for name in file.schema_arrow.names if name in wanted]
        for batch in file.iter_batches(batch_size=256, columns=names):
            yield from batch.to_pylist()


_ROWS: Mapping[str, Callable[[Path], _Rows]] = {
    ".txt": _lines,
    ".jsonl": _json,
    ".ndjson": _json,
    ".json": _json,
    ".csv": _comma_separated,
    ".tsv": _tab_separated,
    ".parquet": _parquet,
}


def _dataset_rows(name: str) -> _Rows:
    """Rows of a dataset by `datasets`, text columns only: images of its rows are neither fetched nor decoded."""
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise ValueError(f"prompts of the dataset {name!r} need the datasets package: pip install 'rpo-diffusion[hub]'") from error
    repository, _, wanted = name.partition(":")
    columns = (*PROMPT_COLUMNS, *CATEGORY_COLUMNS, *SPLIT_COLUMNS)
    try:
        parts = datasets.load_dataset(repository, streaming=True)
        if wanted and wanted not in parts:
            raise ValueError(f"it has the splits {', '.join(map(str, parts))}")
        for split, rows in parts.items():
            if wanted in ("", split):
                known = [column for column in rows.column_names or () if column in columns]
                for row in rows.select_columns(known) if known else rows:
                    yield {"split": str(split)} | row
    except (OSError, ValueError, TypeError, DatasetsError) as error:
        raise ValueError(f"cannot read the dataset {name}: {' '.join(str(error).split())}") from error
