"""The client against a real server on the loopback: rate, faults, caps, cache, secrets. `slow`: the numbers in full."""

import sqlite3
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rpo.accounting.ledger import Account, spent
from rpo.backends.chat.openai import ChatServer, OpenAIChat, OpenAIChatConfig, hang_up
from rpo.backends.chat.pacing import Pacing
from rpo.data.chat import ChatAnswer, ChatRequest, Message, Sampling
from rpo.errors import CapReached, RowError, RpoError
from rpo.testing.faults import FAULTS
from rpo.testing.server import Asked, FakeServer, Faults, Said

HASTY = ChatServer(
    timeout_s=0.4, retry_after_max_s=0.05, deadline_s=30.0, pacing=Pacing(concurrency_start=4, concurrency_max=8, breaker_pause_s=0.1)
)
"""A client for tests: all its patience is short."""
CALM = 10.0
"""Seconds for one request where the server is well and the test counts requests, however busy the machine is."""
IMAGE = np.zeros((16, 16, 3), dtype=np.uint8)


def question(number: int, **changes: Any) -> ChatRequest:
    return ChatRequest(messages=(Message(role="user", parts=(f"question {number}", IMAGE)),), purpose="test", **changes)


def questions(count: int) -> list[ChatRequest]:
    return [question(number) for number in range(count)]


def echo(asked: Asked) -> str:
    return f"answer to {asked.texts[0]}"


def chat(server: FakeServer | str, account: Account | None = None, **changes: Any) -> OpenAIChat:
    url = server if isinstance(server, str) else server.url
    return OpenAIChatConfig(model="m", server=replace(HASTY, base_url=url, **changes)).build_metered(account)


def account(folder: Path, **caps: Any) -> Account:
    return Account(ledger=folder / "ledger.sqlite", answers=folder / "answers.sqlite", **caps)


def texts(answers: Sequence[ChatAnswer | RowError]) -> list[str]:
    return [answer.text if isinstance(answer, ChatAnswer) else f"error: {answer}" for answer in answers]


def expected(count: int) -> list[str]:
    return [f"answer to question {number}" for number in range(count)]


def attempts(folder: Path) -> list[tuple[str, str | None]]:
    with sqlite3.connect(folder / "ledger.sqlite") as connection:
        return connection.execute("SELECT question, outcome FROM attempts ORDER BY number").fetchall()


def test_all_are_answered_in_order_and_never_more_at_once_than_allowed() -> None:
    with FakeServer(echo, latency_s=0.02) as server:
        assert texts(chat(server, timeout_s=CALM).complete(questions(60))) == expected(60)
        assert server.requests == 60 and 4 < server.at_once_max <= 8


def test_nothing_is_asked_twice_by_another_run_at_another_address_with_another_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeServer(echo) as server:
        first = chat(server, account(tmp_path), timeout_s=CALM).complete(questions(30))
        hang_up()
        monkeypatch.setenv("RPO_API_KEY", "sk-other")
        with monkeypatch.context() as patch:
            patch.delattr("rpo.backends.chat.wire.encoded_image")  # what is answered is not even encoded
            again = chat("http://127.0.0.1:9/v1", account(tmp_path), timeout_s=9.0).complete(questions(30))
        assert first == again and server.requests == 30
        assert chat(server, account(tmp_path)).complete([question(0, sample=1)]) == first[:1] and server.requests == 31


def test_the_same_question_at_the_same_time_is_asked_once() -> None:
    with FakeServer(echo, latency_s=0.02) as server:
        answers = chat(server, timeout_s=CALM).complete([question(1)] * 20)
        assert texts(answers) == ["answer to question 1"] * 20 and server.requests == 1


def test_a_yes_no_question_has_a_probability() -> None:
    with FakeServer(lambda asked: Said(text="Yes", finish="length", first_token={"Yes": -0.1, "No": -2.0, "It": -5.0})) as server:
        (answer,) = chat(server).complete([question(0, first_token=20, sampling=Sampling(max_tokens=1))])
        assert isinstance(answer, ChatAnswer) and answer.first_token == {"Yes": -0.1, "No": -2.0, "It": -5.0}


@pytest.mark.parametrize("kind", FAULTS)
def test_no_fault_passes_for_an_answer_and_each_is_outlived(kind: str) -> None:
    with FakeServer(echo, faults=Faults(rate=1.0, kinds=(kind,))) as server:
        (failed,) = chat(server, attempts=1).complete([question(0)])
        assert isinstance(failed, RowError) and "after 1 attempts" in str(failed) and server.failed[kind] == 1
        assert len(str(failed)) < 400
    faults = Faults(rate=0.5, kinds=(kind,), seed=2)
    with FakeServer(echo, faults=faults) as server:
        assert texts(chat(server, attempts=20).complete(questions(4))) == expected(4)


@pytest.mark.parametrize("rows", [60, pytest.param(500, marks=pytest.mark.slow)])
def test_at_30_percent_faults_every_row_is_done_or_has_its_own_error(rows: int, tmp_path: Path) -> None:
    with FakeServer(echo, faults=Faults(rate=0.3, seed=rows)) as server:
        began = time.monotonic()
        answers = chat(server, account(tmp_path)).complete(questions(rows))
        assert time.monotonic() - began < HASTY.deadline_s * 2
        right = [text for text, whole in zip(texts(answers), expected(rows), strict=True) if text == whole]
        errors = [answer for answer in answers if isinstance(answer, RowError)]
        assert len(right) + len(errors) == rows and len(errors) <= rows // 50
        assert all("after 6 attempts" in str(error) for error in errors)
        assert server.at_once_max <= 8 and sum(server.failed.values()) > rows // 5
        tried = attempts(tmp_path)
        assert len(tried) == server.requests and max(tried.count(row) for row in tried) <= 6
        assert sum(outcome == "answered" for _, outcome in tried) == len(right)
        before = server.requests
        hang_up()
        chat(server, account(tmp_path)).complete([q for q, a in zip(questions(rows), answers, strict=True) if isinstance(a, ChatAnswer)])
        assert server.requests == before


def test_a_slow_drip_does_not_outlast_the_deadline() -> None:
    with FakeServer(echo, faults=Faults(rate=1.0, kinds=("slow-drip",))) as server:
        began = time.monotonic()
        (answer,) = chat(server, deadline_s=0.8).complete([question(0)])
        assert isinstance(answer, RowError) and time.monotonic() - began < 1.5


def test_a_refused_question_is_its_rows_error_and_never_asked_again() -> None:
    def picky(asked: Asked) -> str:
        if "3" in asked.texts[0]:
            raise ValueError("the picture is too large")
        return echo(asked)

    with FakeServer(picky) as server:
        answers = chat(server).complete(questions(6))
        assert texts(answers)[3] == "error: unanswered: HTTP 400: the picture is too large" and server.requests == 6


@pytest.mark.parametrize(
    ("path", "key", "mend"),
    [("/v1", "sk-wrong", "key_env"), ("/v2", "sk-right", r"/v2/chat/completions: HTTP 404.*up to and without /chat/completions")],
)
def test_what_no_retry_can_mend_stops_the_run_at_once(path: str, key: str, mend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RPO_API_KEY", key)
    with FakeServer(echo, key="sk-right") as server:
        with pytest.raises(RpoError, match=mend) as stopped:
            chat(server.url.replace("/v1", path)).complete(questions(50))
        assert server.requests == 0 and key not in str(stopped.value)


def test_a_server_that_is_not_there_is_told_with_the_way_out() -> None:
    patience = Pacing(concurrency_start=4, breaker_failures=4, breaker_pause_s=0.1)
    with pytest.raises(RpoError, match=r"nothing answers at http://127.0.0.1:9/v1 .* Start the server, or correct base_url"):
        chat("http://127.0.0.1:9/v1", pacing=patience).complete(questions(6))


def test_a_server_that_comes_back_is_waited_for(tmp_path: Path) -> None:
    with FakeServer(echo) as server:
        client = chat(server, account(tmp_path))
        client.complete(questions(5))
        port = int(server.url.split(":")[2].split("/")[0])
    waiting = client._line.submit(client._line.answer(client._wire.question(question(5)), "m", None))
    time.sleep(0.15)
    with FakeServer(echo, port=port):
        assert waiting.result(timeout=10).text == "answer to question 5"


def test_a_cap_on_calls_is_never_overshot_and_all_that_was_answered_is_kept(tmp_path: Path) -> None:
    with FakeServer(echo, latency_s=0.01) as server:
        for cap in (20, 50):
            with pytest.raises(CapReached, match=f"{cap} calls are made, and --max-calls is {cap}.*--resume and a higher cap"):
                chat(server, account(tmp_path, max_calls=cap), timeout_s=CALM).complete(questions(100))
            hang_up()
            assert server.requests == cap == len(attempts(tmp_path))
        assert texts(chat(server, account(tmp_path, max_calls=100), timeout_s=CALM).complete(questions(100))) == expected(100)
        assert server.requests == 100 and set(server.questions.values()) == {1}


def test_a_cap_on_cost_is_overshot_by_no_more_than_is_under_way(tmp_path: Path) -> None:
    prices = (("m", 1000.0, 0.0),)  # 102 tokens are read of each question: about ten cents
    with FakeServer(echo, latency_s=0.01) as server:
        with pytest.raises(CapReached, match="is spent, and --max-cost is"):
            chat(server, account(tmp_path, max_cost=3.0), prices=prices, timeout_s=CALM).complete(questions(100))
        (line,) = spent(tmp_path / "ledger.sqlite")
        assert (line.calls, line.answered) == (server.requests, server.requests)
        assert 3.0 <= line.cost <= 3.0 + 8 * 0.102 and line.cost == pytest.approx(line.input_tokens * 1e-3)
        hang_up()
        assert texts(chat(server, account(tmp_path, max_cost=30.0), prices=prices, timeout_s=CALM).complete(questions(100))) == expected(
            100
        )
        assert server.requests == 100
    with pytest.raises(ValueError, match="--max-cost needs the price of 'm'"):
        chat("http://127.0.0.1:9/v1", account(tmp_path, max_cost=1.0))


def test_an_answer_cut_short_is_an_error_that_keeps_what_was_said_and_is_paid_for_once(tmp_path: Path) -> None:
    with FakeServer(lambda asked: Said(text='{"reasoning": "' + " " * 50, finish="length")) as server:
        for _ in range(2):
            (answer,) = chat(server, account(tmp_path)).complete([question(0)])
            assert isinstance(answer, RowError) and "cut short" in str(answer) and answer.raw.startswith('{"reasoning')
        assert server.requests == 1


def test_the_key_is_in_no_file_log_or_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    key = "sk-canary-0123456789"
    monkeypatch.setenv("RPO_API_KEY", key)
    caplog.set_level("DEBUG")

    def parrot(asked: Asked) -> str:
        if "1" in asked.texts[0]:
            raise ValueError(f"you sent {key}")
        return f"your key is {key}"

    faults = Faults(rate=0.3, kinds=("500", "reset-inside"))
    with FakeServer(parrot, key=key, faults=faults) as server:
        answers = chat(server, account(tmp_path)).complete(questions(6))
    assert "your key is [key]" in texts(answers) and "error: unanswered: HTTP 400: you sent [key]" in texts(answers)
    with FakeServer(echo, key="another") as server, pytest.raises(RpoError) as stopped:
        chat(server, account(tmp_path)).complete(questions(7))
    hang_up()
    said = "".join([repr(answers), str(stopped.value), repr(stopped.value.__cause__), caplog.text])
    files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert key not in said and len(files) >= 2 and not any(key.encode() in content for content in files)


def test_a_damaged_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "ledger.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(RpoError, match=r"ledger.sqlite: file is not a database.*remove it"):
        chat("http://127.0.0.1:9/v1", account(tmp_path))


@pytest.mark.parametrize(("wrong", "match"), [
    ({"base_url": "localhost:8000"}, "base_url must be like"), ({"base_url": "file:///etc/passwd"}, "base_url must be like"),
    ({"base_url": "http://me:secret@host/v1"}, "no key or password"), ({"base_url": "http://host/v1?key=1"}, "no key or password"),
    ({"timeout_s": 0.0}, "timeout_s"), ({"attempts": 0}, "attempts"),
])  # fmt: skip
def test_settings_of_the_server_are_checked(wrong: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match) as refused:
        ChatServer(**wrong)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"side_max": 3}, "side_max"),
        ({"extra": "{"}, "extra"),
        ({"extra": "[]"}, "extra"),
        ({"extra": '{"messages": []}'}, "take the place"),
    ],
)
def test_settings_of_the_model_are_checked(wrong: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        OpenAIChatConfig(model="m", **wrong)
