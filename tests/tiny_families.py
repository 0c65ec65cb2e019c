"""One pipeline of each family's real classes with random weights, small enough for a test."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, Qwen3Config, Qwen3Model, T5Config, T5EncoderModel

from rpo.models.diffusers_denoiser import DiffusersDenoiser
from rpo.shapes.networks import tokenizer
from tiny_diffusion import save_pipeline

WIDTH = 32
PROMPT = "a red circle"


def _clip(kind: type[Any]) -> Any:
    words = tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=words.model_max_length,
        projection_dim=WIDTH,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    return kind(config)


def _t5() -> Any:
    words = tokenizer()
    return T5EncoderModel(T5Config(vocab_size=len(words), d_model=WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2))


def _vae(channels: int, stages: int) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8,) * stages,
        down_block_types=("DownEncoderBlock2D",) * stages,
        up_block_types=("UpDecoderBlock2D",) * stages,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        scaling_factor=0.6,
        shift_factor=0.1,
        mid_block_add_attention=False,
    )


def stable_diffusion_xl() -> StableDiffusionXLPipeline:
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=2 * WIDTH,
        attention_head_dim=(2, 4),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + WIDTH,
        use_linear_projection=True,
        norm_num_groups=4,
    )
    return StableDiffusionXLPipeline(
        vae=_vae(4, 4),
        text_encoder=_clip(CLIPTextModel),
        text_encoder_2=_clip(CLIPTextModelWithProjection),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        unet=unet,
        scheduler=DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
        add_watermarker=False,
    )


def stable_diffusion_3() -> StableDiffusion3Pipeline:
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=2 * WIDTH,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )
    t5 = T5EncoderModel(T5Config(vocab_size=len(tokenizer()), d_model=2 * WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    return StableDiffusion3Pipeline(
        vae=_vae(4, 4),
        text_encoder=_clip(CLIPTextModelWithProjection),
        text_encoder_2=_clip(CLIPTextModelWithProjection),
        text_encoder_3=t5,
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        tokenizer_3=tokenizer(),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def flux() -> FluxPipeline:
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    return FluxPipeline(
        vae=_vae(4, 4),
        text_encoder=_clip(CLIPTextModel),
        text_encoder_2=_t5(),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )


def z_image() -> ZImagePipeline:
    words = tokenizer()
    words.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    config = Qwen3Config(
        vocab_size=len(words),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        pad_token_id=words.pad_token_id,
    )
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=48,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[8, 8, 8],
        axes_lens=[1024, 32, 32],
    )
    # The padding tokens start as whatever was in memory.
    torch.nn.init.normal_(transformer.x_pad_token)
    torch.nn.init.normal_(transformer.cap_pad_token)
    return ZImagePipeline(
        vae=_vae(4, 4),
        text_encoder=Qwen3Model(config),
        tokenizer=words,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


_BUILDERS: dict[str, Callable[[], Any]] = {
    "stable_diffusion_xl": stable_diffusion_xl,
    "stable_diffusion_3": stable_diffusion_3,
    "flux": flux,
    "z_image": z_image,
}
FAMILIES = ("stable_diffusion", *_BUILDERS)


def save_family(name: str, folder: Path, seed: int = 0) -> Path:
    """A pipeline folder whose pictures are 64 pixels a side."""
    if name == "stable_diffusion":
        return save_pipeline(folder, seed=seed)
    torch.manual_seed(seed)
    _BUILDERS[name]().save_pretrained(folder, safe_serialization=True)
    return folder


def pipeline_of(folder: Path) -> Any:
    pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def picture(pipeline: Any) -> np.ndarray:
    """The same picture from the same weights."""
    generator = torch.Generator().manual_seed(0)
    out = pipeline(PROMPT, num_inference_steps=2, guidance_scale=1.0, height=64, width=64, generator=generator, output_type="np")
    return out.images[0]


def disturb(denoiser: DiffusersDenoiser) -> None:
    """As if it had been trained."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in denoiser.trainable().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def euler_to_data(sigma: torch.Tensor, output: torch.Tensor, x_t: torch.Tensor) -> torch.Tensor:
    """diffusers' own step from the level `sigma` to the level 0."""
    one_step = FlowMatchEulerDiscreteScheduler(shift=1.0)
    one_step.set_timesteps(sigmas=[float(sigma)])
    assert len(one_step.sigmas) == 2 and one_step.sigmas[1] == 0 and abs(one_step.sigmas[0] - sigma) < 1e-6
    return one_step.step(output, one_step.timesteps[0], x_t).prev_sample
