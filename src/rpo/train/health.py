"""Can chosen be told from rejected without the prompt? Then training may learn the pipeline's fingerprint, not the preference.

A small linear probe looks at single images: their colours, spectrum and pixel noise. It is trained on some pairs and tested on
others. 0.5 means that the sides differ in content only; 1 that one side carries a mark, such as an editor's blur.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from rpo.errors import RpoError

WARN_ABOVE = 0.8
REFUSE_ABOVE = 0.95
MIN_PAIRS = 20
MAX_PAIRS = 1000
"""Of more pairs so many are drawn: enough for the area to be sure to about two points."""
_FOLDS = 5
_RIDGE = 3.0
_EPSILON = 1e-6


def fingerprint_auc(sides: Iterable[tuple[np.ndarray, np.ndarray]], seed: int = 0) -> float:
    """Area under the curve of the probe on held-out pairs; both sides of a pair are always in the same fold.

    `sides` gives (chosen, rejected) images, uint8 (height, width, 3), of which no more than two are held at a time. NaN for fewer than
    20 pairs, or all linked by shared images: nothing can be said then.
    """
    told = [[(image_features(image), hashlib.sha256(image.tobytes()).digest()) for image in pair] for pair in sides]
    if len(told) < MIN_PAIRS:
        return math.nan
    told = [told[row] for row in np.random.default_rng(seed).permutation(len(told))]
    chosen, rejected = (np.stack([pair[side][0] for pair in told]) for side in (0, 1))
    fold = _folds(*([pair[side][1] for pair in told] for side in (0, 1)))
    if fold.max() == 0:
        return math.nan
    areas = []
    for held_out in range(fold.max() + 1):
        train, test = fold != held_out, fold == held_out
        probe = _fit(np.concatenate([chosen[train], rejected[train]]), np.repeat([1.0, 0.0], train.sum()))
        areas.append(_auc(probe(chosen[test]), probe(rejected[test])))
    return float(np.mean(areas))


def check_health(auc: float, allow_fingerprint: bool = False) -> str:
    """One line for people; it starts with "warning" above 0.8. Above 0.95 raises `RpoError` unless a fingerprint is allowed."""
    if math.isnan(auc):
        return f"warning: pair health unknown: fewer than {MIN_PAIRS} pairs cannot show whether one side carries a fingerprint"
    if auc > REFUSE_ABOVE and not allow_fingerprint:
        raise RpoError(
            f"pair health: a probe that never sees the prompt tells chosen from rejected images (AUC {auc:.2f}, limit {REFUSE_ABOVE}). "
            "Training would learn that fingerprint instead of the preference, and can make the model worse while its loss falls. "
            "Let both sides pass the same editor (neutral edit as rejected side) or project both through the policy; "
            "--allow-fingerprint trains all the same."
        )
    if auc > WARN_ABOVE:
        return (
            f"warning: pair health: a probe that never sees the prompt tells chosen from rejected images (AUC {auc:.2f}, healthy below "
            f"{WARN_ABOVE}); part of what is learned may be the pipeline's fingerprint. Watch the chosen error and the judge."
        )
    return f"pair health: fine, a probe that never sees the prompt barely tells the sides apart (AUC {auc:.2f}, 0.5 is chance)"


def image_features(image: np.ndarray) -> np.ndarray:
    """About a hundred numbers: coarse colours, channel statistics, spectrum, pixel noise, block edges. Scale-free where possible."""
    pixels = image.astype(np.float64) / 255
    luma = pixels @ np.array([0.299, 0.587, 0.114])
    planes = [luma, pixels[..., 0] - luma, pixels[..., 2] - luma]
    means, deviations = pixels.mean(axis=(0, 1)), pixels.std(axis=(0, 1))
    clipped = [(image == 0).mean(), (image == 255).mean()]
    colours = [*_coarse(pixels).ravel(), *means, *np.log(deviations + _EPSILON), *clipped]
    return np.array([*colours, *(value for plane in planes for value in (*_spectrum(plane), *_noise(plane), *_blocks(plane)))])


def _coarse(pixels: np.ndarray, cells: int = 4) -> np.ndarray:
    rows = np.array_split(pixels, cells, axis=0)
    return np.array([[cell.mean(axis=(0, 1)) for cell in np.array_split(row, cells, axis=1)] for row in rows])


def _spectrum(plane: np.ndarray, bands: int = 8) -> list[float]:
    """Log mean power in rings of equal width, from the lowest frequencies to the corner."""
    height, width = plane.shape
    window = np.hanning(height)[:, None] * np.hanning(width)[None, :]
    power = np.abs(np.fft.rfft2((plane - plane.mean()) * window)) ** 2 / (height * width)
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    ring = np.minimum((radius / 0.5 * bands).astype(int), bands - 1)
    return [float(np.log(power[ring == band].mean() + _EPSILON**2)) for band in range(bands)]


def _noise(plane: np.ndarray) -> list[float]:
    """What a local mean leaves over: its quantiles, tails and correlation with its neighbours, and its strength where all is flat."""
    middle = plane[1:-1, 1:-1]
    sides = plane[:-2, 1:-1] + plane[2:, 1:-1] + plane[1:-1, :-2] + plane[1:-1, 2:]
    rest = middle - sides / 4
    power = (rest**2).mean() + _EPSILON**2
    quantiles = np.log(np.quantile(np.abs(rest), [0.1, 0.25, 0.5, 0.75, 0.9]) + 1e-4)
    across, down = (rest[:, 1:] * rest[:, :-1]).mean() / power, (rest[1:] * rest[:-1]).mean() / power
    size = max(1, min(8, *rest.shape))
    trimmed = rest[: rest.shape[0] // size * size, : rest.shape[1] // size * size]
    cells = trimmed.reshape(trimmed.shape[0] // size, size, -1, size).std(axis=(1, 3))
    flat = np.log(np.quantile(cells, [0.05, 0.25]) + 1e-4)
    return [float(np.log(power)), float(np.log((rest**4).mean() / power**2 + _EPSILON)), *quantiles, float(across), float(down), *flat]


def _blocks(plane: np.ndarray) -> list[float]:
    """How much steeper the steps over the edges of 8 by 8 blocks are than elsewhere: codecs and autoencoders leave such."""
    ratios = []
    for steps in (np.abs(np.diff(plane, axis=0)), np.abs(np.diff(plane, axis=1)).T):
        edges = steps[7::8]
        ratios.append(float(np.log((edges.mean() + 1e-4) / (steps.mean() + 1e-4))) if len(edges) else 0.0)
    return ratios


def _fit(features: np.ndarray, labels: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Ridge regression on standardised features: the linear discriminant, shrunk. Gives the function that scores features."""
    mean, scale = features.mean(axis=0), features.std(axis=0) + _EPSILON
    standard = (features - mean) / scale
    gram = standard.T @ standard + _RIDGE * np.eye(standard.shape[1])
    weights = np.linalg.solve(gram, standard.T @ (labels - labels.mean()))
    return lambda unseen: (unseen - mean) / scale @ weights


def _folds(chosen: Sequence[bytes], rejected: Sequence[bytes]) -> np.ndarray:
    """A fold per pair of image digests; pairs that share an image share a fold, or the probe could recognise images it has seen."""
    index = {name: node for node, name in enumerate(dict.fromkeys([*chosen, *rejected]))}
    left, right = ([index[name] for name in side] for side in (chosen, rejected))
    graph = coo_array((np.ones(len(left)), (left, right)), shape=(len(index), len(index)))
    group = connected_components(graph, directed=False)[1][left]
    fold_of = {name: place % _FOLDS for place, name in enumerate(dict.fromkeys(group.tolist()))}
    return np.array([fold_of[name] for name in group.tolist()])


def _auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Probability that a positive scores above a negative, ties as half."""
    return float((np.sign(positive[:, None] - negative[None, :]) + 1).mean() / 2)
