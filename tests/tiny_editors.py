"""One edit pipeline of each real class with random weights, small enough for a test; pictures are 64 pixels a side, or 32."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    ControlNetModel,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxKontextPipeline,
    LongCatImageEditPipeline,
    LongCatImageTransformer2DModel,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImageTransformer2DModel,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLInstructPix2PixPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rpo.backends.diffusers.image_processor import PictureReader
from tiny_diffusion import save_pipeline
from tiny_families import _vae, flux, stable_diffusion_xl

WIDTH = 32
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def _wider(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """The same network with an input of eight channels, noise and source."""
    return UNet2DConditionModel.from_config(dict(unet.config) | {"in_channels": 8})


def pix2pix(folder: Path) -> None:
    parts = StableDiffusionPipeline.from_pretrained(save_pipeline(folder.parent / "sd", prediction="epsilon")).components
    parts["unet"] = _wider(parts["unet"])
    StableDiffusionInstructPix2PixPipeline(**parts, requires_safety_checker=False).save_pretrained(folder)


def pix2pix_xl(folder: Path) -> None:
    parts = {name: part for name, part in stable_diffusion_xl().components.items() if name not in ("image_encoder", "feature_extractor")}
    parts["unet"] = _wider(parts["unet"])
    StableDiffusionXLInstructPix2PixPipeline(**parts, add_watermarker=False).save_pretrained(folder)


def controlnet(folder: Path) -> None:
    """The base model; its ControlNet lies beside it."""
    save_pipeline(folder, prediction="epsilon")
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    # One halving for each of the autoencoder's, which are two here.
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 16, 32))
    for layer in [net.controlnet_cond_embedding.conv_out, *net.controlnet_down_blocks, net.controlnet_mid_block]:
        torch.nn.init.normal_(layer.weight, std=0.3)  # they begin as zeros, which would hide the source
    net.save_pretrained(folder.parent / "controlnet_ip2p")


def kontext(folder: Path) -> None:
    parts = dict(flux().components.items())
    FluxKontextPipeline(**parts).save_pretrained(folder)


def _qwen_words() -> PreTrainedTokenizerFast:
    """Every byte a token, as unknown words are for the real one."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, *_SPECIAL])}
    words = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<|im_end|>", pad_token="<|endoftext|>", additional_special_tokens=list(_SPECIAL[1:])
    )
    fast.chat_template = "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>{% endfor %}"
    return fast


def klein(folder: Path) -> None:
    words = _qwen_words()
    text = Qwen3Config(
        vocab_size=len(words), hidden_size=8, intermediate_size=8, num_hidden_layers=28, num_attention_heads=1, num_key_value_heads=1,
        head_dim=8, max_position_embeddings=1024, pad_token_id=words.pad_token_id,
    )  # fmt: skip
    transformer = Flux2Transformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    )  # fmt: skip
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1, latent_channels=4, norm_num_groups=4, mid_block_add_attention=False,
    )  # fmt: skip
    Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True), vae=vae, text_encoder=Qwen3ForCausalLM(text),
        tokenizer=words, transformer=transformer, is_distilled=True,
    ).save_pretrained(folder)  # fmt: skip


def _reader(words: PreTrainedTokenizerFast) -> Qwen2_5_VLForConditionalGeneration:
    number = words.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(words), "hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 2, "max_position_embeddings": 8192,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
        },
        vision_config={
            "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH, "patch_size": 14,
            "fullatt_block_indexes": [0], "window_size": 56,
        },
        image_token_id=number("<|image_pad|>"), video_token_id=number("<|video_pad|>"),
        vision_start_token_id=number("<|vision_start|>"), vision_end_token_id=number("<|vision_end|>"),
    )  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(config)


def _qwen_edit(kind: Any, folder: Path) -> None:
    words = _qwen_words()
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    )
    transformer = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    kind(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True), vae=vae, text_encoder=_reader(words),
        tokenizer=words, processor=_processor(words), transformer=transformer,
    ).save_pretrained(folder)  # fmt: skip


def _processor(words: PreTrainedTokenizerFast) -> PictureReader:
    return PictureReader(Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=28 * 28 * 64), words)


def _as_published(folder: Path) -> None:
    """The folder names transformers' own processor, as the published ones do."""
    index = folder / "model_index.json"
    config = json.loads(index.read_text())
    for name, part in config.items():
        if isinstance(part, list) and part[1] == "PictureReader":
            config[name] = ["transformers", "Qwen2VLProcessor"]
    index.write_text(json.dumps(config))


def longcat(folder: Path) -> None:
    words = _qwen_words()
    transformer = LongCatImageTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, axes_dims_rope=[4, 6, 6],
    )  # fmt: skip
    LongCatImageEditPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True), vae=_vae(16, 4), text_encoder=_reader(words),
        tokenizer=words, text_processor=_processor(words), transformer=transformer,
    ).save_pretrained(folder)  # fmt: skip


_BUILDERS: dict[str, Callable[[Path], None]] = {
    "StableDiffusionInstructPix2PixPipeline": pix2pix,
    "StableDiffusionXLInstructPix2PixPipeline": pix2pix_xl,
    "StableDiffusionControlNetPipeline": controlnet,
    "FluxKontextPipeline": kontext,
    "Flux2KleinPipeline": klein,
    "QwenImageEditPipeline": lambda folder: _qwen_edit(QwenImageEditPipeline, folder),
    "QwenImageEditPlusPipeline": lambda folder: _qwen_edit(QwenImageEditPlusPipeline, folder),
    "LongCatImageEditPipeline": longcat,
}
EDITORS = tuple(_BUILDERS)


def save_editor(name: str, folder: Path, seed: int = 0) -> Path:
    """The folder of a pipeline of that class."""
    torch.manual_seed(seed)
    _BUILDERS[name](folder)
    _as_published(folder)
    return folder
