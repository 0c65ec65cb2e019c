"""The exceptions of the package; everything else that is raised is a `ValueError` for what a user wrote, or a bug."""

import signal
from collections.abc import Sequence
from typing import TypeVar

Value = TypeVar("Value")


class RpoError(Exception):
    """A run cannot go on; the message says what happened, where, and how to go on. The CLI prints it without a traceback."""


class CapReached(RpoError):
    """The run has spent what it may: money, calls or time. What is done is on the disk."""


class RowError(Exception):
    """One row's data is bad: it becomes that row's status (`error:STAGE:REASON`) and the run goes on."""

    def __init__(self, reason: str = "", *, raw: str = "") -> None:
        super().__init__(reason)
        self.raw = raw
        """What could not be used, such as a model's answer."""


UNANSWERED = "unanswered: "


class UnansweredError(RowError):
    """A remote model gave a row no answer, which says nothing about the row: --resume asks again."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"{UNANSWERED}{reason}")


def answered(values: Sequence[Value | RowError], who: str) -> Sequence[Value | RowError]:
    """The values as they are. Raises `RpoError` if more than half of them are errors: what is left would be no fair sample."""
    failed = [value for value in values if isinstance(value, RowError)]
    if 2 * len(failed) > len(values):
        raise RpoError(f"{who} gave no answer to {len(failed)} of {len(values)} questions; the first: {failed[0]}")
    return values


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM stopped the work at a safe point; what was done is on the disk. A program exits with `exit_code` (130 or 143)."""

    def __init__(self, signum: int) -> None:
        super().__init__(
            f"stopped by {signal.Signals(signum).name}; what is done is kept: the same command goes on, with --resume if it has that"
        )
        self.signum = signum
        self.exit_code = 128 + signum
