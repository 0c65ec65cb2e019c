"""SIGINT and SIGTERM for the length of a block."""

import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def signals_to(handle: Callable[[int], object]) -> Generator[None, None, None]:
    """Gives SIGINT and SIGTERM to `handle` while the block runs. In another than the main thread, signals stay the caller's."""

    def received(signum: int, frame: FrameType | None) -> None:
        handle(signum)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.signal(signum, received) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
