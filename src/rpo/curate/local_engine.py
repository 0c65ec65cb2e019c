"""Runs stages on one machine: each in its own threads, one shard behind the other, whole shards committed as they are ready.

What a row becomes does not depend on threads, timing or restarts: batches are cut by row index inside a shard, and a stage
reads what the stages before it committed. Stopping, by a signal or an error, loses at most the shards in hand.
"""

import json
import os
import re
import signal
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

import pyarrow as pa
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from rpo.curate.pipeline import Batch, Stage, StageCall, StageSpec
from rpo.curate.sidecars import (
    SECONDS_LOG,
    SHARD_ROWS,
    Layer,
    lay_out,
    prepare,
    read_joined,
    scan_shard,
    shard_sizes,
    write_layer_shard,
)
from rpo.data.run_folder import RunFolder
from rpo.errors import CapReached, Interrupted, RpoError

QUEUE_SHARDS = 8
"""How many shards a stage may be ahead of the next."""
GRACE_S = 5.0
"""After a stop: time to finish the shard in hand."""
LIMIT_S = 8.0
"""After a stop: time after which a batch that does not return is left behind."""

_STATUS = re.compile(r"(drop|error):[^\n]+")
_BUILDING = threading.Lock()
"""Model libraries import lazily and draw from global generators: only one stage is built at a time."""


@dataclass
class _Line:
    """One stage at work. Guarded by the board's condition, except `chain`, whose entries are written once by their shard's worker."""

    stage: Stage
    spec: StageSpec
    layer: Layer
    chain: list[str | None]
    """Per shard: the chain value once it is committed."""
    finished: list[bool]
    taken: int = 0
    """Shards below this index are done or in a worker's hands."""
    rows_done: int = 0


@dataclass
class _Board:
    """What the threads of a run share."""

    layers: tuple[Layer, ...]
    sizes: list[int]
    lines: list[_Line]
    plan_chain: list[str]
    changed: threading.Condition = field(default_factory=threading.Condition)
    deadline: float | None = None
    """Set by a stop: no new shard is taken, and those in hand are left at this time (monotonic seconds)."""
    error: BaseException | None = None
    where: str = ""

    def stop(self, grace_s: float = GRACE_S) -> None:
        with self.changed:
            if self.deadline is None or grace_s == 0:
                self.deadline = time.monotonic() + grace_s
            self.changed.notify_all()

    def fail(self, error: BaseException, where: str) -> None:
        with self.changed:
            if self.error is None:
                self.error, self.where = error, where
        self.stop()

    def out_of_time(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline

    def left_behind(self) -> bool:
        """True when the main thread no longer waits: the lock may be gone, so nothing is committed any more."""
        return self.deadline is not None and time.monotonic() >= self.deadline + LIMIT_S - GRACE_S

    def _may_take(self, position: int) -> bool:
        index = self.lines[position].taken
        ready = position == 0 or self.lines[position - 1].finished[index]
        return ready and (position + 1 == len(self.lines) or index < self.lines[position + 1].taken + QUEUE_SHARDS)

    def take(self, position: int) -> int | None:
        """The next shard that the stage must make, in index order, once its input is there; `None` when there is none left."""
        line = self.lines[position]
        with self.changed:
            while self.deadline is None and line.taken < len(self.sizes):
                if not self._may_take(position):
                    self.changed.wait()
                    continue
                index, line.taken = line.taken, line.taken + 1
                self.changed.notify_all()
                if not line.finished[index]:
                    return index
        return None

    def finish(self, position: int, index: int, chain: str) -> None:
        with self.changed:
            line = self.lines[position]
            line.chain[index], line.finished[index] = chain, True
            line.rows_done += self.sizes[index]
            self.changed.notify_all()


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


@dataclass
class _Worker:
    """One thread of one stage: its callable, and where it is."""

    board: _Board
    position: int
    call: StageCall | None = None
    seconds: float = 0.0
    where: str = ""

    def run(self) -> None:
        line = self.board.lines[self.position]
        self.where = f"stage {line.spec.name!r}"
        # Everything, because a thread has no caller: the main thread raises it again.
        try:
            while (index := self.board.take(self.position)) is not None:
                chain = self._make(line, index)
                if chain is None:
                    return
                self.board.finish(self.position, index, chain)
        except BaseException as error:
            self.board.fail(error, self.where)

    def _make(self, line: _Line, index: int) -> str | None:
        """Makes and commits one shard; `None` when the run was stopped before the shard was whole."""
        if self.call is None:
            self.where = f"stage {line.spec.name!r}, while it was built"
            with _BUILDING:
                self.call = line.stage.build()
        self.where = f"stage {line.spec.name!r}, shard {index:05d}"
        self.seconds = 0.0
        made = self._rows(line, index, self.call)
        if made is None or self.board.left_behind():
            return None
        before = self.board.lines[self.position - 1].chain if self.position else self.board.plan_chain
        upstream = before[index]
        assert upstream is not None
        chain = write_layer_shard(line.layer, index, made, upstream)
        _log_seconds(line.layer, index, made.num_rows, self.seconds)
        return chain

    def _rows(self, line: _Line, index: int, call: StageCall) -> pa.Table | None:
        spec = line.spec
        source = read_joined(self.board.layers[: self.position + 1], index, [name for name in spec.inputs if name != "id"])
        count = source.num_rows
        inputs = {name: source.column(name).to_pylist() for name in spec.inputs}
        live = [status is None for status in source.column("status").to_pylist()]
        made: dict[str, list[object]] = {name: [None] * count for name in (*spec.outputs, "status")}
        for start in range(0, count, spec.batch_size):
            if self.board.out_of_time():
                return None
            picked = [row for row in range(start, min(start + spec.batch_size, count)) if live[row]]
            if not picked:
                continue
            first = index * self.board.sizes[0]
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


def _log_seconds(layer: Layer, index: int, rows: int, seconds: float) -> None:
    line = json.dumps({"shard": index, "rows": rows, "seconds": round(seconds, 6)})
    descriptor = os.open(layer.folder / SECONDS_LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, f"\n{line}\n".encode())
    finally:
        os.close(descriptor)


@contextmanager
def _signals(received: list[int]) -> Generator[None, None, None]:
    """Collects SIGINT and SIGTERM while the block runs. In another than the main thread, signals stay the caller's."""

    def note(signum: int, frame: FrameType | None) -> None:
        received.append(signum)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.signal(signum, note) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


class _Display:
    """A bar per stage on a terminal; elsewhere one line when a stage is finished."""

    def __init__(self, console: Console, board: _Board) -> None:
        self.console, self.board, self.total = console, board, sum(board.sizes)
        columns = (TextColumn("{task.description:>12}"), BarColumn(), MofNCompleteColumn(), TextColumn("rows"), TimeElapsedColumn())
        self.bars = Progress(*columns, console=console, disable=not console.is_terminal)
        self.tasks: list[TaskID] = [self.bars.add_task(line.spec.name, total=self.total) for line in board.lines]
        self.told = [False] * len(board.lines)
        self.began = time.monotonic()

    def update(self) -> None:
        for position, line in enumerate(self.board.lines):
            self.bars.update(self.tasks[position], completed=line.rows_done)
            if line.rows_done == self.total and not self.told[position]:
                self.told[position] = True
                if not self.console.is_terminal:
                    self.console.print(f"{line.spec.name:>12}  {self.total} rows done after {time.monotonic() - self.began:.1f} s")


def _scan(layers: tuple[Layer, ...], stages: Sequence[Stage]) -> _Board:
    """What is done and what is to do, from the footers on disk."""
    sizes = shard_sizes(layers)
    lines: list[_Line] = []
    for stage, layer in zip(stages, layers[1:], strict=True):
        lines.append(_Line(stage=stage, spec=stage.spec, layer=layer, chain=[None] * len(sizes), finished=[False] * len(sizes)))
    board = _Board(layers=layers, sizes=sizes, lines=lines, plan_chain=[])
    for index, rows in enumerate(sizes):
        chain = scan_shard(layers, index, rows)
        board.plan_chain.append(chain[0])
        for line, value in zip(lines, chain[1:], strict=False):
            line.chain[index], line.finished[index] = value, True
            line.rows_done += rows
    return board


def _watch(board: _Board, threads: Sequence[threading.Thread], display: _Display, received: list[int], max_seconds: float | None) -> None:
    """Waits for the workers; after a stop no longer than the limit."""
    heard, began = 0, time.monotonic()
    while any(thread.is_alive() for thread in threads):
        if max_seconds is not None and board.deadline is None and time.monotonic() - began >= max_seconds:
            board.fail(CapReached(f"the {max_seconds:g} s of --max-time are over; what is done is kept, go on with --resume"), "stopped")
        if len(received) > heard:
            heard = len(received)
            board.stop(GRACE_S if heard == 1 else 0.0)
            if heard == 1:
                display.console.print(f"stopping: {GRACE_S:g} s to finish the shards in hand (again to stop at once)")
        if board.left_behind():
            return
        with board.changed:
            board.changed.wait(0.1)
        display.update()
    display.update()


def run_stages(
    run: RunFolder,
    rows: pa.Table,
    stages: Sequence[Stage],
    *,
    shard_rows: int = SHARD_ROWS,
    console: Console | None = None,
    max_seconds: float | None = None,
) -> None:
    """Makes every shard of every stage that is not yet on the disk; returns when all are.

    `rows` is what `plan` made. Raises `Interrupted` after SIGINT or SIGTERM, within about 8 seconds, with whole shards committed;
    `RpoError` when the folder holds another recipe's results, or for the first error that is not a row's own: it names stage, shard
    and rows, has the original as its cause, and a second call goes on from there. A callable that ignores a stop longer than
    that is left running in a daemon thread. After `max_seconds` it stops as after a signal, with `RpoError`.
    """
    layers = lay_out(run.path, rows, stages, shard_rows=shard_rows)
    prepare(run, rows, layers, shard_rows=shard_rows)
    board = _scan(layers, stages)
    received: list[int] = []
    display = _Display(console or Console(stderr=True), board)
    threads = [
        threading.Thread(target=_Worker(board, position).run, name=f"rpo-{line.spec.name}-{number}", daemon=True)
        for position, line in enumerate(board.lines)
        if not all(line.finished)
        for number in range(line.spec.workers)
    ]
    # A stage with nothing to do has no thread; what follows it must not wait for it to take its shards.
    for line in board.lines:
        if all(line.finished):
            line.taken = len(board.sizes)
    with _signals(received), display.bars:
        display.update()
        try:
            for thread in threads:
                thread.start()
            _watch(board, threads, display, received, max_seconds)
        except BaseException:
            board.stop(0.0)
            raise
    if board.error is not None:
        raise RpoError(f"{board.where}: {_told(board.error)}") from board.error
    if received:
        raise Interrupted(received[0])


def _told(error: BaseException) -> str:
    if isinstance(error, RpoError):
        return str(error)
    return f"{type(error).__name__}: {error}. Shards that were done are kept; mend the cause and run again with --resume."
