"""How much counts when: a strength that follows the run or its margins, and weights on timesteps. Each wraps an objective and is one.

A strength k multiplies margins, so a wrapper changes k by scaling all four errors alike; what is wrapped must depend on them through
the margin alone, as every objective with a `k` but MaPO does.
"""

import math
from dataclasses import dataclass, replace

import torch

from rpo.arrays import PerPair
from rpo.training.objectives.preference import DiffusionDPO, DiffusionKTO, MaPO, Objective, PairErrors, Wrapper


class _Scaled(Wrapper):
    """Checks that scaling the errors is scaling k."""

    def __post_init__(self) -> None:
        if not hasattr(self.of, "k") or isinstance(self.of, MaPO):
            raise ValueError(f"{type(self).__name__} changes the strength of an objective on the margin; {self.of.describe()} has none")


@dataclass(frozen=True, kw_only=True)
class ScheduledK(_Scaled):
    """k rises or falls over the run, by a constant factor a step, from `first` to `last` times the objective's own."""

    of: Objective = DiffusionDPO()
    """The objective."""
    first: float = 0.1
    """Factor on k at the first step."""
    last: float = 1.0
    """Factor on k at the last step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("first", "last"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}; 1 leaves k as it is")

    def __call__(self, errors: PairErrors) -> PerPair:
        return self.of(_scaled(errors, self.first * (self.last / self.first) ** errors.progress))

    def describe(self) -> str:
        return f"{self.of.describe()}, k x{self.first:g} to x{self.last:g}"


@dataclass(frozen=True, kw_only=True)
class AutoK(_Scaled):
    """Holds the gradient's factor sigmoid(-k |m|) at a target: k = logit(1 - target) / mean |m| of the step's pairs, up to
    the objective's own.

    So k falls as margins grow, and pairs that are told apart go on pulling (the idea of beta-DPO, arXiv 2407.08639).
    """

    of: Objective = DiffusionDPO()
    """The objective; its k is the most that is used."""
    target: float = 0.2
    """Below 1/2, which is the factor where policy and reference agree."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.of, DiffusionKTO):
            raise ValueError("AutoK needs an objective on the margin of a pair; DiffusionKTO looks at each side by itself")
        if not 0 < self.target < 0.5:
            raise ValueError(f"target must be above 0 and below 0.5, got {self.target}")

    def __call__(self, errors: PairErrors) -> PerPair:
        wanted = math.log(1 / self.target - 1) / errors.whole.margin().detach().abs().mean().clamp(min=1e-12)
        return self.of(_scaled(errors, (wanted / self.of.k).clamp(max=1.0)))  # pyright: ignore[reportAttributeAccessIssue]  (checked)

    def describe(self) -> str:
        return f"{self.of.describe()} at most, gradient factor held at {self.target:g}"


@dataclass(frozen=True, kw_only=True)
class TimestepWeighted(Wrapper):
    """Multiplies a pair's loss by (1 + power) ((t + 1) / T)^power, whose mean over all timesteps is 1: above 0 the noisy ones count more.

    Those decide what is where, the others how it looks.
    """

    of: Objective = DiffusionDPO()
    """The objective."""
    power: float = 1.0
    """0 weights all alike; above -1."""
    num_timesteps: int = 1000
    """T, of the model's schedule."""

    def __post_init__(self) -> None:
        if not self.power > -1:
            raise ValueError(f"power must be above -1, got {self.power}; 0 weights all timesteps alike")

    def __call__(self, errors: PairErrors) -> PerPair:
        if errors.timestep is None:
            raise ValueError("TimestepWeighted reads where the noise was drawn; give timestep to PairErrors")
        return self.of(errors) * (1 + self.power) * ((errors.timestep + 1) / self.num_timesteps) ** self.power

    def describe(self) -> str:
        return f"{self.of.describe()}, timesteps weighted by their power {self.power:g}"


def _scaled(errors: PairErrors, factor: float | torch.Tensor) -> PairErrors:
    names = ("chosen", "rejected", "ref_chosen", "ref_rejected")
    scaled = {name: None if getattr(errors, name) is None else factor * getattr(errors, name) for name in names}
    return replace(errors, **scaled, step=None if errors.step is None else lambda: _scaled(errors.whole, factor))
