"""The exceptions of the package; everything else that is raised is a `ValueError` for what a user wrote, or a bug."""

import errno
import re
import signal
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
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


_ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "Make room"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "Raise the limit of open files (`ulimit -n`)"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "Make it readable and writable, or choose another folder"),
}
_GO_ON = "then go on with --resume; what is done is kept."
_TEMPORARY = re.compile(r"\.[0-9a-f]{8}\.tmp$|/\.(partial|old)-")


def disk_error(error: BaseException, path: Path | str | None = None) -> str | None:
    """One line for an error of a disk or a file: the file, the reason, how to go on; `None` for any other error.

    These are `OSError`, but for those of the network, and the exceptions of safetensors and pyarrow, known by name because neither
    is imported here. `path` is the file where the error names none, or a temporary one.
    """
    kinds = {kind.__name__ for kind in type(error).__mro__}
    wire = isinstance(error, ConnectionError | TimeoutError) or type(error).__module__ not in ("builtins", "pyarrow.lib", "PIL")
    if not (isinstance(error, OSError) and not wire) and not kinds & {"SafetensorError", "ArrowException"}:
        return None
    named = getattr(error, "filename", None)
    clear = isinstance(named, str | Path) and str(named) and not (path and _TEMPORARY.search(str(named)))
    file = named if clear else path
    reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
    advice = _ADVICE.get(getattr(error, "errno", None) or 0, "Check the disk and the file")
    return f"{f'{file}: ' if file else ''}{reason}. {advice}, {_GO_ON}"


@contextmanager
def disk_errors(path: Path) -> Generator[None, None, None]:
    """Turns an error of a disk or a file into an `RpoError` that names a file: `path` unless the error names another."""
    try:
        yield
    except Exception as error:
        line = None if isinstance(error, ValueError) else disk_error(error, path)  # pyarrow's ValueErrors are about values
        if line is None:
            raise
        raise RpoError(line) from error


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
