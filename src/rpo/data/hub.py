"""A published dataset: one folder that `datasets.load_dataset` opens, that the trainer reads, and that proves what it holds.

    README.md            the card: what made the pairs, with which models, what was dropped and why
    manifest.json        size and sha256 of every other file
    data/train-*.parquet, data/held_out-*.parquet      the pairs
    rejected/rejected-*.parquet                        every dropped candidate, with its images and the reason
    rows/rows-*.parquet                                every row of the run, without images: its status and all that was measured

From these every number of the card can be computed again.
"""

import time
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa

from rpo.core.atomic import MANIFEST, atomic_folder, files_of, listed_files, restore_folder, sha256_of, sweep_folders
from rpo.core.parquet import atomic_path, open_writer
from rpo.core.records import read_record, write_record
from rpo.data.formats.files import is_junk
from rpo.errors import RpoError, disk_errors

CARD = "README.md"
SHARD_BYTES = 256 * 2**20
"""About this much in a file: the Hub wants fewer files than a run has shards."""
_SETTLED_NS = 2 * 10**9
"""A file changed more recently may change again within one tick of its time."""
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

    Raises `RpoError` when `target` exists, unless it is an earlier export and `overwrite` is set, and when it holds a file that no
    export wrote. It is made under a random name; of two that make one target at once both succeed, or the later one is refused.
    """
    with disk_errors(target):
        restore_folder(target)
    _refuse_target(target, overwrite)
    with atomic_folder(target, manifest=True, replace=overwrite) as folder:
        yield folder
        _refuse_target(target, overwrite)
    with suppress(OSError):
        sweep_folders(target.parent, target.name)


def _refuse_target(target: Path, overwrite: bool) -> None:
    """Raises `RpoError` unless nothing is at `target`, or an earlier export alone that may be replaced."""
    with disk_errors(target):
        if not target.exists() and not target.is_symlink():
            return
        whole = target.is_dir() and not target.is_symlink()
        listed = listed_files(target, "Remove the folder, or choose another with --to.") if whole else None
        if listed is None:
            raise RpoError(f"{target} exists; choose another folder with --to")
        if not overwrite:
            raise RpoError(f"{target} exists; replace it by --overwrite, or choose another")
        for path in files_of(target):
            name = path.relative_to(target).as_posix()
            if name not in listed and not (name.startswith(".cache/") or is_junk(path.name)):
                raise RpoError(f"{path} was written by no export and would be removed; move it, or choose another folder with --to")


def check_published(folder: Path, seen: Path | None = None) -> dict[str, Any]:
    """The manifest of a published folder, once every file is what it says. Raises `RpoError` that names what is not.

    The card may be edited, and what file managers and downloads leave behind is no part of the dataset. In the file `seen`, if given,
    sizes, times and inodes of the files that were read are kept: those that have not changed are not read again.
    """
    again = "Export or download the dataset again."
    wanted = listed_files(folder, again)
    if wanted is None:
        raise RpoError(f"{folder} is no published dataset: it has no {MANIFEST}. Make one with `rpo export`.")
    with disk_errors(folder):
        there = {file.relative_to(folder).as_posix(): file for file in files_of(folder) if not file.is_symlink()}
        there = {name: file for name, file in there.items() if not any(map(is_junk, name.split("/")))}
        if odd := wanted.keys() ^ there.keys():
            name = sorted(odd)[0]
            raise RpoError(f"{folder / name} is {'missing' if name in wanted else 'not in the manifest'}. {again}")
        before = _seen(seen, folder)
        began, now = time.time_ns(), dict[str, list[int | str]]()
        for name, file in there.items():
            at = file.stat()
            state: list[int | str] = [at.st_size, at.st_mtime_ns, at.st_ctime_ns, at.st_ino, at.st_dev, wanted[name][1]]
            if name != CARD and before.get(name) != state and (at.st_size, sha256_of(file)) != wanted[name]:
                raise RpoError(f"{file} is damaged: it is not what {MANIFEST} says. {again}")
            if name != CARD and max(at.st_mtime_ns, at.st_ctime_ns) < began - _SETTLED_NS:  # a later change shows in its times
                now[name] = state
    if seen and now != before:
        seen.parent.mkdir(parents=True, exist_ok=True)
        write_record(seen, {"folder": str(folder.resolve()), "files": now})
    return read_record(folder / MANIFEST, again) or {}


def _seen(record: Path | None, folder: Path) -> dict[str, list[int | str]]:
    """What `check_published` kept of this folder; nothing where that is missing or damaged, for then all is read again."""
    try:
        kept = (record and read_record(record, "")) or {}
    except RpoError:
        return {}
    files = kept.get("files") if kept.get("folder") == str(folder.resolve()) else None
    return files if isinstance(files, dict) else {}


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
