"""Rate of requests to one server: adaptive concurrency, pauses after many failures, waiting times. Lives in one event loop."""

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Literal

from rpo.errors import RpoError

logger = logging.getLogger(__name__)

Trouble = Literal["busy", "late", "bad", "unreachable"]
"""The server asked for less (429, 503); did not answer in time; broke; was not even connected."""
Outcome = Literal["answered", "refused"] | Trouble

BACKOFF_FIRST_S = 0.5
BACKOFF_MAX_S = 60.0
_WINDOW_MIN = 8
"""Answers, at least, from which a rate is measured; else twice as many as are under way at once."""
_HOLD = 8
"""Windows that pass after a change of the limit that was no gain, before the next is tried."""
_GAIN = 0.25
"""Share of a proportional gain in answers a second that a higher limit must bring to stay."""
_CLIMB, _STEADY = 0.8, 0.5
"""Share of the time-out that an answer may take at the next limit, should the server work on one at a time: while the limit climbs
for the first time, and after a climb that was no gain."""


@dataclass(frozen=True, kw_only=True)
class Pacing:
    """Limits of one client towards one server."""

    concurrency_start: int = 2
    """Requests at once to begin with. They double while that brings more answers a second and the server does not ask for less."""
    concurrency_max: int = 64
    """Requests at once, never more; vLLM's --max-num-seqs is a good number."""
    breaker_failures: int = 10
    """Failures in a row after which nothing is sent for a while."""
    breaker_pause_s: float = 30.0
    """How long nothing is sent then; afterwards one request probes."""
    patience_s: float = 600.0
    """With pauses only and no answer for so long, the run stops."""

    def __post_init__(self) -> None:
        if not 1 <= self.concurrency_start <= self.concurrency_max:
            raise ValueError(
                f"concurrency_start must be 1 to concurrency_max ({self.concurrency_max}), got {self.concurrency_start}; set both"
            )
        if self.breaker_failures < 1:
            raise ValueError(f"breaker_failures must be at least 1, got {self.breaker_failures}")


def retry_after_s(headers: Mapping[str, str], now: float | None = None) -> float:
    """What the server asks to wait: `retry-after-ms`, or `retry-after` in seconds or as a date; 0 if it says nothing sensible."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        said = headers.get(name, "").strip()
        if not said:
            continue
        try:
            wait = float(said) * unit
        except ValueError:
            try:
                wait = parsedate_to_datetime(said).timestamp() - (time.time() if now is None else now)
            except (ValueError, OverflowError, TypeError):
                continue
        return wait if 0 < wait < float("inf") else 0.0
    return 0.0


def backoff_s(attempt: int, floor_s: float, random_share: Callable[[], float] = random.random) -> float:
    """How long to wait after the `attempt`-th failure, counted from 1: full jitter, or a fifth above what the server asked for."""
    if floor_s > 0:
        return floor_s * (1 + 0.2 * random_share())
    return random_share() * min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2**attempt)


@dataclass(frozen=True)
class Turn:
    """One request's leave to be sent."""

    round: int
    """Complaints of the server before it."""
    began: float


class Pace:
    """The gate that every request passes. The limit rises only while that brings more answers a second, so that a server that works
    on one question at a time is not given more than it answers in time; it halves when the server asks for less."""

    def __init__(self, pacing: Pacing, name: str, timeout_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._pacing, self._name, self._timeout_s, self._clock = pacing, name, timeout_s, clock
        self.limit = pacing.concurrency_start
        self.in_flight = 0
        self._climbing = True
        self._before: tuple[int, float] | None = None
        """The limit before the last change and its answers a second, while that change is on trial."""
        self._hold = 0
        self._window: list[float] = []
        """Seconds of each answer since `_window_began`, with the gate full all the time."""
        self._window_began = clock()
        self._round = 0
        self._failures = 0
        self._paused_until: float | None = None
        self._last_good: float | None = None
        self._troubled_since: float | None = None
        self._waiting: deque[asyncio.Future[Turn]] = deque()
        self._closed: RpoError | None = None

    @property
    def paused(self) -> bool:
        """Whether the server is left alone, or asked by one probe at most."""
        return self._paused_until is not None

    @property
    def ever_good(self) -> bool:
        return self._last_good is not None

    def _may_enter(self) -> bool:
        if self._paused_until is not None:
            return self.in_flight == 0 and self._clock() >= self._paused_until
        return self.in_flight < self.limit

    def _admit(self) -> None:
        while self._waiting and self._may_enter():
            turn = self._waiting.popleft()
            if not turn.done():
                self.in_flight += 1
                turn.set_result(Turn(self._round, self._clock()))

    async def enter(self) -> Turn:
        """Waits for a turn, which `leave` wants back. Raises the error that `close` was given."""
        if self._closed is not None:
            raise self._closed
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        self._admit()
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.leave_unused()
            raise

    def leave_unused(self) -> None:
        """Gives a turn back in which nothing was asked."""
        self.in_flight -= 1
        self._admit()

    def close(self, error: RpoError) -> None:
        """Nobody enters any more; those who wait get the error."""
        self._closed = error
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_exception(error)

    def leave(self, turn: Turn, outcome: Outcome, why: str = "") -> None:
        """Enters the outcome of a request; lets others in. Raises `RpoError` when the server was silent for too long."""
        self.in_flight -= 1
        try:
            if outcome == "answered" or outcome == "refused":
                self._failures, self._paused_until, self._troubled_since = 0, None, None
                self._last_good = self._clock()
                if outcome == "answered":
                    self._measure(self._clock() - turn.began)
            else:
                self._fail(turn, outcome, why)
        finally:
            self._admit()
            if self.in_flight < self.limit:  # a limit that is not used proves nothing
                self._restart()

    def _restart(self) -> None:
        self._window, self._window_began = [], self._clock()

    def _measure(self, seconds: float) -> None:
        """At the end of a window: a change of the limit that was no gain is taken back, and else the next one tried."""
        self._window.append(seconds)
        if len(self._window) < max(_WINDOW_MIN, 2 * self.limit):
            return
        rate = len(self._window) / max(self._clock() - self._window_began, 1e-9)
        latency = sum(self._window) / len(self._window)
        before, self._before = self._before, None
        if before is not None and rate < before[1] * (1 + _GAIN * (self.limit / before[0] - 1)):
            self.limit, self._climbing, self._hold = before[0], False, _HOLD
        elif self._hold:
            self._hold -= 1
        elif (tried := self._next_limit(latency)) != self.limit:
            self._before, self.limit = (self.limit, rate), tried
        self._restart()

    def _next_limit(self, latency: float) -> int:
        allowed = self._timeout_s * (_CLIMB if self._climbing else _STEADY)
        if latency > self._timeout_s * _STEADY and not self._climbing:
            return max(1, self.limit // 2)
        for higher in (2 * self.limit, self.limit + 1) if self._climbing else (self.limit + 1,):
            higher = min(higher, self._pacing.concurrency_max)
            if latency * higher / self.limit <= allowed:
                return higher
        return self.limit

    def _fail(self, turn: Turn, trouble: Outcome, why: str) -> None:
        now = self._clock()
        self._failures += 1
        self._troubled_since = self._troubled_since if self._troubled_since is not None else now
        if trouble in ("busy", "late") and turn.round == self._round:  # the others of this round were sent before the server complained
            self.limit = max(1, self.limit // 2)
            self._round += 1
            self._climbing, self._before = False, None
            self._restart()
        if self._failures < self._pacing.breaker_failures:
            return
        if trouble == "unreachable" and not self.ever_good:
            raise RpoError(f"nothing answers at {self._name} ({why}). Start the server, or correct base_url; then go on with --resume.")
        if now - self._troubled_since >= self._pacing.patience_s:
            raise RpoError(
                f"{self._name} gave no answer for {now - self._troubled_since:.0f} s (last: {why}). "
                "What is done is kept; go on with --resume."
            )
        if self._paused_until is None or now >= self._paused_until:
            self._pause(now, why)

    def _pause(self, now: float, why: str) -> None:
        pause = self._pacing.breaker_pause_s
        self._paused_until = now + pause
        logger.warning(
            "%s: %d failures in a row (last: %s); waiting %.0f s before one request probes", self._name, self._failures, why, pause
        )
        asyncio.get_running_loop().call_later(pause + 0.001, self._admit)
