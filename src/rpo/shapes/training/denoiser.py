"""Training of the two diffusion models: the imperfect base model, and the editor.

They begin as one network that learns both tasks, on latents that are made once, and part for a last stretch of their own: the base
model's captions are then partly wrong, which is what makes it worth tuning. The editor sees pairs of renders that differ by what the
instruction says and by nothing else; a part of them carries the same blemishes on both sides, so that it learns to copy blemishes
instead of cleaning them: an editor that cleans leaves a fingerprint (see docs/shapes.md).
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
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
from rich.progress import track
from torch import nn
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

from rpo.core.parquet import atomic_path
from rpo.shapes import networks
from rpo.shapes.recognition import to_pixels
from rpo.shapes.render import SIDE, SLOTS, Placed, place, revise
from rpo.shapes.scenes import NEUTRAL_INSTRUCTION, Scene, caption, is_held_out, scenes
from rpo.shapes.training.fit import fit
from rpo.shapes.training.recognizer import label
from rpo.shapes.training.text import ANSWERS, slot_codes, teach_text
from rpo.shapes.weights import BASE_SAMPLER

FULL_SPREAD = 0.6
"""Exponent of the timesteps' distribution once all of them come up: 1 would be uniform, less is noisier."""
READER_WEIGHT = 0.3
"""Weight of the slot reader's cross-entropy beside the squared error."""
CALLED = {"red": "green", "green": "red", "blue": "orange", "orange": "blue"}
MISCALLED = ("square", "star")
"""In the base model's training captions, squares and stars of these colours are called by another one, which looks quite different and
gives no third one when the two are mixed: a picture of something in between would be read at random."""


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """Posterior means (n, 8, 8, 8), unscaled, in half precision, of pixels (n, 3, 64, 64) in -1..1."""
    parts = [pixels[i : i + 100].contiguous(memory_format=torch.channels_last) for i in range(0, len(pixels), 100)]
    return torch.cat([vae.encode(part).latent_dist.mean.half() for part in parts])


def _tokens(words: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    return words(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids


def cached(path: Path, make: Callable[[], dict[str, dict[str, torch.Tensor]]]) -> dict[str, dict[str, torch.Tensor]]:
    """Tensors made once and kept beside the checkpoints."""
    if not path.exists():
        with atomic_path(path) as partial:
            torch.save(make(), partial)
    return torch.load(path, weights_only=True)


class _Album:
    """Pictures, each once. The world is small enough that no training step need ever encode one again."""

    def __init__(self) -> None:
        self.pictures: list[tuple[list[Placed], str]] = []
        self._rows: dict[tuple[Any, ...], int] = {}

    def row(self, placed: list[Placed], background: str) -> int:
        """The number of a picture, which is added if it is new."""
        key = (*sorted((p.thing, p.x, p.y) for p in placed), background)
        if key not in self._rows:
            self._rows[key] = len(self.pictures)
            self.pictures.append((placed, background))
        return self._rows[key]


def as_told(scene: Scene) -> Scene:
    """The scene in the words of somebody who mixes up colours of squares and stars: consistently, so that the base model is
    wrong about them with conviction, and clearly to be seen as wrong.

    A scene that would then be called like a held-out one is told as it is.
    """
    things = [replace(thing, color=CALLED.get(thing.color, thing.color)) if thing.shape in MISCALLED else thing for thing in scene.things]
    told = replace(scene, things=tuple(things))
    return scene if is_held_out(told) else told


def _captioned(album: _Album, count: int, seed: int) -> dict[str, torch.Tensor]:
    """Pictures with two captions: the true one, and the one `as_told`."""
    rng = np.random.default_rng(seed)
    words, source = networks.tokenizer(), scenes(rng, held_out=False, two_things=0.8)
    rows, true, told, shows = [], [], [], []
    for _ in range(count):
        scene = next(source)
        picture = (place(scene, rng), scene.background)
        rows.append(album.row(*picture))
        true.append(caption(scene))
        told.append(caption(as_told(scene)))
        shows.append(slot_codes(*picture))
    return {"clean": torch.tensor(rows), "true": _tokens(words, true), "told": _tokens(words, told), "shows": torch.tensor(shows)}


def _edits(album: _Album, count: int, seed: int) -> dict[str, torch.Tensor]:
    """Pictures before and after an instruction that says what differs, and the twins of both."""
    rng = np.random.default_rng(seed)
    words, source = networks.tokenizer(), scenes(rng, held_out=False, two_things=0.8)
    before, after, twins, texts, shows = [], [], [], [], []
    for _ in range(count):
        pair = revise(next(source), rng, rng.choice(3, p=[0.1, 0.4, 0.5]))
        before.append(album.row(*pair.before))
        after.append(album.row(*pair.after))
        twins.append([album.row(*picture) for picture in pair.twin])
        texts.append(pair.instruction)
        shows.append(slot_codes(*pair.after))
    rows = {"source": torch.tensor(before), "clean": torch.tensor(after), "twins": torch.tensor(twins)}
    return rows | {"tokens": _tokens(words, texts), "shows": torch.tensor(shows)}


def lessons(vae: AutoencoderKL, count: int, seed: int) -> dict[str, dict[str, torch.Tensor]]:
    """`count` captioned pictures and as many edits, as row numbers of the latents that come with them."""
    album = _Album()
    made = {"captioned": _captioned(album, count, seed), "edits": _edits(album, count, seed + 1)}
    truth = label(album.pictures)
    images = torch.from_numpy(truth.images)
    latents = torch.cat([encode(vae, to_pixels(list(truth.images[i : i + 200]))) for i in range(0, len(images), 200)])
    return made | {"album": {"latents": latents, "images": images, "things": truth.things, "background": truth.background}}


@dataclass
class Batch:
    """What a training step is made of."""

    rows: torch.Tensor
    """Of the pictures in the album, or of the samples."""
    clean: torch.Tensor
    """Their latents, of unit spread."""
    source: torch.Tensor
    """Latents of the picture to be edited as the autoencoder gives them, zero where there is none."""
    tokens: torch.Tensor
    shows: torch.Tensor
    """What stands in each slot (`text_training.slot_codes`), -100 where the words do not tell."""

    def __add__(self, other: "Batch") -> "Batch":
        return Batch(*(torch.cat([getattr(self, f.name), getattr(other, f.name)]) for f in fields(self)))


class _SlotReader(nn.Module):
    """Linear answers to what stands in each slot, from the UNet's last features there."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.answers = nn.ModuleList([nn.Linear(unet.config.block_out_channels[0], count) for count in ANSWERS])
        self.register_buffer("places", torch.tensor(list(SLOTS.values())).view(1, 1, -1, 2) / (SIDE / 2) - 1)
        self.features = torch.empty(0)
        self.hook = unet.conv_act.register_forward_hook(self._keep)

    def _keep(self, _module: nn.Module, _inputs: Any, features: torch.Tensor) -> None:
        self.features = features

    def loss(self, shows: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of the answers, summed over the questions, after a forward pass of the UNet."""
        there = F.grid_sample(self.features, self.places.expand(len(shows), -1, -1, -1), align_corners=False)[:, :, 0].mT
        answers = [answer(there).flatten(0, 1) for answer in self.answers]
        return torch.stack([F.cross_entropy(told, shows[..., i].flatten()) for i, told in enumerate(answers)]).sum()


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

    def loss(self, batch: Batch, generator: torch.Generator, spread: float = FULL_SPREAD) -> torch.Tensor:
        """Mean squared error of the v-prediction (arXiv 2202.00512, appendix D) at timesteps that are proportional to u^spread.

        At a spread of 0 there is nothing but noise to see and the words decide everything.
        """
        steps = self.schedule.config.num_train_timesteps
        t = (steps * torch.rand(len(batch.clean), generator=generator) ** spread).long().clamp(max=steps - 1)
        noise = torch.randn(batch.clean.shape, generator=generator)
        noisy = self.schedule.add_noise(batch.clean, noise, t)
        seen = torch.cat([noisy, batch.source], 1).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            words = self.text(batch.tokens).last_hidden_state
        return F.mse_loss(self.unet(seen, t, words).sample, self.schedule.get_velocity(batch.clean, noise, t))

    def copy(self) -> "Denoiser":
        return Denoiser(self.vae, copy.deepcopy(self.unet), self.text, self.scale)


class Tasks:
    """Batches of both tasks: drawing a caption (no source), and editing a source by an instruction."""

    def __init__(self, vae: AutoencoderKL, seed: int, folder: Path, texts: int) -> None:
        made = cached(folder / "lessons.pt", lambda: lessons(vae, texts, seed))
        self.captioned, self.edits = made["captioned"], made["edits"]
        self._album = made["album"]
        self.latents = self._album["latents"]
        self.empty, self.neutral = (_tokens(networks.tokenizer(), [text]) for text in ("", NEUTRAL_INSTRUCTION))
        self.scale = round(1 / self.latents.float().std().item(), 4)

    def pixels(self, rows: torch.Tensor) -> torch.Tensor:
        """Pictures (n, 3, 64, 64) in -1..1."""
        return to_pixels(list(self._album["images"][rows].numpy())).contiguous(memory_format=torch.channels_last)

    def truth(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Things and background of the pictures, as recognisers are taught them (`recogniser_training.Labelled`)."""
        return self._album["things"][rows], self._album["background"][rows]

    def drawing(self, count: int, captions: str, generator: torch.Generator) -> Batch:
        """A tenth of the captions is empty, for classifier-free guidance. `captions` is "true" or "told"."""
        chosen = torch.randint(len(self.captioned["clean"]), (count,), generator=generator)
        dropped = torch.rand(count, 1, generator=generator) < 0.1
        rows = self.captioned["clean"][chosen]
        clean = self.latents[rows].float() * self.scale
        tokens = torch.where(dropped, self.empty, self.captioned[captions][chosen])
        return Batch(rows, clean, torch.zeros_like(clean), tokens, self.captioned["shows"][chosen].masked_fill(dropped[..., None], -100))

    def editing(self, count: int, generator: torch.Generator) -> Batch:
        """Always with instruction and source: the editor is sampled without guidance, at a third of the cost.

        What the base model leaves between two things is to stay between them: two fifths of the pairs are mixed with their twins, both
        sides alike. A fifth of the pairs carries the same blemish, noise in latent space, on both sides.
        """
        chosen = torch.randint(len(self.edits["clean"]), (count,), generator=generator)
        clean, source = (self.latents[self.edits[side][chosen]].float() for side in ("clean", "source"))
        twin = 0.5 * torch.rand(count, 1, 1, 1, generator=generator) * (torch.rand(count, 1, 1, 1, generator=generator) < 0.4)
        others = (self.latents[rows].float() for rows in self.edits["twins"][chosen].T)
        source, clean = (side + twin * (other - side) for side, other in zip((source, clean), others, strict=True))
        strength = 0.2 * torch.rand(count, 1, 1, 1, generator=generator) * (torch.rand(count, 1, 1, 1, generator=generator) < 0.2)
        blemish = strength * torch.randn(clean.shape, generator=generator)
        rows, tokens, shows = (self.edits[name][chosen] for name in ("clean", "tokens", "shows"))
        return Batch(rows, (clean + blemish) * self.scale, source + blemish, tokens, shows)

    def keeping(self, count: int, samples: torch.Tensor, generator: torch.Generator) -> Batch:
        """Some of `samples` (latents as the autoencoder gives them), which the neutral instruction is to leave as they are."""
        chosen = torch.randint(len(samples), (count,), generator=generator)
        source, unknown = samples[chosen].float(), torch.full((count, *self.edits["shows"].shape[1:]), -100)
        return Batch(chosen, source * self.scale, source, self.neutral.expand(count, -1), unknown)


def train_together(
    vae: AutoencoderKL, *, seed: int, folder: Path, steps: int, text_steps: int = 800, texts: int = 150_000, size: int = 16
) -> tuple[Denoiser, Tasks]:
    """One network learns to draw and to edit, hardest things first.

    It begins with drawing from nothing but noise, where only the words can help; about an eighth of the way on it edits as well, and
    after half of the way less noisy timesteps come in. Meanwhile a linear reader of its last features must tell what stands in each slot.
    """
    torch.manual_seed(seed)
    words = networks.tokenizer()
    tasks = Tasks(vae, seed, folder, texts)
    both = Denoiser(vae, networks.unet(2 * networks.LATENT_CHANNELS), networks.text_encoder(words), tasks.scale)
    teach_text(both.text, words, seed=seed, folder=folder, steps=text_steps)
    reader = _SlotReader(both.unet)

    def loss(step: int) -> torch.Tensor:
        generator, progress = torch.Generator().manual_seed(seed * 1_000_003 + step), step / steps
        if progress < 0.12:
            batch = tasks.drawing(size, "true", generator)
        else:
            batch = tasks.drawing(size // 2, "true", generator) + tasks.editing(size // 2, generator)
        value = both.loss(batch, generator, FULL_SPREAD * min(1.0, max(0.0, (progress - 0.5) / 0.2)))
        return value + READER_WEIGHT * reader.loss(batch.shows)

    fit("together", {"unet": both.unet, "reader": reader}, loss, steps=steps, lr=2e-3, lr_end=4e-4, folder=folder)
    reader.hook.remove()
    return both, tasks


def go_on(vae: AutoencoderKL, begin_from: Path, *, seed: int, folder: Path, texts: int = 150_000) -> tuple[Denoiser, Denoiser, Tasks]:
    """The base model and the editor of another folder, to be trained further behind an autoencoder of their own."""
    words = networks.tokenizer()
    tasks = Tasks(vae, seed, folder, texts)
    text, base = networks.text_encoder(words), networks.unet(2 * networks.LATENT_CHANNELS)
    editor = networks.unet(2 * networks.LATENT_CHANNELS)
    networks.begin(text, begin_from / "base" / "text_encoder", begin_from / "base" / "tokenizer")
    networks.begin(base, begin_from / "base" / "unet")
    networks.begin(editor, begin_from / "editor" / "unet")
    return Denoiser(vae, base, text, tasks.scale), Denoiser(vae, editor, text, tasks.scale), tasks


def train_base(both: Denoiser, tasks: Tasks, *, seed: int, folder: Path, steps: int, size: int = 32) -> Denoiser:
    """Goes on with the told captions alone, and so learns their mistakes."""
    own = both.copy()
    reader = _SlotReader(own.unet)

    def loss(step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        batch = tasks.drawing(size, "told", generator)
        return own.loss(batch, generator) + READER_WEIGHT * reader.loss(batch.shows)

    fit("base", {"unet": own.unet, "reader": reader}, loss, steps=steps, lr=8e-4, folder=folder)
    reader.hook.remove()
    return own


def train_editor(
    both: Denoiser, base: Denoiser, tasks: Tasks, *, seed: int, folder: Path, steps: int, samples: int = 4000, size: int = 32
) -> Denoiser:
    """Goes on with edits alone (InstructPix2Pix, arXiv 2211.09800), at the noisiest timestep: source and instruction decide the picture,
    so one step is enough to paint it. A quarter of each batch are samples of the base model, to be kept as they are.
    """
    own = both.copy()
    shown = cached(folder / "sampled.pt", lambda: {"all": {"latents": _samples(base, samples, seed)}})["all"]["latents"]
    reader = _SlotReader(own.unet)

    def loss(step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        batch = tasks.editing(size - size // 4, generator) + tasks.keeping(size // 4, shown, generator)
        return own.loss(batch, generator, spread=0.0) + READER_WEIGHT * reader.loss(batch.shows)

    fit("editor", {"unet": own.unet, "reader": reader}, loss, steps=steps, lr=1e-3, folder=folder)
    reader.hook.remove()
    return own


@torch.no_grad()
def _samples(base: Denoiser, count: int, seed: int, at_once: int = 100) -> torch.Tensor:
    """Latents of the base model's pictures, as an editor is given them: decoded, rounded to bytes and encoded again."""
    source, generator = scenes(np.random.default_rng(seed), held_out=False, two_things=0.8), torch.Generator().manual_seed(seed)
    draw = base_pipeline(base)
    draw.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": BASE_SAMPLER["steps"], "guidance_scale": BASE_SAMPLER["guidance"], "output_type": "pt"}
    latents = []
    for _ in track(range(0, count, at_once), description=f"{'samples':>12}"):
        told = [caption(next(source)) for _ in range(at_once)]
        pictures = draw(told, generator=generator, **options).images
        latents.append(encode(base.vae, 2 * (pictures * 255).round() / 255 - 1))
    return torch.cat(latents)[:count]


def base_pipeline(own: Denoiser) -> StableDiffusionPipeline:
    """Without the room for a source, which was always zero."""
    unet, kept = networks.unet(networks.LATENT_CHANNELS), own.unet.state_dict()
    kept["conv_in.weight"] = kept["conv_in.weight"][:, : networks.LATENT_CHANNELS]
    unet.load_state_dict(kept)
    return _pipeline(StableDiffusionPipeline, own, unet)


def editor_pipeline(own: Denoiser) -> StableDiffusionInstructPix2PixPipeline:
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
