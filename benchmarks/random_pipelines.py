"""Pipelines of the published models' architecture and size with random weights: nothing is fetched, and a step costs the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from rpo.shapes.networks import tokenizer

TOKENS = 77


def _vae(scaling: float) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        scaling_factor=scaling,
    )


def _text(words: Any, kind: Any, width: int, layers: int, heads: int, activation: str) -> Any:
    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=TOKENS,
        hidden_act=activation,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    return kind(config)


def _tokenizer() -> Any:
    words = tokenizer()
    words.model_max_length = TOKENS
    return words


def _scheduler() -> DDIMScheduler:
    return DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)


def sd15(folder: Path) -> None:
    """Stable Diffusion 1.5: UNet of 860 M weights."""
    torch.manual_seed(0)
    words = _tokenizer()
    StableDiffusionPipeline(
        vae=_vae(0.18215),
        text_encoder=_text(words, CLIPTextModel, 768, 12, 12, "quick_gelu"),
        tokenizer=words,
        unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768),
        scheduler=_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def sdxl(folder: Path) -> None:
    """Stable Diffusion XL: UNet of 2.6 G weights."""
    torch.manual_seed(0)
    words = _tokenizer()
    unet = UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    StableDiffusionXLPipeline(
        vae=_vae(0.13025),
        text_encoder=_text(words, CLIPTextModel, 768, 12, 12, "quick_gelu"),
        text_encoder_2=_text(words, CLIPTextModelWithProjection, 1280, 32, 20, "gelu"),
        tokenizer=words,
        tokenizer_2=words,
        unet=unet,
        scheduler=_scheduler(),
    ).save_pretrained(folder)


ARCHITECTURES: dict[str, Callable[[Path], None]] = {"sd15": sd15, "sdxl": sdxl}
