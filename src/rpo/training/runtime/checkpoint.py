"""What a run must not lose: checkpoints that are whole or absent, and the folder they live in.

A checkpoint is a folder `checkpoints/step-000050/` with `trained.safetensors` (weights), `optimizer.safetensors`, `state.json`
and, written last, `manifest.json` with the sha256 of the others. It is committed as a whole. The newest ones are kept, and the one
with the best accuracy on held-out pairs. One that is damaged is renamed to `damaged-step-000050-…`, and one that cannot be read stays.
"""

import json
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rpo.core.atomic import MANIFEST, atomic_folder, check_manifest, sha256_of, sweep_folders
from rpo.core.parquet import sweep
from rpo.core.records import read_record, write_record
from rpo.core.run_folder import has_checkpoint, has_weights, remove_training
from rpo.errors import RpoError, disk_errors
from rpo.training.runtime.metrics import Trend, Watch
from rpo.training.runtime.optimizer import Descent

CONFIG = "config.json"
_MADE_AGAIN = "Remove the folder of these weights and run `rpo train` with --resume, which saves them again from the last checkpoint."
_ANEW = "Start anew with --overwrite, which keeps the cache, or restore the file."
_STEP = re.compile(r"step-\d+")
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

    A folder with a checkpoint or weights is continued with `resume` if its config is the same, emptied with `overwrite` of what
    training wrote (all but the cache, whose files are named by content), and refused otherwise (`RpoError`), as is a folder of
    something else.
    """
    if resume and overwrite:
        raise ValueError("resume and overwrite exclude each other; give one of them")
    if overwrite or (not resume and not has_checkpoint(folder)):
        remove_training(folder, keep_cache=True)
    elif not resume:
        raise RpoError(f"{folder} holds a training run already; --resume goes on with it, --overwrite starts anew")
    elif before := read_config(folder):
        _check_same(before, config, folder)
    elif has_weights(folder):
        raise RpoError(f"{folder / 'weights'} is there without the {CONFIG} of the training that made it; move it elsewhere.")
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for place in (folder, folder / "cache"):
            sweep(place)
            sweep_folders(place)
    write_record(folder / CONFIG, config)


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a training folder; an empty one where there is none."""
    return read_record(folder / CONFIG, _ANEW) or {}


def is_trained(folder: Path) -> bool:
    """Whether finished weights are there: with a manifest, or by an earlier version, which wrote none, beside their `config.json`."""
    weights = folder / "weights"
    return (weights / MANIFEST).is_file() or (has_weights(folder) and (folder / CONFIG).is_file())


def check_weights(weights: Path) -> None:
    """Raises `RpoError` for saved weights that are damaged, by their manifest; those of earlier versions have none, and must be finite."""
    if check_manifest(weights, _MADE_AGAIN):
        return
    for path in sorted(weights.rglob("*.safetensors")):
        with disk_errors(path):
            try:
                finite(load_file(path), path)
            except SafetensorError as error:
                raise RpoError(f"{path} is damaged ({error}). {_MADE_AGAIN}") from error


def finite(weights: Mapping[str, Tensor], path: Path | None = None) -> Mapping[str, Tensor]:
    """The weights as they are. Raises `RpoError` when one of them is infinite or not a number."""
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            where, way = (f"{path}: ", _MADE_AGAIN) if path else ("", "Lower lr or k, or use precision='fp32'.")
            raise RpoError(f"{where}the weights {name} are not finite. {way}")
    return weights


def save_checkpoint(folder: Path, state: TrainState, weights: Mapping[str, Tensor], optimizer: Mapping[str, Tensor], *, keep: int) -> None:
    """Commits a checkpoint under `folder` and removes all but the newest `keep` and the best."""
    with atomic_folder(folder / _name(state.step)) as partial:
        save_file(dict(weights), partial / "trained.safetensors")
        save_file(dict(optimizer), partial / "optimizer.safetensors")
        (partial / "state.json").write_text(json.dumps(asdict(state)))
        hashes = {file: sha256_of(partial / file) for file in _FILES}
        (partial / "manifest.json").write_text(json.dumps(hashes, indent=2))
    _prune(folder, state, keep)


def _prune(folder: Path, state: TrainState, keep: int) -> None:
    """Removes all checkpoints but the newest `keep` and the best."""
    for old in checkpoints(folder)[:-keep]:
        if old.name != _name(state.best_step):
            with disk_errors(old):
                shutil.rmtree(old)


def load_newest(folder: Path, descent: Descent, say: Callable[[str], None], keep: int | None = None) -> TrainState:
    """Loads the newest whole checkpoint into `descent` and what it moves; without any, they stay as they are at step 0.

    Says which damaged ones it passed over, and renames them. Raises `RpoError` when one cannot be read, and leaves it as it is.
    """
    with disk_errors(folder):
        sweep_folders(folder)
    for path in reversed(checkpoints(folder)):
        damage = _damage(path)
        if damage is None:
            state = _load(path, descent)
            if keep is not None:
                _prune(folder, state, keep)  # what a kill between a checkpoint and this left
            return state
        aside = path.with_name(f"damaged-{path.name}-{secrets.token_hex(4)}")
        say(f"{path} is damaged ({damage}); going back to the checkpoint before it. It is kept as {aside.name}")
        with disk_errors(path):
            os.rename(path, aside)
    return TrainState()


def checkpoints(folder: Path) -> list[Path]:
    """Oldest first."""
    found = (path for path in folder.glob("step-*") if _STEP.fullmatch(path.name) and path.is_dir())
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def best_weights(folder: Path, state: TrainState) -> dict[str, Tensor]:
    """What training would have saved at its best step. Raises `RpoError` when that checkpoint is damaged."""
    path = folder / _name(state.best_step)
    if damage := _damage(path):
        raise RpoError(f"{path}, the best checkpoint, is damaged ({damage}); take the last weights with --train.result last")
    optimizer = load_file(path / "optimizer.safetensors")
    return {name: optimizer.get(f"{name}/average", value) for name, value in load_file(path / "trained.safetensors").items()}


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
    """What is wrong with a checkpoint, or `None`: only a digest that differs and a missing file are damage."""
    try:
        with disk_errors(path):
            hashes: dict[str, str] = json.loads((path / "manifest.json").read_bytes())
            wrong = [name for name in _FILES if sha256_of(path / name) != hashes[name]]
    except (ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    except RpoError as error:
        if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
            return f"{error.__cause__.filename} is missing"
        raise
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
