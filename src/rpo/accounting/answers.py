"""Answers that were paid for, by the hash of their question, and claims on questions that are being asked: SQLite, sealed records."""

import json
import math
import os
import secrets
import socket
import sqlite3
import time
from functools import partial
from pathlib import Path
from typing import Any, cast

from rpo.accounting.ledger import damaged_record, explained, open_database, seal, transaction
from rpo.data.chat import ChatAnswer

_ANSWERS = (
    "CREATE TABLE answers (question TEXT PRIMARY KEY, text TEXT NOT NULL, finish TEXT NOT NULL, input_tokens INTEGER NOT NULL, "
    "output_tokens INTEGER NOT NULL, first_token TEXT NOT NULL{}) WITHOUT ROWID"
)
_TABLES = (
    _ANSWERS.format(", seal TEXT NOT NULL"),
    "CREATE TABLE total (only_row INTEGER PRIMARY KEY CHECK (only_row = 0), answers INTEGER NOT NULL)",
    "CREATE TABLE claims (question TEXT PRIMARY KEY, owner TEXT NOT NULL, until REAL NOT NULL) WITHOUT ROWID",
)
_COLUMNS = "question, text, finish, input_tokens, output_tokens, first_token"
_LEASE_MAX_S = 86_400.0


def _upgrade(connection: sqlite3.Connection) -> None:
    records = connection.execute(f"SELECT {_COLUMNS} FROM answers").fetchall()
    connection.execute("DROP TABLE answers")
    for table in _TABLES:
        connection.execute(table)
    connection.executemany("INSERT INTO answers VALUES (?, ?, ?, ?, ?, ?, ?)", [(*record, seal(record)) for record in records])
    connection.execute("INSERT INTO total VALUES (0, ?)", (len(records),))


def _check(path: Path | None, connection: sqlite3.Connection) -> None:
    """Every answer is what was written, and as many are there as were."""
    count, before = 0, ""
    for *record, sealed in connection.execute(f"SELECT {_COLUMNS}, seal FROM answers ORDER BY question"):
        if seal(record) != sealed or record[0] <= before:
            raise damaged_record(path, f"the answer to question {str(record[0])[:8]} is not what was written")
        count, before = count + 1, record[0]
    total = connection.execute("SELECT answers FROM total").fetchall() or [(0,)]
    if total[0][0] != count:
        raise damaged_record(path, f"it counts {total[0][0]} answers and holds {count}")


def _process() -> str:
    """This process, told apart from an earlier one with its number."""
    return f"{socket.gethostname()}:{os.getpid()}:{_started(os.getpid())}"


def _started(pid: int) -> str:
    """When a process of this machine was started, in the kernel's count; empty if there is none, or no way to know."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _is_gone(owner: str) -> bool:
    """Whether the process that made a claim is known to have ended."""
    host, _, rest = owner.rpartition("/")[0].partition(":")
    pid, _, started = rest.partition(":")
    if host != socket.gethostname() or not pid.isdecimal():
        return False
    if started:
        return _started(int(pid)) != started
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


class Answers:
    """For one thread at a time. Holds every answer that was paid for, usable or not, with the server's reason to end it."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._owner = f"{_process()}/{secrets.token_hex(8)}"
        self._connection = open_database(path, _TABLES, (_ANSWERS.format(""),), _upgrade, partial(_check, path))
        with explained(path):
            self._connection.execute("INSERT OR IGNORE INTO total VALUES (0, 0)")

    def get(self, question: str) -> tuple[ChatAnswer, str] | None:
        """The answer and the server's reason to end it. Raises `RpoError` for a record that is not what was written."""
        query = f"SELECT {_COLUMNS}, seal FROM answers WHERE question = ?"
        with explained(self._path):
            found = self._connection.execute(query, (question,)).fetchone()
        if found is None:
            return None
        *record, sealed = found
        try:
            if seal(record) != sealed:
                raise ValueError("its seal differs")
            return _read(record)
        except (ValueError, TypeError) as error:
            raise damaged_record(self._path, f"the answer to question {question[:8]} is not what was written ({error})") from error

    def put(self, question: str, answer: ChatAnswer, finish: str) -> None:
        """Keeps an answer; the first to a question stays."""
        record = (question, answer.text, finish, answer.input_tokens, answer.output_tokens, json.dumps(dict(answer.first_token)))
        with explained(self._path), transaction(self._connection):
            cursor = self._connection.execute("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?, ?, ?, ?)", (*record, seal(record)))
            self._connection.execute("UPDATE total SET answers = answers + ?", (cursor.rowcount,))
            self._connection.execute("DELETE FROM claims WHERE question = ?", (question,))

    def claim(self, question: str, lease_s: float) -> bool:
        """Whether this one may ask the question now: nobody has its answer, or asks it. The claim ends by `put`, `release`, after
        `lease_s`, or with the process."""
        until = time.time() + min(lease_s, _LEASE_MAX_S)
        with explained(self._path), transaction(self._connection):
            known = self._connection.execute("SELECT 1 FROM answers WHERE question = ?", (question,)).fetchone()
            if known or self.is_claimed(question):
                return False
            self._connection.execute("INSERT OR REPLACE INTO claims VALUES (?, ?, ?)", (question, self._owner, until))
        return True

    def is_claimed(self, question: str) -> bool:
        """Whether another asks the question now."""
        with explained(self._path):
            found = self._connection.execute("SELECT owner, until FROM claims WHERE question = ?", (question,)).fetchone()
        if found is None or found[0] == self._owner or _is_gone(str(found[0])):
            return False
        return isinstance(found[1], float) and 0 < found[1] - time.time() <= _LEASE_MAX_S

    def release(self, question: str) -> None:
        """Ends a claim of one's own on a question without an answer."""
        with explained(self._path):
            self._connection.execute("DELETE FROM claims WHERE question = ? AND owner = ?", (question, self._owner))

    def close(self) -> None:
        self._connection.close()


def _read(record: list[Any]) -> tuple[ChatAnswer, str]:
    """A record as an answer. Raises `ValueError` for one that no answer of ours is."""
    _, text, finish, input_tokens, output_tokens, first_token = record
    alternatives: Any = json.loads(first_token)
    counts = all(isinstance(count, int) and count >= 0 for count in (input_tokens, output_tokens))
    if not (isinstance(text, str) and isinstance(finish, str) and counts and isinstance(alternatives, dict)):
        raise ValueError("its values are of other kinds")
    shares = cast("dict[str, Any]", alternatives)
    if not all(isinstance(share, int | float) and math.isfinite(share) for share in shares.values()):
        raise ValueError("its log probabilities are no numbers")
    return ChatAnswer(text=text, input_tokens=input_tokens, output_tokens=output_tokens, first_token=shares), finish
