"""The random part of a training input: timestep, noise, latent sample, caption dropout and mirroring, one draw per pair and visit.

A draw is a pure function of (seed, pair id, visit): no state, so a resumed run sees the same ones, and both sides of a pair
share all of it. Noise is drawn on the CPU whatever the device, so that every machine sees the same values.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch

from rpo.arrays import PairFlags, PairLatents, PairTimesteps

Density = Literal["uniform", "logit_normal"]
"""How timesteps come up: all alike, or as the logistic function of a standard normal, the middle most (arXiv 2403.03206, eq. 19)."""


@dataclass(frozen=True, kw_only=True)
class Draws:
    """One draw for each pair of a batch."""

    timestep: PairTimesteps
    noise: PairLatents
    """What the path adds to both sides."""
    latent_noise: PairLatents
    """Picks the sample of the autoencoder's posterior, the same standard normal for both sides."""
    drop_prompt: PairFlags
    """Whether the prompt is replaced by the empty one, on both sides."""
    mirrored: PairFlags
    """Whether both images are mirrored, left and right."""


@dataclass(frozen=True, kw_only=True)
class DrawRange:
    """What the draws are made from."""

    seed: int
    timesteps: tuple[int, int]
    """First timestep and one past the last."""
    num_timesteps: int
    """Length of the model's schedule: a window cuts the density off at its ends, it does not squeeze it."""
    drop_probability: float
    density: Density = "uniform"
    """Of the timesteps between them."""
    mirror_probability: float = 0.0


@runtime_checkable
class NoiseProvider(Protocol):
    """Says which draw a pair gets on its `visit`-th appearance (0, 1, 2, ...)."""

    @property
    def num_draws(self) -> int | None:
        """How many draws there are per pair; None if they never repeat."""
        ...

    def index(self, visit: int) -> int:
        """The draw that a visit gets."""
        ...

    def draws(self, pair_ids: Sequence[str], visits: Sequence[int], shape: tuple[int, ...]) -> Draws:
        """`shape` is a latent's (c, h, w)."""
        ...


@dataclass(frozen=True, kw_only=True)
class FreshDraws:
    """New noise and an independent uniform timestep on every visit."""

    range: DrawRange

    @property
    def num_draws(self) -> None:
        return None

    def index(self, visit: int) -> int:
        return visit

    def draws(self, pair_ids: Sequence[str], visits: Sequence[int], shape: tuple[int, ...]) -> Draws:
        return _stack([_draw(self.range, pair, visit, shape, None) for pair, visit in zip(pair_ids, visits, strict=True)])


@dataclass(frozen=True, kw_only=True)
class DrawTable:
    """`num_draws` draws per pair, taken in turn; their timesteps lie in as many equally likely strata, in an order of the pair's own.

    With as many draws as visits each is used once, and training sees no fewer noises than with fresh ones.
    """

    range: DrawRange
    num_draws: int

    def __post_init__(self) -> None:
        if self.num_draws < 1:
            raise ValueError(f"draws must be at least 1, got {self.num_draws}; None draws anew on every visit")

    def index(self, visit: int) -> int:
        return visit % self.num_draws

    def draws(self, pair_ids: Sequence[str], visits: Sequence[int], shape: tuple[int, ...]) -> Draws:
        rows = zip(pair_ids, visits, strict=True)
        return _stack([_draw(self.range, pair, self.index(visit), shape, self.num_draws) for pair, visit in rows])


@dataclass(frozen=True, kw_only=True)
class GenerationNoise:
    """Another provider's draws, but always with the noise that a pair's source was generated from: both sides are taken back towards it."""

    of: NoiseProvider
    seeds: Mapping[str, int]
    """Pair id -> the source's seed."""

    @property
    def num_draws(self) -> int | None:
        return self.of.num_draws

    def index(self, visit: int) -> int:
        return self.of.index(visit)

    def draws(self, pair_ids: Sequence[str], visits: Sequence[int], shape: tuple[int, ...]) -> Draws:
        noise = [torch.randn((1, *shape), generator=torch.Generator().manual_seed(self.seeds[pair])) for pair in pair_ids]
        return replace(self.of.draws(pair_ids, visits, shape), noise=torch.cat(noise))


def seed_of(*parts: object) -> int:
    """A 63-bit seed that is a pure function of `parts` (their text), the same in every process."""
    return int.from_bytes(hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()[:8]) >> 1


def _draw(source: DrawRange, pair_id: str, index: int, shape: tuple[int, ...], num_strata: int | None) -> Draws:
    seed = seed_of(source.seed, "draw", pair_id, index)
    position, dropped = np.random.default_rng(seed).random(2)
    if num_strata is not None:
        order = np.random.default_rng(seed_of(source.seed, "strata", pair_id, num_strata)).permutation(num_strata)
        position = (order[index] + position) / num_strata
    noise = torch.randn((2, *shape), generator=torch.Generator().manual_seed(seed))
    mirrored = False
    if source.mirror_probability > 0:
        mirrored = np.random.default_rng(seed_of(source.seed, "mirror", pair_id, index)).random() < source.mirror_probability
    return Draws(
        timestep=torch.tensor([_timestep(source, position)]),
        noise=noise[:1],
        latent_noise=noise[1:],
        drop_prompt=torch.tensor([bool(dropped < source.drop_probability)]),
        mirrored=torch.tensor([bool(mirrored)]),
    )


def _timestep(source: DrawRange, quantile: float) -> int:
    """The inverse of the distribution function of the density between the first timestep and the end of the window."""
    first, end = source.timesteps
    match source.density:
        case "uniform":
            return first + int(quantile * (end - first))
        case "logit_normal":
            below, up_to = (_logit_normal_cdf(t / source.num_timesteps) for t in (first, end))
            normal = NormalDist().inv_cdf(min(max(below + quantile * (up_to - below), 1e-9), 1 - 1e-9))
            return min(max(int(source.num_timesteps / (1 + math.exp(-normal))), first), end - 1)


def _logit_normal_cdf(x: float) -> float:
    """Of the logistic function of a standard normal variable (arXiv 2403.03206, eq. 19)."""
    return 0.0 if x <= 0 else 1.0 if x >= 1 else NormalDist().cdf(math.log(x / (1 - x)))


def _stack(rows: Sequence[Draws]) -> Draws:
    return Draws(
        timestep=torch.cat([row.timestep for row in rows]),
        noise=torch.cat([row.noise for row in rows]),
        latent_noise=torch.cat([row.latent_noise for row in rows]),
        drop_prompt=torch.cat([row.drop_prompt for row in rows]),
        mirrored=torch.cat([row.mirrored for row in rows]),
    )
