"""What an edit did to a picture, in numbers that need no model."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

CHANGED_LEVELS = 24
"""A pixel has changed when one of its channels differs by more than this, of 255."""


def _same_size(before: np.ndarray, after: np.ndarray) -> None:
    if before.shape != after.shape:
        raise ValueError(f"both sides must have the same size, got {before.shape} and {after.shape}")


def change_fraction(before: np.ndarray, after: np.ndarray) -> float:
    """Share of pixels that changed visibly, 0 to 1, of two uint8 images (h, w, 3)."""
    _same_size(before, after)
    return float((np.abs(before.astype(np.int16) - after).max(-1) > CHANGED_LEVELS).mean())


EDGE_LEVELS = 64
"""A step of so many levels between neighbours is a full edge."""
EDGES_SIDE = 512
"""Edges are compared on pictures of at most this side; displacements are given in the picture's own pixels."""
MOVED_GAIN, MOVED_LEAST = 1.2, 0.5
"""A displacement counts where edges then agree by so much more than in place, and at least so well (1 is full agreement)."""
ZOOM_SCALES = (0.9, 0.92, 0.94, 0.96, 0.98, 1.02, 1.04, 1.06, 1.08, 1.1)
ZOOM_GAIN, ZOOM_LEAST = 1.02, 0.8
"""The same for a change of scale, which moves the edges near the middle only a little."""


def _small(image: np.ndarray) -> tuple[Image.Image, float]:
    """(the picture with no side above `EDGES_SIDE`, by how much it was made smaller)."""
    factor = max(*image.shape[:2], EDGES_SIDE) / EDGES_SIDE
    picture = Image.fromarray(image)
    if factor == 1:
        return picture, 1.0
    size = (max(round(picture.width / factor), 1), max(round(picture.height / factor), 1))
    return picture.resize(size, Image.Resampling.BOX), factor


def _edges(picture: Image.Image) -> np.ndarray:
    """0 to 1 per pixel: where colour changes, whatever the colours are."""
    levels = np.asarray(picture, dtype=np.float64)
    across = np.abs(np.diff(levels, axis=1, prepend=levels[:, :1])).max(-1)
    down = np.abs(np.diff(levels, axis=0, prepend=levels[:1])).max(-1)
    return np.minimum(np.maximum(across, down), EDGE_LEVELS) / EDGE_LEVELS


def shift_px(before: np.ndarray, after: np.ndarray) -> float:
    """By how many pixels the whole picture moved, by the correlation of edges; 0 unless a shift explains it clearly better.

    Edges stay where colours and backgrounds change, so an edit seldom looks like a shift. Shifts up to an eighth of the side are told;
    a picture of which the edit left nothing in place cannot be registered, and counts as not shifted.
    """
    _same_size(before, after)
    (a, factor), (b, _) = _small(before), _small(after)
    first, second = _edges(a), _edges(b)
    rows, columns = first.shape
    size = (2 * rows, 2 * columns)  # what is moved out on one side does not come in on the other
    surface = np.fft.irfft2(np.conj(np.fft.rfft2(first, size)) * np.fft.rfft2(second, size), size)
    surface /= np.sqrt((first**2).sum() * (second**2).sum()) + 1e-9
    down, across = (np.arange(-(length // 8), length // 8 + 1) for length in (rows, columns))
    near = surface[np.ix_(down, across)]
    row, column = np.unravel_index(int(near.argmax()), near.shape)
    if near[row, column] < max(MOVED_LEAST, MOVED_GAIN * surface[0, 0]):
        return 0.0
    return factor * float(np.hypot(down[row], across[column]))


def zoom(before: np.ndarray, after: np.ndarray) -> float:
    """How much the whole picture was scaled about its centre, 0.02 for two per cent either way; 0 unless scaling explains it clearly.

    By the agreement of edges; tells steps of 0.02 up to a tenth.
    """
    _same_size(before, after)
    (a, _), (b, _) = _small(before), _small(after)
    inner = tuple(slice(length // 16, length - length // 16) for length in (a.height, a.width))  # what every scale still shows
    target = _edges(b)[inner]

    def agreement(scale: float) -> float:
        width, height = a.width / scale, a.height / scale
        left, top = (a.width - width) / 2, (a.height - height) / 2
        box = (left, top, left + width, top + height)
        scaled = _edges(a.transform(a.size, Image.Transform.EXTENT, box, Image.Resampling.BILINEAR))[inner]
        return float((scaled * target).sum() / (np.sqrt((scaled**2).sum() * (target**2).sum()) + 1e-9))

    found = {scale: agreement(scale) for scale in (1.0, *ZOOM_SCALES)}
    best = max(found, key=lambda scale: found[scale])
    return abs(best - 1) if found[best] >= max(ZOOM_LEAST, ZOOM_GAIN * found[1.0]) else 0.0


def pattern_levels(before: Sequence[np.ndarray], after: Sequence[np.ndarray]) -> float | None:
    """How strong a pattern is that every edit carries alike, in levels of 255; `None` for fewer than eight pictures of one size.

    Edits differ from picture to picture, an editor's fingerprint does not. So the mean of what changed a little (pixels that changed
    visibly are left out) is taken over two halves of the pictures, and only what both halves agree on counts: the root of the mean
    product, in which independent noise cancels.
    """
    if len(before) < 8 or len({image.shape for image in (*before, *after)}) != 1:
        return None
    halves: list[np.ndarray] = []
    for half in (0, 1):
        total = np.zeros(before[0].shape)
        count = np.zeros(before[0].shape)
        for a, b in zip(before[half::2], after[half::2], strict=True):
            change = b.astype(np.float64) - a
            quiet = np.abs(change).max(-1, keepdims=True) <= CHANGED_LEVELS
            total += np.where(quiet, change, 0)
            count += quiet
        halves.append(total / np.maximum(count, 1))
    return float(np.sqrt(max((halves[0] * halves[1]).mean(), 0.0)))
