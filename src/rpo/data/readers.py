"""Prompts and preference sets that others have made. Their rows are hostile until read."""

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rpo.data.images import decode_image
from rpo.data.pairs import Pair, read_pairs, split_of
from rpo.data.shards import CORRUPT
from rpo.errors import RpoError

PICKAPIC_COLUMNS = ("caption", "jpg_0", "jpg_1", "label_0")
HELD_OUT_SHARE = 0.05
"""Of the prompts of a foreign set, which tuning only measures."""
MAX_PROMPT_CHARACTERS = 2000


PROMPT_COLUMNS = ("prompt", "text", "caption", "Prompt")
CATEGORY_COLUMNS = ("category", "tag", "Category")


def read_prompts(path: Path) -> dict[str, str | None]:
    """The prompts of a file, each once and in its order, and their kinds where it names them.

    A text file has one a line; `.jsonl`, `.csv`, `.tsv` and `.parquet` have a column prompt, text or caption, and may have category or tag.
    Raises `ValueError` for a file that is missing, cannot be read or holds none.
    """
    try:
        rows = _ROWS.get(path.suffix, _lines)(path)
    except (OSError, UnicodeDecodeError, csv.Error, json.JSONDecodeError, *CORRUPT) as error:
        raise ValueError(f"cannot read the prompts file {path}: {error}") from error
    prompts: dict[str, str | None] = {}
    for number, row in enumerate(rows, start=1):
        prompt = next((row[name] for name in PROMPT_COLUMNS if name in row), None)
        if not isinstance(prompt, str) or len(prompt) > MAX_PROMPT_CHARACTERS:
            columns = ", ".join(PROMPT_COLUMNS[:3])
            raise ValueError(f"{path}, row {number}: no text of at most {MAX_PROMPT_CHARACTERS} characters in a column {columns}")
        kind = next((row[name] for name in CATEGORY_COLUMNS if isinstance(row.get(name), str)), None)
        if prompt.strip():
            prompts.setdefault(" ".join(prompt.split()), kind)
    if not prompts:
        raise ValueError(f"the prompts file {path} holds no prompt; write one a line")
    return prompts


def _lines(path: Path) -> list[dict[str, Any]]:
    return [{"prompt": line} for line in path.read_text(encoding="utf-8").splitlines()]


def _json_lines(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [row if isinstance(row, dict) else {} for row in rows]


def _separated(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))


def _parquet(path: Path) -> list[dict[str, Any]]:
    names = [name for name in pq.read_schema(path).names if name in (*PROMPT_COLUMNS, *CATEGORY_COLUMNS)]
    return pq.read_table(path, columns=names).to_pylist()


_ROWS: Mapping[str, Callable[[Path], list[dict[str, Any]]]] = {
    ".jsonl": _json_lines,
    ".csv": _separated,
    ".tsv": _separated,
    ".parquet": _parquet,
}


class _Unusable(ValueError):
    """A row that is no pair; the message is the reason it is counted under."""


def load_pairs(path: Path) -> tuple[list[Pair], Mapping[str, int]]:
    """The pairs of a file of ours, or of a Parquet file with Pick-a-Pic v2's columns; and how many rows were dropped, by reason.

    Raises `RpoError` when the file is missing, damaged, of another kind, or holds no usable pair.
    """
    try:
        columns = set(pq.read_schema(path).names)
    except (OSError, *CORRUPT):
        columns = set()  # `read_pairs` says what is wrong with it
    if not columns.issuperset(PICKAPIC_COLUMNS):
        return read_pairs(path), {}
    pairs, dropped = _pickapic(path)
    if not pairs:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in dropped.items()) or "it has no rows"
        raise RpoError(f"{path} holds no usable pair ({reasons})")
    return pairs, dropped


def _pickapic(path: Path) -> tuple[list[Pair], Mapping[str, int]]:
    pairs: dict[str, Pair] = {}
    dropped: Counter[str] = Counter()
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=64, columns=list(PICKAPIC_COLUMNS)):
                for row in batch.to_pylist():
                    try:
                        pair = _pickapic_pair(row)
                    except _Unusable as why:
                        dropped[str(why)] += 1
                        continue
                    dropped["repeated"] += pair.id in pairs
                    pairs.setdefault(pair.id, pair)
    except (*CORRUPT, pa.ArrowException) as error:
        raise RpoError(f"{path} is damaged ({error}); download it again") from error
    return list(pairs.values()), +dropped


def _pickapic_pair(row: Mapping[str, Any]) -> Pair:
    """`label_0` is 1 where the first image is preferred, 0 where the second is, 0.5 for a tie. Raises `_Unusable`."""
    prompt, label = row["caption"], row["label_0"]
    if not isinstance(prompt, str) or not prompt.strip():
        raise _Unusable("no prompt")
    if len(prompt) > MAX_PROMPT_CHARACTERS:
        raise _Unusable(f"prompt over {MAX_PROMPT_CHARACTERS} characters")
    if label == 0.5:
        raise _Unusable("tie")
    if label not in (0, 1):
        raise _Unusable("no label")
    images = [_image(row[f"jpg_{side}"]) for side in (0, 1)]
    chosen, rejected = images if label == 1 else images[::-1]
    if chosen == rejected:
        raise _Unusable("both images are the same")
    name = hashlib.sha256("\x1f".join([prompt, *(hashlib.sha256(image).hexdigest() for image in (chosen, rejected))]).encode())
    return Pair(
        id=name.hexdigest()[:32],
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        gap=1.0,
        split=split_of(prompt, HELD_OUT_SHARE),
        critique="{}",
        instruction="",
        scores="{}",
        provenance=json.dumps({"from": "pickapic"}),
    )


def _image(value: object) -> bytes:
    """The encoded image of a cell, bytes or `{"bytes": ..., "path": ...}`, once it has been decoded; a path is never opened."""
    encoded = value.get("bytes") if isinstance(value, Mapping) else value
    if not isinstance(encoded, bytes):
        raise _Unusable("no image")
    try:
        decode_image(encoded)
    except ValueError:
        raise _Unusable("unreadable image") from None
    return encoded
