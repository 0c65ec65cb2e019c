"""What keeps preference tuning from winning its margin by spoiling both sides. Each wraps an objective and is one itself.

Pairs whose images come from another model than the policy, such as edits, invite that: see docs/method.md.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from rpo.arrays import PerPair
from rpo.training.objectives.preference import DiffusionDPO, Objective, PairErrors, Wrapper, weighted


@dataclass(frozen=True, kw_only=True)
class LoserGradient(Wrapper):
    """Scales the gradient, not the value, of the rejected error by a constant."""

    of: Objective = DiffusionDPO()
    """The objective."""
    scale: float = 0.5
    """1 changes nothing; 0 leaves only the pull of the chosen side."""

    def __post_init__(self) -> None:
        if not 0 <= self.scale <= 1:
            raise ValueError(f"scale must be between 0 and 1, got {self.scale}; 1 is the plain objective")

    def __call__(self, errors: PairErrors) -> PerPair:
        return self.of(_scaled(errors, self.scale))

    def describe(self) -> str:
        return f"{self.of.describe()}, loser gradient x{self.scale:g}"


@dataclass(frozen=True, kw_only=True)
class WinnerPreserving(Wrapper):
    """Scales the gradient of the rejected error so that, to first order, a step cannot raise the chosen one (arXiv 2511.03317).

    Per pair by min(1, (1 - mu) |g_c|^2 / <g_c, g_r>) where the gradients g at the network's output agree, else not at all: they are the
    residuals, so two errors and their product say it without another pass. With `unchanged_weight` below 1 it is their once-weighted
    angle, which is close but no longer exact.
    """

    of: Objective = DiffusionDPO()
    """The objective."""
    mu: float = 0.9
    """Share of the chosen side's own descent that must be left, the authors' 0.9 for Stable Diffusion 1.5; 0 only forbids ascent."""

    def __post_init__(self) -> None:
        if not 0 <= self.mu <= 1:
            raise ValueError(f"mu must be between 0 and 1, got {self.mu}")

    def __call__(self, errors: PairErrors) -> PerPair:
        if errors.alignment is None:
            raise ValueError("WinnerPreserving needs the product of both sides' residuals; give alignment to PairErrors")
        against = errors.alignment.detach()
        limit = (1 - self.mu) * errors.chosen.detach() / against.clamp(min=1e-12)
        return self.of(_scaled(errors, torch.where(against > 0, limit.clamp(max=1.0), torch.ones_like(limit))))

    def describe(self) -> str:
        return f"{self.of.describe()}, winner-preserving (mu={self.mu:g})"


@dataclass(frozen=True, kw_only=True)
class Anchored(Wrapper):
    """Adds weight * max(0, chosen - ref_chosen): being worse than the reference on the chosen side costs (arXiv 2402.13228's term)."""

    of: Objective = DiffusionDPO()
    """The objective."""
    weight: float = 1000.0
    """On an error of about 0.1, of which a thousandth matters."""

    def referenced(self) -> bool:
        return True

    def __post_init__(self) -> None:
        _positive("weight", self.weight)

    def __call__(self, errors: PairErrors) -> PerPair:
        if errors.ref_chosen is None:
            raise ValueError("Anchored compares with the reference; give ref_chosen to PairErrors")
        return self.of(errors) + weighted(self.weight * F.relu(errors.chosen - errors.ref_chosen), errors)

    def describe(self) -> str:
        return f"{self.of.describe()}, anchored x{self.weight:g}"


@dataclass(frozen=True, kw_only=True)
class WithSFT(Wrapper):
    """Adds weight * chosen: a pull towards the better images that does not end where the reference is."""

    of: Objective = DiffusionDPO()
    """The objective."""
    weight: float = 100.0
    """On an error of about 0.1; the objective is about 0.7 at the start."""

    def __post_init__(self) -> None:
        _positive("weight", self.weight)

    def __call__(self, errors: PairErrors) -> PerPair:
        return self.of(errors) + weighted(self.weight * errors.chosen, errors)

    def describe(self) -> str:
        return f"{self.of.describe()}, with SFT x{self.weight:g}"


def _scaled(errors: PairErrors, scale: PerPair | float) -> PairErrors:
    if errors.rejected is None:
        raise ValueError("there is no rejected side to scale; this safeguard is for objectives that read pairs")
    still = errors.rejected.detach()
    return replace(errors, rejected=still + scale * (errors.rejected - still))


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} must be above 0, got {value}; leave the safeguard out to have none")
