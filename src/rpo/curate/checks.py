"""What an edit did to a picture, in numbers that need no model."""

import numpy as np

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
