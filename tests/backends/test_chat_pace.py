"""The gate every request passes, on a clock of its own: nothing here waits."""

import asyncio
import heapq
import random
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from email.utils import formatdate
from typing import Any

import pytest

from rpo.backends.chat.pacing import Outcome, Pace, Pacing, Turn, backoff_s, retry_after_s
from rpo.errors import RpoError


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def make(**settings: Any) -> tuple[Pace, Clock]:
    clock = Clock()
    return Pace(Pacing(**settings), "http://server/v1", 120.0, clock), clock


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


async def filled(pace: Pace) -> list[Turn]:
    """Enters as often as the limit allows."""
    return [await pace.enter() for _ in range(pace.limit - pace.in_flight)]


@dataclass
class Simulated:
    """A server by its times alone, asked by a client that always has more questions."""

    seconds: Callable[[], float]
    """For one answer, of a server that has a slot for it."""
    slots: int
    """Answers made at once; further questions wait in line, also those that the client has given up."""
    timeout_s: float = 120.0
    late: int = 0
    answered_s: float = 0.0
    most: int = 0

    def ask(self, count: int, **settings: Any) -> Pace:
        pace, clock = make(**settings)
        asyncio.run(self._ask(pace, clock, count))
        return pace

    async def _ask(self, pace: Pace, clock: Clock, count: int) -> None:
        free, ends, began = [clock.now] * self.slots, list[tuple[float, int, Turn, Outcome]](), clock.now
        asked = 0

        async def one() -> None:
            nonlocal asked
            turn = await pace.enter()
            done = max(heapq.heappop(free), clock.now) + self.seconds()
            heapq.heappush(free, done)
            late = done - clock.now > self.timeout_s
            asked += 1
            heapq.heappush(ends, (min(done, clock.now + self.timeout_s), asked, turn, "late" if late else "answered"))

        waiting = [asyncio.create_task(one()) for _ in range(count)]
        for _ in range(count):
            await asyncio.sleep(0)
            self.most = max(self.most, pace.in_flight)
            clock.now, _, turn, outcome = heapq.heappop(ends)
            self.late += outcome == "late"
            pace.leave(turn, outcome)
        self.answered_s = clock.now - began
        await asyncio.gather(*waiting)


def drawn(mean: float, seed: int, spread: float = 0.4) -> Callable[[], float]:
    """Times of answers as they differ by length: uniform around the mean."""
    rng = random.Random(seed)
    return lambda: mean * rng.uniform(1 - spread, 1 + spread)


@pytest.mark.parametrize("mean", [0.5, 5.0, 12.0, 25.0])
@pytest.mark.parametrize("seed", range(3))
def test_a_server_that_works_on_one_question_at_a_time_is_not_drowned(mean: float, seed: int) -> None:
    server = Simulated(drawn(mean, seed), slots=1)
    pace = server.ask(400)
    assert server.late == 0 and pace.limit * mean <= 60.0 and server.answered_s <= 401 * mean * 1.1
    assert server.most * mean <= 96.0, "nor while the limit is tried out"


@pytest.mark.parametrize(("mean", "slots", "timeout_s"), [(1.0, 32, 120.0), (10.0, 16, 120.0), (45.0, 64, 120.0), (0.2, 8, 120.0)])
def test_a_server_with_room_is_filled(mean: float, slots: int, timeout_s: float) -> None:
    server = Simulated(drawn(mean, 1), slots=slots, timeout_s=timeout_s)
    server.ask(4000)
    best = 4000 * mean / slots
    assert server.late == 0 and server.answered_s < 1.35 * best + 30 * mean, (server.answered_s, best)


def test_the_limit_doubles_while_that_brings_more_answers_and_goes_back_when_it_brings_none() -> None:
    assert Simulated(lambda: 1.0, slots=1000).ask(2000, concurrency_max=20).limit == 20
    server = Simulated(lambda: 1.0, slots=8)
    assert server.ask(300).limit == 8 and server.most == 16


def test_a_server_that_is_too_slow_even_for_two_is_asked_one_at_a_time() -> None:
    server = Simulated(lambda: 70.0, slots=1)
    assert server.ask(30).limit == 1 and server.late <= 2


def test_a_limit_that_is_not_used_does_not_grow() -> None:
    async def work() -> None:
        pace, clock = make(concurrency_start=8)
        for _ in range(50):
            turn = await pace.enter()
            clock.now += 1.0
            pace.leave(turn, "answered")
        assert pace.limit == 8

    run(work())


def test_it_halves_once_for_all_that_were_under_way() -> None:
    async def work() -> None:
        pace, _ = make(concurrency_start=16, concurrency_max=64, breaker_failures=100)
        for entered in await filled(pace):
            pace.leave(entered, "busy", "HTTP 429")
        assert pace.limit == 8
        for entered in await filled(pace):
            pace.leave(entered, "late", "no answer within 120 s")
        assert pace.limit == 4
        for _ in range(10):
            pace.leave(await pace.enter(), "busy")
        assert pace.limit == 1
        pace.leave(await pace.enter(), "bad")
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
            pace.leave(entered, "answered")

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
        pace.leave(first, "answered")
        assert pace.in_flight == 0 and (await pace.enter()).round == 0

    run(work())


def test_after_failures_in_a_row_one_request_probes(caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        pace, clock = make(concurrency_start=8, breaker_failures=3, breaker_pause_s=30)
        for entered in [await pace.enter() for _ in range(3)]:
            pace.leave(entered, "bad", "HTTP 500")
        waiting = [asyncio.create_task(pace.enter()) for _ in range(5)]
        await asyncio.sleep(0)
        assert pace.in_flight == 0 and not any(task.done() for task in waiting) and pace.paused
        clock.now += 31
        pace._admit()
        await asyncio.sleep(0)
        assert pace.in_flight == 1
        pace.leave(Turn(0, clock.now), "bad", "HTTP 502")  # the probe failed: nobody else is let in
        await asyncio.sleep(0)
        assert pace.in_flight == 0
        clock.now += 31
        pace._admit()
        pace.leave(Turn(0, clock.now), "answered")
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
        pace.leave(await pace.enter(), "answered")
        pace.leave(await pace.enter(), "unreachable", "refused")
        pace.leave(await pace.enter(), "unreachable", "refused")
        for _ in range(3):
            clock.now += 31
            entered = await pace.enter()
            if clock.now < 1090:
                pace.leave(entered, "unreachable", "refused")
        clock.now += 10
        with pytest.raises(RpoError, match=r"gave no answer for 103 s .last: refused"):
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
