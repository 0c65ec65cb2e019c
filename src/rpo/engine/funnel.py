"""How many rows each stage received, kept and dropped, and why: a count over the status columns of a run folder."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypedDict

from rpo.core.parquet import read_shard, shard_path
from rpo.core.records import SECONDS_LOG, read_lines
from rpo.data.formats.dropped import commonest, others
from rpo.engine.layers import scan_shard, shard_sizes, stored_layers
from rpo.errors import UNANSWERED

REASONS_MAX = 100
"""Reasons of one stage that are told apart: a server may refuse each row with words of its own."""
_REASON_MAX = 160
"""Characters of a reason in a line."""


class FunnelStage(TypedDict):
    """One stage's line of the funnel; `rows_in` is `kept` plus the sum of `dropped`."""

    stage: str
    rows_in: int
    kept: int
    dropped: dict[str, int]


def drops(folder: Path) -> Iterator[list[tuple[int, str | None]]]:
    """Shard by shard, for each row: in how many stages of the run it lived, and the status that ended it (`None` = it lives).

    Of an unfinished run, as far as the shard is done. Raises `RpoError` on damaged shards.
    """
    layers = stored_layers(folder)
    for index, rows in enumerate(shard_sizes(layers)):
        done = len(scan_shard(layers, index, rows))
        ends: list[tuple[int, str | None]] = [(done, None)] * rows
        for position in range(done):
            statuses: list[str | None] = read_shard(shard_path(layers[position].folder, index), ["status"]).column(0).to_pylist()
            for row, status in enumerate(statuses):
                if ends[row][1] is None and status is not None:
                    ends[row] = (position, status)
        yield ends


def funnel(folder: Path) -> list[FunnelStage]:
    """The stages of a run folder in order, the plan left out; of an unfinished run, the shards that are done.

    A reason is a status without its `drop:`; errors keep theirs (`error:critique:…`). Behind the first 100 of a stage, the rest
    are summed up as other reasons. Raises `RpoError` on damaged shards.
    """
    layers = stored_layers(folder)
    rows_in, dropped = [0] * len(layers), [Counter[str]() for _ in layers]
    for position, status in (end for shard in drops(folder) for end in shard):
        for passed in range(position):
            rows_in[passed] += 1
        if status is not None:
            rows_in[position] += 1
            dropped[position][status.removeprefix("drop:")] += 1
    return [
        FunnelStage(stage=layer.name, rows_in=count, kept=count - reasons.total(), dropped=_summed_up(layer.name, reasons))
        for layer, count, reasons in zip(layers[1:], rows_in[1:], dropped[1:], strict=True)
    ]


def _summed_up(stage: str, reasons: Counter[str]) -> dict[str, int]:
    """The reasons by the alphabet, the rare ones of many as one per kind: rows that are asked again, other errors, drops."""
    named, rest = commonest(reasons, REASONS_MAX)
    told = Counter(dict(named))
    for reason, rows in rest:
        error = f"error:{stage}:"
        kind = f"{error}{UNANSWERED}" if reason.startswith(error + UNANSWERED) else error if reason.startswith(error) else ""
        told[f"{kind}other reasons"] += rows
    return dict(sorted(told.items()))


def stage_seconds(folder: Path) -> dict[str, float]:
    """Seconds spent in each stage's callable for the shards that are there, over all runs that made them (the last, if made twice)."""
    seconds: dict[str, float] = {}
    for layer in stored_layers(folder)[1:]:
        shards: dict[int, float] = {}
        for entry in read_lines(layer.folder / SECONDS_LOG)[0]:  # a line that a kill cut short is of a shard that was made again
            with suppress(KeyError, TypeError, ValueError):
                shards[entry["shard"]] = float(entry["seconds"])
        seconds[layer.name] = sum(shards.values())
    return seconds


def funnel_lines(stages: Sequence[FunnelStage], seconds: dict[str, float] | None = None) -> list[str]:
    """One printable line per stage: rows in, kept, dropped and why, and the seconds when given."""
    width = max((len(stage["stage"]) for stage in stages), default=0)
    lines: list[str] = []
    for stage in stages:
        named, rest = commonest(stage["dropped"])
        reasons = ", ".join([*(f"{_cut(reason)} {count}" for reason, count in named), *([others(rest)] if rest else [])])
        time = f"  {seconds[stage['stage']]:8.1f} s" if seconds and stage["stage"] in seconds else ""
        dropped = f"  dropped {sum(stage['dropped'].values())}: {reasons}" if reasons else ""
        lines.append(f"{stage['stage']:>{width}}  in {stage['rows_in']:>6}  kept {stage['kept']:>6}{time}{dropped}")
    return lines


def _cut(reason: str) -> str:
    return reason if len(reason) <= _REASON_MAX else f"{reason[: _REASON_MAX - 1]}\N{HORIZONTAL ELLIPSIS}"
