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


def shift_px(before: np.ndarray, after: np.ndarray) -> float:
    """By how many pixels the whole picture moved (phase correlation, Kuglin and Hines 1975); 0 unless a shift explains it better.

    Editors drift by a few pixels; what goes further is a thing that was asked to move. So shifts up to an eighth of the side are
    looked for, and count only where moving `before` by them leaves less difference than not moving it at all.
    """
    _same_size(before, after)
    a, b = (image.astype(np.float64).mean(-1) for image in (before, after))
    cross = np.fft.fft2(b - b.mean()) * np.conj(np.fft.fft2(a - a.mean()))
    surface = np.fft.ifft2(cross / np.maximum(np.abs(cross), 1e-12)).real
    rows, columns = surface.shape
    reach = np.minimum(np.arange(rows), rows - np.arange(rows))[:, None], np.minimum(np.arange(columns), columns - np.arange(columns))
    near = (reach[0] <= rows // 8) & (reach[1] <= columns // 8)
    row, column = np.unravel_index(int(np.where(near, surface, -np.inf).argmax()), surface.shape)
    moved = np.roll(a, (int(row), int(column)), (0, 1))
    if np.abs(moved - b).mean() >= np.abs(a - b).mean():
        return 0.0
    return float(np.hypot(min(row, rows - row), min(column, columns - column)))


ZOOM_SCALES = (0.9, 0.92, 0.94, 0.96, 0.98, 1.02, 1.04, 1.06, 1.08, 1.1)
ZOOM_SIDE = 128
"""Zooming is looked for on pictures of at most this side."""
ZOOM_GAIN = 0.7
"""A zoom counts when scaling `before` leaves at most this share of the difference that not scaling it leaves."""


def zoom(before: np.ndarray, after: np.ndarray) -> float:
    """How much the whole picture was scaled about its centre, 0.02 for two per cent either way; 0 unless scaling explains it clearly.

    Tells 0.02 apart; what an edit zooms beyond a tenth shows as a change of almost every pixel.
    """
    _same_size(before, after)
    small = min(ZOOM_SIDE / max(before.shape[:2]), 1.0)
    size = (max(round(before.shape[1] * small), 8), max(round(before.shape[0] * small), 8))
    a, b = (Image.fromarray(image).convert("L").resize(size, Image.Resampling.BOX) for image in (before, after))
    target = np.asarray(b, dtype=np.float64)
    inner = tuple(slice(length // 8, length - length // 8) for length in target.shape)  # what every scale still shows

    def difference(scale: float) -> float:
        width, height = size[0] / scale, size[1] / scale
        left, top = (size[0] - width) / 2, (size[1] - height) / 2
        scaled = a.transform(size, Image.Transform.EXTENT, (left, top, left + width, top + height), Image.Resampling.BILINEAR)
        return float(np.abs(np.asarray(scaled, dtype=np.float64) - target)[inner].mean())

    still = difference(1.0)
    best = min(ZOOM_SCALES, key=difference)
    return abs(best - 1) if difference(best) < ZOOM_GAIN * still else 0.0


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
