"""Preference sets as tables: Parquet files, JSON lines and JSON arrays."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import pyarrow.parquet as pq

from rpo.data.formats.files import array_values, is_array, json_value, lines_of, open_regular
from rpo.data.formats.rows import (
    CRITIQUE_KEYS,
    IMAGE_KEYS,
    MAX_RANKED,
    PROMPT_KEYS,
    Captioned,
    Comparison,
    ListedImages,
    Row,
    Unusable,
    bytes_of,
    comparison,
    first_text,
    number_of,
    prompt_of,
    ranking,
    row_of,
    scored,
)

TableLayout = Literal["pickapic", "ranking", "scored", "pairs", "captions"]
ReadTableRow = Callable[[Mapping[str, Any]], Row]

BATCH_ROWS = 64
BATCH_BYTES = 64_000_000
"""About so much of a Parquet file is in memory at once."""
METADATA = ("metadata.jsonl", "metadata.csv", "captions.jsonl")
"""Files that name the images of a folder with their captions (`file_name` and `text`, `caption` or `prompt`), as `datasets` has them."""
JSON_FOLDERS = ("images", "test", "train")
"""Where images of JSON rows are looked for beside the file's own folder."""

_SIDES = (
    ("chosen", "rejected"),
    ("chosen_file_name", "rejected_file_name"),
    ("chosen_image", "rejected_image"),
)


def _pickapic(row: Mapping[str, Any]) -> Comparison:
    first, second = number_of(row["label_0"]), number_of(row.get("label_1"))
    unlabeled = row.get("has_label") is False or (row.get("label_1") is not None and (first is None or first + (second or 0) != 1))
    return comparison(row["caption"], row["jpg_0"], row["jpg_1"], None if unlabeled else first)


def _pairs(row: Mapping[str, Any]) -> Comparison:
    return comparison(row["prompt"], row["chosen"], row["rejected"], 1, critique=row.get("critique"))


def _scored(row: Mapping[str, Any]) -> Comparison:
    return scored(row, row.get("image_0"), row.get("image_1"))


def _ranking(row: Mapping[str, Any]) -> Comparison:
    images = next((row[key] for key in ("images", "image") if row.get(key) is not None), None)
    return ranking(first_text(row), images, row)


def _captioned(row: Mapping[str, Any]) -> Captioned:
    return Captioned(prompt=prompt_of(first_text(row)), image=bytes_of(row["image"]))


_LAYOUTS: tuple[tuple[TableLayout, frozenset[str], ReadTableRow], ...] = (
    ("pickapic", frozenset({"caption", "jpg_0", "jpg_1", "label_0"}), _pickapic),
    ("pairs", frozenset({"prompt", "chosen", "rejected"}), _pairs),
    ("scored", frozenset({"image_0", "image_1", "prefer_0", "prefer_1"}), _scored),
    ("ranking", frozenset({"images", "rank"}), _ranking),
    ("ranking", frozenset({"images", "human_preference"}), _ranking),
    ("ranking", frozenset({"image", "rank"}), _ranking),
    ("ranking", frozenset({"image", "human_preference"}), _ranking),
    *(("captions", frozenset({"image", key}), _captioned) for key in PROMPT_KEYS),
)
_READ = frozenset().union(*(columns for _, columns, _ in _LAYOUTS), PROMPT_KEYS, ("critique", "label_1", "has_label"))


def layout_of(columns: set[str]) -> tuple[TableLayout, ReadTableRow] | None:
    """The layout that a Parquet file with such columns has, and what reads its rows."""
    return next(((layout, read) for layout, wanted, read in _LAYOUTS if columns >= wanted), None)


def parquet_columns(path: Path) -> list[str]:
    """Names of the columns of a Parquet file. Raises what pyarrow does for a file that is none."""
    with open_regular(path) as file:
        return pq.read_schema(file).names


def _batch_rows(group: Any, columns: list[str]) -> int:
    """Rows of a batch, from the bytes that they take in memory: a value of a dictionary may stand in every row."""
    chunks = [group.column(number) for number in range(group.num_columns)]
    sizes = [chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.split(".")[0] in columns]
    return max(1, min(BATCH_ROWS, BATCH_BYTES // max(1, sum(sizes))))


def parquet_rows(read: ReadTableRow) -> Callable[[Path, int], Iterator[Row]]:
    """Rows from any one on; row groups before it are not read."""

    def rows(path: Path, start: int) -> Iterator[Row]:
        with open_regular(path) as opened, pq.ParquetFile(opened, page_checksum_verification=True) as file:
            columns = [name for name in file.schema_arrow.names if name in _READ]
            before = 0
            for number in range(file.num_row_groups):
                group = file.metadata.row_group(number)
                before += group.num_rows
                if before <= start:
                    continue
                place = before - group.num_rows
                for batch in file.iter_batches(batch_size=_batch_rows(group, columns), row_groups=[number], columns=columns):
                    skipped = min(max(start - place, 0), batch.num_rows)
                    place += batch.num_rows
                    for row in batch.slice(skipped).to_pylist():
                        yield row_of(lambda row=row: read(row))

    return rows


def json_rows(path: Path, start: int) -> Iterator[Row]:
    """JSON lines, or one JSON array as HPDv2 has them; images are base64, data URLs, or names of files in the set's folder."""
    listed = ListedImages(path.parent, *JSON_FOLDERS)
    for number, row in enumerate(_json_values(path)):
        if number >= start:
            yield row if isinstance(row, Unusable) else row_of(lambda row=row: _json_row(row, listed))
    if start == 0 and path.name in METADATA:
        yield from listed.unnamed()


def _json_values(path: Path) -> Iterator[object]:
    with open_regular(path) as file:
        if is_array(file):
            yield from array_values(file)
            return
        for line in lines_of(file):
            if line is None:
                yield Unusable("line that is too long")
            elif line.strip():
                try:
                    yield json_value(line)
                except UnicodeDecodeError:
                    yield Unusable("text that is not UTF-8")
                except ValueError:
                    yield Unusable("no JSON object")


def _json_row(value: object, listed: ListedImages) -> Row:
    if not isinstance(value, dict):
        raise Unusable("no JSON object")
    row = cast("dict[str, Any]", value)
    for chosen, rejected in _SIDES:
        if chosen in row and rejected in row:
            sides = listed.image(row[chosen]), listed.image(row[rejected])
            return comparison(first_text(row), *sides, 1, critique=first_text(row, CRITIQUE_KEYS))
    if "image_0" in row or "image_1" in row:
        return scored(row, listed.image(row.get("image_0")), listed.image(row.get("image_1")))
    many = next((row[key] for key in ("images", *IMAGE_KEYS) if isinstance(row.get(key), list)), None)
    if many is not None:
        return ranking(first_text(row), [listed.image(value) for value in many] if len(many) <= MAX_RANKED else None, row)
    alone = next((row[key] for key in IMAGE_KEYS if isinstance(row.get(key), str)), None)
    if alone is not None:
        return Captioned(prompt=prompt_of(first_text(row)), image=bytes_of(listed.image(alone)))
    return scored(row, None, None)
