"""A run folder: who may write in it, and what happens to one that exists."""

import fcntl
import os
import re
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rpo.data.shards import sweep
from rpo.errors import RpoError

LOCK = ".lock"
STAGE_FOLDER = re.compile(r"(\d+)_([a-z][a-z0-9_]*)-([0-9a-f]{8})")
"""`POSITION_NAME-FINGERPRINT`, the first eight digits of it."""

_CONTENTS = ("recipe.json", "pairs.parquet", "train", "evaluation", "summary.json", "report.html", "rounds", "ledger.sqlite", "published")
"""Answers of models over a wire (`answers.sqlite`) are not among them: they were paid for and are right for whoever asks the same."""


@dataclass(frozen=True)
class RunFolder:
    """A run folder that this process holds the lock of; `open_run` makes it."""

    path: Path


def run_contents(path: Path) -> list[Path]:
    """What a run left in the folder, sorted: the part of the folder that `--overwrite` removes."""
    if not path.is_dir():
        return []
    return sorted(entry for entry in path.iterdir() if entry.name in _CONTENTS or STAGE_FOLDER.fullmatch(entry.name))


def _refuse_foreign(path: Path) -> None:
    if not path.is_dir():
        return
    foreign = [entry.name for entry in path.iterdir()]
    if foreign and LOCK not in foreign and not run_contents(path):
        raise RpoError(f"{path} exists and is not a run folder (it holds {sorted(foreign)[0]!r}, for one). Choose a new folder.")


def _lock(path: Path) -> int:
    """File descriptor that holds the lock; the kernel drops it with the process, however that ends."""
    descriptor = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(descriptor, 64, 0).decode(errors="replace").strip()
        os.close(descriptor)
        raise RpoError(
            f"{path} is being written by process {holder or 'unknown'}. Wait for it, end it, or choose another folder."
        ) from error
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor


def _clear(path: Path) -> None:
    for entry in run_contents(path):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


@contextmanager
def open_run(path: Path, *, resume: bool = False, overwrite: bool = False) -> Generator[RunFolder, None, None]:
    """Makes or enters the run folder `path` and holds its lock while the block runs.

    A folder that already holds a run needs `resume` (go on with it) or `overwrite` (its contents are removed; files that no run
    makes are left). Raises `RpoError` when it has neither, is no run folder, cannot be written, or another process writes in it.
    """
    if resume and overwrite:
        raise ValueError("resume and overwrite exclude each other: go on with what is there, or begin anew")
    try:
        path.mkdir(parents=True, exist_ok=True)
        _refuse_foreign(path)
        descriptor = _lock(path)
    except OSError as error:
        raise RpoError(f"cannot write in {path} ({error.strerror or error}). Choose a folder that you may write in.") from error
    try:
        if run_contents(path) and not resume and not overwrite:
            raise RpoError(f"{path} already holds a run. Go on with it by --resume, replace it by --overwrite, or choose a new folder.")
        if overwrite:
            _clear(path)
        sweep(path)
        yield RunFolder(path)
    finally:
        os.close(descriptor)
