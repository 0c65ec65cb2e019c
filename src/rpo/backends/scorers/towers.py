"""What the scorers share: where weights lie, how an image becomes pixels, and one copy of a network for all who use it."""

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import numpy as np
import torch
from huggingface_hub import snapshot_download
from PIL import Image
from torch import nn
from transformers import CLIPModel

from rpo.errors import RpoError

FILES = ("*.json", "*.safetensors", "*.txt", "*.model")
"""What is fetched of a hub model: no pickles, no code."""
Network = TypeVar("Network", bound=nn.Module)

_LOADED: WeakValueDictionary[tuple[object, ...], nn.Module] = WeakValueDictionary()
_LOADING = Lock()


def model_folder(model: str, revision: str | None = None, files: Sequence[str] = FILES) -> Path:
    """The folder of a model: itself, or the snapshot of a commit of the hub. Raises `RpoError` when there is none."""
    if Path(model).is_dir():
        return Path(model)
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(files)))
    except (OSError, ValueError) as error:
        raise RpoError(f"cannot load the model {model!r}: {error}. Give a folder, or a hub id.") from error


def shared(key: tuple[object, ...], load: Callable[[], Network]) -> Network:
    """The network under `key`, loaded once for all who hold it: a check and two rewards on one CLIP cost the memory of one."""
    with _LOADING:
        network = _LOADED.get(key)
        if network is None:
            _LOADED[key] = network = load()
        return network  # type: ignore[return-value]


def clip_model(folder: Path, device: str) -> CLIPModel:
    """The `CLIPModel` of a folder, in float32."""
    load = partial(CLIPModel.from_pretrained, folder, use_safetensors=True, dtype=torch.float32)
    return shared(("clip", str(folder), device), lambda: load().to(device).eval())


@dataclass(frozen=True)
class Preprocessing:
    """Shortest side to `side` (bicubic), centre crop, standardise; written out, so that it depends on no optional library."""

    side: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, folder: Path) -> "Preprocessing":
        """From a CLIP-type `preprocessor_config.json`."""
        file = folder / "preprocessor_config.json"
        if not file.exists():
            raise RpoError(f"{folder} has no preprocessor_config.json, so how its images are scaled is not known")
        settings: dict[str, Any] = json.loads(file.read_text())
        crop = settings["crop_size"]
        side = crop["height"] if isinstance(crop, dict) else crop
        return cls(side, tuple(settings["image_mean"]), tuple(settings["image_std"]))

    def pixels(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        """(b, 3, side, side)."""
        return torch.stack([self._one(image) for image in images])

    def _one(self, image: np.ndarray) -> torch.Tensor:
        height, width = image.shape[:2]
        scale = self.side / min(height, width)
        size = (max(self.side, round(width * scale)), max(self.side, round(height * scale)))
        resized = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)) if size != (width, height) else image
        top, left = (size[1] - self.side) // 2, (size[0] - self.side) // 2
        cropped = torch.from_numpy(resized[top : top + self.side, left : left + self.side].copy()).float() / 255
        # Told in so many words, for a model that is being loaded meanwhile may have set another default for all threads.
        mean, std = (torch.tensor(values, dtype=torch.float32) for values in (self.mean, self.std))
        return ((cropped - mean) / std).permute(2, 0, 1)


def linear_head(width: int) -> nn.Sequential:
    """Five linear layers to one number, nothing between them: the head of ImageReward and of LAION's aesthetic predictor."""
    widths = (width, 1024, 128, 64, 16, 1)
    return nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(widths)))
