"""A folder that is whole or absent, and proves what it holds: how checkpoints, weights, policies and exports are committed.

It is made under a random name beside its place, synced, and renamed. A lock on it tells a maker at work from one that was killed.
"""

import fcntl
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rpo.core.parquet import fsync, umask
from rpo.core.records import read_record, write_record
from rpo.errors import RpoError, disk_errors

MANIFEST = "manifest.json"
_NAMES = {"partial": ".partial-{}-{}", "old": ".old-{}-{}"}
_OURS = re.compile(r"\.(partial|old)-.+-[0-9a-f]{16}")
_BEFORE = re.compile(r"\.partial-(step-\d+|weights|policy)|\.adopting-\d+_[a-z0-9_]+-[0-9a-f]{8}")
"""Temporary folders of earlier versions."""


@contextmanager
def atomic_folder(final: Path, *, manifest: bool = False, replace: bool = True) -> Generator[Path, None, None]:
    """Yields an empty folder that becomes `final` when the block ends well, synced to the disk; with `manifest`, with one of its files.

    A folder of that name is replaced, or with `replace=False` stays and `RpoError` is raised. When anything fails, `final` is
    as it was. An error of the disk becomes an `RpoError`.
    """
    with disk_errors(final):
        with temporary_folder(final) as partial:
            yield partial
            if manifest:
                write_manifest(partial)
            _finish(partial)
            _put(partial, final, replace=replace)
        fsync(final.parent)


@contextmanager
def temporary_folder(place: Path) -> Generator[Path, None, None]:
    """Yields an empty folder beside `place`, locked while the block runs and removed after it, unless it was renamed."""
    folder = place.with_name(_NAMES["partial"].format(place.name, secrets.token_hex(8)))
    folder.mkdir(parents=True)
    try:
        lock = _locked(folder)
        try:
            yield folder
        finally:
            if lock is not None:
                os.close(lock)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _locked(folder: Path) -> int | None:
    """A descriptor that holds the folder's lock, `None` where the file system has no locks or another process holds it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _finish(folder: Path) -> None:
    """Modes by umask, and every file and folder on the disk."""
    mode = 0o666 & ~umask()
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_file() and not path.is_symlink() and path.stat().st_nlink == 1:  # a hard link is somebody else's file as well
            os.chmod(path, mode)
        fsync(path)
    fsync(folder)


def _put(partial: Path, final: Path, *, replace: bool) -> None:
    """Renames `partial` to `final`; a folder that is there is renamed aside first and removed last. Several may do so at once."""
    aside: list[Path] = []
    try:
        while True:
            try:
                os.rename(partial, final)
                break
            except OSError:
                if not final.is_dir() or final.is_symlink():
                    raise
                if not replace:
                    raise RpoError(f"{final} exists; replace it by --overwrite, or choose another") from None
            old = final.with_name(_NAMES["old"].format(final.name, secrets.token_hex(8)))
            with suppress(FileNotFoundError):  # another process was faster
                os.rename(final, old)
                aside.append(old)
    except BaseException:
        if aside:
            with suppress(OSError):
                os.rename(aside[0], final)
        raise
    for old in aside:
        shutil.rmtree(old, ignore_errors=True)


def restore_folder(final: Path) -> None:
    """Gives a folder its name back that a killed process had renamed aside, and not replaced yet."""
    if not final.exists():
        pattern = re.compile(rf"\.old-{re.escape(final.name)}-[0-9a-f]{{16}}")
        aside = [path for path in final.parent.glob(".old-*") if pattern.fullmatch(path.name) and not path.is_symlink()]
        for path in sorted(aside, key=lambda path: path.stat().st_mtime)[-1:]:
            os.rename(path, final)


def sweep_folders(parent: Path, name: str | None = None) -> None:
    """Removes the temporary folders that killed makers left in `parent`, of `name` or of all names; never one whose maker is at work."""
    for left in parent.iterdir() if parent.is_dir() else ():
        ours = _OURS.fullmatch(left.name) if name is None else re.fullmatch(rf"\.(partial|old)-{re.escape(name)}-[0-9a-f]{{16}}", left.name)
        if not (ours or (name is None and _BEFORE.fullmatch(left.name))) or left.is_symlink() or not left.is_dir():
            continue
        lock = _locked(left)
        if lock is not None:
            try:
                shutil.rmtree(left)
            finally:
                os.close(lock)


def remove_files(folder: Path, ours: Callable[[Path], bool]) -> list[Path]:
    """Removes the files below `folder` that are `ours`, and the folders that this empties; gives what stays.

    Links stay, and are not followed.
    """
    stays: list[Path] = []
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            stays += remove_files(path, ours)
        elif path.is_symlink() or not ours(path):
            stays.append(path)
        else:
            path.unlink()
    if not stays:
        folder.rmdir()
    return stays


def files_of(folder: Path) -> list[Path]:
    """The files below a folder, sorted, without its manifest."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)


def sha256_of(path: Path) -> str:
    """Of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path) -> None:
    """Size and sha256 of every file of the folder, in its `manifest.json`."""
    files = {path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in files_of(folder)}
    write_record(folder / MANIFEST, {"version": 1, "files": files}, indent=1)


def listed_files(folder: Path, way_out: str) -> dict[str, tuple[int, str]] | None:
    """(bytes, sha256) by name as the folder's manifest has them, `None` without one. Raises `RpoError` when it is damaged."""
    manifest = read_record(folder / MANIFEST, way_out)
    if manifest is None:
        return None
    try:
        listed: Mapping[str, Any] = dict(manifest["files"])
        return {name: (entry["bytes"], entry["sha256"]) for name, entry in listed.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RpoError(f"{folder / MANIFEST} is damaged ({type(error).__name__}: {error}). {way_out}") from error


def check_manifest(folder: Path, way_out: str) -> bool:
    """Whether the folder has a manifest. Raises `RpoError` that names the first file that is missing or not what the manifest says."""
    listed = listed_files(folder, way_out)
    for name, wanted in (listed or {}).items():
        path = folder / name
        with disk_errors(path):
            try:
                found = path.stat(follow_symlinks=False)
            except FileNotFoundError as error:
                raise RpoError(f"{path} is missing. {way_out}") from error
            if not stat.S_ISREG(found.st_mode) or (found.st_size, sha256_of(path)) != wanted:
                raise RpoError(f"{path} is damaged: it is not what {MANIFEST} says. {way_out}")
    return listed is not None
