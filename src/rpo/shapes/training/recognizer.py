"""Training of the recognisers: the critic, the checklist scorer and the judge, each on pictures of its own."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from rpo.shapes.networks import begin
from rpo.shapes.recognition import CELL, GRID, Recogniser
from rpo.shapes.render import RADII, SIDE, Placed, place, render
from rpo.shapes.scenes import BACKGROUNDS, COLORS, SHAPES, SIZES, random_scene, random_thing
from rpo.shapes.training.fit import fit


@dataclass
class Labelled:
    """Pictures with their truth: `things` (n, 4, 6) holds x, y, shape, colour, size, present."""

    images: np.ndarray
    things: torch.Tensor
    background: torch.Tensor


def _scattered(rng: np.random.Generator) -> list[Placed]:
    """Up to four things anywhere, apart from each other: what no caption asks for but a poor model may draw."""
    placed: list[Placed] = []
    for _ in range(int(rng.integers(0, 5))):
        thing = random_thing(rng)
        reach = float(RADII[SIZES.index(thing.size)]) * 1.1
        x, y = rng.uniform(reach * 0.8, SIDE - reach * 0.8, size=2)
        if all(np.hypot(p.x - x, p.y - y) > reach + 1.1 * RADII[SIZES.index(p.thing.size)] for p in placed):
            placed.append(Placed(thing, float(x), float(y)))
    return placed


def label(pictures: list[tuple[list[Placed], str]]) -> Labelled:
    """Draws the pictures and writes down what is in them."""
    things = torch.zeros(len(pictures), 4, 6)
    for i, (placed, _) in enumerate(pictures):
        for j, p in enumerate(placed):
            codes = (SHAPES.index(p.thing.shape), COLORS.index(p.thing.color), SIZES.index(p.thing.size))
            things[i, j] = torch.tensor([p.x, p.y, *codes, 1.0])
    images = np.concatenate([render(pictures[i : i + 200]) for i in range(0, len(pictures), 200)])
    return Labelled(images, things, torch.tensor([BACKGROUNDS.index(background) for _, background in pictures]))


def labelled_pictures(count: int, seed: int, scattered: float = 0.5) -> Labelled:
    """`scattered` of the pictures hold any number of things anywhere, the others a scene."""
    rng = np.random.default_rng(seed)
    pictures: list[tuple[list[Placed], str]] = []
    for _ in range(count):
        scene = random_scene(rng)
        pictures.append((_scattered(rng) if rng.random() < scattered else place(scene, rng), scene.background))
    return label(pictures)


def _blur(pixels: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Gaussian blur with its own sigma (pixels) per image."""
    taps = torch.arange(-4, 5.0)
    kernel = torch.exp(-0.5 * (taps / sigma[:, None].clamp(min=1e-2)) ** 2)
    kernel = kernel / kernel.sum(1, keepdim=True)
    b, c, h, w = pixels.shape
    flat = F.pad(pixels, (4, 4, 4, 4), mode="replicate").reshape(1, b * c, h + 8, w + 8)
    weight = kernel.repeat_interleave(c, 0)
    flat = F.conv2d(flat, weight[:, None, :, None], groups=b * c)
    return F.conv2d(flat, weight[:, None, None, :], groups=b * c).reshape(b, c, h, w)


def _warp(pixels: torch.Tensor, amplitude: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A smooth random displacement of up to `amplitude` pixels per image."""
    b = len(pixels)
    coarse = (torch.rand(b, 2, 5, 5, generator=generator) * 2 - 1) * (2 * amplitude / SIDE)[:, None, None, None]
    shift = F.interpolate(coarse, (SIDE, SIDE), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    identity = F.affine_grid(torch.eye(2, 3).expand(b, 2, 3), (b, 1, SIDE, SIDE), align_corners=False)
    return F.grid_sample(pixels, identity + shift, padding_mode="border", align_corners=False)


def degrade(pixels: torch.Tensor, strength: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Blur, warp, ghost of another picture, brightness and noise, each a random share of `strength` (b,) in 0..1."""
    share = torch.rand(len(pixels), 5, generator=generator) * strength[:, None]
    pixels = _warp(_blur(pixels, 1.6 * share[:, 0]), 2.0 * share[:, 1], generator)
    ghost = 0.25 * share[:, 2, None, None, None]
    pixels = (1 - ghost) * pixels + ghost * pixels.roll(1, 0)
    pixels = pixels * (1 + 0.15 * (share[:, 3, None, None, None] - 0.5 * strength[:, None, None, None]))
    return (pixels + 0.25 * share[:, 4, None, None, None] * torch.randn(pixels.shape, generator=generator)).clamp(-1, 1)


def _flip(pixels: torch.Tensor, things: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mirrors left and right; every shape is its own mirror image."""
    things = things.clone()
    things[..., 0] = SIDE - things[..., 0]
    return pixels.flip(3), things


_CENTRES = (torch.arange(GRID) + 0.5) * CELL


def recogniser_loss(out: dict[str, torch.Tensor], things: torch.Tensor, background: torch.Tensor) -> torch.Tensor:
    """Heat by cross-entropy against a Gaussian bump round each centre; readings in the cells near a centre."""
    x, y, present = things[..., 0], things[..., 1], things[..., 5]
    dx = (x[..., None] - _CENTRES) / CELL  # (b, 4, column)
    dy = (y[..., None] - _CENTRES) / CELL
    bump = torch.exp(-(dx[:, :, None, :] ** 2 + dy[..., None] ** 2) / (2 * 0.6**2)) * present[..., None, None]  # (b, 4, row, column)
    heat, owner = bump.max(1)
    total = 4 * F.binary_cross_entropy_with_logits(out["heat"].squeeze(1), heat)
    weight = heat * (heat > 0.3)
    norm = weight.sum().clamp(min=1.0)
    for field, index in (("shape", 2), ("color", 3), ("size", 4)):
        target = things[..., index].long().gather(1, owner.flatten(1)).view_as(owner)
        total = total + (F.cross_entropy(out[field], target, reduction="none") * weight).sum() / norm
    wanted = torch.stack(
        [d.gather(1, owner[:, None]).squeeze(1) for d in (dx[:, :, None, :].expand_as(bump), dy[..., None].expand_as(bump))], 1
    )
    total = total + ((out["offset"] - wanted).abs().sum(1) * weight).sum() / norm
    return total + F.cross_entropy(out["background"], background)


def train_recogniser(
    name: str,
    kind: str,
    *,
    seed: int,
    folder: Path,
    steps: int,
    grades_quality: bool = False,
    pictures: int = 20_000,
    batch: int = 64,
    begin_from: Path | None = None,
) -> Recogniser:
    torch.manual_seed(seed)
    network = Recogniser(kind, grades_quality)
    if begin_from:
        begin(network, begin_from / name)
    data = labelled_pictures(pictures, seed)

    def loss(step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        chosen = torch.randint(len(data.images), (batch,), generator=generator)
        clean = torch.from_numpy(data.images[chosen.numpy()]).permute(0, 3, 1, 2).float() / 127.5 - 1
        things, background = data.things[chosen], data.background[chosen]
        if step % 2:
            clean, things = _flip(clean, things)
        strength = torch.rand(batch, generator=generator) * (torch.rand(batch, generator=generator) < 0.8)
        pixels = degrade(clean, strength, generator)
        out = network(pixels)
        total = recogniser_loss(out, things, background)
        if grades_quality:
            error = (pixels - clean).square().mean((1, 2, 3)).sqrt() / 2
            total = total + (out["quality"] - (1 - 4 * error).clamp(0, 1)).abs().mean()
        return total

    fit(name, {"network": network}, loss, steps=steps, lr=2e-3, folder=folder)
    return network
