"""ImageReward (arXiv 2304.05977): BLIP reads the prompt while looking at the picture, five linear layers give the reward."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer, BlipTextConfig, BlipVisionConfig, BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from rpo.backends.diffusers.pipelines import Halving, pick_device
from rpo.backends.scorers.towers import Preprocessing, linear_head, shared
from rpo.errors import RpoError

TOKENS = 35
"""Prompts are cut here, as the authors do."""
MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the raw reward over the authors' data; rewards are given standardised."""
_PIXEL_MEAN, _PIXEL_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class ImageRewardNetwork(nn.Module):
    """Vision transformer, BERT with cross attention, head."""

    def __init__(self, vision: dict[str, Any], text: dict[str, Any]) -> None:
        super().__init__()
        self.vision = BlipVisionModel(BlipVisionConfig(**vision))
        self.text = BlipTextModel(BlipTextConfig(**text), add_pooling_layer=False)
        self.head = linear_head(text["hidden_size"])

    @classmethod
    def load(cls, folder: Path) -> "ImageRewardNetwork":
        if not (folder / "config.json").is_file():
            raise RpoError(
                f"{folder} holds no converted ImageReward; make it with "
                "`python -m rpo.backends.scorers.convert image_reward CHECKPOINT --base TOKENIZER --out FOLDER`"
            )
        network = cls(**json.loads((folder / "config.json").read_text()))
        network.load_state_dict(load_file(folder / "model.safetensors"))
        return network.eval()

    def forward(self, pixels: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(b,) standardised rewards."""
        seen = self.vision(pixel_values=pixels).last_hidden_state
        everywhere = torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device)
        read = self.text(input_ids=tokens, attention_mask=mask, encoder_hidden_states=seen, encoder_attention_mask=everywhere)
        return (self.head(read.last_hidden_state[:, 0]).squeeze(-1) - MEAN) / STD


@dataclass(frozen=True, kw_only=True)
class ImageRewardConfig:
    """ImageReward v1.0."""

    model: str
    """Folder, as `python -m rpo.backends.scorers.convert image_reward` leaves it."""
    device: str | None = None
    """cuda or cpu; the best there is if not given."""

    def models(self) -> tuple[str, ...]:
        return (self.model,)

    def build(self) -> "ImageRewardScorer":
        return ImageRewardScorer(self)


class ImageRewardScorer:
    """A `Scorer`."""

    def __init__(self, config: ImageRewardConfig) -> None:
        self.device, self.halving = pick_device(config.device), Halving()
        folder = Path(config.model)
        self.network = shared(("image reward", str(folder), self.device), lambda: ImageRewardNetwork.load(folder).to(self.device))
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.preprocessing = Preprocessing(self.network.vision.config.image_size, _PIXEL_MEAN, _PIXEL_STD)

    @torch.inference_mode()
    def score(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[float]:
        def run(part: slice) -> list[float]:
            words = self.tokenizer(list(prompts[part]), padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
            words = words.to(self.device)
            pixels = self.preprocessing.pixels(images[part]).to(self.device)
            return self.network(pixels, words.input_ids, words.attention_mask).tolist()

        return self.halving(len(images), run)
