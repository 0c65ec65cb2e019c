"""LAION's aesthetic predictor (improved-aesthetic-predictor, sac+logos+ava1): CLIP-L sees, five linear layers grade; blind to prompts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from rpo.backends.diffusers.pipelines import Halving, pick_device, pinned
from rpo.backends.scorers.towers import Preprocessing, clip_model, linear_head, model_folder
from rpo.errors import RpoError

HEAD = "aesthetic_head.safetensors"


@dataclass(frozen=True, kw_only=True)
class AestheticConfig:
    """How pleasing a picture is, about 1 to 10."""

    head: str
    """Folder with the head, as `python -m rpo.backends.scorers.convert aesthetic` leaves it."""
    clip: str = "openai/clip-vit-large-patch14"
    """Hub id or folder of the CLIP that the head was trained on."""
    revision: str | None = None
    """Commit, tag or branch of the CLIP; its main branch if not given."""
    device: str | None = None
    """cuda or cpu; the best there is if not given."""

    def models(self) -> tuple[str, ...]:
        return (self.head, pinned(self.clip, self.revision))

    def build(self) -> "AestheticScorer":
        return AestheticScorer(self)


class AestheticScorer:
    """A `Scorer`."""

    def __init__(self, config: AestheticConfig) -> None:
        self.device, self.halving = pick_device(config.device), Halving()
        file = Path(config.head) / HEAD
        if not file.is_file():
            raise RpoError(f"there is no {file}; make it with `python -m rpo.backends.scorers.convert aesthetic CHECKPOINT --out FOLDER`")
        folder = model_folder(config.clip, config.revision)
        self.preprocessing = Preprocessing.of(folder)
        self.model = clip_model(folder, self.device)
        self.head = linear_head(self.model.config.projection_dim)
        self.head.load_state_dict(load_file(file))
        self.head.to(self.device)

    @torch.inference_mode()
    def score(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[float]:
        def run(part: slice) -> list[float]:
            seen = self.model.get_image_features(self.preprocessing.pixels(images[part]).to(self.device)).pooler_output
            return self.head(F.normalize(seen, dim=-1)).squeeze(-1).tolist()

        return self.halving(len(images), run)
