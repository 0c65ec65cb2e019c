"""A published dataset: one folder that `datasets.load_dataset` opens, that the trainer reads, and that proves what it holds.

    README.md            the card: what made the pairs, with which models, what fell and why
    manifest.json        size and sha256 of every other file
    data/train-*.parquet, data/held_out-*.parquet      the pairs
    rejected/rejected-*.parquet                        every candidate that fell, with its images and the reason
    rows/rows-*.parquet                                every row of the run, without images: its status and all that was measured

From these every number of the card can be computed again.
"""

import ctypes
import hashlib
import json
import os
import shutil
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from rpo.data.files import is_junk, json_value, open_regular
from rpo.data.shards import atomic_path, fsync, open_writer, write_text
from rpo.errors import RpoError

MANIFEST = "manifest.json"
CARD = "README.md"
MAX_MANIFEST_BYTES = 64_000_000
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
SHARD_BYTES = 256 * 2**20
"""About this much in a file: the Hub wants fewer files than a run has shards."""
CONFIGS: Mapping[str, Mapping[str, Mapping[str, str]]] = {
    "rpo": {
        "default": {"train": "data/train-*.parquet", "held_out": "data/held_out-*.parquet"},
        "rejected": {"rejected": "rejected/rejected-*.parquet"},
        "rows": {"rows": "rows/rows-*.parquet"},
    },
    "pickapic": {"default": {"train": "data/train-*.parquet", "held_out": "data/held_out-*.parquet"}},
    "diffusers": {"default": {"train": "train/**", "held_out": "held_out/**"}},
    "jsonl": {"default": {"train": "train.jsonl", "held_out": "held_out.jsonl"}},
    "folders": {
        "chosen": {"train": "chosen/*.[!t]*", "held_out": "held_out/chosen/*.[!t]*"},
        "rejected": {"train": "rejected/*.[!t]*", "held_out": "held_out/rejected/*.[!t]*"},
    },
    "webdataset": {"default": {"train": "train-*.tar", "held_out": "held_out-*.tar"}},
}
"""By format, for `datasets`: configurations of the dataset, their splits and files."""


def configs(folder: Path, layout: str) -> dict[str, dict[str, str]]:
    """The configurations that a folder holds files of."""
    found = {
        name: {split: files for split, files in splits.items() if any(folder.glob(files))}
        for name, splits in CONFIGS.get(layout, {}).items()
    }
    return {name: splits for name, splits in found.items() if splits}


@contextmanager
def new_folder(target: Path, *, overwrite: bool = False) -> Generator[Path, None, None]:
    """Yields an empty folder that becomes `target`, with a manifest and synced to the disk, when the block ends well; else nothing is left.

    Raises `RpoError` when `target` exists, unless it is an earlier export and `overwrite` is set.
    """
    partial, old = (target.with_name(f"{target.name}{suffix}") for suffix in (".tmp", ".old.tmp"))
    if old.exists() and not target.exists():
        os.replace(old, target)
    if target.exists() and not (overwrite and (target / MANIFEST).is_file()):
        way_out = "choose another folder with --to" if not (target / MANIFEST).is_file() else "replace it by --overwrite, or choose another"
        raise RpoError(f"{target} exists; {way_out}")
    for left in (partial, old):
        shutil.rmtree(left, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        _write_manifest(partial)
        if not (target.exists() and _exchanged(partial, target)):
            if target.exists():
                os.replace(target, old)
            os.replace(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if old.exists() and not target.exists():
            os.replace(old, target)
        raise
    try:
        fsync(target.parent)
    finally:
        for left in (partial, old):
            shutil.rmtree(left, ignore_errors=True)


def _exchanged(first: Path, second: Path) -> bool:
    """Swaps two folders in one step, so that none is ever missing; false where the system cannot (it is Linux's `renameat2`)."""
    swap = getattr(ctypes.CDLL(None), "renameat2", None)
    return swap is not None and swap(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_manifest(folder: Path) -> None:
    files: dict[str, dict[str, Any]] = {}
    for path in _files(folder):
        fsync(path)
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": _digest(path)}
    write_text(folder / MANIFEST, json.dumps({"version": 1, "files": files}, indent=1) + "\n")


def check_published(folder: Path) -> dict[str, Any]:
    """The manifest of a published folder, once every file is what it says. Raises `RpoError` that names what is not.

    The card may be edited, and what file managers and downloads leave behind is no part of the dataset.
    """
    path = folder / MANIFEST
    try:
        with open_regular(path) as file:
            manifest: Any = json_value(file.read(MAX_MANIFEST_BYTES))
        listed: dict[str, Mapping[str, Any]] = dict(manifest["files"])
        wanted = {name: (entry["bytes"], entry["sha256"]) for name, entry in listed.items()}
    except FileNotFoundError as error:
        raise RpoError(f"{folder} is no published dataset: it has no {MANIFEST}. Make one with `rpo export`.") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RpoError(f"{path} is damaged ({error}). Export or download the dataset again.") from error
    there = {file.relative_to(folder).as_posix(): file for file in _files(folder) if not file.is_symlink()}
    there = {name: file for name, file in there.items() if not any(map(is_junk, name.split("/")))}
    if odd := wanted.keys() ^ there.keys():
        name = sorted(odd)[0]
        raise RpoError(
            f"{folder / name} is {'missing' if name in wanted else 'not in the manifest'}. Export or download the dataset again."
        )
    for name, file in there.items():
        if name != CARD and (file.stat().st_size, _digest(file)) != wanted[name]:
            raise RpoError(f"{file} is damaged: it is not what {MANIFEST} says. Export or download the dataset again.")
    return manifest


def write_tables(folder: Path, name: str, schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
    """The tables as Parquet files `NAME-00000.parquet`, … of about 256 MiB; none for no rows."""
    folder.mkdir(parents=True, exist_ok=True)
    rest, number = iter(tables), 0
    following = next(rest, None)
    while following is not None:
        with atomic_path(folder / f"{name}-{number:05d}.parquet") as partial, open_writer(partial, schema) as writer:
            size = 0
            while following is not None and size < SHARD_BYTES:
                writer.write(following)
                size += following.nbytes
                following = next(rest, None)
        number += 1


def push_folder(folder: Path, repository: str, *, private: bool) -> str:
    """Uploads a published folder, once it proves whole; the address of the dataset.

    Raises `ValueError` for a name that is none, `RpoError` without a token or when the Hub refuses.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HFValidationError

    if repository.count("/") != 1 or not all(repository.split("/")):
        raise ValueError(f"--to must be owner/name, got {repository!r}")
    check_published(folder)
    if get_token() is None:
        raise RpoError("there is no token for the Hub: log in with `hf auth login`, or set HF_TOKEN (a token that may write)")
    api = HfApi()
    try:
        api.create_repo(repository, repo_type="dataset", private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, repo_type="dataset", folder_path=str(folder), commit_message="Dataset made by rpo")
    except HFValidationError as error:
        raise ValueError(f"--to must be owner/name: {error}") from error
    except Exception as error:  # its transport has been requests, httpx and httpx2, whose errors have no base in common
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RpoError(f"the Hub did not take {repository}: {reason}. What was uploaded stays; push again to go on.") from error
    return f"https://huggingface.co/datasets/{repository}"
