"""Stable Diffusion 3 and 3.5 (arXiv 2403.03206): flow matching, two CLIP encoders and T5, which may be left out (null in the index)."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

from rpo.arrays import Conditions, Latents, Levels
from rpo.models.family import Family

_T5_TOKENS = 256


def _encode(pipeline: Any, prompts: Sequence[str]) -> Conditions:
    if pipeline.text_encoder_3 is None and pipeline.transformer is None:
        # Without T5 the pipeline writes zeros of a width that it reads from its transformer's configuration.
        config = SD3Transformer2DModel.load_config(pipeline.config._name_or_path, subfolder="transformer", local_files_only=True)
        pipeline.transformer = SimpleNamespace(config=SimpleNamespace(**config))
    texts = list(prompts)
    embeds, _, pooled, _ = pipeline.encode_prompt(
        texts, texts, texts, device=pipeline.device, do_classifier_free_guidance=False, max_sequence_length=_T5_TOKENS
    )
    return {"embeds": embeds, "pooled": pooled}


def _reads(pipeline: Any) -> tuple[Any, int]:
    if pipeline.tokenizer_3 is not None and pipeline.text_encoder_3 is not None:
        return pipeline.tokenizer_3, _T5_TOKENS
    return pipeline.tokenizer, pipeline.tokenizer.model_max_length


def _predict(transformer: SD3Transformer2DModel, x_t: Latents, level: Levels, conditions: Conditions) -> Latents:
    return transformer(
        hidden_states=x_t, timestep=1000 * level, encoder_hidden_states=conditions["embeds"], pooled_projections=conditions["pooled"]
    ).sample


FAMILY = Family(
    pipeline=StableDiffusion3Pipeline,
    network=SD3Transformer2DModel,
    part="transformer",
    encode=_encode,
    reads=_reads,
    predict=_predict,
    patch=2,
)
