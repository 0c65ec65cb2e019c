"""What a page is made of: the files of a run folder, whichever are there."""

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rpo.core.records import read_lines, read_record
from rpo.data.pairs import Pair, read_pairs
from rpo.errors import RpoError
from rpo.evaluation.judges import headline_of
from rpo.evaluation.rows import Row, read_rows

RECIPE_CHARACTERS_MAX = 100_000


@dataclass(frozen=True, kw_only=True)
class RunData:
    """A run as it lies on disk; what was not run is empty."""

    folder: Path
    summary: Mapping[str, Any]
    recipe: str
    """`recipe.json` as text."""
    record: Mapping[str, Any]
    """`recipe.json` as values."""
    pairs: list[Pair]
    steps: list[Mapping[str, Any]]
    """Lines of `train/metrics.jsonl`."""
    rows: Mapping[str, list[Row]]
    """What the judges measured, by model."""

    @property
    def compared(self) -> tuple[str, str] | None:
        """The model that the others are compared with, and `tuned` or else the first other; `None` where nothing was compared."""
        first, *others = self.rows or [""]
        return (first, "tuned" if "tuned" in others else others[0]) if others else None

    @property
    def numbers(self) -> Mapping[str, Mapping[str, Any]]:
        """What is known of each metric of the compared model."""
        comparisons: Mapping[str, Any] = self.summary.get("comparisons", {})
        shown = self.compared[1] if self.compared else ""
        return comparisons.get(shown) or self.summary.get("evaluation", {})

    @property
    def headline(self) -> str:
        """The metric that the run is judged by; of a run of an older version the first that is evidence."""
        named = str(self.summary.get("headline", ""))
        return named if named in self.numbers else headline_of(named, self.numbers)

    @property
    def evaluation(self) -> Path:
        return self.folder / "evaluation"


_AGAIN = "Remove it, and run the part that wrote it again with --resume."


def _lines(path: Path) -> list[Mapping[str, Any]]:
    """Lines of a log; of a last line that a killed trainer left half written it is said that it is left out."""
    lines, damaged = read_lines(path)
    if damaged and (len(damaged) > 1 or damaged[0] <= len(lines)):
        raise RpoError(f"{path} line {damaged[0]} is damaged. Remove that line and make the report again.")
    if damaged:
        warnings.warn(f"{path}: line {damaged[0]}, the last, is cut and is left out", stacklevel=2)
    return [*lines]


def read_run(folder: Path) -> RunData:
    """Reads a run folder. Raises `RpoError` when it is none, holds nothing to report on, or one of its files is damaged."""
    if not folder.is_dir():
        raise RpoError(f"there is no run folder {folder}. Make one with `rpo run`, or name another.")
    recipe = read_record(folder / "recipe.json", _AGAIN) or {}
    text = json.dumps(recipe, indent=2, ensure_ascii=False) if recipe else ""
    pairs = folder / "pairs.parquet"
    data = RunData(
        folder=folder,
        summary=read_record(folder / "summary.json", _AGAIN) or {},
        recipe=text if len(text) <= RECIPE_CHARACTERS_MAX else text[:RECIPE_CHARACTERS_MAX] + "\n… cut here; see recipe.json",
        record=recipe,
        pairs=read_pairs(pairs) if pairs.exists() else [],
        steps=_lines(folder / "train" / "metrics.jsonl"),
        rows=read_rows(folder / "evaluation"),
    )
    if not (data.summary or data.pairs or data.steps or data.rows):
        raise RpoError(f"{folder} holds nothing to report on yet. Run `rpo run` or `rpo curate` into it first.")
    return data
