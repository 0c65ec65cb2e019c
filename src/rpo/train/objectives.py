"""What is minimised: pure functions of a pair's four errors.

Every objective is called as `objective(errors) -> loss per pair`. The one strength is `k`, the factor on the mean-reduced margin

    m = (ref_chosen - chosen) - (ref_rejected - rejected)

where each term is a sample's squared error averaged over channels and pixels. The "beta" of the authors' script is 2k.
The mean over pairs is taken by the caller, after the objective: never inside its logarithm.
"""

from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch.nn.functional as F

from rpo.arrays import PairTimesteps, PerPair


@dataclass(frozen=True)
class PairErrors:
    """Mean squared errors of a batch of pairs, float32, one per pair; both sides saw the same noise, timestep and dropout."""

    chosen: PerPair
    rejected: PerPair | None = None
    """None for an objective that looks at the chosen side only."""
    ref_chosen: PerPair | None = None
    """The reference's error on the same inputs; None for an objective without a reference."""
    ref_rejected: PerPair | None = None
    timestep: PairTimesteps | None = None
    gap: PerPair | None = None
    """By how much the chosen side won, in the unit of the label."""
    weight: PerPair | None = None
    """How much the pair counts; None means 1."""

    def margin(self) -> PerPair:
        """m: how much more than the reference the policy prefers the chosen side. Raises `ValueError` when an error is missing."""
        if self.rejected is None or self.ref_chosen is None or self.ref_rejected is None:
            raise ValueError("the margin needs rejected, ref_chosen and ref_rejected; give all three to PairErrors")
        return (self.ref_chosen - self.chosen) - (self.ref_rejected - self.rejected)


@runtime_checkable
class Objective(Protocol):
    """A frozen value with only its own hyperparameters."""

    def needs_pair(self) -> bool:
        """Whether it reads the rejected side and the reference; if not, neither is computed."""
        ...

    def __call__(self, errors: PairErrors) -> PerPair: ...

    def describe(self) -> str:
        """One line for people, strengths in every convention they may know."""
        ...


@dataclass(frozen=True, kw_only=True)
class DiffusionDPO:
    """-log sigmoid(k m) (arXiv 2311.12908, eq. 14, with its constant weighting). log 2 where policy and reference agree."""

    k: float = 2500.0
    """Strength on the mean-reduced margin; the authors' beta 5000 is 2500."""
    loser_gradient: float = 1.0
    """Factor on the gradient, not the value, of the rejected error; below 1 keeps both sides from getting worse together."""

    def __post_init__(self) -> None:
        if not self.k > 0:
            raise ValueError(f"k must be above 0, got {self.k}; the authors' beta of 5000 is k=2500")
        if not 0 <= self.loser_gradient <= 1:
            raise ValueError(f"loser_gradient must be between 0 and 1, got {self.loser_gradient}; 1 is plain Diffusion-DPO")

    def needs_pair(self) -> bool:
        return True

    @property
    def beta(self) -> float:
        """The number that gives the same loss in the authors' script: -log sigmoid(-beta/2 * Delta), Delta = -m."""
        return 2 * self.k

    def __call__(self, errors: PairErrors) -> PerPair:
        if errors.rejected is not None and self.loser_gradient != 1:
            still = errors.rejected.detach()
            errors = replace(errors, rejected=still + self.loser_gradient * (errors.rejected - still))
        return _weighted(-F.logsigmoid(self.k * errors.margin()), errors)

    def describe(self) -> str:
        scale = "" if self.loser_gradient == 1 else f", loser gradient x{self.loser_gradient:g}"
        return f"Diffusion-DPO, k={self.k:g} (beta={self.beta:g} in the authors' convention){scale}"


@dataclass(frozen=True, kw_only=True)
class SFT:
    """The chosen side's own error: plain fine-tuning on the better images, without a reference."""

    def needs_pair(self) -> bool:
        return False

    def __call__(self, errors: PairErrors) -> PerPair:
        return _weighted(errors.chosen, errors)

    def describe(self) -> str:
        return "SFT on the chosen images"


def _weighted(loss: PerPair, errors: PairErrors) -> PerPair:
    return loss if errors.weight is None else loss * errors.weight
