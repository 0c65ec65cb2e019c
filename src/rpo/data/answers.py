"""Answers that were paid for, by the hash of their question: SQLite, JSON and text only."""

import json
from pathlib import Path
from typing import Any

from rpo.data.chat import ChatAnswer
from rpo.data.ledger import explained, open_database

_TABLES = """
CREATE TABLE IF NOT EXISTS answers (
  question TEXT PRIMARY KEY, text TEXT NOT NULL, finish TEXT NOT NULL, input_tokens INTEGER NOT NULL, output_tokens INTEGER NOT NULL,
  first_token TEXT NOT NULL) WITHOUT ROWID;
"""


class Answers:
    """For one thread at a time. Holds whole answers of the server only, also those cut short by it, which were paid for like any other."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._connection = open_database(path, _TABLES)

    def get(self, question: str) -> tuple[ChatAnswer, str] | None:
        """The answer and the server's reason to end it."""
        query = "SELECT text, finish, input_tokens, output_tokens, first_token FROM answers WHERE question = ?"
        with explained(self._path):
            row = self._connection.execute(query, (question,)).fetchone()
        if row is None:
            return None
        first_token: dict[str, Any] = json.loads(row[4])
        return ChatAnswer(text=row[0], input_tokens=row[2], output_tokens=row[3], first_token=first_token), row[1]

    def put(self, question: str, answer: ChatAnswer, finish: str) -> None:
        row = (question, answer.text, finish, answer.input_tokens, answer.output_tokens, json.dumps(dict(answer.first_token)))
        with explained(self._path):
            self._connection.execute("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?, ?, ?)", row)

    def close(self) -> None:
        self._connection.close()
