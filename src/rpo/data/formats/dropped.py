"""Rows that were dropped: how many by reason, and where the first of them are."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rpo.core.parquet import write_text

ROWS_KEPT = 100
"""Rows of a reason whose names are kept."""
_SHOWN = 3
REASONS_SHOWN = 6
"""Reasons that one line of a terminal, card or page names."""


def commonest(reasons: Mapping[str, int], most: int = REASONS_SHOWN) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """The most frequent reasons with their rows, and all others; equally frequent ones by the alphabet."""
    ordered = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    return ordered[:most], ordered[most:]


def others(rest: Sequence[tuple[str, int]]) -> str:
    """`and N other reasons for M`, to end a list of reasons; empty without any."""
    return f"and {len(rest)} other reasons for {sum(rows for _, rows in rest)}" if rest else ""


class Dropped(Mapping[str, int]):
    """The number of dropped rows by reason, in the order in which the reasons came up."""

    def __init__(self, counts: Mapping[str, int] | None = None, rows: Mapping[str, list[str]] | None = None) -> None:
        self._counts = dict(counts or {})
        self.rows: dict[str, list[str]] = {reason: list(names) for reason, names in (rows or {}).items()}
        """The first rows of each reason, by file and number."""
        self.notes: list[str] = []
        """What was left out beside whole rows."""

    def add(self, reason: str, row: str) -> None:
        self._counts[reason] = self._counts.get(reason, 0) + 1
        names = self.rows.setdefault(reason, [])
        if len(names) < ROWS_KEPT:
            names.append(row)

    def __getitem__(self, reason: str) -> int:
        return self._counts[reason]

    def __iter__(self) -> Iterator[str]:
        return iter(self._counts)

    def __len__(self) -> int:
        return len(self._counts)

    def reasons(self) -> str:
        """`reason: count` of all."""
        return ", ".join(f"{reason}: {count}" for reason, count in self._counts.items())

    def first(self) -> str:
        """The first row of every reason, at most three."""
        named = [f"{names[0]}: {reason}" for reason, names in self.rows.items()][:_SHOWN]
        return f"; for instance {'; '.join(named)}" if named else ""

    def write(self, path: Path) -> None:
        """A file with the first rows of every reason, whole or not at all."""
        reasons = {reason: {"rows": count, "first": self.rows.get(reason, [])} for reason, count in self._counts.items()}
        write_text(path, json.dumps({"dropped": reasons, "notes": self.notes}, indent=1, ensure_ascii=False) + "\n")
