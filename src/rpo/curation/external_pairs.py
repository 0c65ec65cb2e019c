"""Images that are brought as the sources of a curation: one side of each pair of a preference set, or single images with captions.

The plan knows a row by the hashes of its images and by its place in the set; the stage reads the images from there.
"""

import hashlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import pyarrow as pa

from rpo.core.parquet import IMAGE
from rpo.data.formats.rows import Captioned, Comparison, Unusable, check_images, key_of
from rpo.data.images import Frame, framed_cells, image_cell
from rpo.data.preference_sets import TEST_ROW, PreferenceSet, comparisons, open_set
from rpo.data.readers import RowReader
from rpo.engine.stage import Batch, StageCall, StageSpec, error_status, plan
from rpo.errors import RowError

EditSide = Literal["rejected", "chosen", "both"]

NO_PAIR = "one image and no pair"
COLUMNS = {"source_sha256": pa.string(), "other_sha256": pa.string(), "source_side": pa.string(), "flawed_row": pa.string()}
NOTES = {"set_file": pa.int32(), "set_row": pa.int64(), "set_name": pa.string(), "flaw": pa.string()}
VALIDATION_ROW = "row of a validation split"
DROPPED = ("tie", "repeated", "contradicted", "both images are the same", TEST_ROW, VALIDATION_ROW, NO_PAIR)
"""Flaws of a row whose data is sound."""
ALONE = "alone"
"""The side of an image that came without another."""


@dataclass(frozen=True)
class _Entry:
    """A row of the set as the plan knows it."""

    file: int
    row: int
    prompt: str
    hashes: dict[str, str]
    """By side; empty for a row that is no pair."""
    key: bytes | None
    flaw: str | None


def _refused(check: Callable[[str], object], prompt: str) -> str | None:
    try:
        check(prompt)
    except ValueError as error:
        return f"prompt refused: {error}"
    return None


def _entries(path: Path, found: PreferenceSet, check: Callable[[str], object], pairs_only: bool) -> tuple[list[_Entry], set[bytes]]:
    """Every row of the set at `path`, and the keys of pairs that come both ways round. Reads every image once and keeps its hash."""
    entries: list[_Entry] = []
    notes = Counter[str](found.notes)
    orders: dict[bytes, bool] = {}
    contradicted: set[bytes] = set()
    for file, number, row in comparisons(found):
        if isinstance(row, Unusable):
            entries.append(_Entry(file, number, "", {}, None, str(row)))
            continue
        notes[row.note] += 1
        key, order = key_of(row)
        names = ("chosen", "rejected") if isinstance(row, Comparison) else (ALONE,)
        hashes = {side: hashlib.sha256(image).hexdigest() for side, image in zip(names, row.images, strict=True)}
        flaw = "repeated" if key in orders else _refused(check, row.prompt)
        flaw = VALIDATION_ROW if found.splits[file] == "held_out" else NO_PAIR if pairs_only and isinstance(row, Captioned) else flaw
        entries.append(_Entry(file, number, row.prompt, hashes, key, flaw))
        if orders.setdefault(key, order) != order:
            contradicted.add(key)
    for note, count in notes.items():
        if note:
            warnings.warn(f"{path}: {note if note in found.notes else f'{note}: {count} rows'}", stacklevel=2)
    return entries, contradicted


def _anything(prompt: str) -> None:
    """Models that understand every prompt."""


def plan_brought(
    path: Path, edit_side: EditSide, *, seed: int, check: Callable[[str], object] = _anything, pairs_only: bool = False
) -> pa.Table:
    """The rows of a run on the pairs at `path`, one for each side that is edited; or on single images with captions, one for each.

    A row that is neither stays, with its flaw; so do all but the first of equal pairs, pairs that the set itself contradicts, rows of
    files that are named for validation or test, single images where `pairs_only` is set, and prompts for which `check` raises
    `ValueError`. Raises `RpoError` when there is no set at `path`.
    """
    found = open_set(path)
    entries, contradicted = _entries(path, found, check, pairs_only)

    def rows() -> Iterator[dict[str, object]]:
        for entry in entries:
            flaw = "contradicted" if entry.key in contradicted else entry.flaw
            sides = (ALONE,) if ALONE in entry.hashes else ("rejected", "chosen") if edit_side == "both" else (edit_side,)
            for side in sides:
                yield {
                    "prompt": entry.prompt,
                    "source_sha256": entry.hashes.get(side),
                    "other_sha256": entry.hashes.get("chosen" if side == "rejected" else "rejected"),
                    "source_side": side,
                    "flawed_row": None if flaw is None else f"{entry.file}:{entry.row}",  # so that equal ones stay apart
                    "set_file": entry.file,
                    "set_row": entry.row,
                    "set_name": found.name(entry.file, entry.row),
                    "flaw": flaw,
                }

    return plan(rows(), seed=seed, columns=COLUMNS, notes=NOTES)


@dataclass(frozen=True, kw_only=True)
class BroughtStage:
    """The images that are brought: the side of a pair that is edited as `source`, and as `other` the one it was compared with, if any."""

    brought: Path
    """The preference set that the plan was made from."""
    frame: Frame | None = None
    """What both images are fitted to; a curation takes it from its editor."""

    @property
    def spec(self) -> StageSpec:
        return StageSpec(
            name="source",
            version="2-brought",
            inputs=(*COLUMNS, *NOTES),
            outputs={"source": IMAGE, "other": IMAGE, "cut": pa.float64()},
            batch_size=64,
        )

    def build(self) -> StageCall:
        reader = _Reader(self.brought)

        def run(batch: Batch) -> Batch:
            rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
            answers = [reader.sides(row, self.frame) for row in rows]
            made = {name: [a[name] if isinstance(a, dict) else None for a in answers] for name in ("source", "other", "cut")}
            return made | {"status": [a if isinstance(a, str) else None for a in answers]}

        return run


class _Reader(RowReader):
    def sides(self, row: dict[str, object], frame: Frame | None) -> dict[str, object] | str:
        """The cells of both images, or the status of a row that has none."""
        flaw = cast("str | None", row["flaw"])
        if flaw is not None:
            return f"drop:{flaw}" if flaw in DROPPED else error_status("source", RowError(flaw))
        found = self.at(cast(int, row["set_file"]), cast(int, row["set_row"]))
        if isinstance(found, Unusable) or isinstance(found, Captioned) != (row["source_side"] == ALONE):
            raise self.changed()
        source, other = found.images[0], found.images[-1] if isinstance(found, Comparison) else None
        if row["source_side"] == "rejected":
            source, other = found.images[1], found.images[0]
        hashes = [image and hashlib.sha256(image).hexdigest() for image in (source, other)]
        if hashes != [row["source_sha256"], row["other_sha256"]]:
            raise self.changed()
        try:
            check_images(found)
        except Unusable as why:
            return error_status("source", RowError(str(why)))
        cells, cut = framed_cells([image_cell(image) for image in (source, other) if image is not None], frame)
        return {"source": cells[0], "other": None if other is None else cells[1], "cut": cut}
