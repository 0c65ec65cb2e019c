"""What one family of text-to-image models says of itself. A new family is one file with a `Family`, and one line here."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from rpo.arrays import Conditions, Latents, Levels
from rpo.models.lora import TRANSFORMER_LAYERS, UNET_LAYERS, LoraTarget

FAMILIES = {
    "StableDiffusionPipeline": "rpo.models.stable_diffusion",
    "StableDiffusionXLPipeline": "rpo.models.stable_diffusion_xl",
    "StableDiffusion3Pipeline": "rpo.models.stable_diffusion_3",
    "FluxPipeline": "rpo.models.flux",
    "ZImagePipeline": "rpo.models.z_image",
}
"""Class of a pipeline, as its `model_index.json` names it -> the module that holds its `FAMILY`, imported when it is asked for."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture of diffusers, seen from the trainer."""

    pipeline: type[Any]
    """The pipeline's class, whose text encoders are used as it uses them."""
    network: type[nn.Module]
    """Class of the network that is tuned."""
    part: Literal["unet", "transformer"]
    """Its name in the pipeline and in the pipeline's folder."""
    encode: Callable[[Any, Sequence[str]], Conditions]
    """(pipeline without autoencoder and network, distinct prompts) -> what the network reads of them."""
    reads: Callable[[Any], tuple[Any, int]]
    """(the same pipeline) -> the tokenizer that reads most of a prompt, and how many tokens."""
    predict: Callable[[Any, Latents, Levels, Conditions], Latents]
    """(network, noisy latents, noise levels, conditions) -> its output. A level is a timestep, or for flow matching the noise's share."""
    patch: int = 1
    """Side of the square of latents that the network reads as one."""
    refuses: Callable[[Mapping[str, Any]], str | None] = lambda config: None
    """(the network's configuration) -> why it is none of the family's text-to-image models."""

    @property
    def flow(self) -> bool:
        """Whether it goes straight from data to noise (flow matching), or along a diffusion's noise schedule."""
        return self.part == "transformer"

    @property
    def layers(self) -> Mapping[LoraTarget, tuple[str, ...]]:
        return TRANSFORMER_LAYERS if self.part == "transformer" else UNET_LAYERS


def family_of(pipeline_class: str) -> Family | None:
    """None for a pipeline that no family knows."""
    module = FAMILIES.get(pipeline_class)
    return None if module is None else importlib.import_module(module).FAMILY
