"""A run folder: what proves that it is one, who may write in it, and what `--overwrite` removes.

A name alone proves nothing: `train/` may be a user's photographs. A run is known by the mark in its lock file, by its `recipe.json`, by
a stage's folder whose `stage.json` fits its name, by `train/config.json` of a training, or by the index or shards of an evaluation.
"""

import fcntl
import json
import os
import re
import stat
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from rpo.core.atomic import MANIFEST, files_of, listed_files, remove_files, sweep_folders
from rpo.core.parquet import is_temporary, sweep
from rpo.errors import RpoError, disk_errors

LOCK = ".lock"
_MARK = "rpo run folder\n"
"""Begins the lock file; after it comes the number of the process that writes, if any. Earlier versions wrote the number alone."""
STAGE_FOLDER = re.compile(r"(\d+)_([a-z][a-z0-9_]*)-([0-9a-f]{8})")
"""`POSITION_NAME-FINGERPRINT`, the first eight digits of it."""

_SHARD = r"\d{5}\.parquet"
_STEP = r"(step-\d+|damaged-step-\d+-[0-9a-f]{8})"
_PARTS: Mapping[str, str] = {
    "train": rf"config\.json|metrics\.jsonl|cache/([a-z]+-[0-9a-f]+\.(safetensors|parquet)|(dropped_rows|published)\.json)"
    rf"|samples/step-\d+\.png|events\.out\.tfevents\..+"
    rf"|checkpoints/{_STEP}/(trained\.safetensors|optimizer\.safetensors|state\.json|manifest\.json)",
    "evaluation": rf"index\.json|rows\.parquet|table\.md|seconds\.jsonl|(images|rows)-[A-Za-z0-9_-]+-[0-9a-f]{{8}}/{_SHARD}",
}
"""Files that a run writes in its folders, by the folder's name."""
_STAGE_FILES = re.compile(rf"stage\.json|seconds\.jsonl|{_SHARD}")
_FILES = ("recipe.json", "pairs.parquet", "summary.json", "report.html", "ledger.sqlite", "ledger.sqlite-wal", "ledger.sqlite-shm")
"""Answers of models over a wire (`answers.sqlite`) are not among them: they were paid for and are right for whoever asks the same."""
_PAID = _FILES[4:]
_STUDY = ("study.json", "cells", "curations", "search", "pairs")
"""Of a study's folder, which earlier versions gave no mark."""


@dataclass(frozen=True)
class RunFolder:
    """A run folder that this process holds the lock of; `open_run` makes it."""

    path: Path


def _keys_of(path: Path) -> set[str]:
    """The keys of a JSON object, its digest right or not; none when it is no such file."""
    if path.is_symlink() or not path.is_file():
        return set()
    try:
        record = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return set()
    return set(record) if isinstance(record, dict) else set()


def _is_stage(folder: Path) -> bool:
    """Whether a folder is a stage's own: its `stage.json` has the name and fingerprint in the folder's name, or a shard is in it."""
    found = STAGE_FOLDER.fullmatch(folder.name)
    if found is None or folder.is_symlink() or not folder.is_dir():
        return False
    if (folder / "stage.json").exists():
        with suppress(ValueError, RecursionError, KeyError, TypeError):
            described = json.loads((folder / "stage.json").read_bytes())
            return (described["name"], described["fingerprint"][:8]) == found.group(2, 3)
    return any(re.fullmatch(_SHARD, path.name) for path in folder.iterdir()) or not any(folder.iterdir())


def _is_training(folder: Path) -> bool:
    if folder.is_symlink() or not folder.is_dir():
        return False
    return {"objective", "pairs"} <= _keys_of(folder / "config.json") or _has_file(folder, "train", ("cache/*", "checkpoints/*/*"))


def _has_file(folder: Path, part: str, globs: Iterable[str]) -> bool:
    """Whether one of the files that a run writes below one of its folders is there."""
    pattern = re.compile(_PARTS[part])
    return any(pattern.fullmatch(path.relative_to(folder).as_posix()) for glob in globs for path in folder.glob(glob))


def _is_evaluation(folder: Path) -> bool:
    if folder.is_symlink() or not folder.is_dir():
        return False
    return {"models", "num_images"} <= _keys_of(folder / "index.json") or _has_file(folder, "evaluation", ("images-*/*.parquet",))


def _is_rounds(folder: Path) -> bool:
    return not folder.is_symlink() and folder.is_dir() and any(is_run(path) for path in folder.glob("[0-9]*"))


def _is_published(folder: Path) -> bool:
    return not folder.is_symlink() and folder.is_dir() and any("files" in _keys_of(path) for path in folder.glob(f"*/{MANIFEST}"))


_PROOFS: Mapping[str, Callable[[Path], bool]] = {
    "train": _is_training,
    "evaluation": _is_evaluation,
    "rounds": _is_rounds,
    "published": _is_published,
}


def is_run(path: Path) -> bool:
    """Whether something in the folder proves that a run was begun there."""
    if not path.is_dir():
        return False
    return _lock_text(path).startswith(_MARK) or {"recipe", "versions"} <= _keys_of(path / "recipe.json") or bool(_proven(path))


def _proven(path: Path) -> list[Path]:
    """The folders in a run folder that are the run's own."""
    entries = sorted(path.iterdir()) if path.is_dir() else []
    return [entry for entry in entries if _is_stage(entry) or (entry.name in _PROOFS and _PROOFS[entry.name](entry))]


def run_contents(path: Path) -> list[Path]:
    """What a run left in its folder, sorted: the part of it that `--overwrite` removes. Nothing where nothing proves a run."""
    if not is_run(path):
        return []
    return sorted([*_proven(path), *(path / name for name in _FILES if (path / name).is_file() and not (path / name).is_symlink())])


def has_work(path: Path) -> bool:
    """Whether the run has results: a shard of a stage behind the plan, pairs, a checkpoint, weights, an evaluation, a finished round."""
    for entry in run_contents(path):
        if STAGE_FOLDER.fullmatch(entry.name) and not entry.name.startswith("0_") and any(entry.glob("*.parquet")):
            return True
        if entry.name in ("pairs.parquet", "summary.json", "evaluation", "published"):
            return True
        if entry.name == "train" and has_checkpoint(entry):
            return True
        if entry.name == "rounds" and any(has_work(inner) for inner in entry.iterdir()):
            return True
    return False


def has_checkpoint(folder: Path) -> bool:
    """Whether a training folder holds a checkpoint or weights."""
    return has_weights(folder) or any(re.fullmatch(_STEP, path.name) for path in (folder / "checkpoints").glob("*"))


def has_weights(folder: Path) -> bool:
    """Whether a training folder holds weights that a training wrote; one of these files is in every such folder."""
    return any((folder / "weights" / name).is_file() for name in (MANIFEST, "model_index.json", "pytorch_lora_weights.safetensors"))


def _lock_text(path: Path) -> str:
    """What the folder's lock file says; nothing without one."""
    lock = path / LOCK
    if lock.is_symlink() or not lock.is_file() or lock.stat().st_size > 64:
        return ""
    return lock.read_bytes().decode(errors="replace")


def _refuse_foreign(path: Path) -> None:
    if not path.is_dir() or is_run(path):
        return
    locked_before = _lock_text(path).strip().isdigit()
    if locked_before and any((path / name).exists() for name in _STUDY):
        return
    known = ("answers.sqlite", "answers.sqlite-wal", "answers.sqlite-shm", *_PAID)  # of a try that ended before its first shard
    foreign = sorted(entry.name for entry in path.iterdir() if entry.name not in known and entry.name != LOCK)
    if foreign or not (locked_before or _lock_text(path) == ""):
        raise RpoError(f"{path} exists and is not a run folder (it holds {[*foreign, LOCK][0]!r}, for one). Choose a new folder.")


def _lock(path: Path) -> int:
    """File descriptor that holds the lock; the kernel drops it with the process, however that ends."""
    file = path / LOCK
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise RpoError(f"{file} is no regular file; remove it, or choose another folder.")
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 64, 0).decode(errors="replace").removeprefix(_MARK).strip()
            os.close(descriptor)
            who = f"is being written by process {holder}" if holder.isdigit() else "is in use by another process, such as an export"
            raise RpoError(f"{path} {who}. Wait for it, end it, or choose another folder.") from error
        except BaseException:
            os.close(descriptor)
            raise
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(file, follow_symlinks=False)):
                break
        os.close(descriptor)  # who held it before has removed the file
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{_MARK}{os.getpid()}\n".encode(), 0)
    return descriptor


@contextmanager
def reading_run(path: Path) -> Generator[None, None, None]:
    """Holds the run folder's lock shared with other readers, so that nobody writes in it meanwhile.

    Raises `RpoError` when a process is writing. A folder that cannot be locked, such as one on a read-only disk, is read without.
    """
    try:
        descriptor = os.open(path / LOCK, os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    except OSError:
        descriptor = None
    try:
        if descriptor is not None:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RpoError(f"{path} is being written by another process. Wait for it, or end it.") from error
            except OSError:
                pass
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _written(folder: Path, part: str) -> Callable[[Path], bool]:
    """Tells which files below a folder of a run the run wrote."""
    pattern = re.compile(_PARTS[part])
    weights = _listed(folder / "weights") if part == "train" and has_weights(folder) else set[Path]()
    return lambda path: pattern.fullmatch(path.relative_to(folder).as_posix()) is not None or path in weights


def _listed(folder: Path) -> set[Path]:
    """The files of a folder that its manifest lists, and the manifest; all of them where an earlier version wrote none."""
    if folder.is_symlink() or not folder.is_dir():
        return set()
    try:
        listed = listed_files(folder, "")
    except RpoError:
        listed = None
    return {folder / name for name in (*listed, MANIFEST)} if listed is not None else {*files_of(folder), folder / MANIFEST}


def remove_run(path: Path, *, keep: tuple[str, ...] = ()) -> None:
    """Removes what a run left in its folder but for `keep`; what no run wrote stays, and no link is followed.

    Raises `RpoError` before anything is removed when a part of the run is a link.
    """
    contents = [entry for entry in run_contents(path) if entry.name not in keep]
    names = [*_PROOFS, *_FILES]
    for entry in path.iterdir():
        if entry.is_symlink() and (entry.name in names or STAGE_FOLDER.fullmatch(entry.name)):
            raise RpoError(f"{entry} is a link, and --overwrite removes nothing through one. Remove the link, or choose a new folder.")
    if path / "train" in contents:
        _refuse_weights(path / "train")
    # The recipe goes last: as long as it is there, the rest is known to be a run's.
    for entry in sorted(contents, key=lambda entry: entry.name == "recipe.json"):
        if not entry.is_dir():
            entry.unlink(missing_ok=True)
        else:
            _remove_part(entry)


def remove_stage(folder: Path) -> None:
    """Removes what a stage wrote in its folder, and the folder if that empties it."""
    sweep(folder)
    remove_files(folder, lambda path: _STAGE_FILES.fullmatch(path.name) is not None)


def _remove_part(folder: Path) -> None:
    if STAGE_FOLDER.fullmatch(folder.name):
        remove_stage(folder)
    elif folder.name == "rounds":
        for inner in folder.iterdir():
            if is_run(inner) and not inner.is_symlink():
                remove_run(inner)
                for part in (inner, inner / "validation"):
                    sweep_folders(part)
                _remove_listed(inner / "policy")
                if (inner / "validation").is_dir():
                    remove_run(inner / "validation")
                    _remove_empty(inner / "validation")
                _remove_empty(inner)
        _remove_empty(folder)
    elif folder.name == "published":
        for inner in folder.iterdir():
            if inner.is_dir() and (inner / MANIFEST).is_file():
                _remove_listed(inner)
        sweep_folders(folder)
        _remove_empty(folder)
    elif folder.name == "train":
        remove_training(folder, keep_cache=False)
    else:
        for place in (folder, *folder.glob("*-*")):
            sweep(place)
        remove_files(folder, _written(folder, folder.name))


def remove_training(folder: Path, *, keep_cache: bool) -> None:
    """Removes what a training wrote in its folder. Raises `RpoError`, and removes nothing, for a link or a folder of something else."""
    with disk_errors(folder):
        if folder.is_symlink():
            raise RpoError(f"{folder} is a link, and nothing is removed through one. Remove the link, or choose a new folder.")
        if not folder.exists():
            return
        written = _written(folder, "train")
        files = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
        if files and not _is_training(folder) and not any(map(written, files)) and not all(is_temporary(path) for path in files):
            raise RpoError(f"{folder} is no training of rpo's (it holds {files[0].name!r}, for one). Choose a new run folder.")
        _refuse_weights(folder)
        for place in (folder, folder / "cache", folder / "checkpoints", folder / "samples"):
            sweep(place)
            sweep_folders(place)
        remove_files(folder, lambda path: written(path) and not (keep_cache and path.parent == folder / "cache"))


def _refuse_weights(folder: Path) -> None:
    """Raises `RpoError` when the folder of weights, whose place the next ones take, holds what no training wrote."""
    ours = _written(folder, "train")
    for path in (folder / "weights").rglob("*"):
        if path.is_symlink() or (not path.is_dir() and not ours(path)):
            raise RpoError(f"{path} was written by no training, and the weights of the next one belong there; move it elsewhere.")


def _remove_listed(folder: Path) -> None:
    listed = _listed(folder)
    if listed:
        remove_files(folder, listed.__contains__)


def _remove_empty(folder: Path) -> None:
    (folder / LOCK).unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def _remove_try(path: Path) -> None:
    """Removes what a run without results left; the account of what was paid stays, and what training has cached."""
    cached = any((path / "train" / "cache").glob("*")) or any((path / "train" / "checkpoints").glob("*"))
    remove_run(path, keep=(*_PAID, *(["train"] if cached else [])))


def _forget_try(path: Path, *, created: bool) -> None:
    """Removes what a try left that ended before its first result; the account of what was paid stays."""
    with suppress(OSError, RpoError):
        if has_work(path):
            return
        _remove_try(path)
        if {entry.name for entry in path.iterdir()} == {LOCK}:
            (path / LOCK).unlink()
            if created:
                path.rmdir()


@contextmanager
def open_run(path: Path, *, resume: bool = False, overwrite: bool = False) -> Generator[RunFolder, None, None]:
    """Makes or enters the run folder `path` and holds its lock while the block runs.

    A folder that already holds results of a run needs `resume` (go on with it) or `overwrite` (what the run wrote is removed; files
    that no run makes are left). A block that fails before there is a result leaves nothing. Raises `RpoError` when the folder is
    no run folder, cannot be written, or another process writes in it.
    """
    if resume and overwrite:
        raise ValueError("resume and overwrite exclude each other: go on with what is there, or begin anew")
    created = not path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
        _refuse_foreign(path)
        descriptor = _lock(path)
    except OSError as error:
        why = f"{error.strerror or error}" + (f": {LOCK} is a link, remove it" if (path / LOCK).is_symlink() else "")
        raise RpoError(f"cannot write in {path} ({why}). Choose a folder that you may write in.") from error
    try:
        with disk_errors(path):
            if not resume and not overwrite:
                if has_work(path):
                    raise RpoError(
                        f"{path} already holds a run. Go on with it by --resume, replace it by --overwrite, or choose a new folder."
                    )
                _remove_try(path)
            if overwrite:
                remove_run(path)
            sweep(path)
            sweep_folders(path)
        try:
            yield RunFolder(path)
        except BaseException:
            _forget_try(path, created=created)
            raise
    finally:
        with suppress(OSError):
            os.ftruncate(descriptor, len(_MARK))
        os.close(descriptor)
