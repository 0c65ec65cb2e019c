"""Preference sets as the sources of a curation: no image is generated; one side of each pair is criticised and edited.

The plan knows a row by the hashes of its images and by its place in the set; the stage reads the images from there.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import pyarrow as pa

from rpo.curate.pipeline import Batch, StageCall, StageSpec, error_status, plan
from rpo.data.images import image_cell
from rpo.data.preferences import PreferenceSet, comparisons, open_set
from rpo.data.readers import RowReader
from rpo.data.rows import Captioned, Comparison, Unusable, check_images, key_of
from rpo.data.shards import IMAGE
from rpo.errors import RowError

EditSide = Literal["rejected", "chosen", "both"]

COLUMNS = {"source_sha256": pa.string(), "other_sha256": pa.string(), "source_side": pa.string(), "flawed_row": pa.string()}
NOTES = {"set_file": pa.int32(), "set_row": pa.int64(), "flaw": pa.string()}
DROPPED = ("tie", "repeated", "contradicted", "both images are the same")
"""Flaws of a pair whose data is sound."""


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


def _entries(found: PreferenceSet, check: Callable[[str], object]) -> tuple[list[_Entry], set[bytes]]:
    """Every row of the set, and the keys of pairs that come both ways round. Reads every image once and keeps its hash."""
    entries: list[_Entry] = []
    orders: dict[bytes, bool] = {}
    contradicted: set[bytes] = set()
    for file, number, row in comparisons(found):
        if isinstance(row, Unusable):
            entries.append(_Entry(file, number, "", {}, None, str(row)))
            continue
        key, order = key_of(row)
        hashes = {side: hashlib.sha256(image).hexdigest() for side, image in (("chosen", row.chosen), ("rejected", row.rejected))}
        flaw = "repeated" if key in orders else _refused(check, row.prompt)
        entries.append(_Entry(file, number, row.prompt, hashes, key, flaw))
        if orders.setdefault(key, order) != order:
            contradicted.add(key)
    return entries, contradicted


def _anything(prompt: str) -> None:
    """Models that understand every prompt."""


def plan_brought(path: Path, edit_side: EditSide, *, seed: int, check: Callable[[str], object] = _anything) -> pa.Table:
    """The rows of a run on the pairs at `path`: one for each side that is edited.

    A row that is no pair stays, with its flaw; so do all but the first of equal pairs, pairs that the set itself contradicts, and
    prompts for which `check` raises `ValueError`. Raises `RpoError` when there is no set at `path`.
    """
    entries, contradicted = _entries(open_set(path), check)

    def rows() -> Iterator[dict[str, object]]:
        for entry in entries:
            flaw = "contradicted" if entry.key in contradicted else entry.flaw
            for side in ("rejected", "chosen") if edit_side == "both" else (edit_side,):
                yield {
                    "prompt": entry.prompt,
                    "source_sha256": entry.hashes.get(side),
                    "other_sha256": entry.hashes.get("chosen" if side == "rejected" else "rejected"),
                    "source_side": side,
                    "flawed_row": None if flaw is None else f"{entry.file}:{entry.row}",  # so that equal ones stay apart
                    "set_file": entry.file,
                    "set_row": entry.row,
                    "flaw": flaw,
                }

    return plan(rows(), seed=seed, columns=COLUMNS, notes=NOTES)


@dataclass(frozen=True, kw_only=True)
class BroughtStage:
    """The images of pairs that are brought: the side that is edited as `source`, the one it was compared with as `other`."""

    brought: Path
    """The preference set that the plan was made from."""

    @property
    def spec(self) -> StageSpec:
        return StageSpec(
            name="source",
            version="1-brought",
            inputs=(*COLUMNS, *NOTES),
            outputs={"source": IMAGE, "other": IMAGE},
            batch_size=64,
        )

    def build(self) -> StageCall:
        reader = _Reader(self.brought)

        def run(batch: Batch) -> Batch:
            rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
            answers = [reader.sides(row) for row in rows]
            made = {name: [a[name] if isinstance(a, dict) else None for a in answers] for name in ("source", "other")}
            return made | {"status": [a if isinstance(a, str) else None for a in answers]}

        return run


class _Reader(RowReader):
    def sides(self, row: dict[str, object]) -> dict[str, object] | str:
        """The cells of both images, or the status of a row that has none."""
        flaw = cast("str | None", row["flaw"])
        if flaw is not None:
            return f"drop:{flaw}" if flaw in DROPPED else error_status("source", RowError(flaw))
        found = self.at(cast(int, row["set_file"]), cast(int, row["set_row"]))
        if not isinstance(found, Comparison):
            raise self.changed()
        images = {"chosen": found.chosen, "rejected": found.rejected}
        source = images.pop(cast(str, row["source_side"]))
        (other,) = images.values()
        if [hashlib.sha256(image).hexdigest() for image in (source, other)] != [row["source_sha256"], row["other_sha256"]]:
            raise self.changed()
        try:
            check_images(found)
        except Unusable as why:
            return error_status("source", RowError(str(why)))
        return {"source": image_cell(source), "other": image_cell(other)}
