"""What is minimised: pure functions of a pair's four errors.

Every objective is called as `objective(errors) -> loss per pair`. The one strength is `k`, the factor on the mean-reduced margin

    m = a_c - a_r,   a_c = ref_chosen - chosen,   a_r = ref_rejected - rejected

where each term is a sample's squared error averaged over channels and pixels; a_c and a_r say by how much the policy has become
better than the reference on a side. Public scripts call other multiples "beta"; `describe` says which.
The mean over pairs is taken by the caller, after the objective: never inside its logarithm.

Safeguards (`safeguards.py`) and schedules of the strength (`schedules.py`) wrap an objective and are objectives themselves.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
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
    alignment: PerPair | None = None
    """Mean product of the policy's residuals on the two sides: with the errors, the angle between their gradients at the output."""

    progress: float = 0.0
    """Share of the run's steps that are done, 0 to 1."""
    step: "Callable[[], PairErrors] | None" = None
    """Gives the errors of all pairs of the optimizer step, of every micro-batch and process, without gradient; see `whole`."""

    @property
    def whole(self) -> "PairErrors":
        """The errors of all pairs of the step, for an objective with a statistic over the batch: only there is it the same whatever the
        number of micro-batches and processes. With several micro-batches the first to ask costs one more forward pass over all of them.
        """
        return self if self.step is None else self.step()

    def advantages(self) -> tuple[PerPair, PerPair]:
        """(a_c, a_r): how much better than the reference the policy predicts each side. Raises `ValueError` when an error is missing."""
        if self.rejected is None or self.ref_chosen is None or self.ref_rejected is None:
            raise ValueError("the margin needs rejected, ref_chosen and ref_rejected; give all three to PairErrors")
        return self.ref_chosen - self.chosen, self.ref_rejected - self.rejected

    def margin(self) -> PerPair:
        """m: how much more than the reference the policy prefers the chosen side. Raises `ValueError` when an error is missing."""
        chosen, rejected = self.advantages()
        return chosen - rejected


@runtime_checkable
class Objective(Protocol):
    """A frozen value with only its own hyperparameters."""

    def paired(self) -> bool:
        """Whether it reads the rejected side; if not, that is not computed."""
        ...

    def referenced(self) -> bool:
        """Whether it reads the reference's errors; if not, they are not computed."""
        ...

    def __call__(self, errors: PairErrors) -> PerPair: ...

    def describe(self) -> str:
        """One line for people, the strength also as the public scripts count it."""
        ...


class Wrapper:
    """Asks for what the wrapped objective asks for."""

    of: Objective

    def paired(self) -> bool:
        return self.of.paired()

    def referenced(self) -> bool:
        return self.of.referenced()


class _Preference(ABC):
    """What all objectives on the margin have in common. Pair weights multiply every loss."""

    k: float

    def paired(self) -> bool:
        return True

    def referenced(self) -> bool:
        return True

    def __post_init__(self) -> None:
        if not self.k > 0:
            raise ValueError(f"k must be above 0, got {self.k}; beta 5000 of Salesforce's script is k=2500")

    def beta(self) -> str:
        """What the public scripts call the same strength: beta/2 multiplies the margin in Salesforce's train.py and in diffusers'
        train_diffusion_dpo_sdxl.py, beta itself in diffusers' train_diffusion_dpo.py (Stable Diffusion with a LoRA)."""
        return f"beta {2 * self.k:g} in Salesforce's script and diffusers' for SDXL, {self.k:g} in diffusers' for SD"

    def __call__(self, errors: PairErrors) -> PerPair:
        return weighted(self._loss(errors), errors)

    @abstractmethod
    def _loss(self, errors: PairErrors) -> PerPair:
        """Before the pair's weight."""

    def describe(self) -> str:
        return f"{type(self).__name__}, k={self.k:g} ({self.beta()})"


@dataclass(frozen=True, kw_only=True)
class DiffusionDPO(_Preference):
    """-log sigmoid(k m) (arXiv 2311.12908, eq. 14, with its constant weighting). log 2 where policy and reference agree."""

    k: float = 2500.0
    """Strength on the mean-reduced margin; 2500 is beta 5000 of Salesforce's script and of diffusers' for SDXL, beta 2500 of diffusers' for
    Stable Diffusion."""

    def _loss(self, errors: PairErrors) -> PerPair:
        return -F.logsigmoid(self.k * errors.margin())


@dataclass(frozen=True, kw_only=True)
class IPO(_Preference):
    """(k m - 1/2)^2: the margin is driven to 1/(2k) and no further (arXiv 2310.12036, eq. 17, times k^2 so that k sets its scale too)."""

    k: float = 2500.0
    """The target of the margin is 1/(2k)."""

    def _loss(self, errors: PairErrors) -> PerPair:
        return (self.k * errors.margin() - 0.5).square()


@dataclass(frozen=True, kw_only=True)
class Hinge(_Preference):
    """max(0, 1 - k m): a pair is left alone once its margin is 1/k (SLiC, arXiv 2305.10425, as a margin loss)."""

    k: float = 2500.0
    """Strength on the mean-reduced margin."""

    def _loss(self, errors: PairErrors) -> PerPair:
        return F.relu(1 - self.k * errors.margin())


@dataclass(frozen=True, kw_only=True)
class SoftDPO(_Preference):
    """-p log sigmoid(k m) - (1-p) log sigmoid(-k m): the label is right with probability p only.

    p = sigmoid(gap / temperature), the Bradley-Terry probability of the reward gap (the idea of SmPO, arXiv 2506.02698), pulled
    towards 1/2 by `smoothing` (conservative DPO). Needs the pairs' gaps unless the temperature is None; then p = 1 - smoothing.
    """

    k: float = 2500.0
    """Strength on the mean-reduced margin."""
    temperature: float | None = None
    """Gap at which p = 0.73, in the unit of the label."""
    smoothing: float = 0.0
    """Share of labels taken to be wrong whatever their gap, below 1/2."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature is not None and not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}; None trusts every label alike")
        if not 0 <= self.smoothing < 0.5:
            raise ValueError(f"smoothing must be at least 0 and below 0.5, got {self.smoothing}")

    def _loss(self, errors: PairErrors) -> PerPair:
        logit = self.k * errors.margin()
        p = torch.ones_like(logit) if self.temperature is None else torch.sigmoid(gaps(errors) / self.temperature)
        p = p + self.smoothing * (1 - 2 * p)
        return -p * F.logsigmoid(logit) - (1 - p) * F.logsigmoid(-logit)


@dataclass(frozen=True, kw_only=True)
class OffsetDPO(_Preference):
    """-log sigmoid(k m - offset * gap): a clear pair must be told apart more clearly (arXiv 2402.10571, with a linear offset)."""

    k: float = 2500.0
    """Strength on the mean-reduced margin."""
    offset: float = 1.0
    """Logit that a gap of 1 asks for on top."""

    def _loss(self, errors: PairErrors) -> PerPair:
        return -F.logsigmoid(self.k * errors.margin() - self.offset * gaps(errors))


@dataclass(frozen=True, kw_only=True)
class DiffusionKTO(_Preference):
    """Each side by itself: (1 - sigmoid(k (a_c - z))) + (1 - sigmoid(k (z - a_r))) (arXiv 2404.04465).

    z, the mean advantage of the step's pairs cut at 0 and without gradient, stands for the divergence from the reference.
    """

    k: float = 500.0
    """Strength on each side's mean-reduced advantage: beta of Diffusion-KTO's script, which has no factor 1/2."""

    def beta(self) -> str:
        return f"beta {self.k:g} in Diffusion-KTO's script"

    def _loss(self, errors: PairErrors) -> PerPair:
        chosen, rejected = errors.advantages()
        z = torch.cat(errors.whole.advantages()).detach().mean().clamp(min=0)
        return torch.sigmoid(-self.k * (chosen - z)) + torch.sigmoid(-self.k * (z - rejected))


@dataclass(frozen=True, kw_only=True)
class MaPO(_Preference):
    """chosen - weight * log sigmoid(4k (f(chosen) - f(rejected))), f(e) = (e/2) / (exp(e/2) - 1) (arXiv 2406.06424): no reference.

    Near e = 0, f falls with slope 1/4, so k is again the strength on the difference of the errors.
    """

    k: float = 250.0
    """Strength on the difference of errors; T = 1000 of MaPO's script is k = 250."""
    weight: float = 0.1
    """Of the margin beside the chosen error: beta of MaPO's script."""

    def referenced(self) -> bool:
        return False

    def beta(self) -> str:
        return f"T {4 * self.k:g} and beta {self.weight:g} in MaPO's script"

    def _loss(self, errors: PairErrors) -> PerPair:
        if errors.rejected is None:
            raise ValueError("MaPO compares two sides; give rejected to PairErrors")
        return errors.chosen - self.weight * F.logsigmoid(4 * self.k * (_likelihood(errors.chosen) - _likelihood(errors.rejected)))


@dataclass(frozen=True, kw_only=True)
class DMPO(_Preference):
    """KL(q || 1 - alpha) of two coins, q = sigmoid(k m): the reverse divergence from the label (arXiv 2507.07510), which seeks its mode."""

    k: float = 1000.0
    """Strength on the mean-reduced margin."""
    alpha: float = 0.01
    """Share of labels taken to be wrong."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.alpha < 0.5:
            raise ValueError(f"alpha must be above 0 and below 0.5, got {self.alpha}")

    def _loss(self, errors: PairErrors) -> PerPair:
        logit = self.k * errors.margin()
        right, wrong = torch.sigmoid(logit), torch.sigmoid(-logit)
        return right * (F.logsigmoid(logit) - math.log(1 - self.alpha)) + wrong * (F.logsigmoid(-logit) - math.log(self.alpha))


@dataclass(frozen=True, kw_only=True)
class LinearDPO(_Preference):
    """-k m: every pair pulls alike, however far it is told apart (the utility of Linear-DPO, arXiv 2605.21123).

    Nothing in it ends the pull: bound it by few steps or by `Anchored`.
    """

    k: float = 1.0
    """Scale of the loss, no more: AdamW takes it out again but for the clipped norm."""

    def _loss(self, errors: PairErrors) -> PerPair:
        return -self.k * errors.margin()


@dataclass(frozen=True, kw_only=True)
class SFT:
    """The chosen side's own error: plain fine-tuning on the better images, without a reference."""

    def paired(self) -> bool:
        return False

    def referenced(self) -> bool:
        return False

    def __call__(self, errors: PairErrors) -> PerPair:
        return weighted(errors.chosen, errors)

    def describe(self) -> str:
        return "SFT on the chosen images"


def weighted(loss: PerPair, errors: PairErrors) -> PerPair:
    """The loss by the pair's weight."""
    return loss if errors.weight is None else loss * errors.weight


def gaps(errors: PairErrors) -> PerPair:
    """The label's gaps. Raises `ValueError` when the pairs carry none."""
    if errors.gap is None:
        raise ValueError("this objective reads by how much the chosen side won; give gap to PairErrors")
    return errors.gap


def _likelihood(error: PerPair) -> PerPair:
    """f(e) = x / (exp(x) - 1), x = e/2, without the 0/0."""
    x = 0.5 * error
    return torch.where(x.abs() < 1e-4, 1 - x / 2, x / torch.expm1(torch.where(x.abs() < 1e-4, torch.ones_like(x), x)))
