"""Two models compared on one metric: paired numbers, the prompt as the unit, intervals by bootstrap or, with few prompts, by Student's t.

Pure functions, seeded.

Several seeds of one prompt are one observation (their mean): more seeds sharpen a prompt's value, `n` stays the number of prompts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.distance import pdist
from scipy.special import ndtri, stdtrit

Floats = NDArray[np.float64]

RESAMPLES = 10_000
BOOTSTRAP_MIN = 30
"""Prompts from which the percentile bootstrap is used. Below, it covers too rarely: of normal differences in 72, 83, 90 and 92 of 100
simulated studies with 3, 5, 10 and 20 prompts, and less of fractions (docs/evaluation.md)."""
INTERVAL_MIN = 3
"""Prompts below which there is no interval."""
Range = tuple[float, float]
_BLOCK = 4_000_000
"""Resampled indices held at once; bounds memory to some 64 MB."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Base against tuned on one metric, over `n` prompts."""

    base: float
    """Mean over prompts of the base model's value."""
    tuned: float
    difference: float
    """Mean over prompts of tuned minus base."""
    ci95: Range | None
    """95 % interval of `difference`; `None` for fewer than `INTERVAL_MIN` prompts."""
    win_rate: float
    """Share of images that tuned wins, ties as half, averaged within the prompt first."""
    win_ci95: Range | None
    """95 % interval of `win_rate`."""
    interval: Literal["bootstrap", "t"] | None
    """How both intervals are made: see `mean_interval`."""
    p_value: float
    """Of the Wilcoxon signed-rank test over prompts; correct it for the number of metrics (`holm`) before reading it."""
    n: int
    """Number of prompts."""
    detectable: float
    """Smallest true difference that this many prompts reveal with 80 % power at 5 %, two-sided."""


def _vector(name: str, values: ArrayLike) -> Floats:
    vector = np.asarray(values, dtype=np.float64)
    if vector.ndim != 1 or vector.size == 0 or not np.isfinite(vector).all():
        raise ValueError(f"{name} must be a non-empty vector of finite numbers, got shape {vector.shape}; drop missing values first")
    return vector


def prompt_means(values: ArrayLike, prompts: ArrayLike) -> Floats:
    """Mean of `values` (images,) within each distinct entry of `prompts` (images,), in sorted order of the entries."""
    vector, keys = _vector("values", values), np.asarray(prompts)
    if keys.shape != vector.shape:
        raise ValueError(f"prompts must name the prompt of each of the {vector.size} values, got shape {keys.shape}")
    _, cluster = np.unique(keys, return_inverse=True)
    return np.bincount(cluster, weights=vector) / np.bincount(cluster)


def pairwise_distance(features: ArrayLike, prompts: ArrayLike) -> Floats:
    """How far the images of a prompt lie apart: the mean Euclidean distance of their pairs on `features` (images, d), per prompt.

    A model that draws the same picture from every noise has 0. Every prompt needs at least two images.
    """
    rows, keys = np.asarray(features, dtype=np.float64), np.asarray(prompts)
    apart: list[float] = []
    for key in np.unique(keys):
        own = rows[keys == key]
        if len(own) < 2:
            raise ValueError(f"prompt {key} has {len(own)} image; distances need at least two")
        apart.append(float(pdist(own).mean()))
    return np.array(apart)


def wins(base: ArrayLike, tuned: ArrayLike) -> Floats:
    """1 where tuned is higher, 0.5 where the two are equal, 0 where base is higher."""
    before, after = _paired(base, tuned)
    return (1.0 + np.sign(after - before)) / 2.0


def _paired(base: ArrayLike, tuned: ArrayLike) -> tuple[Floats, Floats]:
    before, after = _vector("base", base), _vector("tuned", tuned)
    if before.shape != after.shape:
        raise ValueError(f"base and tuned must be paired, got {before.size} and {after.size} values; measure both on the same images")
    return before, after


def bootstrap_interval(values: ArrayLike, *, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values` (n,), one value per prompt (Efron 1979).

    Right for some 30 values and more; `mean_interval` knows what to do with fewer.
    """
    vector = _vector("values", values)
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}; 0.95 gives a 95 % interval")
    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK // vector.size)
    means = [
        vector[rng.integers(vector.size, size=(min(block, resamples - start), vector.size))].mean(axis=1)
        for start in range(0, resamples, block)
    ]
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def t_interval(values: ArrayLike, *, within: Range | None = None, level: float = 0.95) -> Range:
    """Student's t interval of the mean of `values` (n,), n >= 2.

    For values that lie in the range `within`, one observation at each of its ends is added and the interval is cut to the range: few
    prompts are often all alike, and a spread of zero would give a point (the idea of Agresti and Coull 1998, who add two of each).
    """
    vector = _vector("values", values)
    if within is not None:
        vector = np.concatenate([vector, within])
    if vector.size < 2:
        raise ValueError("values must be at least two for a t interval; one says nothing of the spread")
    half = float(stdtrit(vector.size - 1, (1 + level) / 2) * vector.std(ddof=1) / np.sqrt(vector.size))
    low, high = float(vector.mean()) - half, float(vector.mean()) + half
    return (low, high) if within is None else (max(low, within[0]), min(high, within[1]))


def mean_interval(values: ArrayLike, *, within: Range | None = None, resamples: int = RESAMPLES, seed: int = 0) -> Range | None:
    """95 % interval of the mean of `values` (n,): percentile bootstrap from `BOOTSTRAP_MIN` values on, below that `t_interval`, and none
    for fewer than `INTERVAL_MIN`.
    """
    vector = _vector("values", values)
    if vector.size < INTERVAL_MIN:
        return None
    if vector.size < BOOTSTRAP_MIN:
        return t_interval(vector, within=within)
    return bootstrap_interval(vector, resamples=resamples, seed=seed)


def interval_kind(prompts: int) -> Literal["bootstrap", "t"] | None:
    """How `mean_interval` makes the interval of that many values."""
    return None if prompts < INTERVAL_MIN else "t" if prompts < BOOTSTRAP_MIN else "bootstrap"


def minimum_detectable_effect(differences: ArrayLike, *, power: float = 0.8, alpha: float = 0.05) -> float:
    """Smallest true mean difference that a two-sided test at `alpha` on n prompts finds with probability `power`.

    (z_{1-alpha/2} + z_power) * s / sqrt(n), with s the standard deviation of the paired differences (n,): normal approximation.
    `inf` for fewer than two prompts.
    """
    vector = _vector("differences", differences)
    if vector.size < 2:
        return float("inf")
    return float((ndtri(1 - alpha / 2) + ndtri(power)) * vector.std(ddof=1) / np.sqrt(vector.size))


def wilcoxon_p(differences: ArrayLike) -> float:
    """Two-sided p-value of the signed-rank test (Wilcoxon 1945) on paired differences (n,), zeros kept in the ranking (Pratt 1959).

    1 when every difference is zero.
    """
    vector = _vector("differences", differences)
    if not vector.any():
        return 1.0
    from scipy.stats import wilcoxon  # a second of imports

    return float(wilcoxon(vector, zero_method="pratt").pvalue)  # pyright: ignore[reportAttributeAccessIssue]  (scipy has no types of its own)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p-values adjusted for being several, by name: the step-down method of Holm (1979)."""
    adjusted: dict[str, float] = {}
    largest = 0.0
    for place, (name, value) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, value * (len(p_values) - place)))
        adjusted[name] = largest
    return adjusted


def compare(
    base: ArrayLike, tuned: ArrayLike, prompts: ArrayLike, *, bounded: bool = False, resamples: int = RESAMPLES, seed: int = 0
) -> Comparison:
    """Everything about one metric; `base`, `tuned` and `prompts` (images,) run side by side, same prompt and noise in each place.

    `bounded`: values lie between 0 and 1, and so differences between -1 and 1.
    """
    before, after = prompt_means(base, prompts), prompt_means(tuned, prompts)
    differences = after - before
    won = prompt_means(wins(base, tuned), prompts)
    return Comparison(
        base=float(before.mean()),
        tuned=float(after.mean()),
        difference=float(differences.mean()),
        ci95=mean_interval(differences, within=(-1.0, 1.0) if bounded else None, resamples=resamples, seed=seed),
        win_rate=float(won.mean()),
        win_ci95=mean_interval(won, within=(0.0, 1.0), resamples=resamples, seed=seed),
        interval=interval_kind(differences.size),
        p_value=wilcoxon_p(differences),
        n=differences.size,
        detectable=minimum_detectable_effect(differences),
    )


def frechet_distance(features: ArrayLike, reference: ArrayLike) -> float:
    """Fréchet distance of the Gaussians fitted to two feature sets (n, d) and (m, d); 0 for equal moments (arXiv 1706.08500).

    |mu_a - mu_b|^2 + tr(A) + tr(B) - 2 tr((A^1/2 B A^1/2)^1/2). The last trace is the sum of the square roots of a symmetric
    positive matrix's eigenvalues, so no root of a nonsymmetric product is taken. It falls as n grows: compare only equal n.
    """
    a, b = np.asarray(features, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    for name, value in (("features", a), ("reference", b)):
        if value.ndim != 2 or len(value) < 2 or not np.isfinite(value).all():
            raise ValueError(f"{name} must be finite and of shape (at least 2, d), got shape {value.shape}")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"both feature sets must have the same width, got {a.shape[1]} and {b.shape[1]}; use one judge for both")
    shift = a.mean(axis=0) - b.mean(axis=0)
    cov_a, cov_b = np.cov(a, rowvar=False).reshape(a.shape[1], -1), np.cov(b, rowvar=False).reshape(b.shape[1], -1)
    values, vectors = np.linalg.eigh(cov_a)
    root_a = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    product = root_a @ cov_b @ root_a
    overlap = np.sqrt(np.clip(np.linalg.eigvalsh((product + product.T) / 2), 0, None)).sum()
    return max(0.0, float(shift @ shift + np.trace(cov_a) + np.trace(cov_b) - 2 * overlap))
