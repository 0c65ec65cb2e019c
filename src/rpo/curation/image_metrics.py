"""What an edit did to an image, in numbers that need no model. Thresholds are documented in docs/editors-and-rewards.md."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

QUIET_LEVELS = 24
"""Pixels that differ by more than this, of 255, are edited; an artifact pattern is looked for in the others."""
_SIDE = 512
"""Changes are measured on images of at most this side."""
_BLOCK = 8
"""Side of a block in pixels, that of JPEG and of most autoencoders; half of it for images below 128 pixels."""
_MEAN_LEVELS, _MEAN_SHARE = 16.0, 0.002
_BROAD_LEVELS, _BROAD_SHARE = 8.0, 0.02
_TEXTURE_LEVELS, _TEXTURE_SHARE = 5.0, 0.1


def _levels(image: np.ndarray) -> np.ndarray:
    """The image as floats with no side above `_SIDE`."""
    factor = max(*image.shape[:2], _SIDE) / _SIDE
    if factor == 1:
        return image.astype(np.float64)
    height, width = (max(round(length / factor), 1) for length in image.shape[:2])
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BOX), dtype=np.float64)


def _blocks(values: np.ndarray, side: int) -> np.ndarray:
    """(rows, side, columns, side, channels) of a (height, width, channels) array, cut to whole blocks."""
    side = min(side, *values.shape[:2])
    rows, columns = (length // side for length in values.shape[:2])
    return values[: rows * side, : columns * side].reshape(rows, side, columns, side, -1)


def visible_change(before: np.ndarray, after: np.ndarray) -> float:
    """How visible the change is between two uint8 images (h, w, 3): below 1 none is, whatever codec or autoencoder they passed.

    The largest of three shares of blocks, each divided by the share at which a change is visible: 8x8 blocks whose mean color differs
    by more than 16 levels (0.2 %: local edits), 32x32 blocks by more than 8 (2 %: casts), and 8x8 blocks whose contrast differs by more
    than 5 (10 %: noise, blur).
    """
    if before.shape != after.shape:
        raise ValueError(f"both sides must have the same size, got {before.shape} and {after.shape}")
    a, b = _levels(before), _levels(after)
    side = _BLOCK if max(before.shape) >= 128 else _BLOCK // 2

    def share(side: int, levels: float) -> float:
        return float((np.abs(_blocks(b - a, side).mean((1, 3))).max(-1) > levels).mean())

    contrast = [_blocks(image.mean(-1, keepdims=True), side).std((1, 3)) for image in (a, b)]
    texture = float((np.abs(contrast[1] - contrast[0]) > _TEXTURE_LEVELS).mean())
    return max(share(side, _MEAN_LEVELS) / _MEAN_SHARE, share(4 * side, _BROAD_LEVELS) / _BROAD_SHARE, texture / _TEXTURE_SHARE)


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """The artifact pattern that every edit of a run carries alike, in levels of 255, with its 95 % interval over rows."""

    levels: float
    low: float
    high: float
    rows: int


PATTERN_ROWS = (64, 128)
"""Fewest rows from which a pattern is estimated, and how many are looked at."""


def artifact_pattern(
    before: Sequence[np.ndarray], after: Sequence[np.ndarray], groups: Mapping[str, Sequence[object]], seed: int = 0
) -> Pattern | None:
    """What the changes of two different rows have in common, over all pairs of rows: content cancels, an editor's pattern does not.

    Two rows that share a value in one of `groups` (name to one value per row: the instruction, the prompt) are not compared, because
    what was asked for twice is no pattern. Pixels that were edited visibly are left out. This is the mean over all halvings of the
    product of the halves' means. `None` for fewer than 64 rows of one size, or fewer than two groups.
    """
    shapes = [image.shape for image in before]
    common = max(set(shapes), key=shapes.count) if shapes else ()
    rows = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a.shape == b.shape == common][: PATTERN_ROWS[1]]
    if len(rows) < PATTERN_ROWS[0]:
        return None
    changes = np.zeros((len(rows), int(np.prod(common))), dtype=np.float32)
    for place, row in enumerate(rows):
        change = after[row].astype(np.float32) - before[row]
        changes[place] = np.where(np.abs(change).max(-1, keepdims=True) <= QUIET_LEVELS, change, 0).ravel()
    products = (changes @ changes.T).astype(np.float64) / changes.shape[1]
    apart = ~np.eye(len(rows), dtype=bool)
    for values in groups.values():
        own = np.array([hash(values[row]) for row in rows])
        apart &= own[:, None] != own[None, :]
    if not apart.any():
        return None

    def levels(picked: np.ndarray) -> float:
        compared = apart[np.ix_(picked, picked)]
        return float(np.sqrt(max((products[np.ix_(picked, picked)] * compared).sum() / max(compared.sum(), 1), 0.0)))

    rng = np.random.default_rng(seed)
    drawn = [levels(rng.integers(0, len(rows), len(rows))) for _ in range(400)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Pattern(levels=levels(np.arange(len(rows))), low=float(low), high=float(high), rows=len(rows))
