"""Text-to-image generators that diffusers runs in process, and the projection of any image onto what one of them draws."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoPipelineForImage2Image
from PIL import Image

from rpo.backends.diffusers.pipelines import Halving, Offload, load_lora, load_pipeline, pinned, seeded, to_arrays
from rpo.data.images import fit_square
from rpo.errors import RpoError


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig:
    """How a text-to-image pipeline samples."""

    model: str
    """Hub id or folder of a pipeline that diffusers knows."""
    revision: str | None = None
    """Commit, tag or branch of a hub model; its main branch if not given."""
    lora: str | None = None
    """Folder of a LoRA to load on top of it."""
    steps: int = 50
    """Denoising steps."""
    guidance: float = 7.5
    """Classifier-free guidance scale; 1 switches it off and halves the cost."""
    side: int | None = None
    """Width and height in pixels; the model's own if not given."""
    device: str | None = None
    """cuda or cpu; the best there is if not given."""
    offload: Offload = "none"
    """none, model or sequential: where weights wait that are not at work."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")

    def models(self) -> tuple[str, ...]:
        return (pinned(self.model, self.revision), *([self.lora] if self.lora else []))

    def tuned(self, weights: Path) -> "GeneratorConfig":
        """The same sampler over what training left in `weights`: a whole pipeline, or a LoRA."""
        if (weights / "model_index.json").exists():
            return replace(self, model=str(weights), revision=None)
        return replace(self, lora=str(weights))

    def other(self, model: str) -> "GeneratorConfig":
        """The same sampler over a pipeline of the Hub: owner/name, or owner/name@revision."""
        name, _, revision = model.partition("@")
        return replace(self, model=name, revision=revision or None, lora=None)

    def build(self) -> "DiffusersGenerator":
        return DiffusersGenerator(self)


class DiffusersGenerator:
    """A `Generator` over any text-to-image pipeline."""

    def __init__(self, config: GeneratorConfig) -> None:
        self.config = config
        self.pipeline, _ = load_pipeline(config.model, device=config.device, revision=config.revision, offload=config.offload)
        if config.lora:
            load_lora(self.pipeline, config.lora)
        self.halving = Halving(self.pipeline.maybe_free_model_hooks)

    @torch.inference_mode()
    def generate(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[np.ndarray]:
        def draw(part: slice) -> list[np.ndarray]:
            out = self.pipeline(
                list(prompts[part]),
                num_inference_steps=self.config.steps,
                guidance_scale=self.config.guidance,
                generator=seeded(seeds[part]),
                height=self.config.side,
                width=self.config.side,
                output_type="np",
            )
            return to_arrays(out.images)

        return self.halving(len(prompts), draw)


@dataclass(frozen=True, kw_only=True)
class ProjectorConfig:
    """Brings images onto a model's own distribution, as SDEdit does (arXiv 2108.01073)."""

    generator: GeneratorConfig
    """The policy and its sampler; every family that diffusers can start from an image."""
    strength: float = 0.5
    """Share of the noise schedule that is undone and redone, above 0 and up to 1."""

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1:
            raise ValueError(f"strength must be above 0 and at most 1, got {self.strength}")
        if self.generator.steps * self.strength < 1:
            raise ValueError(f"strength {self.strength} of {self.generator.steps} steps is less than one step; take more of either")

    def models(self) -> tuple[str, ...]:
        return self.generator.models()

    def build(self) -> "Projector":
        return Projector(self)


def _side(pipeline: Any) -> int:
    """Width and height that a pipeline draws when it is told nothing."""
    network = getattr(pipeline, "unet", None) or pipeline.transformer
    size = network.config.get("sample_size") or getattr(pipeline, "default_sample_size", None)
    return 1024 if size is None else size * pipeline.vae_scale_factor


class Projector:
    """Re-noises images to a strength and denoises them under their prompts."""

    def __init__(self, config: ProjectorConfig) -> None:
        self.config = config
        drawn = config.generator.build().pipeline
        self.side = config.generator.side or _side(drawn)
        try:
            self.pipeline: Any = AutoPipelineForImage2Image.from_pipe(drawn)
        except ValueError:
            self.pipeline = None
        if self.pipeline is None or "strength" not in signature(self.pipeline.__call__).parameters:  # an editor is found, and has none
            raise RpoError(f"{config.generator.model} holds a {type(drawn).__name__}, which diffusers cannot start from an image")
        self.pipeline.set_progress_bar_config(disable=True)
        self.halving = Halving(self.pipeline.maybe_free_model_hooks)

    @torch.inference_mode()
    def __call__(self, images: Sequence[np.ndarray], prompts: Sequence[str], seeds: Sequence[int]) -> list[np.ndarray]:
        def project(part: slice) -> list[np.ndarray]:
            out = self.pipeline(
                list(prompts[part]),
                image=[Image.fromarray(fit_square(image, self.side)) for image in images[part]],
                strength=self.config.strength,
                num_inference_steps=self.config.generator.steps,
                guidance_scale=self.config.generator.guidance,
                generator=seeded(seeds[part]),
                output_type="np",
                **self._size(),
            )
            return to_arrays(out.images)

        return self.halving(len(images), project)

    def _size(self) -> dict[str, int]:
        """Some families take the size of what they draw from the image, others are told it and draw 1024 pixels when they are not."""
        return {"height": self.side, "width": self.side} if hasattr(self.pipeline, "transformer") else {}
