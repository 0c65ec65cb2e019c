"""Training of the two diffusion models: the imperfect base model, and the editor.

They begin as one network that learns both tasks, on latents that are made once, and part for a last stretch of their own: the base
model's captions are then partly wrong, which is what makes it worth tuning. The editor sees pairs of renders that differ by what the
instruction says and by nothing else; a part of them carries the same blemishes on both sides, so that it learns to copy blemishes
instead of cleaning them: an editor that cleans leaves a fingerprint (see docs/shapes.md).
"""

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

from rpo.shapes import networks
from rpo.shapes.fit import fit
from rpo.shapes.recogniser_training import degrade
from rpo.shapes.render import Placed, place, place_after, render
from rpo.shapes.scenes import caption, differences, is_held_out, join_instructions, random_change, scenes
from rpo.shapes.text_training import teach_text

WRONG_CAPTIONS = 0.45
"""Share of the base model's training captions in which one thing is not true of the picture."""


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """Posterior means (n, 8, 8, 8), unscaled, in half precision, of pixels (n, 3, 64, 64) in -1..1."""
    parts = [pixels[i : i + 100].contiguous(memory_format=torch.channels_last) for i in range(0, len(pixels), 100)]
    return torch.cat([vae.encode(part).latent_dist.mean.half() for part in parts])


def _pixels(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def _tokens(words: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    return words(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids


def _cached(path: Path, make):
    """Tensors made once and kept beside the checkpoints."""
    if not path.exists():
        torch.save(make(), path)
    return torch.load(path, weights_only=True)


def captioned_latents(vae: AutoencoderKL, count: int, seed: int) -> dict[str, torch.Tensor]:
    """Pictures of the training split with two captions: the true one, and a told one that is wrong in `WRONG_CAPTIONS` of them."""
    rng = np.random.default_rng(seed)
    words, source = networks.tokenizer(), scenes(rng, held_out=False, two_things=0.7)
    clean, true, told = [], [], []
    for _ in range(0, count, 200):
        shown = [next(source) for _ in range(200)]
        clean.append(encode(vae, _pixels(render([(place(scene, rng), scene.background) for scene in shown]))))
        for scene in shown:
            other = scene
            if rng.random() < WRONG_CAPTIONS:
                while other is scene or is_held_out(other):
                    other = random_change(scene, rng)[0]
            true.append(caption(scene))
            told.append(caption(other))
    return {"clean": torch.cat(clean), "true": _tokens(words, true), "told": _tokens(words, told)}


def _edit_pair(source, rng: np.random.Generator) -> tuple[list[Placed], str, list[Placed], str, str]:
    """(things before, background before, things after, background after, instruction) for no, one or two changes."""
    before = next(source)
    placed = place(before, rng)
    while True:
        after, origins = before, tuple(range(len(before.things)))
        for _ in range(rng.choice([0, 1, 2], p=[0.12, 0.44, 0.44])):
            after, step = random_change(after, rng)
            origins = tuple(None if i is None else origins[i] for i in step)
        edits = differences(before, after)
        if len(edits) <= 2 and origins[0] is not None:
            break
    placed_after = place_after(after, origins, placed, rng) if edits else placed
    return placed, before.background, placed_after, after.background, join_instructions([edit.instruction for edit in edits])


def edit_latents(vae: AutoencoderKL, count: int, seed: int) -> dict[str, torch.Tensor]:
    """Pairs of latents and the instruction between them; four in ten pairs are blemished alike on both sides."""
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    words, source = networks.tokenizer(), scenes(rng, held_out=False, two_things=0.75)
    before, after, texts = [], [], []
    for _ in range(0, count, 100):
        pairs = [_edit_pair(source, rng) for _ in range(100)]
        pixels = _pixels(render([pair[0:2] for pair in pairs] + [pair[2:4] for pair in pairs]))
        strength = 0.7 * torch.rand(100, generator=generator) * (torch.rand(100, generator=generator) < 0.4)
        state = generator.get_state()
        before.append(encode(vae, degrade(pixels[:100], strength, generator)))
        generator.set_state(state)  # the same blemishes on the other side
        after.append(encode(vae, degrade(pixels[100:], strength, generator)))
        texts += [pair[4] for pair in pairs]
    return {"source": torch.cat(before), "clean": torch.cat(after), "tokens": _tokens(words, texts)}


@dataclass
class Denoiser:
    """A UNet with room for a source image beside the noise, its text encoder, and what both tasks share."""

    vae: AutoencoderKL
    unet: UNet2DConditionModel
    text: CLIPTextModel
    """Stays as it was taught: a UNet that is still guessing would only spoil it."""
    scale: float
    """1 / standard deviation of the latents."""
    schedule: DDIMScheduler = field(default_factory=networks.scheduler)

    def loss(self, clean: torch.Tensor, source: torch.Tensor, tokens: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Mean squared error of the v-prediction (arXiv 2202.00512, appendix D), noisy timesteps more often: there the words decide."""
        t = (self.schedule.config.num_train_timesteps * torch.rand(len(clean), generator=generator) ** 0.6).long()
        noise = torch.randn(clean.shape, generator=generator)
        noisy, target = self.schedule.add_noise(clean, noise, t), self.schedule.get_velocity(clean, noise, t)
        seen = torch.cat([noisy, source], 1).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            words = self.text(tokens).last_hidden_state
        return F.mse_loss(self.unet(seen, t, words).sample, target)

    def copy(self) -> "Denoiser":
        return Denoiser(self.vae, copy.deepcopy(self.unet), self.text, self.scale)


class Tasks:
    """Batches of both tasks: drawing a caption (no source), and editing a source by an instruction."""

    def __init__(self, vae: AutoencoderKL, seed: int, folder: Path, pictures: int) -> None:
        self.captioned = _cached(folder / "captioned_latents.pt", lambda: captioned_latents(vae, pictures, seed))
        self.edits = _cached(folder / "edit_latents.pt", lambda: edit_latents(vae, pictures, seed + 1))
        self.empty = _tokens(networks.tokenizer(), [""])
        self.scale = round(1 / self.captioned["clean"].float().std().item(), 4)

    def drawing(self, count: int, captions: str, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(clean, source, tokens); a tenth of the captions is empty. `captions` is "true" or "told"."""
        chosen = torch.randint(len(self.captioned["clean"]), (count,), generator=generator)
        dropped = torch.rand(count, 1, generator=generator) < 0.1
        clean = self.captioned["clean"][chosen].float() * self.scale
        return clean, torch.zeros_like(clean), torch.where(dropped, self.empty, self.captioned[captions][chosen])

    def editing(self, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(clean, source, tokens); 5 % without instruction, 5 % without source, 5 % without both, as in arXiv 2211.09800."""
        chosen = torch.randint(len(self.edits["clean"]), (count,), generator=generator)
        dice = torch.rand(count, generator=generator)
        tokens = torch.where((dice < 0.1)[:, None], self.empty, self.edits["tokens"][chosen])
        keeps_source = (dice < 0.05) | (dice >= 0.15)
        source = self.edits["source"][chosen].float() * keeps_source[:, None, None, None]
        return self.edits["clean"][chosen].float() * self.scale, source, tokens


def train_together(
    vae: AutoencoderKL, *, seed: int, folder: Path, steps: int, text_steps: int = 600, pictures: int = 24_000, batch: int = 16
) -> tuple[Denoiser, Tasks]:
    """One network learns to draw and to edit at once: what an edit teaches about a word serves the captions, and the other way round."""
    torch.manual_seed(seed)
    words = networks.tokenizer()
    tasks = Tasks(vae, seed, folder, pictures)
    both = Denoiser(vae, networks.unet(2 * networks.LATENT_CHANNELS), networks.text_encoder(words), tasks.scale)
    teach_text(both.text, words, seed=seed, folder=folder, steps=text_steps)

    def loss(step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        drawn, edited = tasks.drawing(batch // 2, "true", generator), tasks.editing(batch // 2, generator)
        clean, source, tokens = (torch.cat(both) for both in zip(drawn, edited, strict=True))
        return both.loss(clean, source, tokens, generator)

    fit("together", {"unet": both.unet}, loss, steps=steps, lr=1e-3, lr_end=3e-4, folder=folder)
    return both, tasks


def train_base(both: Denoiser, tasks: Tasks, *, seed: int, folder: Path, steps: int, batch: int = 32) -> StableDiffusionPipeline:
    """Goes on with the told captions alone, and so learns to be wrong as often as they are."""
    own = both.copy()

    def loss(step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        return own.loss(*tasks.drawing(batch, "told", generator), generator)

    fit("base", {"unet": own.unet}, loss, steps=steps, lr=3e-4, folder=folder)
    unet = networks.unet(networks.LATENT_CHANNELS)
    kept = own.unet.state_dict()
    kept["conv_in.weight"] = kept["conv_in.weight"][:, : networks.LATENT_CHANNELS]  # the source was always zero
    unet.load_state_dict(kept)
    return _pipeline(StableDiffusionPipeline, own, unet)


def train_editor(
    both: Denoiser, tasks: Tasks, *, seed: int, folder: Path, steps: int, batch: int = 32
) -> StableDiffusionInstructPix2PixPipeline:
    """Goes on with edits alone (InstructPix2Pix, arXiv 2211.09800)."""
    own = both.copy()

    def loss(step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        return own.loss(*tasks.editing(batch, generator), generator)

    fit("editor", {"unet": own.unet}, loss, steps=steps, lr=3e-4, folder=folder)
    return _pipeline(StableDiffusionInstructPix2PixPipeline, own, own.unet)


def _pipeline(kind: Any, own: Denoiser, unet: UNet2DConditionModel) -> Any:
    own.vae.register_to_config(scaling_factor=own.scale)
    return kind(
        vae=own.vae,
        text_encoder=own.text,
        tokenizer=networks.tokenizer(),
        unet=unet,
        scheduler=networks.scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
