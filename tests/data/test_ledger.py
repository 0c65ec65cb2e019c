"""Accounts that survive whoever writes them."""

import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from rpo.data.answers import Answers
from rpo.data.chat import ChatAnswer
from rpo.data.ledger import Account, Ledger, spent
from rpo.errors import CapReached, RpoError


def account(folder: Path, **caps: float) -> Account:
    return Account(ledger=folder / "ledger.sqlite", answers=folder / "answers.sqlite", **caps)  # type: ignore[arg-type]


def test_an_attempt_is_entered_before_it_is_sent_and_its_end_after(tmp_path: Path) -> None:
    ledger = Ledger(account(tmp_path))
    first, second = ledger.begin("critique", "m", "q1"), ledger.begin("instruct", "m", "q2")
    ledger.end(first, "answered", 1.5, 100, 20, 0.25)
    told = {line.purpose: line for line in spent(tmp_path / "ledger.sqlite")}
    assert list(told) == ["critique", "instruct"] and second == first + 1
    assert (told["critique"].calls, told["critique"].answered, told["critique"].cost) == (1, 1, 0.25)
    assert (told["instruct"].calls, told["instruct"].answered, told["instruct"].input_tokens) == (1, 0, 0)
    ledger.close()
    assert spent(tmp_path / "none.sqlite") == []


def test_caps_count_what_earlier_processes_spent(tmp_path: Path) -> None:
    program = "import sys; from pathlib import Path; from rpo.data.ledger import *; p = Path(sys.argv[1]); "
    program += "l = Ledger(Account(ledger=p, answers=p)); [l.end(l.begin('a', 'm', 'q'), 'answered', 0.0, 1, 1, 0.5) for _ in range(3)]; "
    program += "l.begin('a', 'm', 'q'); import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "ledger.sqlite")], check=False, env=os.environ)
    with pytest.raises(CapReached, match="4 calls are made, and --max-calls is 4"):
        Ledger(account(tmp_path, max_calls=4)).begin("a", "m", "q")
    with pytest.raises(CapReached, match=r"\$1.5000 is spent, and --max-cost is \$1.5000"):
        Ledger(account(tmp_path, max_cost=1.5)).begin("a", "m", "q")
    open_ledger = Ledger(account(tmp_path, max_calls=5, max_cost=1.6))
    open_ledger.begin("a", "m", "q")
    with pytest.raises(CapReached):
        open_ledger.begin("a", "m", "q")
    assert spent(tmp_path / "ledger.sqlite")[0].calls == 5


def test_without_an_account_it_is_kept_in_memory() -> None:
    ledger = Ledger(None)
    ledger.end(ledger.begin("a", "m", "q"), "answered", 0.1)


def test_answers_come_back_whole_and_the_first_stays(tmp_path: Path) -> None:
    answers = Answers(tmp_path / "answers.sqlite")
    answer = ChatAnswer(text="two\nlines \u6f22", input_tokens=3, output_tokens=4, first_token={"Yes": -0.5})
    answers.put("q", answer, "stop")
    answers.put("q", ChatAnswer(text="another"), "stop")
    answers.close()
    again = Answers(tmp_path / "answers.sqlite")
    assert again.get("q") == (answer, "stop") and again.get("other") is None
    with sqlite3.connect(tmp_path / "answers.sqlite") as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_what_cannot_be_written_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(RpoError, match=r"nowhere.*ledger.sqlite: unable to open database file"):
        Ledger(account(tmp_path / "nowhere"))
