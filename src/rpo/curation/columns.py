"""Columns of a batch as what they hold, and back."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np

from rpo.data.images import decode_cell, encode_png, image_cell
from rpo.engine.stage import error_status
from rpo.errors import RowError


def images(cells: Sequence[object]) -> list[np.ndarray]:
    return [decode_cell(cast(Any, cell)) for cell in cells]


def cells(arrays: Sequence[np.ndarray]) -> list[object]:
    return [image_cell(encode_png(image)) for image in arrays]


def texts(values: Sequence[object]) -> list[str]:
    return cast(list[str], list(values))


def seeds(values: Sequence[object]) -> list[int]:
    return cast(list[int], list(values))


def first_errors(
    stage: str, columns: Mapping[str, Sequence[float | RowError]], rows: int
) -> tuple[list[str | None], dict[str, list[float | None]]]:
    """(status of each row: its first error or number that is none; the columns, with null in such places)."""
    status: list[str | None] = [None] * rows
    clean: dict[str, list[float | None]] = {}
    for name, values in columns.items():
        clean[name] = []
        for row, value in enumerate(values):
            if not isinstance(value, RowError) and not math.isfinite(value):
                value = RowError(f"{name} is {value}")
            if isinstance(value, RowError):
                status[row] = status[row] or error_status(stage, value)
                clean[name].append(None)
            else:
                clean[name].append(value)
    return status, clean


def raw_answers(answers: Sequence[object]) -> list[str | None]:
    """What could not be read, of rows that ended in an error for that."""
    return [answer.raw or None if isinstance(answer, RowError) else None for answer in answers]


def score_column(reward: str, side: str) -> str:
    return f"{reward}_{side}"
