"""What a page is made of: the files of a run folder, whichever are there."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rpo.data.pairs import Pair, read_pairs
from rpo.errors import RpoError
from rpo.evaluate.rows import Row, read_rows

RECIPE_CHARACTERS_MAX = 100_000


@dataclass(frozen=True, kw_only=True)
class RunData:
    """A run as it lies on disk; what was not run is empty."""

    folder: Path
    summary: Mapping[str, Any]
    recipe: str
    """`recipe.json` as text."""
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
    def evaluation(self) -> Path:
        return self.folder / "evaluation"


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise RpoError(f"{path} is damaged ({error}). Run the part that wrote it again.") from error


def _object(path: Path) -> dict[str, Any]:
    text = _text(path)
    try:
        value = json.loads(text) if text is not None else {}
    except ValueError as error:
        raise RpoError(f"{path} is damaged ({error}). Run the part that wrote it again.") from error
    if not isinstance(value, dict):
        raise RpoError(f"{path} must hold a JSON object, found {type(value).__name__}. Run the part that wrote it again.")
    return value


def _lines(path: Path) -> list[Mapping[str, Any]]:
    """JSON lines; a last line that a killed trainer left half written is passed over."""
    lines = (_text(path) or "").splitlines()
    values: list[Mapping[str, Any]] = []
    for i, line in enumerate(lines, start=1):
        try:
            values.append(json.loads(line))
        except ValueError as error:
            if i < len(lines):
                raise RpoError(f"{path} line {i} is damaged ({error}). Remove that line and make the report again.") from error
    return values


def read_run(folder: Path) -> RunData:
    """Reads a run folder. Raises `RpoError` when it is none, holds nothing to report on, or one of its files is damaged."""
    if not folder.is_dir():
        raise RpoError(f"there is no run folder {folder}. Make one with `rpo run`, or name another.")
    recipe = _object(folder / "recipe.json")
    text = json.dumps(recipe, indent=2, ensure_ascii=False) if recipe else ""
    pairs = folder / "pairs.parquet"
    data = RunData(
        folder=folder,
        summary=_object(folder / "summary.json"),
        recipe=text if len(text) <= RECIPE_CHARACTERS_MAX else text[:RECIPE_CHARACTERS_MAX] + "\n… cut here; see recipe.json",
        pairs=read_pairs(pairs) if pairs.exists() else [],
        steps=_lines(folder / "train" / "metrics.jsonl"),
        rows=read_rows(folder / "evaluation"),
    )
    if not (data.summary or data.pairs or data.steps or data.rows):
        raise RpoError(f"{folder} holds nothing to report on yet. Run `rpo run` or `rpo curate` into it first.")
    return data
