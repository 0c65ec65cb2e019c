"""Stable Diffusion 3 and 3.5 (arXiv 2403.03206): flow matching, two CLIP encoders and T5."""

from collections.abc import Sequence
from typing import Any

from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

from rpo.arrays import Conditions, Latents, Levels
from rpo.models.family import Family

_T5_TOKENS = 256


def _encode(pipeline: Any, prompts: Sequence[str]) -> Conditions:
    texts = list(prompts)
    embeds, _, pooled, _ = pipeline.encode_prompt(
        texts, texts, texts, device=pipeline.device, do_classifier_free_guidance=False, max_sequence_length=_T5_TOKENS
    )
    return {"embeds": embeds, "pooled": pooled}


def _predict(transformer: SD3Transformer2DModel, x_t: Latents, level: Levels, conditions: Conditions) -> Latents:
    return transformer(
        hidden_states=x_t, timestep=1000 * level, encoder_hidden_states=conditions["embeds"], pooled_projections=conditions["pooled"]
    ).sample


FAMILY = Family(
    pipeline=StableDiffusion3Pipeline,
    network=SD3Transformer2DModel,
    part="transformer",
    encode=_encode,
    reads=lambda pipeline: (pipeline.tokenizer_3, _T5_TOKENS),
    predict=_predict,
    patch=2,
)
