"""Stable Diffusion 1.x and 2.x, epsilon or v."""

from collections.abc import Mapping, Sequence
from typing import Any

from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from rpo.arrays import Conditions, Latents, Levels
from rpo.models.family import Family


def _encode(pipeline: Any, prompts: Sequence[str]) -> Conditions:
    return {"embeds": pipeline.encode_prompt(list(prompts), pipeline.device, 1, False)[0]}


def _predict(unet: UNet2DConditionModel, x_t: Latents, level: Levels, conditions: Conditions) -> Latents:
    return unet(x_t, level, encoder_hidden_states=conditions["embeds"]).sample


def refuses_guidance(config: Mapping[str, Any]) -> str | None:
    """For every UNet: consistency models take another input."""
    return None if config["time_cond_proj_dim"] is None else "its UNet is told a guidance scale, as consistency models are"


def _refuses(config: Mapping[str, Any]) -> str | None:
    # An addition of type "text" is pooled from the prompt's own embeddings; every other one needs inputs of its own.
    if config["in_channels"] != config["out_channels"] or config["addition_embed_type"] not in (None, "text"):
        return "its UNet takes more than a noisy latent, a timestep and a prompt"
    return refuses_guidance(config)


FAMILY = Family(
    pipeline=StableDiffusionPipeline,
    network=UNet2DConditionModel,
    part="unet",
    encode=_encode,
    reads=lambda pipeline: (pipeline.tokenizer, pipeline.tokenizer.model_max_length),
    predict=_predict,
    refuses=_refuses,
)
