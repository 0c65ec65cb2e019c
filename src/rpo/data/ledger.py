"""What was asked of servers and what it cost: one row per HTTP attempt, in SQLite, so that several processes may write and any may die."""

import sqlite3
import time
from collections.abc import Generator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from rpo.errors import CapReached, RpoError

LEDGER = "ledger.sqlite"
ANSWERS = "answers.sqlite"

_TABLES = """
CREATE TABLE IF NOT EXISTS attempts (
  number INTEGER PRIMARY KEY, purpose TEXT NOT NULL, model TEXT NOT NULL, question TEXT NOT NULL, began REAL NOT NULL,
  seconds REAL, outcome TEXT, input_tokens INTEGER, output_tokens INTEGER, cost REAL);
CREATE TABLE IF NOT EXISTS total (only_row INTEGER PRIMARY KEY CHECK (only_row = 0), calls INTEGER NOT NULL, cost REAL NOT NULL);
INSERT OR IGNORE INTO total VALUES (0, 0, 0.0);
"""


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
    """Calls that brought an answer."""
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
    except sqlite3.Error as error:
        raise RpoError(
            f"{path}: {error}. If the disk is full, make room; if the file is damaged, remove it. Then go on with --resume."
        ) from error


def open_database(path: Path | None, tables: str) -> sqlite3.Connection:
    """A database file (in memory without one) that survives a killed process and bears several writers; used by one thread at a time."""
    with explained(path):
        connection = sqlite3.connect(path or ":memory:", isolation_level=None, timeout=30.0, check_same_thread=False)
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")
        connection.executescript(tables)
        return connection


class Ledger:
    """For one thread at a time. An attempt is written before it is sent, so that one whose answer never came is counted too."""

    def __init__(self, account: Account | None) -> None:
        self._account = account
        self._path = account and account.ledger
        self._connection = open_database(self._path, _TABLES)

    def begin(self, purpose: str, model: str, question: str) -> int:
        """Enters an attempt that is about to be sent; its number. Raises `CapReached` when a cap says no."""
        with explained(self._path):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                self._hold_caps()
                self._connection.execute("UPDATE total SET calls = calls + 1")
                row = (purpose, model, question, time.time())
                cursor = self._connection.execute("INSERT INTO attempts (purpose, model, question, began) VALUES (?, ?, ?, ?)", row)
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    def end(self, number: int, outcome: str, seconds: float, input_tokens: int = 0, output_tokens: int = 0, cost: float = 0.0) -> None:
        """What became of an attempt."""
        with explained(self._path):
            self._connection.execute("BEGIN IMMEDIATE")
            self._connection.execute("UPDATE total SET cost = cost + ?", (cost,))
            self._connection.execute(
                "UPDATE attempts SET outcome = ?, seconds = ?, input_tokens = ?, output_tokens = ?, cost = ? WHERE number = ?",
                (outcome, seconds, input_tokens, output_tokens, cost, number),
            )
            self._connection.execute("COMMIT")

    def _hold_caps(self) -> None:
        account = self._account
        if account is None or account.max_cost is None and account.max_calls is None:
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
        "SELECT purpose, model, count(*), count(*) FILTER (WHERE outcome = 'answered'), coalesce(sum(input_tokens), 0), "
        "coalesce(sum(output_tokens), 0), coalesce(sum(cost), 0.0), coalesce(sum(seconds), 0.0) FROM attempts GROUP BY purpose, model "
        "ORDER BY min(number)"
    )
    names = ("purpose", "model", "calls", "answered", "input_tokens", "output_tokens", "cost", "seconds")
    with explained(ledger), closing(open_database(ledger, _TABLES)) as connection:
        return [Spent(**dict(zip(names, row, strict=True))) for row in connection.execute(query)]
