"""Rewards in the layout of CLIP: PickScore (arXiv 2305.01569), CLIP score (arXiv 2104.08718), HPS v2.1 (arXiv 2306.09341)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch.nn import functional as F
from transformers import AutoTokenizer

from rpo.backends.diffusers.pipelines import Halving, pick_device, pinned
from rpo.backends.scorers.towers import Preprocessing, clip_model, model_folder

_NO_WEIGHTS = ("*.json", "*.txt", "*.model")


@dataclass(frozen=True, kw_only=True)
class ClipScorerConfig:
    """A CLIP-type reward."""

    model: str
    """Hub id or folder of a `CLIPModel`."""
    processor: str | None = None
    """Hub id or folder of its tokenizer and `preprocessor_config.json`, where they lie elsewhere."""
    revision: str | None = None
    """Commit, tag or branch of a hub model; its main branch if not given."""
    scale: Literal["logit", "cosine"] = "logit"
    """logit: times the model's own scale, so that a difference is a preference logit (PickScore); cosine: -1 to 1 (CLIP score, HPS)."""
    device: str | None = None
    """cuda or cpu; the best there is if not given."""

    def models(self) -> tuple[str, ...]:
        return (pinned(self.model, self.revision), *([self.processor] if self.processor else []))

    def build(self) -> "ClipScorer":
        return ClipScorer(self)


class ClipScorer:
    """A `Scorer`, and an `Embedder` of images."""

    def __init__(self, config: ClipScorerConfig) -> None:
        self.config, self.halving = config, Halving()
        self.device = pick_device(config.device)
        folder = model_folder(config.model, config.revision)
        self.model = clip_model(folder, self.device)
        beside = model_folder(config.processor, files=_NO_WEIGHTS) if config.processor else folder
        self.tokenizer = AutoTokenizer.from_pretrained(beside)
        self.preprocessing = Preprocessing.of(beside)

    @torch.inference_mode()
    def score(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[float]:
        factor = self.model.logit_scale.exp() if self.config.scale == "logit" else 1.0

        def run(part: slice) -> list[float]:
            tokens = self.tokenizer(list(prompts[part]), padding="max_length", truncation=True, return_tensors="pt").to(self.device)
            pixels = self.preprocessing.pixels(images[part]).to(self.device)
            out = self.model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, pixel_values=pixels)
            cosine = (F.normalize(out.image_embeds, dim=-1) * F.normalize(out.text_embeds, dim=-1)).sum(-1)
            return (factor * cosine).tolist()

        return self.halving(len(images), run)

    @torch.inference_mode()
    def features(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """(n, d) embeddings of length 1."""

        def run(part: slice) -> list[np.ndarray]:
            seen = self.model.get_image_features(self.preprocessing.pixels(images[part]).to(self.device)).pooler_output
            return list(F.normalize(seen, dim=-1).cpu().numpy())

        rows = self.halving(len(images), run)
        return np.stack(rows) if rows else np.zeros((0, self.model.config.projection_dim))
