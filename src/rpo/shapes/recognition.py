"""Reading a picture of the embedded world back into a scene: one detection head on three different trunks.

The picture is cut into an 8 by 8 grid. Each cell says whether a thing's centre lies in it and, if so, its shape, colour, size and
where in the cell it is; the whole picture says its background. So any number of things is seen, also those nobody asked for.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from rpo.shapes.render import SIDE
from rpo.shapes.scenes import BACKGROUNDS, COLORS, SHAPES, SIZES, Scene, Thing

GRID = 8
CELL = SIDE // GRID
HEAT_MIN = 0.35
"""A cell is a thing when its heat is a local maximum above this."""
CELL_FIELDS = {"heat": 1, "shape": len(SHAPES), "color": len(COLORS), "size": len(SIZES), "offset": 2}


def _conv(channels: int, out: int, stride: int = 1, kernel: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, out, kernel, stride, kernel // 2), nn.GroupNorm(8, out), nn.SiLU())


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(_conv(channels, channels), nn.Conv2d(channels, channels, 3, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(x + self.body(x))


class _Depthwise(nn.Module):
    """A ConvNeXt block (arXiv 2201.03545): 7x7 depthwise, then a pointwise network of four times the width."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.spread = nn.Conv2d(channels, channels, 7, 1, 3, groups=channels)
        self.mix = nn.Sequential(
            nn.GroupNorm(1, channels), nn.Conv2d(channels, 4 * channels, 1), nn.GELU(), nn.Conv2d(4 * channels, channels, 1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mix(self.spread(x))


def _trunk(kind: str) -> tuple[nn.Sequential, int]:
    if kind == "plain":
        return nn.Sequential(_conv(3, 24, 2), _conv(24, 48, 2), _conv(48, 48), _conv(48, 96, 2), _conv(96, 96), _conv(96, 96)), 96
    if kind == "residual":
        return nn.Sequential(
            _conv(3, 32, 2, 5), nn.AvgPool2d(2), _conv(32, 64), _Residual(64), nn.AvgPool2d(2), _conv(64, 96), _Residual(96), _Residual(96)
        ), 96
    if kind == "depthwise":
        return nn.Sequential(
            nn.Conv2d(3, 64, 4, 4), *(_Depthwise(64) for _ in range(3)), nn.Conv2d(64, 128, 2, 2), *(_Depthwise(128) for _ in range(3))
        ), 128
    raise ValueError(f"trunk must be plain, residual or depthwise, got {kind!r}")


@dataclass(frozen=True)
class Seen:
    """One thing that was seen, with the certainty of each reading."""

    thing: Thing
    x: float
    y: float
    certainty: float
    """Product of the probabilities of the readings, 0 to 1."""


@dataclass(frozen=True)
class View:
    """What was seen in one picture."""

    things: tuple[Seen, ...]
    background: str

    def scene(self) -> Scene | None:
        """The scene, or `None` when the number of things fits none."""
        if len(self.things) == 1:
            return Scene((self.things[0].thing,), None, self.background)
        if len(self.things) != 2:
            return None
        first, second = self.things
        dx, dy = second.x - first.x, second.y - first.y
        relation = ("left of" if dx > 0 else "right of") if abs(dx) >= abs(dy) else ("above" if dy > 0 else "below")
        return Scene((first.thing, second.thing), relation, self.background)


class Recogniser(nn.Module):
    """`grades_quality` adds a head that estimates how near a picture is to a clean render, 0 to 1."""

    def __init__(self, kind: str, grades_quality: bool = False) -> None:
        super().__init__()
        self.kind, self.grades_quality = kind, grades_quality
        self.trunk, width = _trunk(kind)
        self.cells = nn.Conv2d(width, sum(CELL_FIELDS.values()), 1)
        self.background = nn.Linear(2 * width, len(BACKGROUNDS))
        self.quality = nn.Sequential(nn.Linear(2 * width, 64), nn.GELU(), nn.Linear(64, 1)) if grades_quality else None

    def pooled(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(feature map, mean and maximum over the map) of pixels (b, 3, 64, 64) in -1..1."""
        maps = self.trunk(pixels)
        return maps, torch.cat([maps.mean((2, 3)), maps.amax((2, 3))], 1)

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Logits per cell (b, fields, 8, 8) by field, "background" (b, 3), and "quality" (b,) if it grades."""
        maps, pooled = self.pooled(pixels)
        out = dict(zip(CELL_FIELDS, self.cells(maps).split(list(CELL_FIELDS.values()), 1), strict=True))
        out["background"] = self.background(pooled)
        if self.quality is not None:
            out["quality"] = self.quality(pooled).squeeze(1)
        return out

    @torch.no_grad()
    def view(self, images: list[np.ndarray]) -> list[View]:
        if not images:
            return []
        return decode({key: value.float() for key, value in self(to_pixels(images)).items()})

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.half().contiguous() for k, v in self.state_dict().items()}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"kind": self.kind, "grades_quality": self.grades_quality}, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "Recogniser":
        network = cls(**json.loads((folder / "config.json").read_text()))
        network.load_state_dict(load_file(folder / "model.safetensors"))
        return network.eval().requires_grad_(False)


def to_pixels(images: list[np.ndarray]) -> torch.Tensor:
    """uint8 images (64, 64, 3) -> (b, 3, 64, 64) floats in -1..1."""
    for image in images:
        if image.shape != (SIDE, SIDE, 3):
            raise ValueError(f"the embedded world's images are {SIDE}x{SIDE} RGB, got shape {image.shape}")
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def decode(out: dict[str, torch.Tensor]) -> list[View]:
    """Local maxima of the heat become things."""
    heat = out["heat"].sigmoid()
    peak = (heat == F.max_pool2d(heat, 3, 1, 1)) & (heat > HEAT_MIN)
    probabilities = {field: out[field].softmax(1) for field in ("size", "color", "shape")}
    views: list[list[Seen]] = [[] for _ in range(len(heat))]
    for b, _, row, column in peak.nonzero().tolist():
        best = {field: p[b, :, row, column].max(0) for field, p in probabilities.items()}
        dx, dy = out["offset"][b, :, row, column].tolist()
        certainty = heat[b, 0, row, column].item() * float(np.prod([value.values.item() for value in best.values()]))
        thing = Thing(SIZES[best["size"].indices], COLORS[best["color"].indices], SHAPES[best["shape"].indices])
        views[b].append(Seen(thing, (column + 0.5 + dx) * CELL, (row + 0.5 + dy) * CELL, certainty))
    backgrounds = out["background"].argmax(1).tolist()
    return [View(tuple(seen), BACKGROUNDS[i]) for seen, i in zip(views, backgrounds, strict=True)]
