"""Reward models in the layout of PickScore (arXiv 2305.01569): a `CLIPModel` folder whose score is the scaled cosine."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from PIL import Image
from torch.nn import functional as F
from transformers import AutoTokenizer, CLIPModel

from rpo.backends.diffusers_pipelines import pick_device
from rpo.errors import RpoError


@dataclass(frozen=True, kw_only=True)
class ClipScorerConfig:
    """A CLIP-type reward."""

    model: str
    """Hub id or folder of a `CLIPModel` with its tokenizer and `preprocessor_config.json`."""
    device: str | None = None
    """cuda or cpu; the best there is if not given."""

    def models(self) -> tuple[str, ...]:
        return (self.model,)

    def build(self) -> "ClipScorer":
        return ClipScorer(self)


def _preprocessing(model: str) -> tuple[int, torch.Tensor, torch.Tensor]:
    """(side, mean, std) of the image processor's file, read by ourselves: its result then does not depend on an optional library."""
    folder = Path(model) if Path(model).is_dir() else Path(snapshot_download(model, allow_patterns=["preprocessor_config.json"]))
    file = folder / "preprocessor_config.json"
    if not file.exists():
        raise RpoError(f"{model!r} has no preprocessor_config.json, so how its images are scaled is not known")
    settings: dict[str, Any] = json.loads(file.read_text())
    crop = settings["crop_size"]
    return crop["height"] if isinstance(crop, dict) else crop, torch.tensor(settings["image_mean"]), torch.tensor(settings["image_std"])


class ClipScorer:
    """A `Scorer`: `logit_scale * cos(image, text)`, so a difference of two scores is a preference logit."""

    def __init__(self, config: ClipScorerConfig) -> None:
        self.device = pick_device(config.device)
        self.model = CLIPModel.from_pretrained(config.model, use_safetensors=True, dtype=torch.float32).to(self.device).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(config.model)
        self.side, self.mean, self.std = _preprocessing(config.model)

    def _pixels(self, image: np.ndarray) -> torch.Tensor:
        """Shortest side to `side` (bicubic), centre crop, scale and standardise; (3, side, side)."""
        height, width = image.shape[:2]
        scale = self.side / min(height, width)
        size = (max(self.side, round(width * scale)), max(self.side, round(height * scale)))
        resized = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)) if size != (width, height) else image
        top, left = (size[1] - self.side) // 2, (size[0] - self.side) // 2
        cropped = torch.from_numpy(resized[top : top + self.side, left : left + self.side].copy()).float() / 255
        return ((cropped - self.mean) / self.std).permute(2, 0, 1)

    @torch.inference_mode()
    def score(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[float]:
        tokens = self.tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt").to(self.device)
        pixels = torch.stack([self._pixels(image) for image in images]).to(self.device)
        out = self.model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, pixel_values=pixels)
        cosine = (F.normalize(out.image_embeds, dim=-1) * F.normalize(out.text_embeds, dim=-1)).sum(-1)
        return (self.model.logit_scale.exp() * cosine).tolist()
