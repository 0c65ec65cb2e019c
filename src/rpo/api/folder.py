"""What the parts of a run leave for each other in its folder: recipe, summary, pairs, weights."""

import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rpo import __version__
from rpo.core.described import described
from rpo.core.hashing import model_identity
from rpo.core.records import read_record, write_record
from rpo.core.run_folder import RunFolder
from rpo.data.prompts import read_prompts
from rpo.errors import RpoError
from rpo.recipe import PromptSource, Recipe, Sampler
from rpo.training.runtime.checkpoint import check_weights, is_trained, read_config

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
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
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


def same_model(one: str, other: str) -> bool:
    """Whether two names mean the same weights: folders by their content, models of the Hub by id and revision.

    A name of the Hub without a revision is taken for any revision of that model.
    """
    if one == other:
        return True
    here = [Path(name).exists() for name in (one, other)]
    if any(here):
        return all(here) and model_identity(one) == model_identity(other)
    (a, _, revision_a), (b, _, revision_b) = one.partition("@"), other.partition("@")
    return a == b and not (revision_a and revision_b)


def drawn_by(sampler: Sampler, model: str) -> bool:
    """Whether the sampler draws with that model."""
    return any(same_model(name, model) for name in sampler.models())


def check_drawn_by(sampler: Sampler, model: str) -> None:
    """Raises `ValueError` where pictures would be drawn with another model than the one that is tuned."""
    if not drawn_by(sampler, model):
        raise ValueError(f"{model} is tuned, and pictures would be drawn with {sampler.models()[0]}; add --generator.model {model}")


def check_base(sampler: Sampler, folder: Path, option: str = "") -> None:
    """Raises `ValueError` where the run in `folder` tuned another model than the sampler draws with.

    Of a base that is no longer where it was, the hash that the run kept decides; a run of an older version kept none, and then the
    folder's name has to do.
    """
    model = read_config(folder / "train").get("model")
    if model is None:
        return
    kept = read_summary(folder).get("training", {}).get("model_identity", "")
    drawn = sampler.models()
    if kept.startswith("sha256:"):
        same = kept in {model_identity(name) for name in drawn}
    elif Path(model).is_absolute() and not Path(model).exists():
        same = Path(model).name in {Path(name).name for name in drawn}
    else:
        same = drawn_by(sampler, model)
    if not same:
        weights = folder / "train" / "weights"
        whole = f", or compare the pipeline {weights} itself" if (weights / "model_index.json").exists() else ""
        raise ValueError(
            f"{option + ': ' if option else ''}{folder} was tuned on {model}, and pictures would be drawn with {drawn[0]}, "
            f"which has other weights; add --generator.model {model}{whole}"
        )


def read_weights(run: RunFolder) -> Path:
    """The folder of a run's tuned weights, once they prove whole. Raises `RpoError` when there are none, or they are damaged."""
    if not is_trained(run.path / "train"):
        raise RpoError(f"{run.path} holds no tuned weights; make them with `rpo train`")
    check_weights(run.path / "train" / "weights")
    return run.path / "train" / "weights"
