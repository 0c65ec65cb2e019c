"""Pairs that are brought: our own files, or preference sets of strangers, whose rows are hostile until read."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

from rpo.core.parquet import CORRUPT
from rpo.data.formats.dropped import Dropped
from rpo.data.formats.files import is_junk
from rpo.data.formats.index import ForeignRows, PairRow, read_index, write_index
from rpo.data.formats.rows import HELD_OUT_SHARE, Captioned, Comparison, Row, Unusable, check_images, key_of
from rpo.data.formats.tables import parquet_columns
from rpo.data.hub import MANIFEST, check_published
from rpo.data.images import EncodedImage
from rpo.data.pairs import SCHEMA, Pair, Split, read_pairs, split_of
from rpo.data.preference_sets import PreferenceSet, comparisons, open_set
from rpo.errors import RpoError

SKIP_ROWS = 1000
"""Over more rows of a preference set than this a reader begins anew instead of reading what lies between."""
ALONE = "one image and no pair: a source for `rpo curate --sources`"

_DECODED_ROWS = 64
_DECODED_BYTES = 64_000_000
"""Rows whose images are decoded at once, and encoded bytes of these."""


class RowReader:
    """Rows of the set at `path` by their place; going forward costs what lies between."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._set: PreferenceSet | None = None
        self._last: tuple[int, int, Row] | None = None
        self._rows: Iterator[tuple[int, int, Row]] = iter(())

    def at(self, file: int, row: int) -> Row:
        """Raises `RpoError` when there is no such row any more."""
        if self._last is None or self._last[:2] > (file, row) or self._last[0] != file or row - self._last[1] > SKIP_ROWS:
            self._set = self._set or open_set(self.path)
            if file >= len(self._set.files):
                raise self.changed()
            self._rows, self._last = comparisons(self._set, file, row), None
        while self._last is None or self._last[:2] != (file, row):
            self._last = next(self._rows, None)
            if self._last is None:
                raise self.changed()
        return self._last[2]

    def changed(self) -> RpoError:
        return RpoError(f"{self.path} is not the preference set that this run was begun with; bring that one back, or begin a new run")


def load_pairs(path: Path, cache: Path | None = None) -> tuple[list[Pair], Dropped]:
    """The pairs of a file or published folder of ours, or of a preference set in a layout of `rpo.data.preference_sets`; and the rows that
    were dropped, by reason. Every image is read and checked once; then it stays in its file until it is asked for.

    In the folder `cache`, if given, what was found is kept, so that an unchanged set is not read again (`rpo.data.formats.index`). Raises
    `RpoError` when the set is missing, damaged, of another kind, or holds no usable pair.
    """
    if (path / MANIFEST).is_file():
        check_published(path, cache / "published.json" if cache else None)
    files = [file for file in sorted(path.glob("data/*.parquet")) if not is_junk(file.name)] if path.is_dir() else [path]
    if files and all(_is_ours(file) for file in files):
        return [pair for file in files for pair in read_pairs(file)], Dropped()
    found = open_set(path)
    rows = (cache and read_index(cache, found)) or _foreign_rows(found)
    if not rows.pairs:
        raise RpoError(f"{path} holds no usable pair ({rows.dropped.reasons() or 'it has no rows'}){rows.dropped.first()}")
    if cache:
        write_index(cache, found, rows)
    return _with_images(rows, path), rows.dropped


def _is_ours(file: Path) -> bool:
    try:
        return file.suffix.lower() == ".parquet" and set(parquet_columns(file)) == set(SCHEMA.names)
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
            return file, number, Unusable(str(why))  # a new one: the old one's traceback holds the images
        return place

    with ThreadPoolExecutor() as threads:  # Pillow decodes outside the interpreter's lock
        part, size = list[tuple[int, int, Row]](), 0
        for place in comparisons(found):
            part.append(place)
            size += 0 if isinstance(place[2], Unusable) else sum(map(len, place[2].images))
            if len(part) == _DECODED_ROWS or size > _DECODED_BYTES:
                yield from threads.map(checked, part)
                part, size = [], 0
        yield from threads.map(checked, part)


def _foreign_rows(found: PreferenceSet) -> ForeignRows:
    """Pairs each once; those that the set itself contradicts, by the same images the other way round, are no pairs."""
    pairs: dict[bytes, PairRow] = {}
    orders: dict[bytes, bool] = {}
    contradicted: set[bytes] = set()
    dropped, notes = Dropped(), Counter[str](found.notes)
    for file, number, row in _with_sound_images(found):
        if not isinstance(row, Comparison):
            dropped.add(ALONE if isinstance(row, Captioned) else str(row), found.name(file, number))
            continue
        notes[row.note] += 1
        key, order = key_of(row)
        if key in orders:
            dropped.add("repeated" if orders[key] == order else "contradicted", found.name(file, number))
            contradicted |= set() if orders[key] == order else {key}
            continue
        chosen, rejected = (hashlib.sha256(image).hexdigest() for image in row.images)
        orders[key] = order
        pairs[key] = PairRow(file, number, row.prompt, row.critique, chosen, rejected, "train")
    for key in contradicted:
        dropped.add("contradicted", found.name(pairs[key].file, pairs[key].row))
    for note, count in notes.items():
        if note:
            dropped.notes.append(note if note in found.notes else f"{note}: {count}")
    return ForeignRows(found.layout, _split([pair for key, pair in pairs.items() if key not in contradicted], found), dropped)


def _split(pairs: list[PairRow], found: PreferenceSet) -> list[PairRow]:
    """All pairs of a prompt are trained on, or none: by the split that their files are named for, else by the prompt's hash.

    Never all are held out: with too few prompts for that, single pairs are.
    """
    if "held_out" in found.splits:
        held_out = {pair.prompt for pair in pairs if found.splits[pair.file] == "held_out"}
        splits: list[Split] = ["held_out" if pair.prompt in held_out else "train" for pair in pairs]
        if "train" not in splits:  # every prompt is in both parts: then the parts hold
            splits = ["held_out" if found.splits[pair.file] == "held_out" else "train" for pair in pairs]
    else:
        splits = [split_of(pair.prompt, HELD_OUT_SHARE) for pair in pairs]
    if pairs and "train" not in splits:
        splits = [split_of(f"{pair.chosen} {pair.rejected}", HELD_OUT_SHARE) for pair in pairs]
        splits[0] = "train"
    return [replace(pair, split=split) for pair, split in zip(pairs, splits, strict=True)]


def _with_images(rows: ForeignRows, path: Path) -> list[Pair]:
    reader = RowReader(path)
    return [_pair(row, rows.layout, partial(_image, reader, row.file, row.row)) for row in rows.pairs]


def _image(reader: RowReader, file: int, number: int, side: str, sha256: str) -> bytes:
    row = reader.at(file, number)
    encoded = getattr(row, side) if isinstance(row, Comparison) else b""
    if hashlib.sha256(encoded).hexdigest() != sha256:
        raise reader.changed()
    return encoded


def _pair(row: PairRow, layout: str, image: Callable[[str, str], bytes]) -> Pair:
    """`image` reads the image of a side with the hash it must have."""
    chosen, rejected = (EncodedImage(of, partial(image, side, of)) for side, of in (("chosen", row.chosen), ("rejected", row.rejected)))
    return Pair(
        id=hashlib.sha256("\x1f".join([row.prompt, row.chosen, row.rejected]).encode()).hexdigest()[:32],
        prompt=row.prompt,
        chosen=chosen,
        rejected=rejected,
        gap=1.0,
        split=row.split,
        critique=json.dumps({"reasoning": row.critique}) if row.critique else "{}",
        instruction="",
        scores="{}",
        provenance=f'{{"from": "{layout}"}}',
    )
