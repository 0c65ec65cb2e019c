"""Stopping at a safe point: Ctrl-C and SIGTERM become a request that the work looks at between two units of it."""

from collections.abc import Generator
from contextlib import contextmanager

from rpo.core.signals import signals_to
from rpo.errors import Interrupted


class StopRequest:
    """Remembers the first signal; a second one raises at once."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def receive(self, number: int) -> None:
        if self.signal is not None:
            raise Interrupted(number)
        self.signal = number

    def check(self) -> None:
        """Raises `Interrupted` if a signal has come."""
        if self.signal is not None:
            raise Interrupted(self.signal)


@contextmanager
def interruptible() -> Generator[StopRequest, None, None]:
    """Takes over SIGINT and SIGTERM for the block (in the main thread; elsewhere signals stay with their owner)."""
    stop = StopRequest()
    with signals_to(stop.receive):
        yield stop
