"""What a stage is, and how the rows of a run are planned: fan-out happens once, here; afterwards rows never move."""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import pyarrow as pa

from rpo.core.terminal import printable
from rpo.errors import RowError

Batch = Mapping[str, Sequence[object]]
"""Columns of equal length by name."""

StageCall = Callable[[Batch], Batch]
"""One row out per row in, same order: the columns the stage declares, and if it likes `status` (None keeps the row)."""

PLAN = "plan"
OWN_COLUMNS = ("id", "status")
PLAN_COLUMNS = ("prompt", "seed")

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_PLAN_CHUNK_ROWS = 16_384


@dataclass(frozen=True, kw_only=True)
class StageSpec:
    """What the engine must know of a stage.

    All of it is part of the stage's fingerprint, as is the stage's own configuration; only fields named `workers`, `cpus`, `gpus`
    and `brought` (where a file lies whose rows the plan knows by content) are not.
    """

    name: str
    """Lower-case letters, digits and `_`; unique in a pipeline."""
    version: str
    """Raised when the stage's code changes its results."""
    inputs: tuple[str, ...]
    """Columns read: `id`, `prompt`, `seed`, other columns of the plan, or outputs of earlier stages."""
    outputs: Mapping[str, pa.DataType]
    """Columns added, with their Arrow types."""
    batch_size: int
    """Rows per call; batches are cut by row index inside a shard."""
    workers: int = 1
    """Threads, or processes of the Ray engine, each with its own callable."""
    cpus: float = 1.0
    """Share of logical CPUs of each worker; the Ray engine keeps to it."""
    gpus: float = 0.0
    """Share of a GPU of each worker; the Ray engine keeps to it, and shows no GPU to a worker without."""
    models: tuple[str, ...] = ()
    """Folders, files or hub ids of the models used; local ones count by their content."""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name) or self.name == PLAN:
            raise ValueError(f"stage name must match {_NAME.pattern} and not be {PLAN!r}, got {self.name!r}")
        for field in ("batch_size", "workers"):
            if getattr(self, field) < 1:
                raise ValueError(f"stage {self.name}: {field} must be at least 1, got {getattr(self, field)}")
        for field in ("cpus", "gpus"):
            if not 0 <= getattr(self, field) < math.inf:
                raise ValueError(f"stage {self.name}: {field} must be at least 0, got {getattr(self, field)}")
        taken = {*OWN_COLUMNS, *PLAN_COLUMNS} & self.outputs.keys()
        if taken:
            raise ValueError(f"stage {self.name}: outputs may not be named {sorted(taken)}; the plan and the engine write those")


@runtime_checkable
class Stage(Protocol):
    """A frozen configuration that knows its spec and builds the callable inside the worker that runs it."""

    @property
    def spec(self) -> StageSpec: ...

    def build(self) -> StageCall: ...


def error_status(stage: str, error: RowError) -> str:
    """The status of a row whose data was bad: `error:STAGE:REASON`, one line of at most 200 characters."""
    return f"error:{stage}:{' '.join(printable(str(error)).split()) or 'unknown'}"[:200]


def fan_out(prompts: Iterable[str], samples: int) -> Iterator[dict[str, object]]:
    """Rows for `plan`: every prompt `samples` times, told apart by a `sample` column (an `int32`)."""
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    for prompt in prompts:
        for sample in range(samples):
            yield {"prompt": prompt, "sample": sample}


def _json_bytes(value: object) -> str:
    if isinstance(value, bytes):
        return f"sha256:{hashlib.sha256(value).hexdigest()}"
    raise TypeError(f"a row cannot hold a {type(value).__name__}")


def row_id(row: Mapping[str, object]) -> str:
    """16 hexadecimal digits that depend on a row's content alone."""
    text = json.dumps(dict(row), sort_keys=True, separators=(",", ":"), allow_nan=False, default=_json_bytes)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def row_seed(seed: int, row: str) -> int:
    """A seed in [0, 2^63) from (run seed, row id)."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{row}".encode()).digest()[:8]) >> 1


NO_PART_OF_RESULTS = ("workers", "cpus", "gpus", "brought")
"""Fields of a stage's configuration that do not enter its fingerprint."""


def _planned_chunk(rows: list[Mapping[str, object]], ids: list[str], seed: int, schema: pa.Schema) -> pa.Table:
    values: dict[str, list[object]] = {"id": list(ids), "seed": [row_seed(seed, row) for row in ids]}
    arrays: list[pa.Array] = []
    for field in schema:
        column = values.get(field.name) or [row[field.name] for row in rows]
        try:
            arrays.append(pa.array(column, field.type))
        except (pa.ArrowException, TypeError, UnicodeEncodeError, OverflowError) as error:
            raise ValueError(f"column {field.name!r} of the plan must be {field.type}: {error}") from error
    return pa.table(arrays, schema=schema)


def plan(
    rows: Iterable[Mapping[str, object]],
    *,
    seed: int,
    columns: Mapping[str, pa.DataType | str] | None = None,
    notes: Mapping[str, pa.DataType | str] | None = None,
) -> pa.Table:
    """The rows of a run: `id`, `prompt`, `seed` and the caller's `columns` and `notes` (Arrow types or their names), in the order given.

    Each row must hold `prompt` and exactly the names in `columns` and `notes`. Ids are hashes of that content, `notes` left out, so
    equal rows are one row (the first stays); seeds come from (`seed`, id). Raises `ValueError` for a wrong row, a wrong type, or no rows.
    """
    extra = {**(columns or {}), **(notes or {})}
    if reserved := {*OWN_COLUMNS, *PLAN_COLUMNS} & extra.keys():
        raise ValueError(f"columns may not be named {sorted(reserved)}; the plan makes those")
    schema = pa.schema([("id", pa.string()), ("prompt", pa.string()), ("seed", pa.int64()), *extra.items()])
    expected = {"prompt", *extra}
    seen: set[int] = set()
    chunks: list[pa.Table] = []
    pending: list[Mapping[str, object]] = []
    ids: list[str] = []
    for number, row in enumerate(rows):
        if set(row) != expected or not isinstance(row["prompt"], str):
            raise ValueError(f"row {number} of the plan must hold {sorted(expected)} with a text as prompt, got {sorted(row)}")
        identity = row_id({name: value for name, value in row.items() if name not in (notes or {})})
        if int(identity, 16) in seen:
            continue
        seen.add(int(identity, 16))
        pending.append(row)
        ids.append(identity)
        if len(pending) == _PLAN_CHUNK_ROWS:
            chunks.append(_planned_chunk(pending, ids, seed, schema))
            pending, ids = [], []
    if pending:
        chunks.append(_planned_chunk(pending, ids, seed, schema))
    if not chunks:
        raise ValueError("rows is empty: a run needs at least one prompt")
    return pa.concat_tables(chunks)
