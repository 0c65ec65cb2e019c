"""FLUX.1 [dev] and [schnell]: flow matching over latents packed two by two, CLIP for the whole prompt and T5 for its words."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel

from rpo.arrays import Conditions, Latents, Levels
from rpo.models.family import Family

_T5_TOKENS = 512
_GUIDANCE = 1.0
"""What a guidance-distilled network is told: 1 asks for the plain velocity, which is what the error is measured against."""


def _encode(pipeline: Any, prompts: Sequence[str]) -> Conditions:
    embeds, pooled, _ = pipeline.encode_prompt(list(prompts), None, device=pipeline.device, max_sequence_length=_T5_TOKENS)
    return {"embeds": embeds, "pooled": pooled}


def _predict(transformer: FluxTransformer2DModel, x_t: Latents, level: Levels, conditions: Conditions) -> Latents:
    count, channels, height, width = x_t.shape
    packed = x_t.reshape(count, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(count, -1, 4 * channels)
    rows, columns = torch.meshgrid(*(torch.arange(side // 2, device=x_t.device) for side in (height, width)), indexing="ij")
    places = torch.stack([torch.zeros_like(rows), rows, columns], -1).view(-1, 3).to(x_t.dtype)
    told = x_t.new_full((count,), _GUIDANCE) if transformer.config.guidance_embeds else None
    out = transformer(
        hidden_states=packed,
        timestep=level,
        guidance=told,
        pooled_projections=conditions["pooled"],
        encoder_hidden_states=conditions["embeds"],
        txt_ids=places.new_zeros(conditions["embeds"].shape[1], 3),
        img_ids=places,
    ).sample
    return out.view(count, height // 2, width // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(x_t.shape)


FAMILY = Family(
    pipeline=FluxPipeline,
    network=FluxTransformer2DModel,
    part="transformer",
    encode=_encode,
    reads=lambda pipeline: (pipeline.tokenizer_2, _T5_TOKENS),
    predict=_predict,
    patch=2,
)
