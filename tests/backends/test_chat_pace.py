"""The gate every request passes, on a clock of its own: nothing here waits."""

import asyncio
from collections.abc import Coroutine
from email.utils import formatdate
from typing import Any

import pytest

from rpo.backends.chat_pace import Pace, Pacing, backoff_s, retry_after_s
from rpo.errors import RpoError


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def make(**settings: Any) -> tuple[Pace, Clock]:
    clock = Clock()
    return Pace(Pacing(**settings), "http://server/v1", clock), clock


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


async def filled(pace: Pace) -> list[int]:
    """Enters as often as the limit allows."""
    return [await pace.enter() for _ in range(int(pace.limit) - pace.in_flight)]


def test_the_limit_doubles_with_every_round_until_it_is_told_to_stop() -> None:
    async def work() -> None:
        pace, _ = make(concurrency_start=4, concurrency_max=20)
        for expected in (8, 16, 20, 20):
            for entered in await filled(pace):
                pace.leave(entered, "good")
            assert pace.limit == expected and pace.in_flight == 0

    run(work())


def test_a_limit_that_is_not_used_does_not_grow() -> None:
    async def work() -> None:
        pace, _ = make(concurrency_start=8)
        for _ in range(50):
            pace.leave(await pace.enter(), "good")
        assert pace.limit == 8

    run(work())


def test_it_halves_once_for_all_that_were_under_way_and_then_grows_by_one_a_round() -> None:
    async def work() -> None:
        pace, _ = make(concurrency_start=16, concurrency_max=64, breaker_failures=100)
        for entered in await filled(pace):
            pace.leave(entered, "busy", "HTTP 429")
        assert pace.limit == 8
        for entered in await filled(pace):
            pace.leave(entered, "good")
        assert 8.0 < pace.limit <= 9.1
        pace.leave(await pace.enter(), "busy")
        assert pace.limit < 5
        for _ in range(10):
            pace.leave(await pace.enter(), "busy")
        assert pace.limit == 1

    run(work())


def test_never_more_than_the_limit_enter_and_those_who_wait_enter_in_order() -> None:
    async def work() -> None:
        pace, _ = make(concurrency_start=2, concurrency_max=2)
        order: list[int] = []

        async def one(number: int) -> None:
            entered = await pace.enter()
            assert pace.in_flight <= 2
            order.append(number)
            await asyncio.sleep(0)
            pace.leave(entered, "good")

        await asyncio.gather(*(one(number) for number in range(20)))
        assert order == list(range(20)) and pace.in_flight == 0

    run(work())


def test_a_waiting_request_that_is_cancelled_takes_no_turn() -> None:
    async def work() -> None:
        pace, _ = make(concurrency_start=1, concurrency_max=1)
        first = await pace.enter()
        waiting = asyncio.create_task(pace.enter())
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        pace.leave(first, "good")
        assert pace.in_flight == 0 and await pace.enter() == 0

    run(work())


def test_after_failures_in_a_row_one_request_probes(caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        pace, clock = make(concurrency_start=8, breaker_failures=3, breaker_pause_s=30)
        for entered in [await pace.enter() for _ in range(3)]:
            pace.leave(entered, "bad", "HTTP 500")
        waiting = [asyncio.create_task(pace.enter()) for _ in range(5)]
        await asyncio.sleep(0)
        assert pace.in_flight == 0 and not any(task.done() for task in waiting)
        clock.now += 31
        pace._admit()
        await asyncio.sleep(0)
        assert pace.in_flight == 1
        pace.leave(0, "bad", "HTTP 502")  # the probe failed: nobody else is let in
        await asyncio.sleep(0)
        assert pace.in_flight == 0
        clock.now += 31
        pace._admit()
        pace.leave(0, "good")
        await asyncio.sleep(0)
        assert pace.in_flight == 3  # all who still waited
        await asyncio.gather(*waiting)

    run(work())
    assert "3 failures in a row (last: HTTP 500); waiting 30 s before one request probes" in caplog.text


def test_a_server_that_was_never_there_ends_the_run_with_the_way_out() -> None:
    async def work() -> None:
        pace, _ = make(breaker_failures=3)
        for _ in range(2):
            pace.leave(await pace.enter(), "unreachable", "refused")
        with pytest.raises(RpoError, match=r"nothing answers at http://server/v1 \(refused\). Start the server, or correct base_url"):
            pace.leave(await pace.enter(), "unreachable", "refused")

    run(work())


def test_a_server_that_went_away_ends_the_run_after_some_patience() -> None:
    async def work() -> None:
        pace, clock = make(breaker_failures=2, breaker_pause_s=30, patience_s=100)
        pace.leave(await pace.enter(), "good")
        pace.leave(await pace.enter(), "unreachable", "refused")
        pace.leave(await pace.enter(), "unreachable", "refused")
        for _ in range(3):
            clock.now += 31
            entered = await pace.enter()
            if clock.now < 1090:
                pace.leave(entered, "unreachable", "refused")
        clock.now += 10
        with pytest.raises(RpoError, match="gave no answer for 103 s .last: refused"):
            pace.leave(entered, "unreachable", "refused")

    run(work())


def test_closing_tells_those_who_wait_and_those_who_come() -> None:
    async def work() -> None:
        pace, _ = make(concurrency_start=1, concurrency_max=1)
        await pace.enter()
        waiting = asyncio.create_task(pace.enter())
        await asyncio.sleep(0)
        pace.close(RpoError("over"))
        for later in (waiting, pace.enter()):
            with pytest.raises(RpoError, match="over"):
                await later

    run(work())


def test_retries_are_paid_for_by_answers() -> None:
    async def work() -> None:
        pace, clock = make(breaker_failures=10, retries_per_answer=0.5)
        assert [pace.retry_wait_s() for _ in range(10)] == [0.0] * 10
        assert pace.retry_wait_s() == 1.0 and pace.retry_wait_s() == 2.0  # beyond them one a second
        for _ in range(6):
            pace.leave(await pace.enter(), "good")
        assert pace.retry_wait_s() == 0.0
        assert pace.retry_wait_s() == 1.0
        clock.now += 100
        assert pace.retry_wait_s() == 0.0

    run(work())


@pytest.mark.parametrize(("headers", "expected"), [
    ({}, 0.0), ({"retry-after": "7"}, 7.0), ({"retry-after": "0.5"}, 0.5), ({"retry-after-ms": "250"}, 0.25),
    ({"retry-after-ms": "250", "retry-after": "9"}, 0.25), ({"retry-after-ms": "x", "retry-after": "9"}, 9.0),
    ({"retry-after": "-3"}, 0.0), ({"retry-after": "soon"}, 0.0), ({"retry-after": "nan"}, 0.0), ({"retry-after": "inf"}, 0.0),
    ({"retry-after": "1e9"}, 1e9), ({"retry-after": formatdate(1_000_060, usegmt=True)}, 60.0),
    ({"retry-after": formatdate(999_000, usegmt=True)}, 0.0), ({"retry-after": "Mon, 99 Nop 2026"}, 0.0), ({"retry-after": ""}, 0.0),
])  # fmt: skip
def test_what_a_server_asks_to_wait(headers: dict[str, str], expected: float) -> None:
    assert retry_after_s(headers, now=1_000_000.0) == pytest.approx(expected)


def test_backoff_is_full_jitter_and_what_was_asked_for_is_a_floor() -> None:
    assert [backoff_s(attempt, 0.0, lambda: 1.0) for attempt in (1, 2, 3, 10)] == [1.0, 2.0, 4.0, 60.0]
    assert backoff_s(5, 0.0, lambda: 0.0) == 0.0
    assert backoff_s(1, 10.0, lambda: 0.0) == 10.0 and backoff_s(1, 10.0, lambda: 1.0) == 12.0


@pytest.mark.parametrize("wrong", [{"concurrency_start": 0}, {"concurrency_start": 65}, {"breaker_failures": 0}])
def test_settings_are_checked(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Pacing(**wrong)
