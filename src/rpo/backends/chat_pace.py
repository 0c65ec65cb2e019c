"""How fast a server may be asked: concurrency that adapts, pauses after many failures, waiting times. Lives in one event loop."""

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

Outcome = Literal["good", "busy", "bad", "unreachable"]
"""Answered (also with a refusal of the question); asked for less (429, 503, time-out); broken; not even connected."""

BACKOFF_FIRST_S = 0.5
BACKOFF_MAX_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Pacing:
    """Limits of one client towards one server."""

    concurrency_start: int = 8
    """Requests at once to begin with; doubles with every round of answers until the server asks for less."""
    concurrency_max: int = 64
    """Requests at once, never more; vLLM's --max-num-seqs is a good number."""
    breaker_failures: int = 10
    """Failures in a row after which nothing is sent for a while."""
    breaker_pause_s: float = 30.0
    """How long nothing is sent then; afterwards one request probes."""
    patience_s: float = 600.0
    """With pauses only and no answer for so long, the run stops."""
    retries_per_answer: float = 0.5
    """Retries that each answer allows; beyond them one a second, so that retries cannot keep a server down."""

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


class Pace:
    """The gate every request passes. Grows while answers come, halves once per round when the server asks for less."""

    def __init__(self, pacing: Pacing, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._pacing, self._name, self._clock = pacing, name, clock
        self.limit = float(pacing.concurrency_start)
        self.in_flight = 0
        self._doubling = True
        self._proven = 0
        """Answers that may still raise the limit: as many as were under way when it was last reached."""
        self._round = 0
        self._failures = 0
        self._paused_until: float | None = None
        self._last_good: float | None = None
        self._troubled_since: float | None = None
        self._retry_debt = -float(pacing.breaker_failures)
        self._retry_paid = clock()
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._closed: RpoError | None = None

    def _may_enter(self) -> bool:
        if self._paused_until is not None:
            return self.in_flight == 0 and self._clock() >= self._paused_until
        return self.in_flight < int(self.limit)

    def _admit(self) -> None:
        while self._waiting and self._may_enter():
            turn = self._waiting.popleft()
            if not turn.done():
                self.in_flight += 1
                turn.set_result(None)
                if self.in_flight >= int(self.limit):
                    self._proven = self.in_flight

    async def enter(self) -> int:
        """Waits for a turn. Returns the round it belongs to, which `leave` wants back. Raises what `close` was told."""
        if self._closed is not None:
            raise self._closed
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        self._admit()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.leave_unused()
            raise
        return self._round

    def leave_unused(self) -> None:
        """Gives a turn back in which nothing was asked."""
        self.in_flight -= 1
        self._admit()

    def close(self, error: RpoError) -> None:
        """Nobody enters any more; those who wait are told why."""
        self._closed = error
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_exception(error)

    def leave(self, entered: int, outcome: Outcome, why: str = "") -> None:
        """Says what became of the request; lets others in. Raises `RpoError` when the server was silent for too long."""
        self.in_flight -= 1
        try:
            if outcome == "good":
                self._grow()
            else:
                self._fail(entered, outcome, why)
        finally:
            self._admit()

    def _grow(self) -> None:
        self._failures, self._paused_until, self._troubled_since = 0, None, None
        self._last_good = self._clock()
        self._retry_debt = max(self._retry_debt - self._pacing.retries_per_answer, -float(self._pacing.concurrency_max))
        if self._proven:  # a limit that is not used proves nothing
            self._proven -= 1
            self.limit = min(self.limit + (1.0 if self._doubling else 1.0 / self.limit), float(self._pacing.concurrency_max))

    def _fail(self, entered: int, outcome: Outcome, why: str) -> None:
        now = self._clock()
        self._failures += 1
        self._troubled_since = self._troubled_since if self._troubled_since is not None else now
        if outcome == "busy" and entered == self._round:  # the others of this round were sent before the server complained
            self.limit = max(1.0, self.limit / 2)
            self._round += 1
            self._doubling = False
        if self._failures < self._pacing.breaker_failures:
            return
        if outcome == "unreachable" and self._last_good is None:
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

    def retry_wait_s(self) -> float:
        """Takes one retry from the budget; how long it must wait for it, 0 while answers pay for it."""
        now = self._clock()
        self._retry_debt = max(self._retry_debt - (now - self._retry_paid), -float(self._pacing.concurrency_max))
        self._retry_paid = now
        self._retry_debt += 1
        return max(0.0, self._retry_debt)
