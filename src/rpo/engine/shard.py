"""One shard of one stage: read what it needs, call it batch by batch, hold the answer against its word, commit. Every engine does this.

What a row becomes does not depend on the engine: batches are cut by row index inside a shard.
"""

import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa

from rpo.core.records import SECONDS_LOG, append_line
from rpo.engine.layers import Layer, read_joined, write_layer_shard
from rpo.engine.stage import Batch, Stage, StageCall, StageSpec
from rpo.errors import RpoError, disk_error

Shares = Mapping[str, Mapping[str, float]]
"""By stage: `workers`, `cpus`, `gpus` in place of those its spec asks for."""

_STATUS = re.compile(r"(drop|error):[^\n]+")
_BUILDING = threading.Lock()
"""Model libraries import lazily and draw from global generators: in a process only one stage is built at a time."""


def shared_specs(stages: Sequence[Stage], shares: Shares) -> list[StageSpec]:
    """The stages' specs with the shares that were asked for. Raises `ValueError` for a share that there cannot be."""
    return [replace(stage.spec, **shares.get(stage.spec.name, {})) for stage in stages]


def _never() -> bool:
    return False


@dataclass
class ShardMaker:
    """A stage in the thread or process that runs it: its callable, and where it is."""

    stage: Stage
    spec: StageSpec
    layers: tuple[Layer, ...]
    """The plan and the stages up to this one, whose shards are made."""
    shard_rows: int
    call: StageCall | None = None
    where: str = ""
    seconds: float = 0.0

    def make(
        self, index: int, upstream: str, *, out_of_time: Callable[[], bool] = _never, left_behind: Callable[[], bool] = _never
    ) -> str | None:
        """Makes and commits one shard; its chain value, or `None` when the run was stopped before the shard was whole."""
        if self.call is None:
            self.where = f"stage {self.spec.name!r}, while it was built"
            with _BUILDING:
                self.call = self.stage.build()
        self.where = f"stage {self.spec.name!r}, shard {index:05d}"
        self.seconds = 0.0
        made = self._rows(index, self.call, out_of_time)
        if made is None or left_behind():
            return None
        chain = write_layer_shard(self.layers[-1], index, made, upstream)
        _log_seconds(self.layers[-1], index, made.num_rows, self.seconds)
        return chain

    def _rows(self, index: int, call: StageCall, out_of_time: Callable[[], bool]) -> pa.Table | None:
        spec = self.spec
        source = read_joined(self.layers[:-1], index, [name for name in spec.inputs if name != "id"])
        count = source.num_rows
        inputs = {name: source.column(name).to_pylist() for name in spec.inputs}
        live = [status is None for status in source.column("status").to_pylist()]
        made: dict[str, list[object]] = {name: [None] * count for name in (*spec.outputs, "status")}
        for start in range(0, count, spec.batch_size):
            if out_of_time():
                return None
            picked = [row for row in range(start, min(start + spec.batch_size, count)) if live[row]]
            if not picked:
                continue
            first = index * self.shard_rows
            self.where = f"stage {spec.name!r}, shard {index:05d}, rows {first + picked[0]} to {first + picked[-1]}"
            began = time.perf_counter()
            answer = call({name: [values[row] for row in picked] for name, values in inputs.items()})
            self.seconds += time.perf_counter() - began
            for name, values in _checked(spec, answer, len(picked)).items():
                for row, value in zip(picked, values, strict=True):
                    made[name][row] = value
        columns = {name: _array(spec, name, made[name], kind) for name, kind in spec.outputs.items()}
        ids = source.column("id").combine_chunks()
        return pa.table({"id": ids, **columns, "status": _array(spec, "status", made["status"], pa.string())})


def _checked(spec: StageSpec, given: Batch, rows: int) -> Batch:
    """The answer of a stage, held against what it declared."""
    names = set(given)
    assert names - {"status"} == set(spec.outputs), f"stage {spec.name} must return {sorted(spec.outputs)}, returned {sorted(names)}"
    for name, values in given.items():
        assert len(values) == rows, f"stage {spec.name} must return {rows} rows, returned {len(values)} of {name!r}"
    for status in given.get("status", ()):
        legal = status is None or (isinstance(status, str) and _STATUS.fullmatch(status))
        assert legal, f"stage {spec.name}: a status is None, 'drop:REASON' or 'error:STAGE:REASON', got {status!r}"
    return given


def _array(spec: StageSpec, name: str, values: list[object], kind: pa.DataType) -> pa.Array:
    try:
        return pa.array(values, kind)
    except (pa.ArrowException, TypeError, UnicodeEncodeError, OverflowError) as error:
        raise AssertionError(f"stage {spec.name} declares {name!r} as {kind}, and returned something else: {error}") from error


def _log_seconds(layer: Layer, index: int, rows: int, seconds: float) -> None:
    append_line(layer.folder / SECONDS_LOG, {"shard": index, "rows": rows, "seconds": round(seconds, 6)})


def told(error: BaseException) -> str:
    """What stopped a stage, and how to go on."""
    if isinstance(error, RpoError):
        return str(error)
    if getattr(error, "filename", None) and (line := disk_error(error)):
        return line
    return f"{type(error).__name__}: {error}. Shards that were done are kept; mend the cause and run again with --resume."
