"""Pipelines of the published models' architecture and size with random weights: nothing is fetched, and a step costs the same.

A folder holds configurations and tokenizers only. `random_weights` lets `rpo` load such a folder: each component is created with
random weights on the device where it is used, in seconds even for networks of 12 G weights.
"""

import json
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    ModelMixin,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLInstructPix2PixPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import AutoConfig, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, PreTrainedModel, T5Config, T5EncoderModel

from rpo.shapes.networks import tokenizer

TOKENS = 77


def _vae(channels: int = 4, **settings: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=channels,
        **settings,
    )


def _text(kind: Any, width: int, layers: int, heads: int, activation: str) -> Any:
    words = _tokenizer()
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


def _clip_l() -> CLIPTextModel:
    return _text(CLIPTextModel, 768, 12, 12, "quick_gelu")


def _tokenizer() -> Any:
    words = tokenizer()
    words.model_max_length = TOKENS
    return words


def _scheduler() -> DDIMScheduler:
    return DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)


def _sd15(kind: Any = StableDiffusionPipeline, in_channels: int = 4) -> Any:
    return kind(
        vae=_vae(scaling_factor=0.18215),
        text_encoder=_clip_l(),
        tokenizer=_tokenizer(),
        unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768, in_channels=in_channels, out_channels=4),
        scheduler=_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl(kind: Any = StableDiffusionXLPipeline, in_channels: int = 4) -> Any:
    unet = UNet2DConditionModel(
        sample_size=128,
        in_channels=in_channels,
        out_channels=4,
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
    return kind(
        vae=_vae(scaling_factor=0.13025),
        text_encoder=_clip_l(),
        text_encoder_2=_text(CLIPTextModelWithProjection, 1280, 32, 20, "gelu"),
        tokenizer=_tokenizer(),
        tokenizer_2=_tokenizer(),
        unet=unet,
        scheduler=_scheduler(),
    )


def _flux() -> FluxPipeline:
    """The T5 encoder has its full 4.7 G weights as well."""
    t5 = T5Config(
        vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu", use_cache=False
    )
    return FluxPipeline(
        vae=_vae(16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=_clip_l(),
        text_encoder_2=T5EncoderModel(t5),
        tokenizer=_tokenizer(),
        tokenizer_2=_tokenizer(),
        transformer=FluxTransformer2DModel(guidance_embeds=True),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )


_BUILDERS: dict[str, Callable[[], Any]] = {
    "sd15": _sd15,
    "sdxl": _sdxl,
    "flux": _flux,
    "sd15_editor": lambda: _sd15(StableDiffusionInstructPix2PixPipeline, 8),
    "sdxl_editor": lambda: _sdxl(StableDiffusionXLInstructPix2PixPipeline, 8),
}
ARCHITECTURES = ("sd15", "sdxl", "flux")
"""What can be tuned: UNets of 0.86 G and 2.6 G weights, a transformer of 12 G."""
EDITORS = ("sd15_editor", "sdxl_editor")
"""InstructPix2Pix pipelines of the same sizes."""


_WORDS = {"vocab_size": 1000}
_CHANNELS = {"block_out_channels": [32] * 4}
_TINY: dict[str, Mapping[str, Any]] = {
    "vae": _CHANNELS,
    "text_encoder": {"num_hidden_layers": 1, **_WORDS},
    "text_encoder_2": {"num_hidden_layers": 1, "num_layers": 1, "num_heads": 2, "d_ff": 64, **_WORDS},
    "unet": {"transformer_layers_per_block": 1, "attention_head_dim": 2, "layers_per_block": 1},
    "transformer": {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 1},
}
"""Settings that make a network small enough for a test on the CPU, by its name in the pipeline."""


def save_configs(name: str, folder: Path, *, tiny: bool = False) -> Path:
    """Writes the pipeline `name` without its weights, which are never created. `tiny` keeps the architecture and drops its size."""
    with torch.device("meta"):
        pipeline = _BUILDERS[name]()
    for part, component in pipeline.components.items():
        if isinstance(component, ModelMixin):
            component.save_config(folder / part)
        elif component is not None:
            (component.config if isinstance(component, torch.nn.Module) else component).save_pretrained(folder / part)
    pipeline.save_config(folder)
    for part, settings in _TINY.items() if tiny else ():
        if (file := folder / part / "config.json").exists():
            config = json.loads(file.read_text())
            small = {key: value for key, value in settings.items() if key in config}
            if part == "unet":
                small["block_out_channels"] = [32] * len(config["block_out_channels"])
            file.write_text(json.dumps(config | small))
    return folder


def random_network(kind: Any, config: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """A network with the random weights of its class's constructor, created on `device` in `dtype`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            torch.manual_seed(0)
            network = kind.from_config(config) if issubclass(kind, ModelMixin) else kind(config)
    finally:
        torch.set_default_dtype(before)
    return network.requires_grad_(False).eval()


def _from_pretrained(kind: Any, folder: str | Path, *_: Any, **settings: Any) -> Any:
    """In place of the class method: random weights, on the GPU if there is one. The caller moves what belongs elsewhere."""
    where = Path(folder) / (settings.get("subfolder") or "")
    config = kind.load_config(where) if issubclass(kind, ModelMixin) else AutoConfig.from_pretrained(where)
    dtype = settings.get("torch_dtype") or settings.get("dtype") or torch.float32
    network = random_network(kind, config, dtype, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return (network, {"missing_keys": []}) if settings.get("output_loading_info") else network


@contextmanager
def random_weights() -> Generator[None, None, None]:
    """Lets diffusers, and so `rpo`'s trainer, generators and editors, load folders of `save_configs`, for the block."""
    with ExitStack() as patches:
        for kind in (ModelMixin, PreTrainedModel):
            patches.enter_context(patch.object(kind, "from_pretrained", classmethod(_from_pretrained)))
        yield
