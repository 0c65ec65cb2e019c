"""What the parts of a run leave for each other in its folder: recipe, summary, pairs, weights."""

import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rpo import __version__
from rpo.config import PromptSource, Recipe, Sampler
from rpo.data.prompts import read_prompts
from rpo.data.records import read_record, write_record
from rpo.data.run_folder import RunFolder
from rpo.described import described
from rpo.errors import RpoError
from rpo.train.state import check_weights, is_trained

PAIRS = "pairs.parquet"
SUMMARY = "summary.json"
RECIPE = "recipe.json"
ROUNDS = "rounds"
SUMMARY_VERSION = 1
_PACKAGES = ("torch", "diffusers", "transformers", "peft", "pyarrow", "numpy", "pillow")


def read_summary(folder: Path) -> dict[str, Any]:
    """What is known of the run so far; an empty one for a new folder."""
    way_out = "Remove it, and run the parts of the run again with --resume: what is done is kept and is counted again."
    summary = read_record(folder / SUMMARY, way_out)
    return {"version": SUMMARY_VERSION, "seconds": {}} if summary is None else {"seconds": {}} | summary


def read_recipe(folder: Path) -> dict[str, Any]:
    """`recipe.json` of a run folder; an empty one where there is none."""
    return read_record(folder / RECIPE, "Remove it and run `rpo curate` or `rpo train` with --resume, which writes it again.") or {}


def update_summary(folder: Path, changes: Mapping[str, Any], seconds: Mapping[str, float]) -> None:
    summary = read_summary(folder)
    summary |= changes
    summary["seconds"] |= {name: round(value, 2) for name, value in seconds.items()}
    write_record(folder / SUMMARY, summary)


def _git_revision() -> str | None:
    """Of the source tree this package runs from, when it is one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def write_recipe(run: RunFolder, recipe: Recipe) -> None:
    """The resolved recipe, package versions and git revision, before the first row or step."""
    record = {
        "recipe": described(recipe),
        "versions": {"python": sys.version.split()[0], "rpo": __version__} | {name: _version(name) for name in _PACKAGES},
        "git": _git_revision(),
    }
    write_record(run.path / RECIPE, record)


def understood_prompts(source: PromptSource, seed: int, file: Path | None) -> dict[str, str | None]:
    """The user's prompts or the recipe's own, each understood, with their kinds if known.

    Raises `ValueError` that names the file and the prompt's number.
    """
    prompts = read_prompts(file) if file else dict.fromkeys(source.prompts(seed))
    for number, prompt in enumerate(prompts, start=1):
        try:
            source.check(prompt)
        except ValueError as error:
            raise ValueError(f"{file}, prompt {number}: {error}" if file else str(error)) from error
    return prompts


def drawn_by(sampler: Sampler, model: str) -> bool:
    """Whether the sampler draws with that model, which may lie elsewhere by now: folders are known by their last name."""
    return Path(model).name in {Path(name.partition("@")[0]).name for name in sampler.models()}


def check_drawn_by(sampler: Sampler, model: str) -> None:
    """Raises `ValueError` where pictures would be drawn with another model than the one that is tuned."""
    if not drawn_by(sampler, model):
        raise ValueError(f"{model} is tuned, and pictures would be drawn with {sampler.models()[0]}; add --generator.model {model}")


def read_weights(run: RunFolder) -> Path:
    """The folder of a run's tuned weights, once they prove whole. Raises `RpoError` when there are none, or they are damaged."""
    if not is_trained(run.path / "train"):
        raise RpoError(f"{run.path} holds no tuned weights; make them with `rpo train`")
    check_weights(run.path / "train" / "weights")
    return run.path / "train" / "weights"
