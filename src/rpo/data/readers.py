"""Prompts and pairs that are brought, from files or the Hub. Their rows are hostile until read."""

import csv
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from rpo.data.hub import MANIFEST, check_published
from rpo.data.images import EncodedImage
from rpo.data.pairs import SCHEMA, Pair, read_pairs, split_of
from rpo.data.preferences import (
    MAX_PROMPT_CHARACTERS,
    Comparison,
    PreferenceSet,
    Row,
    Unusable,
    check_images,
    comparisons,
    key_of,
    open_set,
)
from rpo.data.shards import CORRUPT
from rpo.errors import RpoError

SKIP_ROWS = 1000
"""Over more rows of a preference set than this a reader begins anew instead of reading what lies between."""
HELD_OUT_SHARE = 0.05
"""Of the prompts of a foreign set, which tuning only measures."""
PROMPT_COLUMNS = ("prompt", "text", "caption", "Prompt", "prompts")
CATEGORY_COLUMNS = ("category", "tag", "Category")
SPLIT_COLUMNS = ("split", "subset")
FILES = (".txt", ".jsonl", ".csv", ".tsv", ".parquet")

_DECODED_ROWS = 64
"""Rows whose images are decoded at once."""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


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

    A text file has one a line; `.jsonl`, `.csv`, `.tsv`, `.parquet` and datasets have a column prompt, text or caption, and may have
    category or tag, and split. Raises `ValueError` for what is missing, cannot be read or holds none.
    """
    source = path.stem if path.is_file() else str(path).partition(":")[0]
    found: dict[str, Prompt] = {}
    for number, row in enumerate(_prompt_rows(path), start=1):
        text = _first(row, PROMPT_COLUMNS)
        if not isinstance(text, str) or len(text) > MAX_PROMPT_CHARACTERS:
            columns = ", ".join(PROMPT_COLUMNS[:3])
            raise ValueError(f"{path}, row {number}: no text of at most {MAX_PROMPT_CHARACTERS} characters in a column {columns}")
        words = " ".join(text.split())
        if words:
            kind, split = (_first(row, columns) for columns in (CATEGORY_COLUMNS, SPLIT_COLUMNS))
            kind, split = (value if isinstance(value, str) else None for value in (kind, split))
            found.setdefault(words, Prompt(text=words, kind=kind, source=source, split=split))
    if not found:
        raise ValueError(f"the prompts file {path} holds no prompt; write one a line")
    return list(found.values())


def _first(row: Mapping[str, Any], columns: tuple[str, ...]) -> Any:
    return next((row[name] for name in columns if name in row), None)


def _prompt_rows(path: Path) -> Iterator[Mapping[str, Any]] | list[dict[str, Any]]:
    on_hub = _HUB_ID.fullmatch(str(path)) and path.suffix not in FILES and not path.is_file()
    if path.is_dir() or on_hub:
        return _dataset_rows(str(path))
    try:
        return _ROWS.get(path.suffix, _lines)(path)
    except (OSError, UnicodeDecodeError, csv.Error, json.JSONDecodeError, RecursionError, *CORRUPT) as error:
        raise ValueError(f"cannot read the prompts file {path}: {error}") from error


def _lines(path: Path) -> list[dict[str, Any]]:
    return [{"prompt": line} for line in path.read_text(encoding="utf-8").splitlines()]


def _json_lines(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [row if isinstance(row, dict) else {} for row in rows]


def _separated(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))


def _parquet(path: Path) -> list[dict[str, Any]]:
    wanted = (*PROMPT_COLUMNS, *CATEGORY_COLUMNS, *SPLIT_COLUMNS)
    names = [name for name in pq.read_schema(path).names if name in wanted]
    return pq.read_table(path, columns=names).to_pylist()


_ROWS: Mapping[str, Callable[[Path], list[dict[str, Any]]]] = {
    ".jsonl": _json_lines,
    ".csv": _separated,
    ".tsv": _separated,
    ".parquet": _parquet,
}


def _dataset_rows(name: str) -> Iterator[Mapping[str, Any]]:
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
        raise ValueError(f"cannot read the dataset {name}: {error}") from error


class RowReader:
    """Rows of the set at `path` by their place; going forward costs what lies between."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._set = open_set(path)
        self._last: tuple[int, int, Row] | None = None
        self._rows: Iterator[tuple[int, int, Row]] = iter(())

    def at(self, file: int, row: int) -> Row:
        """Raises `RpoError` when there is no such row any more."""
        if self._last is None or self._last[:2] > (file, row) or self._last[0] != file or row - self._last[1] > SKIP_ROWS:
            self._rows, self._last = comparisons(self._set, file, row), None
        while self._last is None or self._last[:2] != (file, row):
            self._last = next(self._rows, None)
            if self._last is None:
                raise self.changed()
        return self._last[2]

    def changed(self) -> RpoError:
        return RpoError(f"{self.path} is not the preference set that this run was begun with; bring that one back, or begin a new run")


def load_pairs(path: Path) -> tuple[list[Pair], Mapping[str, int]]:
    """The pairs of a file or published folder of ours, or of a preference set in a layout of `rpo.data.preferences`; and how many rows
    were dropped, by reason. Every image is read and checked once; then it stays in its file until it is asked for.

    Raises `RpoError` when it is missing, damaged, of another kind, or holds no usable pair.
    """
    if (path / MANIFEST).is_file():
        check_published(path)
    files = sorted(path.glob("data/*.parquet")) if path.is_dir() else [path]
    if files and all(_is_ours(file) for file in files):
        return [pair for file in files for pair in read_pairs(file)], {}
    pairs, dropped = _foreign_pairs(path)
    if not pairs:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in dropped.items()) or "it has no rows"
        raise RpoError(f"{path} holds no usable pair ({reasons})")
    return pairs, dropped


def _is_ours(file: Path) -> bool:
    try:
        return file.suffix == ".parquet" and set(pq.read_schema(file).names) == set(SCHEMA.names)
    except CORRUPT:
        return True  # `read_pairs` says what is wrong with it


def _with_sound_images(found: PreferenceSet) -> Iterator[tuple[int, int, Row]]:
    """The rows of a set as `comparisons` gives them; those with an image that cannot be read are `Unusable`. Decodes on all cores."""

    def checked(place: tuple[int, int, Row]) -> tuple[int, int, Row]:
        file, number, row = place
        try:
            if isinstance(row, Comparison):
                check_images(row)
        except Unusable as why:
            return file, number, why
        return place

    rest = comparisons(found)
    with ThreadPoolExecutor() as threads:  # Pillow decodes outside the interpreter's lock
        while part := list(islice(rest, _DECODED_ROWS)):
            yield from threads.map(checked, part)


def _foreign_pairs(path: Path) -> tuple[list[Pair], Mapping[str, int]]:
    """Pairs each once; those that the set itself contradicts, by the same images the other way round, are no pairs."""
    found, reader = open_set(path), RowReader(path)
    pairs: dict[bytes, Pair] = {}
    orders: dict[bytes, bool] = {}
    contradicted: set[bytes] = set()
    dropped: Counter[str] = Counter()
    for file, number, row in _with_sound_images(found):
        if isinstance(row, Unusable):
            dropped[str(row)] += 1
            continue
        key, order = key_of(row)
        if key in orders:
            dropped["repeated" if orders[key] == order else "contradicted"] += 1
            contradicted |= set() if orders[key] == order else {key}
            continue
        orders[key], pairs[key] = order, _pair(row, found.layout, partial(_image, reader, file, number))
    dropped["contradicted"] += len(contradicted)
    return [pair for key, pair in pairs.items() if key not in contradicted], +dropped


def _image(reader: RowReader, file: int, number: int, side: str, sha256: str) -> bytes:
    row = reader.at(file, number)
    encoded = getattr(row, side) if isinstance(row, Comparison) else b""
    if hashlib.sha256(encoded).hexdigest() != sha256:
        raise reader.changed()
    return encoded


def _pair(row: Comparison, layout: str, image: Callable[[str, str], bytes]) -> Pair:
    """`image` reads the image of a side with the hash it must have."""
    digests = {side: hashlib.sha256(encoded).hexdigest() for side, encoded in (("chosen", row.chosen), ("rejected", row.rejected))}
    chosen, rejected = (EncodedImage(sha256, partial(image, side, sha256)) for side, sha256 in digests.items())
    return Pair(
        id=hashlib.sha256("\x1f".join([row.prompt, *digests.values()]).encode()).hexdigest()[:32],
        prompt=row.prompt,
        chosen=chosen,
        rejected=rejected,
        gap=1.0,
        split=split_of(row.prompt, HELD_OUT_SHARE),
        critique=json.dumps({"reasoning": row.critique} if row.critique else {}),
        instruction="",
        scores="{}",
        provenance=json.dumps({"from": layout}),
    )
