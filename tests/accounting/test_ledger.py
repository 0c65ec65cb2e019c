"""Accounts that survive whoever writes them."""

import os
import random
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from rpo.accounting.answers import Answers
from rpo.accounting.ledger import Account, Ledger, seal, spent
from rpo.data.chat import ChatAnswer
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
    program = "import sys; from pathlib import Path; from rpo.accounting.ledger import *; p = Path(sys.argv[1]); "
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


OLD_ANSWERS = """
CREATE TABLE IF NOT EXISTS answers (
  question TEXT PRIMARY KEY, text TEXT NOT NULL, finish TEXT NOT NULL, input_tokens INTEGER NOT NULL, output_tokens INTEGER NOT NULL,
  first_token TEXT NOT NULL) WITHOUT ROWID;
INSERT INTO answers VALUES ('q', 'told', 'stop', 3, 4, '{"Yes": -0.5}'), ('r', '', 'length', 1, 1, '{}');
"""
OLD_LEDGER = """
CREATE TABLE IF NOT EXISTS attempts (
  number INTEGER PRIMARY KEY, purpose TEXT NOT NULL, model TEXT NOT NULL, question TEXT NOT NULL, began REAL NOT NULL,
  seconds REAL, outcome TEXT, input_tokens INTEGER, output_tokens INTEGER, cost REAL);
CREATE TABLE IF NOT EXISTS total (only_row INTEGER PRIMARY KEY CHECK (only_row = 0), calls INTEGER NOT NULL, cost REAL NOT NULL);
INSERT OR IGNORE INTO total VALUES (0, 0, 0.0);
INSERT INTO attempts VALUES (1, 'critique', 'm', 'q', 1.5, 0.5, 'answered', 3, 4, 0.25),
  (2, 'critique', 'm', 'r', 1.5, NULL, NULL, NULL, NULL, NULL);
UPDATE total SET calls = 2, cost = 0.25;
"""


def written_by_the_version_before(folder: Path) -> None:
    for name, script in (("answers.sqlite", OLD_ANSWERS), ("ledger.sqlite", OLD_LEDGER)):
        with closing(sqlite3.connect(folder / name, isolation_level=None)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.executescript(script)


def test_files_of_the_version_before_are_opened_and_sealed(tmp_path: Path) -> None:
    written_by_the_version_before(tmp_path)
    for _ in range(2):
        answers, ledger = Answers(tmp_path / "answers.sqlite"), Ledger(account(tmp_path))
        assert answers.get("q") == (ChatAnswer(text="told", input_tokens=3, output_tokens=4, first_token={"Yes": -0.5}), "stop")
        assert answers.get("r") == (ChatAnswer(text="", input_tokens=1, output_tokens=1), "length")
        answers.close()
        ledger.close()
        (line,) = spent(tmp_path / "ledger.sqlite")
        assert (line.calls, line.answered, line.maybe_billed, line.cost) == (2, 1, 1, 0.25)
    with closing(sqlite3.connect(tmp_path / "answers.sqlite")) as connection:
        connection.execute("UPDATE answers SET text = 'tolk' WHERE question = 'q'")
        connection.commit()
    with pytest.raises(RpoError, match=r"answers.sqlite is damaged: the answer to question q is not what was written"):
        Answers(tmp_path / "answers.sqlite")


def filled(folder: Path, count: int = 40) -> tuple[Path, Path]:
    answers, ledger = Answers(folder / "answers.sqlite"), Ledger(account(folder))
    for number in range(count):
        answers.put(f"{number:064d}", ChatAnswer(text=f"answer {number} " + "x" * 100, input_tokens=number, output_tokens=2), "stop")
        ledger.end(ledger.begin("critique", "m", f"q{number}"), "answered", 0.5, number, 2, 0.125)
    answers.close()
    ledger.close()
    return folder / "answers.sqlite", folder / "ledger.sqlite"


def read_all(answers: Path, ledger: Path, count: int = 40) -> list[object]:
    opened = Answers(answers)
    found: list[object] = [opened.get(f"{number:064d}") for number in range(count)]
    opened.close()
    return [*found, *(replace(line, seconds=0.0) for line in spent(ledger))]


@pytest.mark.parametrize("which", ["answers", "ledger"])
@pytest.mark.parametrize("tries", [60, pytest.param(1500, marks=pytest.mark.slow)])
def test_a_flipped_bit_or_a_cut_is_named_or_without_effect(which: str, tries: int, tmp_path: Path) -> None:
    files = filled(tmp_path)
    right, rng, named = read_all(*files), random.Random(0), 0
    damaged = files[0] if which == "answers" else files[1]
    whole = damaged.read_bytes()
    for number in range(tries):
        content = bytearray(whole)
        if number % 4 == 3:
            del content[rng.randrange(len(content)) * (number > 3) :]
        else:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        for stray in damaged.parent.glob(f"{damaged.name}-*"):
            stray.unlink()
        damaged.write_bytes(content)
        os.utime(damaged, (1e9, 1e9))
        try:
            assert read_all(*files) == right, f"try {number}"
        except RpoError as error:
            assert damaged.name in str(error) and "--resume" in str(error)
            named += 1
    assert named > tries / 3


@pytest.mark.parametrize("script", [
    "CREATE VIEW answers AS WITH RECURSIVE n(question) AS (SELECT 'q' UNION ALL SELECT question FROM n) SELECT * FROM n",
    OLD_ANSWERS + "CREATE TRIGGER t BEFORE INSERT ON answers BEGIN SELECT raise(ABORT, 'run by a stranger'); END;",
    "CREATE TABLE answers (question TEXT PRIMARY KEY, text AS (hex(zeroblob(1000000000))), seal TEXT)", "CREATE TABLE other (a)",
    OLD_ANSWERS + "CREATE INDEX i ON answers (text);",
])  # fmt: skip
def test_a_strangers_database_is_refused_before_anything_in_it_runs(script: str, tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "answers.sqlite")) as connection:
        connection.executescript(script)
    began = time.monotonic()
    with pytest.raises(
        RpoError, match=r"answers.sqlite is damaged, or a database of another program or version; give another file, or remove it"
    ):
        Answers(tmp_path / "answers.sqlite")
    assert time.monotonic() - began < 5.0


def test_no_file_is_named_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "answers.sqlite")
    for path in (tmp_path / "answers.sqlite", tmp_path):
        with pytest.raises(RpoError, match="is no file"):
            Answers(path)


def test_values_that_are_no_answer_are_damage_even_with_a_seal(tmp_path: Path) -> None:
    wrong = [
        ("q", "a", "stop", -1, 2, "{}"),
        ("q", "a", "stop", 1, 2, "[]"),
        ("q", "a", "stop", 1, 2, '{"Yes": NaN}'),
        ("q", "a", "stop", 1, 2, "{"),
    ]
    for number, record in enumerate(wrong):
        path = tmp_path / f"{number}.sqlite"
        Answers(path).close()
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            connection.execute("INSERT INTO answers VALUES (?, ?, ?, ?, ?, ?, ?)", (*record, seal(record)))
            connection.execute("UPDATE total SET answers = 1")
        with pytest.raises(RpoError, match="is damaged"):
            Answers(path).get("q")


def test_a_question_is_claimed_by_one_until_it_is_answered_released_or_the_lease_ends(tmp_path: Path) -> None:
    mine, other = Answers(tmp_path / "answers.sqlite"), Answers(tmp_path / "answers.sqlite")
    assert mine.claim("q", 60.0) and mine.claim("q", 60.0) and not other.claim("q", 60.0) and other.is_claimed("q")
    other.release("q")
    assert other.is_claimed("q"), "only one's own claims are released"
    mine.release("q")
    assert other.claim("q", 0.05) and not mine.claim("q", 60.0)
    time.sleep(0.06)
    assert mine.claim("q", 60.0)
    mine.put("q", ChatAnswer(text="a"), "stop")
    assert not other.is_claimed("q") and not other.claim("q", 60.0), "what is answered is asked by nobody"


def test_the_claim_of_a_process_that_died_is_void_and_a_far_one_ends(tmp_path: Path) -> None:
    program = "import sys, os; from pathlib import Path; from rpo.accounting.answers import Answers; "
    program += "assert Answers(Path(sys.argv[1])).claim('q', 9999.0); os._exit(1)"
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "answers.sqlite")], check=False, env=os.environ)
    answers = Answers(tmp_path / "answers.sqlite")
    with closing(sqlite3.connect(tmp_path / "answers.sqlite", isolation_level=None)) as connection:
        assert connection.execute("SELECT count(*) FROM claims").fetchone() == (1,)
        assert answers.claim("q", 1.0)
        connection.execute("INSERT INTO claims VALUES ('r', 'elsewhere:1:1/a', 1e300), ('s', 'elsewhere:1:1/a', ?)", (time.time() + 60,))
    assert answers.claim("r", 1.0) and not answers.claim("s", 1.0)
