"""Preference sets and captioned images that others have made, in the layouts they are found in. Their rows are hostile until read.

A set is read row by row: `comparisons(set, start)` begins at any row without decoding those before it. Images are the bytes that the
set itself holds. A path in a row is never opened and an address never fetched; a name chooses among the regular files that lie in
the set's own folder. No link is followed.
"""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rpo.core.parquet import CORRUPT
from rpo.data.formats.files import MAX_LINE_BYTES, is_array, is_junk, json_value, lines_of, open_regular
from rpo.data.formats.folders import beside_images, captioned_rows, holds_images, metadata_csv_rows, pair_rows, row_names
from rpo.data.formats.rows import Row, Unusable
from rpo.data.formats.tables import METADATA, TableLayout, json_rows, layout_of, parquet_columns, parquet_rows
from rpo.data.formats.tars import DamagedTar, tar_rows
from rpo.errors import RpoError

Layout = TableLayout | Literal["json", "folders", "triplets"]
SplitName = Literal["train", "held_out", "test"]

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
SUFFIXES = (".parquet", ".tar", *JSON_SUFFIXES)
_BROKEN = (*CORRUPT, EOFError, MemoryError, RecursionError, OverflowError, DamagedTar)
_SPLITS = re.compile(r"(?:^|[^a-z])(train|validation|valid|val|dev|eval|test|held[_-]?out)(?:$|[^a-z])")
TEST_ROW = "row of a test split"


@dataclass(frozen=True)
class PreferenceSet:
    """Files of one layout, and how their rows are read."""

    layout: Layout
    files: tuple[Path, ...]
    rows: Callable[[Path, int], Iterator[Row]]
    """(file, first row) -> the rows from there on."""
    splits: tuple[SplitName | None, ...]
    """Of each file, by its name; all `None` where no file is named for training beside others."""
    notes: tuple[str, ...] = ()
    """What lies beside the files and is not read."""

    def name(self, file: int, row: int) -> str:
        """A row for people: by its number, or by the name of its files."""
        path = self.files[file]
        names = row_names(path, self.layout == "folders") if path.is_dir() else ()
        return f"{path.name}, {names[row] if row < len(names) else f'row {row + 1}'}"


def _set(layout: Layout, files: list[Path], rows: Callable[[Path, int], Iterator[Row]], notes: list[str] | None = None) -> PreferenceSet:
    splits: list[SplitName | None] = [_split_of(file.name) for file in files]
    if not {"train", None} & set(splits) or not {"held_out", "test"} & set(splits):
        splits = [None] * len(files)  # a set without parts, or a part that the user chose by name
    return PreferenceSet(layout, tuple(files), rows, tuple(splits), tuple(notes or ()))


def _split_of(name: str) -> SplitName | None:
    found = _SPLITS.search(name.lower())
    kind = found.group(1) if found else None
    return None if kind is None else "train" if kind == "train" else "test" if kind == "test" else "held_out"


def open_set(path: Path) -> PreferenceSet:
    """The set at `path`: a file, or a folder of Parquet, tar or JSON files, of `chosen/` and `rejected/`, or of images with captions.

    Raises `RpoError` when it is missing, damaged, or of no layout that is known.
    """
    if not path.exists() and not path.is_symlink():
        raise RpoError(f"there are no pairs at {path}")
    if not path.is_dir():
        return _by_kind([path], [])
    if (path / "chosen").is_dir() and (path / "rejected").is_dir():
        held_out = path / "held_out"
        homes = [path, held_out] if (held_out / "chosen").is_dir() and (held_out / "rejected").is_dir() else [path]
        splits: tuple[SplitName | None, ...] = ("train", "held_out") if len(homes) > 1 else (None,)
        return PreferenceSet("folders", tuple(homes), pair_rows, splits)
    if (found := _named_images(path)) is not None:
        return found
    files, notes = _data_files(path)
    if files:
        return _by_kind(files, notes)
    if holds_images(path):
        return PreferenceSet("captions", (path,), captioned_rows, (None,), (*notes, *beside_images(path)))
    what = "no Parquet, tar or JSONL files, no chosen/ and rejected/, and no images with captions"
    raise RpoError(f"{path} holds no preference set: {notes[0] if notes else what}")


def _named_images(path: Path) -> PreferenceSet | None:
    """A folder of images that a metadata file names with their captions, in the folder or in its parts."""
    homes = [path, *(path / part for part in ("train", "validation", "test", "held_out"))]
    for name in METADATA:
        if files := [home / name for home in homes if (home / name).is_file() and not home.is_symlink()]:
            splits: list[SplitName | None] = [_split_of(file.parent.name) if file.parent != path else None for file in files]
            if len(files) == 1:
                splits = [None]
            csv = name.endswith(".csv")
            return PreferenceSet("captions" if csv else "json", tuple(files), metadata_csv_rows if csv else json_rows, tuple(splits))
    return None


def _data_files(path: Path) -> tuple[list[Path], list[str]]:
    """The files of one kind in a folder, Parquet before tar before JSON lines, and notes on what is not read."""
    found: dict[str, list[Path]] = {}
    links = 0
    for folder in (path / "data", path):
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name) if folder.is_dir() and not folder.is_symlink() else ():
            kind = Path(entry.name).suffix.lower()
            if is_junk(entry.name) or kind not in (".parquet", ".tar", ".jsonl", ".ndjson"):
                continue
            if entry.is_file(follow_symlinks=False):
                found.setdefault(f"{folder.name if folder != path else ''}{kind}", []).append(folder / entry.name)
            else:
                links += 1
    order = ("data.parquet", ".parquet", "data.tar", ".tar", "data.jsonl", ".jsonl", "data.ndjson", ".ndjson")
    kinds = [kind for kind in order if kind in found]
    unread = f"{links} links or devices, which are not followed; copy the files (cp -rL)" if links else ""
    notes = [unread] if unread else []
    if not kinds:
        return [], notes
    others = [file.name for kind in kinds[1:] for file in found[kind]]
    return found[kinds[0]], [*notes, f"{len(others)} other files, such as {others[0]}; name one to read it"] if others else notes


def _by_kind(files: list[Path], notes: list[str]) -> PreferenceSet:
    """The set whose kind shows in its files' names. Raises `RpoError` for a name, a file or columns that are not read."""
    first = files[0]
    suffix = first.suffix.lower()
    if suffix in (".gz", ".tgz", ".zip", ".bz2", ".xz", ".zst", ".7z"):
        raise RpoError(f"{first} is compressed; unpack it first. Pairs are read from {', '.join(SUFFIXES)} and folders")
    if suffix not in SUFFIXES:
        raise RpoError(
            f"{first} is no preference set by its ending {suffix!r}; pairs are read from {', '.join(SUFFIXES)} and folders (docs/data.md)"
        )
    if suffix == ".tar":
        return _set("triplets", files, tar_rows, notes)
    if suffix in JSON_SUFFIXES:
        _check_json(first)
        return _set("json", files, json_rows, notes)
    known = [_layout(file) for file in files]
    if odd := next((file for file, (layout, _) in zip(files, known, strict=True) if layout != known[0][0]), None):
        raise RpoError(f"{odd} has other columns than {first}; name one of them, or move it out of the folder")
    layout, read = known[0]
    return _set(layout, files, parquet_rows(read), notes)


def _layout(file: Path) -> tuple[TableLayout, Callable[..., Row]]:
    try:
        columns = set(parquet_columns(file))
    except _BROKEN as error:
        raise RpoError(f"{file} is damaged ({_one_line(error)}); download it again") from error
    if (found := layout_of(columns)) is None:
        named = ", ".join(sorted(columns))[:300]
        raise RpoError(
            f"{file} has no columns of a preference set that is known; it has {named}. Rename them to prompt, chosen and rejected "
            "(better and worse image), or to another layout of docs/data.md."
        )
    return found


def _check_json(file: Path) -> None:
    """Refuses a `.json` file that is neither an array nor an object a line, by what it is."""
    try:
        with open_regular(file) as opened:
            if file.suffix.lower() != ".json" or is_array(opened):
                return
            line = next((line for line in lines_of(opened, MAX_LINE_BYTES) if line is None or line.strip()), b"")
        value = json_value(line or b"")
        keys = [key for key, rows in value.items() if isinstance(rows, list)] if isinstance(value, dict) else []
        wrong = f"is one JSON object with rows under {keys[0]!r}" if keys and len(value) <= 3 else None  # type: ignore[arg-type]
        if wrong is None or not any(isinstance(row, dict) for row in value[keys[0]]):  # type: ignore[index]
            return
    except ValueError:
        wrong = "is neither a JSON array nor one JSON object a line"
    except OSError as error:
        raise RpoError(f"{file} cannot be read ({_one_line(error)})") from error
    raise RpoError(f"{file} {wrong}; write the rows as one array, or one object a line")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def comparisons(found: PreferenceSet, file: int = 0, start: int = 0) -> Iterator[tuple[int, int, Row]]:
    """(file, row in it, what the row is) from row `start` of file number `file` on. Raises `RpoError` for a damaged file."""
    for number in range(file, len(found.files)):
        path, test = found.files[number], found.splits[number] == "test"
        try:
            for row, value in enumerate(found.rows(path, start), start=start):
                yield number, row, Unusable(TEST_ROW) if test else value
        except _BROKEN as error:
            raise RpoError(f"{path} is damaged ({_one_line(error)}); download it again") from error
        start = 0
