"""The client against servers that are ill, refuse everything, or bill for what cannot be used."""

import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from test_chat_openai import CALM, account, attempts, chat, echo, expected, question, questions, texts

import rpo
from rpo.accounting.ledger import Account, spent
from rpo.backends.chat.openai import hang_up
from rpo.backends.chat.pacing import Pacing
from rpo.data.chat import ChatAnswer
from rpo.errors import CapReached, RowError, RpoError, UnansweredError
from rpo.testing.server import Asked, FakeServer, Raw, Said

PRICES = (("m", 1.0, 10.0),)
USAGE = {"prompt_tokens": 1000, "completion_tokens": 1500}
COST = 0.016
"""US dollars of one answer with this usage at these prices."""


def billed(usage: object = USAGE, **changes: Any) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": "Yes"}, "finish_reason": "stop"}
    return {"choices": [choice | changes], "usage": usage}


def says(content: object, **more: object) -> dict[str, Any]:
    return {"message": {"role": "assistant", "content": content} | more}


UNUSABLE: dict[str, Raw] = {
    "thought only": Raw(body=billed(**says(None), finish_reason="length")),
    "refusal": Raw(body=billed(**says(None, refusal="no"))),
    "filtered": Raw(
        body=billed(
            **says(
                "half",
            ),
            finish_reason="content_filter",
        )
    ),
    "no reason": Raw(body=billed(finish_reason=None)),
    "runaway": Raw(body=billed(**says("x" * 70_000))),
    "number": Raw(body=billed(**says(7))),
    "no choices": Raw(body={"choices": [], "usage": USAGE}),
    "plain": Raw(body=billed(finish_reason="length"), headers={"Content-Type": "text/plain"}),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_what_is_paid_for_and_cannot_be_used_is_in_the_ledger_under_the_cap_and_paid_once(name: str, tmp_path: Path) -> None:
    with FakeServer(lambda asked: UNUSABLE[name]) as server:
        with pytest.raises(CapReached, match="is spent, and --max-cost is"):
            chat(server, account(tmp_path, max_cost=0.3), prices=PRICES, timeout_s=CALM).complete(questions(100))
        (line,) = spent(tmp_path / "ledger.sqlite")
        assert line.calls == server.requests and line.cost == pytest.approx(COST * server.requests)
        assert 0.3 <= line.cost <= 0.3 + 8 * COST and line.input_tokens == 1000 * line.calls
        hang_up()
        answers = chat(server, account(tmp_path, max_cost=9.0), prices=PRICES, timeout_s=CALM).complete(questions(100))
        assert server.requests == 100 and set(server.questions.values()) == {1}, "none is paid for twice"
        assert all(isinstance(answer, RowError) and not isinstance(answer, UnansweredError) for answer in answers)


def test_yes_no_questions_to_a_server_without_log_probabilities_end_the_run_and_are_billed(tmp_path: Path) -> None:
    asked = [question(number, first_token=5) for number in range(200)]
    with FakeServer(lambda asked: Raw(body=billed())) as server:
        with pytest.raises(RpoError, match=r"no log probabilities; yes/no questions need them"):
            chat(server, account(tmp_path, max_cost=0.1), prices=PRICES, timeout_s=CALM).complete(asked)
        assert server.requests <= 4 and spent(tmp_path / "ledger.sqlite")[0].cost == pytest.approx(COST * server.requests)


def test_one_answer_without_log_probabilities_is_its_rows_error_where_others_have_them() -> None:
    def sometimes(asked: Asked) -> Said | Raw:
        return Raw(body=billed()) if "question 7" in asked.texts[0] else Said(text="Yes", first_token={"Yes": -0.1})

    with FakeServer(sometimes) as server:
        answers = chat(server, timeout_s=CALM).complete([question(number, first_token=5) for number in range(20)])
    assert [number for number, answer in enumerate(answers) if isinstance(answer, RowError)] == [7]


def test_tokens_that_are_written_alone_are_counts_and_none_at_all_ends_a_run_with_a_price_cap(tmp_path: Path) -> None:
    with FakeServer(lambda asked: Raw(body=billed({"completion_tokens": 5}))) as server:
        chat(server, account(tmp_path, max_cost=1.0), prices=PRICES).complete(questions(3))
    hang_up()
    with FakeServer(lambda asked: Raw(body=billed(None))) as server:
        with pytest.raises(RpoError, match="tells no token counts"):
            chat(server, account(tmp_path, max_cost=1.0), prices=PRICES).complete(questions(9)[3:])
        assert all(outcome == "answered" for _, outcome in attempts(tmp_path)), "no attempt stays open"


REFUSALS = {
    "openai": ({"error": {"message": "Unsupported parameter: 'max_tokens'"}}, 400, "Unsupported parameter.*max_completion_tokens"),
    "fastapi": ({"detail": "Server is pinned to SmolLM2"}, 400, "Server is pinned to SmolLM2.*BASE_URL/models"),
    "schema": ({"error": {"message": "failed to parse grammar"}}, 400, "failed to parse grammar.*send_schema"),
    "list": ({"detail": [{"loc": ["body", "messages"], "msg": "no images"}]}, 422, "body.messages: no images.*image_format"),
    "system": ({"error": {"message": "Conversation roles must alternate user/assistant"}}, 400, "must alternate.*system_as_user"),
    "broken": ({"message": "1 validation error 'json_schema'"}, 500, "1 validation error.*send_schema"),
    "200": ({"error": {"message": "context length exceeded", "code": 400}}, 200, "context length exceeded"),
    "page": (b"<html>Sign in</html>", 200, "no JSON object.*Sign in.*up to and without /chat/completions"),
    "other": ({"message": {"content": "hi"}}, 200, "it has no choices.*up to and without /chat/completions"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_server_that_refuses_every_question_alike_ends_the_run_with_its_words(name: str, tmp_path: Path) -> None:
    body, status, words = REFUSALS[name]
    refusing = True

    def answer(asked: Asked) -> str | Raw:
        return Raw(body=body, status=status) if refusing else echo(asked)

    with FakeServer(answer) as server:
        with pytest.raises(
            RpoError,
            match=f"(?s)/v1/chat/completions: the server (refuses every question with HTTP|answers no question).*{words}.*--resume",
        ):
            chat(server, account(tmp_path), timeout_s=CALM).complete(questions(60))
        assert server.requests <= 20
        refusing = False
        hang_up()
        assert texts(chat(server, account(tmp_path), timeout_s=CALM).complete(questions(60))) == expected(60)


def test_some_refusals_end_no_run_nor_does_what_a_picture_shows() -> None:
    def picky(asked: Asked) -> str:
        if "question 5" not in asked.texts[0]:
            raise ValueError("flagged by moderation")
        return echo(asked)

    with FakeServer(picky) as server:
        answers = chat(server, timeout_s=CALM).complete(questions(20))
    assert sum(isinstance(answer, ChatAnswer) for answer in answers) == 1


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (
            Raw(body=b"", status=308, headers={"Location": "https://example.invalid/v1/chat/completions"}),
            "set base_url to https://example.invalid/v1",
        ),
        (Raw(body={"error": {"message": "quota", "type": "insufficient_quota", "code": None}}, status=429), "no credit left"),
        (Raw(body={"detail": "Not Found"}, status=404), "HTTP 404: Not Found"),
        (Raw(body={}, status=405), "takes no questions"),
    ],
)
def test_what_no_retry_mends_ends_the_run_at_the_first(raw: Raw, words: str) -> None:
    with FakeServer(lambda asked: raw) as server:
        with pytest.raises(RpoError, match=words):
            chat(server, timeout_s=CALM).complete(questions(50))
        assert server.requests <= 4


class Outage:
    """A server that is well, ill for some time from the `after`-th question on, and well again."""

    def __init__(self, kind: str, seconds: float, after: int) -> None:
        self.kind, self.seconds, self.after, self.began, self.count = kind, seconds, after, 0.0, 0

    def __call__(self, asked: Asked) -> str | Raw:
        self.count += 1
        self.began = self.began or (time.monotonic() if self.count > self.after else 0.0)
        if self.began and time.monotonic() - self.began < self.seconds:
            if self.kind == "silence":
                time.sleep(0.6)
            else:
                return Raw(body={"error": {"message": "ill"}}, status=int(self.kind))
        return echo(asked)


@pytest.mark.parametrize("kind", ["503", "500", "429", "502", "silence"])
@pytest.mark.parametrize(("rows", "after"), [(4, 0), (40, 10)])
def test_an_outage_longer_than_a_rows_time_loses_no_row(kind: str, rows: int, after: int, tmp_path: Path) -> None:
    if kind == "500" and after == 0:
        return  # a server that never answered and is broken for every question ends the run: tested above
    pacing = Pacing(concurrency_start=4, concurrency_max=4, breaker_pause_s=0.6, breaker_failures=4)
    with FakeServer(Outage(kind, 2.0, after)) as server:
        client = chat(server, account(tmp_path), pacing=pacing, deadline_s=1.5, timeout_s=0.5)
        assert texts(client.complete(questions(rows))) == expected(rows)
    outcomes = [outcome or "" for _, outcome in attempts(tmp_path)]
    assert not any("within -" in outcome or "within 0.0 s" in outcome for outcome in outcomes), "nothing is sent when time is over"
    assert outcomes.count("answered") == rows


def test_time_at_the_gate_and_in_pauses_is_not_the_questions(tmp_path: Path) -> None:
    pacing = Pacing(concurrency_start=1, concurrency_max=1)
    with FakeServer(echo, latency_s=0.1) as server:
        client = chat(server, account(tmp_path), pacing=pacing, deadline_s=1.0, timeout_s=CALM)
        assert texts(client.complete(questions(20))) == expected(20)


def test_an_outage_of_several_pauses_costs_no_pause_for_each_question() -> None:
    pacing = Pacing(concurrency_start=8, concurrency_max=8, breaker_pause_s=0.5)
    began = time.monotonic()
    with FakeServer(Outage("503", 0.3, 1)) as server:
        assert texts(chat(server, pacing=pacing, deadline_s=0.4, timeout_s=0.4).complete(questions(9))) == expected(9)
    assert time.monotonic() - began < 3.0


def test_a_question_that_kills_its_server_every_time_ends_as_unanswered() -> None:
    def poisoned(asked: Asked) -> str | Raw:
        return Raw(body=b"", status=500) if "question 3" in asked.texts[0] else echo(asked)

    with FakeServer(poisoned) as server:
        answers = chat(server, timeout_s=CALM).complete(questions(20))
    assert isinstance(answers[3], UnansweredError) and "HTTP 500 (after 6 attempts)" in str(answers[3])
    assert sum(isinstance(answer, RowError) for answer in answers) == 1


def test_requests_without_an_answer_are_said_to_be_possibly_billed(tmp_path: Path) -> None:
    def slow(asked: Asked) -> str:
        if "question 0" in asked.texts[0]:
            time.sleep(0.5)
        return echo(asked)

    with FakeServer(slow) as server:
        answers = chat(server, account(tmp_path), timeout_s=0.3, attempts=2).complete(questions(5))
    assert isinstance(answers[0], UnansweredError) and "it may be billed" in str(answers[0])
    assert spent(tmp_path / "ledger.sqlite")[0].maybe_billed == 2


@pytest.mark.parametrize("wrap", ["{}\n", "{}\r\n", "  {}\t"])
def test_white_space_around_the_key_is_left_out(wrap: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RPO_API_KEY", wrap.format("sk-canary-0123456789"))
    with FakeServer(echo, key="sk-canary-0123456789") as server:
        assert texts(chat(server).complete(questions(2))) == expected(2)


@pytest.mark.parametrize("key", ["sk-canary-0123456789\nX: 1", "sk-canary\u2013dash", "sk canary 0123", "sk-canary\x7f0"])
def test_a_key_that_no_request_can_carry_is_refused_by_the_variables_name(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RPO_API_KEY", key)
    with pytest.raises(RpoError, match="the environment variable RPO_API_KEY holds") as refused:
        chat("http://127.0.0.1:9/v1")
    assert "canary" not in str(refused.value)


@pytest.mark.parametrize("key", ["EMPTY", "none", "ollama"])
def test_a_placeholder_in_place_of_a_key_takes_no_word_out_of_an_answer(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RPO_API_KEY", key)
    with FakeServer(lambda asked: f"an {key} bowl") as server:
        assert texts(chat(server).complete([question(0)])) == [f"an {key} bowl"]


def test_a_key_too_short_to_be_redacted_is_refused_and_one_of_8_characters_is_redacted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RPO_API_KEY", "s3cr3t!")
    with pytest.raises(RpoError, match=r"the environment variable RPO_API_KEY holds a key of 7 characters.*longer key") as refused:
        chat("http://127.0.0.1:9/v1")
    assert "s3cr3t" not in str(refused.value)
    monkeypatch.setenv("RPO_API_KEY", "s3cr3t!8")
    with FakeServer(lambda asked: "it is s3cr3t!8") as server:
        assert texts(chat(server).complete([question(0)])) == ["it is [key]"]


@contextmanager
def raw_server(answer: bytes, *, drips: bool = False) -> Iterator[str]:
    """Sends the same bytes to every request, whatever they are, and hangs up; or adds a blank now and then, for ever."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                with closing(connection):
                    connection.settimeout(5)
                    while b"\r\n\r\n" not in connection.recv(1 << 20):
                        pass
                    connection.sendall(answer)
                    with suppress(OSError):
                        while drips:
                            connection.sendall(b" ")
                            time.sleep(0.02)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        listening.shutdown(socket.SHUT_RDWR)
    thread.join(5)


KEY = b"sk-canary-0123456789"
ECHOES = {
    "status line": b"HTTP/1.1 200 OK " + KEY + b"\r\nContent-Length: 2\r\n\r\n{}",
    "bad status": b"HTTP/1.1 " + KEY + b" OK\r\n\r\n",
    "no http": KEY + b" is not welcome here\r\n\r\n",
    "header": b"HTTP/1.1 200 OK\r\n" + KEY + b"\r\n\r\n",
    "content type": b"HTTP/1.1 200 OK\r\nContent-Type: text/" + KEY + b"\r\nContent-Length: 2\r\n\r\nhi",
    "chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + KEY + b"\r\n",
    "length": b"HTTP/1.1 200 OK\r\nContent-Length: " + KEY + b"\r\n\r\n{}",
    "encoding": b"HTTP/1.1 200 OK\r\nContent-Encoding: " + KEY + b"\r\nContent-Length: 2\r\n\r\n{}",
    "location": b"HTTP/1.1 308 Moved\r\nLocation: http://" + KEY + b".invalid/\r\nContent-Length: 0\r\n\r\n",
    "html": b"HTTP/1.1 500 Oops\r\nContent-Length: 29\r\n\r\n<p>" + KEY + b"</p>  ",
}


@pytest.mark.parametrize("where", ECHOES)
def test_the_key_is_in_no_file_or_message_wherever_a_server_repeats_it(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RPO_API_KEY", KEY.decode())
    with raw_server(ECHOES[where]) as url:
        try:
            said = repr(chat(url, account(tmp_path), attempts=2).complete([question(0)]))
        except RpoError as error:
            said = f"{error} {error.__cause__}"
        hang_up()
    files = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    told = "".join(capfd.readouterr())
    assert KEY.decode() not in said + told and KEY not in files and len(files) > 1000


SHARER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[4])
from test_chat_openai import account, chat, expected, questions, texts
from rpo.accounting.ledger import Account
folder, me, url = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
accounts = Account(ledger=folder / f"{me}.sqlite", answers=folder / "answers.sqlite")
print("ready", flush=True)
sys.stdin.readline()
assert texts(chat(url, accounts, timeout_s=20.0).complete(questions(60))) == expected(60)
"""


def sharer(folder: Path, me: str, url: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(rpo.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SHARER, str(folder), me, url, str(Path(__file__).parent)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def test_two_processes_that_share_answers_pay_once_also_after_one_was_killed(tmp_path: Path) -> None:
    with FakeServer(echo, latency_s=0.1) as server:
        both = [sharer(tmp_path, me, server.url) for me in ("one", "two")]
        for process in both:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        for process in both:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        while server.requests < 20:
            time.sleep(0.01)
        both[0].send_signal(signal.SIGKILL)
        both[0].communicate(timeout=30)
        both[1].communicate(timeout=60)
        assert both[1].returncode == 0
        assert server.requests <= 60 + 8 and len(server.questions) == 60, "twice only what was under way in the killed one"
    with closing(sqlite3.connect(tmp_path / "one.sqlite")) as one, closing(sqlite3.connect(tmp_path / "two.sqlite")) as two:
        answered = [o.execute("SELECT count(*) FROM attempts WHERE outcome = 'answered'").fetchone()[0] for o in (one, two)]
    assert sum(answered) == 60 and all(answered)


def test_two_lines_of_one_process_pay_once(tmp_path: Path) -> None:
    def accounts(me: str) -> Account:
        return Account(ledger=tmp_path / f"{me}.sqlite", answers=tmp_path / "answers.sqlite")

    with FakeServer(echo, latency_s=0.05) as server:
        clients = [chat(server, accounts(me), timeout_s=CALM) for me in ("one", "two")]
        found: list[list[str]] = []
        threads = [threading.Thread(target=lambda client=client: found.append(texts(client.complete(questions(30))))) for client in clients]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [expected(30)] * 2 and server.requests == 30


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_closed_lines_leave_no_descriptor_or_thread(tmp_path: Path) -> None:
    def once(folder: Path) -> None:
        folder.mkdir()
        with FakeServer(echo) as server:
            chat(server, account(folder)).complete(questions(8))
            hang_up()

    once(tmp_path / "first")
    before, threads = descriptors(), threading.active_count()
    for number in range(5):
        once(tmp_path / str(number))
    assert descriptors() <= before + 2 and threading.active_count() <= threads
