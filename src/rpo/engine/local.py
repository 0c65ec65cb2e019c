"""Runs stages on one machine: each in its own threads, one shard behind the other, whole shards committed as they are ready.

What a row becomes does not depend on threads, timing or restarts: batches are cut by row index inside a shard, and a stage
reads what the stages before it committed. Stopping, by a signal or an error, loses at most the shards in hand.
"""

import gc
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import pyarrow as pa
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from rpo.core.run_folder import RunFolder
from rpo.core.signals import signals_to
from rpo.core.terminal import Terminal
from rpo.engine.layers import SHARD_ROWS, Layer, lay_out, prepare, scan_shard, shard_sizes
from rpo.engine.shard import ShardMaker, Shares, shared_specs, told
from rpo.engine.stage import Stage, StageSpec
from rpo.errors import CapReached, Interrupted, RpoError

QUEUE_SHARDS = 8
"""How many shards a stage may be ahead of the next."""
GRACE_S = 5.0
"""After a stop: time to finish the shard in hand."""
LIMIT_S = 8.0
"""After a stop: time after which a batch that does not return is left behind."""


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
    shards_ahead: int
    """How many shards a stage may be ahead of the next."""
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
        return ready and (position + 1 == len(self.lines) or index < self.lines[position + 1].taken + self.shards_ahead)

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


@dataclass
class _Worker:
    """One thread of one stage."""

    board: _Board
    position: int
    maker: ShardMaker

    def run(self) -> None:
        board, position = self.board, self.position
        # Everything, because a thread has no caller: the main thread raises it again.
        try:
            while (index := board.take(position)) is not None:
                before = board.lines[position - 1].chain if position else board.plan_chain
                upstream = before[index]
                assert upstream is not None
                chain = self.maker.make(index, upstream, out_of_time=board.out_of_time, left_behind=board.left_behind)
                if chain is None:
                    return
                board.finish(position, index, chain)
        except BaseException as error:
            board.fail(error, self.maker.where or f"stage {self.maker.spec.name!r}")


class _Display:
    """A bar per stage on a terminal; elsewhere one line when a stage is finished."""

    def __init__(self, console: Console, board: _Board) -> None:
        self.console, self.board, self.total = console, board, sum(board.sizes)
        name = TextColumn("{task.description:>12}", markup=False)
        columns = (name, BarColumn(), MofNCompleteColumn(), TextColumn("rows"), TimeElapsedColumn())
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


def _scan(layers: tuple[Layer, ...], stages: Sequence[Stage], specs: Sequence[StageSpec], *, stage_by_stage: bool) -> _Board:
    """What is done and what is to do, from the footers on disk."""
    sizes = shard_sizes(layers)
    lines: list[_Line] = []
    for stage, spec, layer in zip(stages, specs, layers[1:], strict=True):
        lines.append(_Line(stage=stage, spec=spec, layer=layer, chain=[None] * len(sizes), finished=[False] * len(sizes)))
    board = _Board(layers=layers, sizes=sizes, lines=lines, plan_chain=[], shards_ahead=len(sizes) if stage_by_stage else QUEUE_SHARDS)
    for index, rows in enumerate(sizes):
        chain = scan_shard(layers, index, rows)
        board.plan_chain.append(chain[0])
        for line, value in zip(lines, chain[1:], strict=False):
            line.chain[index], line.finished[index] = value, True
            line.rows_done += rows
    # A stage with nothing to do has no thread; what follows it must not wait for it to take its shards.
    for line in lines:
        if all(line.finished):
            line.taken = len(sizes)
    return board


def _threads(board: _Board, positions: Sequence[int], shard_rows: int) -> list[threading.Thread]:
    threads: list[threading.Thread] = []
    for position in positions:
        line = board.lines[position]
        for number in range(0 if all(line.finished) else line.spec.workers):
            maker = ShardMaker(stage=line.stage, spec=line.spec, layers=board.layers[: position + 2], shard_rows=shard_rows)
            worker = _Worker(board=board, position=position, maker=maker)
            threads.append(threading.Thread(target=worker.run, name=f"rpo-{line.spec.name}-{number}", daemon=True))
    return threads


def _watch(board: _Board, threads: Sequence[threading.Thread], display: _Display, received: list[int], ends: float | None) -> None:
    """Waits for the workers; after a stop no longer than the limit. At the time `ends` (monotonic seconds) it stops them."""
    heard = 0
    while any(thread.is_alive() for thread in threads):
        if ends is not None and board.deadline is None and time.monotonic() >= ends:
            board.fail(CapReached("the time of --max-time is over; what is done is kept, go on with --resume"), "stopped")
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
    shares: Shares | None = None,
    stage_by_stage: bool = False,
    max_seconds: float | None = None,
) -> None:
    """Makes every shard of every stage that is not yet on the disk; returns when all are.

    `rows` is what `plan` made. Stages overlap, or with `stage_by_stage` each makes all its shards, alone in memory, before the next
    is built. Raises `Interrupted` after SIGINT or SIGTERM, within about 8 seconds, with whole shards committed; `RpoError` when the
    folder holds another recipe's results, or for the first error that is not a row's own: it names stage, shard and rows, has the
    original as its cause, and a second call goes on from there. A callable that ignores a stop longer than that is left running in
    a daemon thread.
    """
    specs = shared_specs(stages, shares or {})
    layers = lay_out(run.path, rows, stages, shard_rows=shard_rows)
    prepare(run, rows, layers, shard_rows=shard_rows)
    board = _scan(layers, stages, specs, stage_by_stage=stage_by_stage)
    received: list[int] = []
    display = _Display(console or Terminal(stderr=True), board)
    every = list(range(len(stages)))
    ends = None if max_seconds is None else time.monotonic() + max_seconds
    with signals_to(received.append), display.bars:
        display.update()
        try:
            for positions in [[position] for position in every] if stage_by_stage else [every]:
                threads = _threads(board, positions, shard_rows)
                for thread in threads:
                    thread.start()
                _watch(board, threads, display, received, ends)
                gc.collect()  # a model may hold itself in a cycle, and the next one wants its memory
                if board.deadline is not None:
                    break
        except BaseException:
            board.stop(0.0)
            raise
    if board.error is not None:
        raise RpoError(f"{board.where}: {told(board.error)}") from board.error
    if received:
        raise Interrupted(received[0])
