"""What a run must not lose: checkpoints that are whole or absent, and the folder they live in.

A checkpoint is a folder `checkpoints/step-000050/` with `trained.safetensors` (weights), `optimizer.safetensors`, `state.json`
and, written last, `manifest.json` with the sha256 of the others. It is built under another name, synced and then renamed.
Kept are the newest ones and the one that did best on held-out pairs.
"""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from rpo.data.shards import fsync, sweep, write_text
from rpo.errors import RpoError
from rpo.train.descent import Descent
from rpo.train.metrics import Trend, Watch

CONFIG = "config.json"
_PARTIAL = ".partial-"
_FILES = ("trained.safetensors", "optimizer.safetensors", "state.json")


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """The scalars of a run after `step` steps; everything random follows from them and the seed."""

    step: int = 0
    network: str = ""
    """Digest of the untuned network."""
    seconds: float = 0.0
    """Spent in steps so far, over all processes."""
    watch: Watch = Watch()
    best_step: int = 0
    """After which the held-out accuracy was highest; 0 before any was measured."""
    best_accuracy: float = -1.0


def open_train_folder(folder: Path, config: Mapping[str, Any], *, resume: bool, overwrite: bool) -> None:
    """Makes `folder` ready for a run with `config`, which is written to `config.json` before anything else.

    An existing folder is continued with `resume` if its config is the same, emptied with `overwrite` (all but the cache, whose
    files are named by content), and refused otherwise (`RpoError`).
    """
    written = folder / CONFIG
    if resume and overwrite:
        raise ValueError("resume and overwrite exclude each other; give one of them")
    if overwrite and folder.exists():
        _empty(folder)
    elif written.exists():
        if not resume:
            raise RpoError(f"{folder} holds a training run already; --resume goes on with it, --overwrite starts anew")
        _check_same(json.loads(written.read_text()), config, folder)
    folder.mkdir(parents=True, exist_ok=True)
    for place in (folder, folder / "cache"):
        sweep(place)
    write_text(written, json.dumps(config, indent=2) + "\n")


def save_checkpoint(folder: Path, state: TrainState, weights: Mapping[str, Tensor], optimizer: Mapping[str, Tensor], *, keep: int) -> None:
    """Commits a checkpoint under `folder` and removes all but the newest `keep` and the best."""
    partial = folder / f"{_PARTIAL}{_name(state.step)}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(dict(weights), partial / "trained.safetensors")
    save_file(dict(optimizer), partial / "optimizer.safetensors")
    (partial / "state.json").write_text(json.dumps(asdict(state)))
    hashes = {file: _sha256(partial / file) for file in _FILES}
    (partial / "manifest.json").write_text(json.dumps(hashes, indent=2))
    commit_folder(partial, folder / _name(state.step))
    for old in checkpoints(folder)[:-keep]:
        if old.name != _name(state.best_step):
            shutil.rmtree(old)


def load_newest(folder: Path, descent: Descent, say: Callable[[str], None]) -> TrainState:
    """Loads the newest whole checkpoint into `descent` and what it moves; without any, they stay as they are at step 0.

    Says which damaged ones it passed over, and removes them.
    """
    for partial in folder.glob(f"{_PARTIAL}*"):
        shutil.rmtree(partial)
    for path in reversed(checkpoints(folder)):
        damage = _damage(path)
        if damage is None:
            return _load(path, descent)
        say(f"{path} is damaged ({damage}); going back to the checkpoint before it")
        shutil.rmtree(path)
    return TrainState()


def checkpoints(folder: Path) -> list[Path]:
    """Oldest first."""
    return sorted(folder.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))


def best_weights(folder: Path, state: TrainState) -> dict[str, Tensor]:
    """What training would have saved at its best step. Raises `RpoError` when that checkpoint is damaged."""
    path = folder / _name(state.best_step)
    if damage := _damage(path):
        raise RpoError(f"{path}, the best checkpoint, is damaged ({damage}); take the last weights with --train.result last")
    optimizer = load_file(path / "optimizer.safetensors")
    return {name: optimizer.get(f"{name}/average", value) for name, value in load_file(path / "trained.safetensors").items()}


def commit_folder(partial: Path, final: Path) -> None:
    """Makes a finished folder visible under its final name, on the disk as a whole; an older one of that name is replaced."""
    for path in sorted(partial.rglob("*"), reverse=True):
        fsync(path)
    fsync(partial)
    if final.exists():
        shutil.rmtree(final)
    os.rename(partial, final)
    fsync(final.parent)


def _name(step: int) -> str:
    return f"step-{step:06d}"


def _load(path: Path, descent: Descent) -> TrainState:
    values: dict[str, Any] = json.loads((path / "state.json").read_text())
    values["watch"] = Watch(**{name: Trend(**trend) for name, trend in values["watch"].items()})
    state = TrainState(**values)
    try:
        descent.load(load_file(path / "trained.safetensors"), load_file(path / "optimizer.safetensors"), state.step)
    except RpoError as error:
        raise RpoError(f"the weights in {path} cannot be used: {error}; start anew with --overwrite") from error
    return state


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        hashes: dict[str, str] = json.loads((path / "manifest.json").read_text())
        wrong = [name for name in _FILES if _sha256(path / name) != hashes[name]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return f"{wrong[0]} does not match the manifest" if wrong else None


def _check_same(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    changed: Sequence[str] = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    if changed == ["versions"]:
        warnings.warn(f"{folder} was started with {before['versions']}, now it is {now['versions']}; bits may differ", stacklevel=3)
    elif changed:
        name = changed[0]
        raise RpoError(
            f"{folder} was started with {name} = {json.dumps(before.get(name))}, now it is {json.dumps(now.get(name))}"
            f"{f' ({len(changed) - 1} more differ)' if len(changed) > 1 else ''}; "
            "resume with the old settings, start anew with --overwrite, or take another folder"
        )


def _empty(folder: Path) -> None:
    """The config goes last: as long as it is there, so may be a run that it belongs to."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name == CONFIG):
        if path.is_dir() and path.name != "cache":
            shutil.rmtree(path)
        elif path.is_file():
            path.unlink()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
