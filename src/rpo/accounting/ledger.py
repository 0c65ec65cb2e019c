"""Ledger of requests to remote models: one sealed row per HTTP attempt in SQLite, which several processes may write and any may die."""

import hashlib
import json
import math
import sqlite3
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rpo.errors import CapReached, RpoError

LEDGER = "ledger.sqlite"
ANSWERS = "answers.sqlite"

MAYBE_BILLED = "it may be billed"
"""Stands in the outcome of an attempt that the server may have worked for, although no answer came back."""

_ATTEMPTS = (
    "CREATE TABLE attempts (number INTEGER PRIMARY KEY, purpose TEXT NOT NULL, model TEXT NOT NULL, question TEXT NOT NULL, "
    "began REAL NOT NULL, seconds REAL, outcome TEXT, input_tokens INTEGER, output_tokens INTEGER, cost REAL{})"
)
_TOTAL = "CREATE TABLE total (only_row INTEGER PRIMARY KEY CHECK (only_row = 0), calls INTEGER NOT NULL, cost REAL NOT NULL)"
_TABLES = (_ATTEMPTS.format(", seal TEXT NOT NULL"), _TOTAL)
_UNSEALED_TABLES = (_ATTEMPTS.format(""), _TOTAL)


@dataclass(frozen=True, kw_only=True)
class Account:
    """Where a run writes what it asked and was answered, and how much it may spend in all, over every time it is resumed."""

    ledger: Path
    """SQLite file of the attempts."""
    answers: Path
    """SQLite file of the answers; runs may share it."""
    max_cost: float | None = None
    """US dollars; requests that are under way when it is reached are still paid for."""
    max_calls: int | None = None
    """HTTP attempts, failed ones included."""


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What one stage asked for."""

    purpose: str
    model: str
    calls: int
    answered: int
    """Calls that brought an answer, usable or not."""
    maybe_billed: int = 0
    """Calls without an answer that a server may bill all the same; in no sum."""
    input_tokens: int
    output_tokens: int
    cost: float
    seconds: float
    """Summed over the calls, which run at the same time."""


@contextmanager
def explained(path: Path | None) -> Generator[None, None, None]:
    """Turns what SQLite complains of into an `RpoError` that names the file."""
    try:
        yield
    except (sqlite3.Error, UnicodeError, OverflowError) as error:  # a flipped bit may also spoil a text or a number
        raise RpoError(
            f"{path}: {error}. If the disk is full, make room; if the file is damaged, remove it. Then go on with --resume."
        ) from error


def damaged_record(path: Path | None, what: str) -> RpoError:
    return RpoError(f"{path} is damaged: {what}. Put a copy of it back, or remove it; then go on with --resume.")


def seal(record: Sequence[object]) -> str:
    """sha256 of a record's values: SQLite itself does not notice a flipped bit."""
    return hashlib.sha256(json.dumps(record, default=repr).encode()).hexdigest()


def _shape(statement: str) -> str:
    return " ".join(statement.replace("IF NOT EXISTS ", "").split()).replace("( ", "(").replace(" )", ")")


def open_database(
    path: Path | None,
    tables: Sequence[str],
    unsealed: Sequence[str],
    upgrade: Callable[[sqlite3.Connection], None],
    check: Callable[[sqlite3.Connection], None],
) -> sqlite3.Connection:
    """A database file (in memory without one) that survives a killed process and bears several writers; used by one thread at a time.

    The file holds exactly `tables`; one of an earlier version, which holds `unsealed`, is brought to them by `upgrade`, and any
    other is refused before anything in it can run. `check` raises `RpoError` for records that are not what was written.
    """
    if path is not None and path.exists() and not path.is_file():
        raise RpoError(f"{path} is no file; give another, or remove it. Then go on with --resume.")
    if path is not None and path.exists() and not path.stat().st_size and time.time() - path.stat().st_mtime > _BORN_S:
        raise damaged_record(path, "it is empty")
    with explained(path):
        connection = sqlite3.connect(path or ":memory:", isolation_level=None, timeout=30.0, check_same_thread=False)
        try:
            connection.execute("PRAGMA trusted_schema=OFF")
            connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _VALUE_BYTES_MAX)
            _check_tables(connection, path, tables, unsealed)
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")
            with transaction(connection):
                if (held := _check_tables(connection, path, tables, unsealed)) != set(map(_shape, tables)):
                    upgrade(connection) if held else [connection.execute(table) for table in tables]
            with transaction(connection, "DEFERRED"):
                check(connection)
        except BaseException:
            connection.close()
            raise
        return connection


_VALUE_BYTES_MAX = 8_000_000
_BORN_S = 30.0
"""A file may be empty for so long: another process is making it."""


def _check_tables(connection: sqlite3.Connection, path: Path | None, *known: Sequence[str]) -> set[str]:
    """The statements that made what is in the file; none of a new one."""
    found = connection.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
    held = {_shape(statement) for (statement,) in found}
    if held and held not in [set(map(_shape, tables)) for tables in known]:
        raise RpoError(
            f"{path} is damaged, or a database of another program or version; give another file, or remove it. Then go on with --resume."
        )
    return held


@contextmanager
def transaction(connection: sqlite3.Connection, kind: str = "IMMEDIATE") -> Generator[None, None, None]:
    connection.execute(f"BEGIN {kind}")
    try:
        yield
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


_ATTEMPT = "number, purpose, model, question, began, seconds, outcome, input_tokens, output_tokens, cost"
_INSERT = f"INSERT OR REPLACE INTO attempts ({_ATTEMPT}, seal) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"


def _upgrade(connection: sqlite3.Connection) -> None:
    attempts = connection.execute(f"SELECT {_ATTEMPT} FROM attempts ORDER BY number").fetchall()
    connection.execute("DROP TABLE attempts")
    connection.execute(_TABLES[0])
    connection.executemany(_INSERT, [(*attempt, seal(attempt)) for attempt in attempts])


def _check(path: Path | None, connection: sqlite3.Connection) -> None:
    """Every attempt is what was written, and the total that of all attempts."""
    calls, cost = 0, 0.0
    for *attempt, sealed in connection.execute(f"SELECT {_ATTEMPT}, seal FROM attempts ORDER BY number"):
        if seal(attempt) != sealed:
            raise damaged_record(path, f"attempt {attempt[0]} is not what was written")
        calls, cost = calls + 1, cost + (attempt[-1] or 0.0)
    total = connection.execute("SELECT calls, cost FROM total").fetchall() or [(0, 0.0)]
    if total[0][0] != calls or not math.isclose(total[0][1], cost, rel_tol=1e-6, abs_tol=1e-9):
        raise damaged_record(path, f"it counts {total[0][0]} attempts for ${total[0][1]} and holds {calls} for ${cost}")


def _open(path: Path | None) -> sqlite3.Connection:
    connection = open_database(path, _TABLES, _UNSEALED_TABLES, _upgrade, partial(_check, path))
    with explained(path):
        connection.execute("INSERT OR IGNORE INTO total VALUES (0, 0, 0.0)")
    return connection


class Ledger:
    """For one thread at a time. An attempt is written before it is sent, so that one whose answer never came is counted too."""

    def __init__(self, account: Account | None) -> None:
        self._account = account
        self._path = account and account.ledger
        self._connection = _open(self._path)

    def begin(self, purpose: str, model: str, question: str) -> int:
        """Enters an attempt that is about to be sent; its number. Raises `CapReached` when a cap says no."""
        with explained(self._path), transaction(self._connection):
            self._hold_caps()
            self._connection.execute("UPDATE total SET calls = calls + 1")
            (number,) = self._connection.execute("SELECT coalesce(max(number), 0) + 1 FROM attempts").fetchone()
            self._write((number, purpose, model, question, time.time(), None, None, None, None, None))
        return number

    def end(self, number: int, outcome: str, seconds: float, input_tokens: int = 0, output_tokens: int = 0, cost: float = 0.0) -> None:
        """Enters how an attempt ended."""
        with explained(self._path), transaction(self._connection):
            self._connection.execute("UPDATE total SET cost = cost + ?", (cost,))
            query = "SELECT number, purpose, model, question, began FROM attempts WHERE number = ?"
            begun = self._connection.execute(query, (number,)).fetchone()
            self._write((*begun, float(seconds), outcome, input_tokens, output_tokens, float(cost)))

    def _write(self, attempt: Sequence[object]) -> None:
        self._connection.execute(_INSERT, (*attempt, seal(attempt)))

    def _hold_caps(self) -> None:
        account = self._account
        if account is None or (account.max_cost is None and account.max_calls is None):
            return
        calls, cost = self._connection.execute("SELECT calls, cost FROM total").fetchone()
        if account.max_calls is not None and calls >= account.max_calls:
            raise CapReached(f"{calls} calls are made, and --max-calls is {account.max_calls}. {_GO_ON}")
        if account.max_cost is not None and cost >= account.max_cost:
            raise CapReached(f"${cost:.4f} is spent, and --max-cost is ${account.max_cost:.4f}. {_GO_ON}")

    def close(self) -> None:
        self._connection.close()


_GO_ON = "What is done is kept and will not be paid for again; go on with --resume and a higher cap."


def spent(ledger: Path) -> list[Spent]:
    """The sums of a ledger by purpose and model; none without a ledger."""
    if not ledger.exists():
        return []
    query = (
        "SELECT purpose, model, count(*), count(*) FILTER (WHERE outcome = 'answered'), "
        "count(*) FILTER (WHERE outcome IS NULL OR instr(outcome, ?)), coalesce(sum(input_tokens), 0), "
        "coalesce(sum(output_tokens), 0), coalesce(sum(cost), 0.0), coalesce(sum(seconds), 0.0) FROM attempts GROUP BY purpose, model "
        "ORDER BY min(number)"
    )
    names = ("purpose", "model", "calls", "answered", "maybe_billed", "input_tokens", "output_tokens", "cost", "seconds")
    with explained(ledger), closing(_open(ledger)) as connection:
        return [Spent(**dict(zip(names, row, strict=True))) for row in connection.execute(query, (MAYBE_BILLED,))]
