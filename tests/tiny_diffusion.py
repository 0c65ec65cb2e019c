"""A Stable Diffusion pipeline of the real classes, small enough to train in a test, and pairs for it."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from rpo.data.images import EncodedImage, encode_png
from rpo.data.pairs import Pair
from rpo.shapes.networks import tokenizer

SIDE = 32


def save_pipeline(folder: Path, *, prediction: str = "v_prediction", seed: int = 0, pooled: bool = False) -> Path:
    """Random weights; latents are 4 x 8 x 8 for images of 32 x 32. `pooled`: the words also reach the UNet beside the timestep."""
    torch.manual_seed(seed)
    words = tokenizer()
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=words.model_max_length,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
        )
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=SIDE,
        mid_block_add_attention=False,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        addition_embed_type="text" if pooled else None,
        addition_embed_type_num_heads=2,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction, clip_sample=False, steps_offset=1
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=words,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def make_pairs(num_pairs: int, *, held_out: int = 0, seed: int = 0) -> list[Pair]:
    """Chosen images are bright on the left, rejected ones on the right; the last `held_out` are not for training."""
    rng = np.random.default_rng(seed)
    pairs = []
    for index in range(num_pairs):
        dim, bright = rng.integers(0, 100, (SIDE, SIDE // 2, 3)), rng.integers(150, 256, (SIDE, SIDE // 2, 3))
        sides = [np.concatenate(halves, axis=1).astype(np.uint8) for halves in ((bright, dim), (dim, bright))]
        pairs.append(
            Pair(
                id=f"pair-{index}",
                prompt=f"a {('red', 'blue', 'green')[index % 3]} circle",
                chosen=EncodedImage.of(encode_png(sides[0])),
                rejected=EncodedImage.of(encode_png(sides[1])),
                gap=1.0,
                split="train" if index < num_pairs - held_out else "held_out",
                critique="{}",
                instruction="",
                scores="{}",
                provenance="{}",
            )
        )
    return pairs


def picture(pipeline: StableDiffusionPipeline) -> np.ndarray:
    """The same picture from the same weights."""
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    return pipeline("a red circle", latents=noise, num_inference_steps=2, output_type="np").images[0]
