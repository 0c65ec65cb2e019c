"""Text-to-image generators and image editors that diffusers runs in process: any text-to-image pipeline, and InstructPix2Pix."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, StableDiffusionInstructPix2PixPipeline, StableDiffusionPipeline

from rpo.data.images import fit_square
from rpo.errors import RpoError


def pick_device(device: str | None) -> str:
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def _load(model: str, device: str) -> Any:
    """A pipeline from a folder or the hub: safetensors only, no remote code, and no safety checker (it blanks images)."""
    try:
        parts: Any = DiffusionPipeline.load_config(model)
        without = {"safety_checker": None, "requires_safety_checker": False} if "safety_checker" in parts else {}
        pipeline = DiffusionPipeline.from_pretrained(model, use_safetensors=True, dtype=_dtype(device), **without)
    except OSError as error:
        raise RpoError(f"cannot load the model {model!r}: {error}. Give a folder of a diffusers pipeline, or a hub id.") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def _dtype(device: str) -> torch.dtype:
    return torch.bfloat16 if device.startswith("cuda") else torch.float32


def _generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One for each picture, on the CPU, so that neither batch nor device changes its noise."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def _to_arrays(images: np.ndarray) -> list[np.ndarray]:
    return list(np.round(images * 255).astype(np.uint8))


def _decode(vae: Any, latents: torch.Tensor) -> list[np.ndarray]:
    pixels = vae.decode(latents).sample.float()
    return _to_arrays(((pixels + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy())


def _side(pipeline: Any) -> int:
    return pipeline.unet.config.sample_size * pipeline.vae_scale_factor


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig:
    """How a text-to-image pipeline samples."""

    model: str
    """Hub id or folder of a pipeline that diffusers knows."""
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

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")

    def models(self) -> tuple[str, ...]:
        return (self.model,) if self.lora is None else (self.model, self.lora)

    def tuned(self, weights: Path) -> "GeneratorConfig":
        """The same sampler over what training left in `weights`: a whole pipeline, or a LoRA."""
        if (weights / "model_index.json").exists():
            return replace(self, model=str(weights))
        return replace(self, lora=str(weights))

    def build(self) -> "DiffusersGenerator":
        return DiffusersGenerator(self)


class DiffusersGenerator:
    """A `Generator` over any text-to-image pipeline."""

    def __init__(self, config: GeneratorConfig) -> None:
        self.config = config
        self.pipeline = _load(config.model, pick_device(config.device))
        if config.lora:
            self.pipeline.load_lora_weights(config.lora)
            self.pipeline.fuse_lora()

    @torch.inference_mode()
    def generate(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[np.ndarray]:
        out = self.pipeline(
            list(prompts),
            num_inference_steps=self.config.steps,
            guidance_scale=self.config.guidance,
            generator=_generators(seeds),
            height=self.config.side,
            width=self.config.side,
            output_type="np",
        )
        return _to_arrays(out.images)


@dataclass(frozen=True, kw_only=True)
class EditorConfig:
    """How an InstructPix2Pix pipeline edits (arXiv 2211.09800)."""

    model: str
    """Hub id or folder of a `StableDiffusionInstructPix2PixPipeline`."""
    steps: int = 25
    """Denoising steps."""
    guidance: float = 7.5
    """Guidance scale towards the instruction; 1 switches all guidance off and costs a third."""
    image_guidance: float = 1.5
    """Guidance scale towards the source."""
    side: int | None = None
    """Width and height in pixels to which every source is fitted; the model's own if not given."""
    device: str | None = None
    """cuda or cpu; the best there is if not given."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")

    def models(self) -> tuple[str, ...]:
        return (self.model,)

    def build(self) -> "DiffusersEditor":
        return DiffusersEditor(self)


class DiffusersEditor:
    """An `Editor` over an InstructPix2Pix pipeline."""

    def __init__(self, config: EditorConfig) -> None:
        self.config = config
        self.pipeline = _load(config.model, pick_device(config.device))
        if not isinstance(self.pipeline, StableDiffusionInstructPix2PixPipeline):
            raise RpoError(f"{config.model} holds a {type(self.pipeline).__name__}; an editor is a StableDiffusionInstructPix2PixPipeline")
        self.side = config.side or _side(self.pipeline)

    def _pixels(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        """(b, 3, side, side) floats in 0..1, as the pipelines' image processor takes them."""
        fitted = np.stack([fit_square(image, self.side) for image in images])
        return torch.from_numpy(fitted).permute(0, 3, 1, 2).float() / 255

    @torch.inference_mode()
    def edit(self, images: Sequence[np.ndarray], instructions: Sequence[str], seeds: Sequence[int]) -> list[np.ndarray]:
        out = self.pipeline(
            list(instructions),
            image=self._pixels(images),
            num_inference_steps=self.config.steps,
            guidance_scale=self.config.guidance,
            image_guidance_scale=self.config.image_guidance,
            generator=_generators(seeds),
            output_type="np",
        )
        return _to_arrays(out.images)

    @torch.inference_mode()
    def round_trip(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        vae = self.pipeline.vae
        pixels = (self._pixels(images) * 2 - 1).to(vae.device, vae.dtype)
        return _decode(vae, vae.encode(pixels).latent_dist.mode())


@dataclass(frozen=True, kw_only=True)
class ProjectorConfig:
    """Brings images onto a model's own distribution, as SDEdit does (arXiv 2108.01073)."""

    generator: GeneratorConfig
    """The policy and its sampler."""
    strength: float = 0.5
    """Share of the noise schedule that is undone and redone, above 0 and up to 1."""

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1:
            raise ValueError(f"strength must be above 0 and at most 1, got {self.strength}")

    def models(self) -> tuple[str, ...]:
        return self.generator.models()

    def build(self) -> "Projector":
        return Projector(self)


class Projector:
    """Re-noises images to a strength and denoises them under their prompts, with Stable Diffusion 1 or 2."""

    def __init__(self, config: ProjectorConfig) -> None:
        self.config = config
        self.pipeline = config.generator.build().pipeline
        if not isinstance(self.pipeline, StableDiffusionPipeline):
            raise RpoError(f"{config.generator.model} holds a {type(self.pipeline).__name__}; projection needs a StableDiffusionPipeline")
        self.side = config.generator.side or _side(self.pipeline)

    @torch.inference_mode()
    def __call__(self, images: Sequence[np.ndarray], prompts: Sequence[str], seeds: Sequence[int]) -> list[np.ndarray]:
        pipeline, sampler, side = self.pipeline, self.config.generator, self.side
        vae, schedule = pipeline.vae, pipeline.scheduler
        pixels = torch.from_numpy(np.stack([fit_square(image, side) for image in images])).permute(0, 3, 1, 2)
        clean = vae.encode((pixels.to(vae.device) / 127.5 - 1).to(vae.dtype)).latent_dist.mode() * vae.config.scaling_factor
        schedule.set_timesteps(sampler.steps)
        steps = schedule.timesteps[sampler.steps - max(1, round(sampler.steps * self.config.strength)) :]
        noise = torch.stack([torch.randn(clean.shape[1:], generator=generator) for generator in _generators(seeds)]).to(clean)
        x_t = schedule.add_noise(clean, noise, steps[:1].expand(len(clean)))
        guided = sampler.guidance > 1
        embeds, negative = pipeline.encode_prompt(list(prompts), pipeline.device, 1, guided)
        for t in steps:
            predicted = pipeline.unet(x_t, t, embeds).sample
            if guided:
                unconditional = pipeline.unet(x_t, t, negative).sample
                predicted = unconditional + sampler.guidance * (predicted - unconditional)
            x_t = schedule.step(predicted, t, x_t).prev_sample
        return _decode(vae, x_t / vae.config.scaling_factor)
