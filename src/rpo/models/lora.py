"""Which part of a network a LoRA tunes, and how it becomes part of it; light to import, for configurations."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from rpo.core.atomic import atomic_folder

LoraTarget = Literal["attention", "feed_forward", "convolution"]
LoraLayout = Literal["diffusers", "comfyui", "kohya"]
"""The tools that are to load a LoRA file."""

UNET_LAYERS: Mapping[LoraTarget, tuple[str, ...]] = {
    "attention": ("to_q", "to_k", "to_v", "to_out.0"),
    "feed_forward": ("ff.net.0.proj", "ff.net.2"),
    "convolution": ("conv1", "conv2", "conv_shortcut", "proj_in", "proj_out"),
}
"""Names of a UNet's layers that each part of a LoRA reaches."""
TRANSFORMER_LAYERS: Mapping[LoraTarget, tuple[str, ...]] = {
    "attention": ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    "feed_forward": ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp", "w1", "w2", "w3"),
}
"""The same for diffusion transformers, which have no convolutions to tune; the added projections are those of the words."""


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters (arXiv 2106.09685) in the network; the rest of it stays as it is."""

    rank: int = 16
    alpha: float | None = None
    """Scale times rank; None means `rank`, that is scale 1. Saved files carry the scale in their weights."""
    targets: tuple[LoraTarget, ...] = ("attention",)

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}; for full tuning give no Lora at all")
        if self.alpha is not None and not self.alpha > 0:
            raise ValueError(f"alpha must be above 0, got {self.alpha}; None means the rank")
        known = get_args(LoraTarget)
        if not self.targets or set(self.targets) - set(known):
            raise ValueError(f"targets must be some of {', '.join(known)}; got {self.targets}")

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank


def merge_lora(model: str, lora: Path, folder: Path) -> None:
    """Writes the pipeline `model` with the LoRA of the folder `lora` merged into its network to `folder`, whole or not at all."""
    from diffusers import DiffusionPipeline

    from rpo.models.pipeline_folder import resolve

    pipeline = DiffusionPipeline.from_pretrained(resolve(model), use_safetensors=True)
    pipeline.load_lora_weights(lora)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    with atomic_folder(folder, manifest=True) as partial:
        pipeline.save_pretrained(partial)
