"""Stable Diffusion XL: two text encoders, and conditions on the picture's size (arXiv 2307.01952)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

from rpo.arrays import Conditions, Latents, Levels
from rpo.models.family import Family
from rpo.models.stable_diffusion import refuses_guidance

_STRIDE = 8
"""Pixels along a side for one latent."""


def _encode(pipeline: Any, prompts: Sequence[str]) -> Conditions:
    """An empty prompt is what guidance is measured from when the pipeline samples: zeros, where its configuration says so."""
    embeds, _, pooled, _ = pipeline.encode_prompt(list(prompts), device=pipeline.device, do_classifier_free_guidance=False)
    if pipeline.config.force_zeros_for_empty_prompt:
        empty = [row for row, prompt in enumerate(prompts) if not prompt]
        embeds[empty], pooled[empty] = 0.0, 0.0
    return {"embeds": embeds, "pooled": pooled}


def _predict(unet: UNet2DConditionModel, x_t: Latents, level: Levels, conditions: Conditions) -> Latents:
    """Without a framing as the pipeline samples by default: the picture was always of this size, and nothing was cropped away.

    Both sides of a pair are told the chosen one's, or the sides could be told apart by it.
    """
    size = torch.zeros((len(x_t), 4), device=x_t.device)  # and filled there: a tensor from here would make the device wait
    size[:, 0], size[:, 1] = (side * _STRIDE for side in x_t.shape[2:])
    added = {"text_embeds": conditions["pooled"], "time_ids": torch.cat([conditions.get("framing", size), size[:, :2]], dim=1)}
    return unet(x_t, level, encoder_hidden_states=conditions["embeds"], added_cond_kwargs=added).sample


def _refuses(config: Mapping[str, Any]) -> str | None:
    if config["in_channels"] != config["out_channels"] or config["addition_embed_type"] != "text_time":
        return "its UNet takes other inputs than a noisy latent, a timestep, a prompt and the picture's size"
    return refuses_guidance(config)


FAMILY = Family(
    pipeline=StableDiffusionXLPipeline,
    network=UNet2DConditionModel,
    part="unet",
    encode=_encode,
    reads=lambda pipeline: (pipeline.tokenizer_2, pipeline.tokenizer_2.model_max_length),
    predict=_predict,
    refuses=_refuses,
)
