"""Z-Image: flow matching; a language model reads the prompt, each at its own length."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from torch.nn import functional as F

from rpo.arrays import Conditions, Latents, Levels
from rpo.models.family import Family

_TOKENS = 512


def _encode(pipeline: Any, prompts: Sequence[str]) -> Conditions:
    """Padded with zeros to one length, which `mask` tells from the words."""
    told, _ = pipeline.encode_prompt(list(prompts), device=pipeline.device, do_classifier_free_guidance=False, max_sequence_length=_TOKENS)
    mask = torch.arange(_TOKENS)[None] < torch.tensor([len(words) for words in told])[:, None]
    return {"embeds": torch.stack([F.pad(words, (0, 0, 0, _TOKENS - len(words))) for words in told]), "mask": mask.to(told[0].device)}


def _predict(transformer: ZImageTransformer2DModel, x_t: Latents, level: Levels, conditions: Conditions) -> Latents:
    """The network counts time from noise to data, and predicts the way back."""
    lengths = conditions["mask"].sum(dim=1).int().tolist()  # waits for the device, once
    words = [embeds[:length] for embeds, length in zip(conditions["embeds"], lengths, strict=True)]
    out = transformer(list(x_t[:, :, None].unbind()), 1 - level, words, return_dict=False)[0]
    return -torch.stack(list(out))[:, :, 0]


FAMILY = Family(
    pipeline=ZImagePipeline,
    network=ZImageTransformer2DModel,
    part="transformer",
    encode=_encode,
    reads=lambda pipeline: (pipeline.tokenizer, _TOKENS),
    predict=_predict,
    patch=2,
)
