"""Motion of the whole picture between an image and its edit: shift, zoom, rotation, mirror, and how well the structure agrees.

Structure is luminance without its local mean, in units of its local contrast: global changes of color and light leave it alone.
A similarity transform is fitted to it by Gauss-Newton (Lucas and Kanade, 1981) with weights that ignore what was edited, on a
pyramid of at most 256 pixels a side, from the best of a few starts.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import ndimage

SIDE = 256
"""Longest side on which pictures are registered; shifts are given in the picture's own pixels, to about a tenth of one here."""
_COARSE = 64
_WINDOW = 9
"""Structure is what differs from the mean over so many pixels."""
_CONTRAST_LEVELS = 4.0
"""Local contrast far below this counts as flat: compression and autoencoders leave as much."""
_SCALES, _DEGREES = (1 / 1.3, 1 / 1.14, 1.0, 1.14, 1.3), (-8.0, 0.0, 8.0)
"""Starts of the fit."""
_REACH = 6
"""Starts are shifted by at most the side divided by this."""
_LEAST, _GAIN = 0.5, 1.15
_MIRROR_LEAST, _MIRROR_GAIN = 0.7, 1.1
"""Motion counts where structure then agrees at least so well, and by so much better than in place; for a mirror image, than without."""

_BUILT = 0.1
"""Structure below this is a flat ground."""
_SPAN, _THING_ZOOM = 0.6, 0.1
"""Structure that spans less is a thing: a change of its size by more is an edit."""
_STILL = 0.97
"""Structure that agrees so well in place has not moved; the fit is left out."""


@dataclass(frozen=True, kw_only=True)
class Motion:
    """What moved. All 0 where no motion explains the edit better than none."""

    shift_px: float
    """Displacement of the center, in pixels of the picture."""
    zoom: float
    """Change of scale, 0.02 for two percent either way."""
    rotation_deg: float
    """Rotation either way."""
    agreement: float
    """Correlation of structure in place, -1 to 1; 1 for pictures without structure that stay so."""
    mirrored: bool
    """Whether a mirror image explains the edit better."""


def _luminance(image: np.ndarray, side: int) -> np.ndarray:
    gray = Image.fromarray(image).convert("L").convert("F")
    factor = max(*image.shape[:2], side) / side
    if factor > 1:
        size = (max(round(gray.width / factor), 1), max(round(gray.height / factor), 1))
        gray = gray.resize(size, Image.Resampling.BOX)
    return np.asarray(gray, dtype=np.float64)


def _structure(levels: np.ndarray) -> np.ndarray:
    rest = levels - ndimage.uniform_filter(levels, _WINDOW)
    contrast = np.sqrt(np.maximum(ndimage.uniform_filter(rest * rest, 2 * _WINDOW - 1), 0))
    return rest / (contrast + _CONTRAST_LEVELS)


def _agreement(a: np.ndarray, b: np.ndarray) -> float:
    power = np.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / power) if power > 1e-9 else float((a * a).sum() <= 1e-9 and (b * b).sum() <= 1e-9)


def _unsigned(structure: np.ndarray) -> np.ndarray:
    """Where structure is, whichever side of an edge is lighter: a recolored thing can turn its edges round."""
    size = np.abs(structure)
    return size - ndimage.uniform_filter(size, _WINDOW)


def _warped(image: np.ndarray, motion: np.ndarray) -> np.ndarray:
    """The image moved by (down, across, scale, turn); lengths in half sides, scale and turn as the matrix 1 + [[s, -t], [t, s]]."""
    half = max(image.shape) / 2
    scale, turn = 1 + motion[2], motion[3]
    matrix = np.linalg.inv(np.array([[scale, -turn], [turn, scale]]))
    center = (np.array(image.shape) - 1) / 2
    return ndimage.affine_transform(image, matrix, center - matrix @ (center + half * motion[:2]), order=1, mode="constant")


def _start(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The best start: for each scale and rotation the shift at which the correlation is highest."""
    size = [2 * length for length in first.shape]
    target = np.fft.rfft2(second, size)
    down, across = (np.arange(-(length // _REACH), length // _REACH + 1) for length in first.shape)
    best, found = -np.inf, np.zeros(4)
    for scale in _SCALES:
        for degrees in _DEGREES:
            angle = np.deg2rad(degrees)
            motion = np.array([0, 0, scale * np.cos(angle) - 1, scale * np.sin(angle)])
            moved = _warped(first, motion)
            near = np.fft.irfft2(np.conj(np.fft.rfft2(moved, size)) * target, size)[np.ix_(down, across)]
            row, column = np.unravel_index(int(near.argmax()), near.shape)
            value = near[row, column] / (np.sqrt((moved**2).sum()) + 1e-9)
            if value > best:
                motion[:2] = np.array([down[row], across[column]]) / (max(first.shape) / 2)
                best, found = value, motion
    return found


def _refined(first: np.ndarray, second: np.ndarray, motion: np.ndarray, steps: int = 8) -> np.ndarray:
    """Gauss-Newton on the weighted squared difference of the moved first picture and the second."""
    half = max(first.shape) / 2
    y, x = ((np.arange(length) - (length - 1) / 2) / half for length in first.shape)
    for _ in range(steps):
        moved = _warped(first, motion)
        g_down, g_across = (half * g for g in np.gradient(moved))
        rest = second - moved
        built = np.maximum(np.abs(moved), np.abs(second)) > _BUILT  # a flat ground fits whatever the motion
        sigma = 1.5 * (np.median(np.abs(rest[built])) if built.any() else 0.0) + 1e-3
        weight = 1 / (1 + (rest / sigma) ** 2) ** 2
        slopes = np.stack([g_down, g_across, g_down * y[:, None] + g_across * x, g_across * y[:, None] - g_down * x]).reshape(4, -1)
        weighted = slopes * weight.ravel()
        step = np.linalg.lstsq(weighted @ slopes.T, weighted @ -rest.ravel(), rcond=None)[0]
        motion = motion + np.clip(step, -0.1, 0.1)
        motion[2:] = np.clip(motion[2:], -0.6, 0.6)
        if np.abs(step).max() < 1e-4:
            break
    return motion


def register(before: np.ndarray, after: np.ndarray) -> Motion:
    """The motion of the whole picture from `before` to `after`, uint8 (h, w, 3) of one size; about 0.2 seconds."""
    a, b = _luminance(before, SIDE), _luminance(after, SIDE)
    pyramid = [(a, b)]
    while min(pyramid[0][0].shape) >= 2 * _COARSE:
        pyramid.insert(0, tuple(ndimage.zoom(ndimage.uniform_filter(side, 2), 0.5, order=1) for side in pyramid[0]))  # type: ignore[arg-type]
    levels = [(_structure(one), _structure(two)) for one, two in pyramid]
    in_place = max(_agreement(*levels[-1]), _agreement(*(_unsigned(side) for side in levels[-1])))
    still = Motion(shift_px=0.0, zoom=0.0, rotation_deg=0.0, agreement=in_place, mirrored=False)
    flipped = _agreement(levels[-1][0][:, ::-1], levels[-1][1])
    if flipped > max(_MIRROR_LEAST, _MIRROR_GAIN * in_place):
        return Motion(shift_px=0.0, zoom=0.0, rotation_deg=0.0, agreement=in_place, mirrored=True)
    if in_place > _STILL or min(a.shape) < _WINDOW:
        return still
    fits = []
    for start in (np.zeros(4), _start(*levels[0])):
        found = start
        for one, two in levels:
            found = _refined(one, two, found)
        fits.append((max(_evidence(one, two, found) for one, two in levels), found))
    gain, best = max(fits, key=lambda fit: fit[0])
    if gain < _GAIN:
        return still
    size = float(np.hypot(1 + best[2], best[3]))
    if _span(levels[-1][0]) < _SPAN and (abs(size - 1) > _THING_ZOOM or abs(best[3]) > _THING_ZOOM):
        return still  # a lone thing that was resized or exchanged
    return Motion(
        shift_px=float(np.hypot(*best[:2])) * max(before.shape[:2]) / 2,
        zoom=abs(size - 1),
        rotation_deg=float(abs(np.rad2deg(np.arctan2(best[3], 1 + best[2])))),
        agreement=in_place,
        mirrored=False,
    )


def _span(structure: np.ndarray) -> float:
    """Share of the longer side over which strong structure extends."""
    places = np.nonzero(np.abs(structure) > 0.5)
    if not len(places[0]):
        return 0.0
    return float(max(np.subtract(*np.quantile(place, (0.98, 0.02))) for place in places) / max(structure.shape))


def _evidence(first: np.ndarray, second: np.ndarray, motion: np.ndarray) -> float:
    """By what factor structure agrees better after the motion than in place; 0 where it does not agree after it either."""
    moved = _warped(first, motion)
    aligned = _agreement(moved, second)
    in_place = max(_agreement(first, second), _agreement(_unsigned(first), _unsigned(second)), 1e-3)
    return aligned / in_place if aligned >= _LEAST else 0.0
