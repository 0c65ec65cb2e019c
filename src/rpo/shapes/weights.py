"""The embedded weights: where they are, and that they are what they were."""

import hashlib
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from rpo.errors import RpoError

CARD = "card.json"
"""Beside the weights: how they were made, their measured quality, and the sha256 of every file."""
BASE_SAMPLER: dict[str, Any] = {"steps": 6, "guidance": 1.5}
EDITOR_SAMPLER: dict[str, Any] = {"steps": 1, "guidance": 1.0, "image_guidance": 1.0}
"""How the card's figures, and the recipe `shapes`, sample the two diffusion models."""


def file_hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file below `folder` but the card, by relative name."""
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CARD)
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def weights_folder() -> Path:
    """The folder of the weights that ship with the package, unchecked."""
    return Path(str(files("rpo.shapes") / "weights"))


def checked_weights(folder: Path) -> Path:
    """`folder`, once its files have the hashes of its card. Raises `RpoError` if one is missing, changed or unknown."""
    try:
        expected: dict[str, str] = json.loads((folder / CARD).read_text())["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RpoError(
            f"no card of weights at {folder / CARD} ({error}). Install the package again, or make them: "
            f"`rpo shapes train --out {folder}`, then `rpo shapes measure --folder {folder}`."
        ) from error
    found = file_hashes(folder)
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        how = "missing" if wrong[0] not in found else "not what its card says"
        raise RpoError(
            f"the embedded weights in {folder} are damaged: {wrong[0]} is {how}. "
            f"Install the package again, or make them: `rpo shapes train --out {folder}`, then `rpo shapes measure --folder {folder}`."
        )
    return folder
