"""Stable Diffusion 1.5, and any other `StableDiffusionPipeline`, tuned on pairs that are brought."""

from rpo.backends.diffusers_images import GeneratorConfig
from rpo.config import Recipe
from rpo.train.config import TrainConfig


def sd15_dpo() -> Recipe:
    """Diffusion-DPO of Stable Diffusion 1.5 with a LoRA, on a pairs file (`--pairs`)."""
    model = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    return Recipe(name="sd15_dpo", generator=GeneratorConfig(model=model), train=TrainConfig(model=model, precision="bf16"))
