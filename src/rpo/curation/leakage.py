"""Leakage: can chosen be told from rejected without the prompt? Then training may learn an artifact instead of the preference.

A small linear probe looks at coarse colors, spectrum and pixel noise, and never at the prompt. Two numbers: how well it tells single
images (what one side carries in every image), and how well it tells the sides of a pair from their difference (what a preference
objective sees). It always learns from the same number of pairs, so that neither number grows with the size of the set.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from rpo.data.images import fit_square
from rpo.errors import RpoError

WARN_ABOVE = 0.85
"""Above this a number warns: honest local edits of photographs stay below it (docs/editors-and-rewards.md)."""
REFUSE_ABOVE = 0.9
"""Training is refused where the lower end of an interval is above this."""
MIN_PAIRS = 20
MAX_PAIRS = 400
"""Of more pairs so many are drawn: a share of 0.9 of them is known to 0.03."""
LEAST_SIDE = 16
"""Images with a smaller side are enlarged before they are looked at."""
_LEARN = 16
"""Pairs that the probe learns from."""
_SPLITS = 30
_RIDGE = 3.0
_EPSILON = 1e-6
GROUPS = {"color": (0, 56), "sharpness and noise": (56, None)}
"""Which features a verdict can name."""


@dataclass(frozen=True, kw_only=True)
class Leakage:
    """Both numbers with their 95 % intervals over pairs: 0.5 is chance, 1 certainty."""

    pairs: int
    """Pairs that were looked at."""
    left_out: int = 0
    """Pairs with features that are not finite."""
    auc: float
    """Single images: the probability that a chosen one scores above a rejected one."""
    auc_low: float
    auc_high: float
    paired: float
    """Differences: the share of pairs whose sides are told apart."""
    paired_low: float
    paired_high: float
    differs: str
    """The features in which the sides differ most."""


def leakage(sides: Iterable[tuple[np.ndarray, np.ndarray]], seed: int = 0, side: int | None = None) -> Leakage | str:
    """Both numbers on pairs that the probe did not learn from, or why nothing can be said.

    `sides` gives (chosen, rejected) images, uint8 (height, width, 3), of which no more than two are held at a time; each is fitted to
    the square of `side` that is trained on.
    """
    rows = [[(_features(image, side), hashlib.sha256(image.tobytes()).digest()) for image in pair] for pair in sides]
    sound = [row for row in rows if all(np.isfinite(features).all() for features, _ in row)]
    left_out = len(rows) - len(sound)
    besides = f", {left_out} more could not be measured" if left_out else ""
    if len(sound) < MIN_PAIRS:
        return f"{len(sound)} pairs{besides}; {MIN_PAIRS} are needed"
    chosen, rejected = (np.stack([row[place][0] for row in sound]) for place in (0, 1))
    group = _groups(*([row[place][1] for row in sound] for place in (0, 1)))
    learn = _learned(group, np.random.default_rng(seed))
    if not len(learn):
        return f"{len(sound)} pairs{besides} share their images, so none can be held out"
    singles, differences = _single(chosen, rejected, learn), _paired(chosen - rejected, _scale(chosen, rejected), learn)
    auc, paired = _interval(singles), _interval(differences)
    alone = {
        name: np.nanmean(_paired((chosen - rejected)[:, slice(*place)], _scale(chosen, rejected)[slice(*place)], learn))
        for name, place in GROUPS.items()
    }
    return Leakage(
        pairs=len(sound), left_out=left_out, auc=auc[0], auc_low=auc[1], auc_high=auc[2], paired=paired[0], paired_low=paired[1],
        paired_high=paired[2], differs=max(alone, key=lambda name: alone[name]),
    )  # fmt: skip


def _features(image: np.ndarray, side: int | None) -> np.ndarray:
    if side is None and min(image.shape[:2]) < LEAST_SIDE:
        side = LEAST_SIDE
    return image_features(image if side is None else fit_square(image, max(side, LEAST_SIDE)))


def check_health(found: Leakage | str, allow_fingerprint: bool = False) -> str:
    """One line for people; it starts with "warning" above 0.85 or where nothing can be said.

    Raises `RpoError` where the lower end of an interval is above 0.9, unless leakage is allowed.
    """
    if isinstance(found, str):
        return f"warning: pair health unknown: {found} to show whether one side carries an artifact"
    told = (
        f"single images AUC {found.auc:.2f} ({found.auc_low:.2f} to {found.auc_high:.2f}), "
        f"sides of a pair {found.paired:.2f} ({found.paired_low:.2f} to {found.paired_high:.2f}), {found.pairs} pairs"
    ) + (f", {found.left_out} not measured" if found.left_out else "")
    if max(found.auc_low, found.paired_low) > REFUSE_ABOVE and not allow_fingerprint:
        raise RpoError(
            f"pair health: a probe that never sees the prompt tells chosen from rejected ({told}; limit {REFUSE_ABOVE}), most by "
            f"{found.differs}. Training would learn that artifact instead of the preference, and can make the model worse while its "
            "loss falls. If the pairs were made here, let both sides pass the same editor (neutral edit as rejected side) or project "
            "both through the policy. If they were brought, both sides need the same processing: size, compression, sharpness, "
            "brightness. If the difference is what you want to teach, --allow-fingerprint trains all the same."
        )
    if max(found.auc, found.paired) > WARN_ABOVE:
        return (
            f"warning: pair health: a probe that never sees the prompt tells chosen from rejected ({told}; healthy up to {WARN_ABOVE}), "
            f"most by {found.differs}; part of what is learned may be that artifact. Watch the chosen error and the judge."
        )
    so_far = " so far" if found.pairs < 100 else ""
    return f"pair health: fine{so_far}, a probe that never sees the prompt barely tells the sides apart ({told}; 0.5 is chance)"


def image_features(image: np.ndarray) -> np.ndarray:
    """About a hundred numbers: coarse colours, channel statistics, spectrum, pixel noise, block edges. Scale-free where possible."""
    pixels = image.astype(np.float64) / 255
    luma = pixels @ np.array([0.299, 0.587, 0.114])
    planes = np.stack([luma, pixels[..., 0] - luma, pixels[..., 2] - luma])
    means, deviations = pixels.mean(axis=(0, 1)), pixels.std(axis=(0, 1))
    clipped = [(image == 0).mean(), (image == 255).mean()]
    colours = [_coarse(pixels).ravel(), means, np.log(deviations + _EPSILON), clipped]
    return np.concatenate([*colours, np.concatenate([_spectrum(planes), _noise(planes), _blocks(planes)], axis=1).ravel()])


def _coarse(pixels: np.ndarray, cells: int = 4) -> np.ndarray:
    """Mean colors of `cells` by `cells` parts, whose sizes differ by at most 1."""
    for axis in (0, 1):
        parts = np.array_split(np.arange(pixels.shape[axis]), cells)
        sizes = np.array([len(part) for part in parts]).reshape([-1, 1, 1] if axis == 0 else [1, -1, 1])
        pixels = np.add.reduceat(pixels, [part[0] for part in parts], axis=axis) / sizes
    return pixels


@lru_cache(maxsize=8)
def _rings(height: int, width: int, bands: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of images of one size: the window before the transform, the ring of every frequency, and how many frequencies a ring has."""
    window = np.hanning(height)[:, None] * np.hanning(width)[None, :]
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    ring = np.minimum((radius / 0.5 * bands).astype(int), bands - 1).ravel()
    return window, ring, np.bincount(ring, minlength=bands)


def _spectrum(planes: np.ndarray, bands: int = 8) -> np.ndarray:
    """Log mean power in rings of equal width, from the lowest frequencies to the corner."""
    _, height, width = planes.shape
    window, ring, count = _rings(height, width, bands)
    power = np.abs(np.fft.rfft2((planes - planes.mean(axis=(1, 2), keepdims=True)) * window)) ** 2 / (height * width)
    sums = np.array([np.bincount(ring, plane.ravel(), minlength=bands) for plane in power])
    return np.log(sums / count + _EPSILON**2)


def _noise(planes: np.ndarray) -> np.ndarray:
    """What a local mean leaves over: its quantiles, tails and correlation with its neighbours, and its strength where all is flat."""
    middle = planes[:, 1:-1, 1:-1]
    sides = planes[:, :-2, 1:-1] + planes[:, 2:, 1:-1] + planes[:, 1:-1, :-2] + planes[:, 1:-1, 2:]
    rest = middle - sides / 4
    squares = rest**2
    power = squares.mean(axis=(1, 2)) + _EPSILON**2
    tails = np.log((squares**2).mean(axis=(1, 2)) / power**2 + _EPSILON)
    quantiles = np.log(np.quantile(np.abs(rest).reshape(len(rest), -1), [0.1, 0.25, 0.5, 0.75, 0.9], axis=1) + 1e-4)
    across = (rest[:, :, 1:] * rest[:, :, :-1]).mean(axis=(1, 2)) / power
    down = (rest[:, 1:] * rest[:, :-1]).mean(axis=(1, 2)) / power
    size = max(1, min(8, *rest.shape[1:]))
    rows, columns = (side // size for side in rest.shape[1:])
    cells = rest[:, : rows * size, : columns * size].reshape(len(rest), rows, size, columns, size).std(axis=(2, 4))
    flat = np.log(np.quantile(cells.reshape(len(rest), -1), [0.05, 0.25], axis=1) + 1e-4)
    return np.stack([np.log(power), tails, *quantiles, across, down, *flat], axis=1)


def _blocks(planes: np.ndarray) -> np.ndarray:
    """How much steeper the steps over the edges of 8 by 8 blocks are than elsewhere: codecs and autoencoders leave such."""
    ratios: list[np.ndarray] = []
    for axis in (1, 2):
        steps = np.abs(np.diff(planes, axis=axis))
        edges = steps[:, 7::8] if axis == 1 else steps[:, :, 7::8]
        whole = np.zeros(len(planes))
        ratios.append(np.log((edges.mean(axis=(1, 2)) + 1e-4) / (steps.mean(axis=(1, 2)) + 1e-4)) if edges.size else whole)
    return np.stack(ratios, axis=1)


def _scale(chosen: np.ndarray, rejected: np.ndarray) -> np.ndarray:
    return np.concatenate([chosen, rejected]).std(axis=0) + _EPSILON


def _ridge(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Weights of the ridge regression through the origin."""
    return np.linalg.solve(features.T @ features + _RIDGE * np.eye(features.shape[1]), features.T @ labels)


def _single(chosen: np.ndarray, rejected: np.ndarray, learn: np.ndarray) -> np.ndarray:
    """(splits, pairs): each held-out pair's part of the area under the curve of single images; NaN where the probe learned from it."""
    found = np.full(learn.shape, np.nan)
    for split, learned in enumerate(learn):
        known = np.concatenate([chosen[learned], rejected[learned]])
        mean, scale = known.mean(axis=0), known.std(axis=0) + _EPSILON
        weights = _ridge((known - mean) / scale, np.repeat([0.5, -0.5], learned.sum()))
        up, down = ((side[~learned] - mean) / scale @ weights for side in (chosen, rejected))
        above = (np.sign(up[:, None] - down[None, :]) + 1) / 2
        found[split, ~learned] = (above.mean(1) + above.mean(0)) / 2
    return found


def _paired(differences: np.ndarray, scale: np.ndarray, learn: np.ndarray) -> np.ndarray:
    """(splits, pairs): whether each held-out pair's sides are told apart by their difference; NaN where the probe learned from it."""
    found = np.full(learn.shape, np.nan)
    for split, learned in enumerate(learn):
        known = differences[learned] / scale
        own = np.sqrt((known**2).mean(axis=0)) + _EPSILON
        weights = _ridge(known / own, np.ones(len(known)))
        found[split, ~learned] = (np.sign(differences[~learned] / scale / own @ weights) + 1) / 2
    return found


def _interval(parts: np.ndarray) -> tuple[float, float, float]:
    """(mean, low, high) over pairs of the mean over splits."""
    tested = ~np.isnan(parts)
    each = np.nansum(parts, axis=0)[tested.any(0)] / tested.sum(axis=0)[tested.any(0)]
    mean, n = float(each.mean()), len(each)
    # Wilson's interval, never narrower than that of a share: with certainty on n pairs its lower end is n / (n + 3.84).
    variance = max(float(each.var()), 0.0)
    middle = (mean + 1.92 / n) / (1 + 3.84 / n)
    width = 1.96 * np.sqrt(variance / n + 0.96 / n**2) / (1 + 3.84 / n)
    return mean, float(middle - width), float(min(middle + width, 1.0))


def _groups(chosen: Sequence[bytes], rejected: Sequence[bytes]) -> np.ndarray:
    """A group per pair of image digests; pairs that share an image share a group, or the probe could recognize images it has seen."""
    index = {name: node for node, name in enumerate(dict.fromkeys([*chosen, *rejected]))}
    left, right = ([index[name] for name in side] for side in (chosen, rejected))
    graph = coo_array((np.ones(len(left)), (left, right)), shape=(len(index), len(index)))
    return connected_components(graph, directed=False)[1][left]


def _learned(group: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(splits, pairs): whether the probe learns from a pair, whole groups until there are enough; no split where none is held out."""
    splits: list[np.ndarray] = []
    for _ in range(_SPLITS):
        order, learned = rng.permutation(np.unique(group)), np.zeros(len(group), dtype=bool)
        for one in order[:-1]:
            if learned.sum() >= _LEARN:
                break
            learned |= group == one
        if learned.sum() >= _LEARN and not learned.all():
            splits.append(learned)
    return np.array(splits, dtype=bool).reshape(-1, len(group))
