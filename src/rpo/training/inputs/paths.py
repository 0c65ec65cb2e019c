"""From a clean latent to a noisy one, and what the network should say about it."""

from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from rpo.arrays import Latents, Schedule, Timesteps
from rpo.models.denoiser import FlowSchedule, NoiseSchedule
from rpo.training.inputs.noise import Density


@runtime_checkable
class Path(Protocol):
    """A way from data to noise with a network's target on it."""

    @property
    def num_timesteps(self) -> int: ...

    @property
    def density(self) -> Density:
        """How training spreads over the timesteps."""
        ...

    def sample(self, x0: Latents, noise: Latents, t: Timesteps) -> tuple[Latents, Latents]:
        """(x_t, target) in float32: the noisy latents at `t`, and what the network is to predict from them."""
        ...


@dataclass(frozen=True, kw_only=True)
class EpsilonPath:
    """x_t = sqrt(a_t) x0 + sqrt(1 - a_t) noise, target the noise (arXiv 2006.11239, eq. 4 and 14)."""

    alphas_cumprod: Schedule
    density: Density = "uniform"

    @property
    def num_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    def sample(self, x0: Latents, noise: Latents, t: Timesteps) -> tuple[Latents, Latents]:
        signal, sigma = _rates(self.alphas_cumprod, t, x0)
        return signal * x0 + sigma * noise, noise


@dataclass(frozen=True, kw_only=True)
class VelocityPath:
    """The same x_t with target v = sqrt(a_t) noise - sqrt(1 - a_t) x0 (arXiv 2202.00512, appendix D)."""

    alphas_cumprod: Schedule
    density: Density = "uniform"

    @property
    def num_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    def sample(self, x0: Latents, noise: Latents, t: Timesteps) -> tuple[Latents, Latents]:
        signal, sigma = _rates(self.alphas_cumprod, t, x0)
        return signal * x0 + sigma * noise, signal * noise - sigma * x0


@dataclass(frozen=True, kw_only=True)
class FlowPath:
    """x_t = (1 - sigma_t) x0 + sigma_t noise, target noise - x0; timesteps in the middle come up most (arXiv 2403.03206, eq. 13 and 19)."""

    schedule: FlowSchedule
    density: Density = "logit_normal"

    @property
    def num_timesteps(self) -> int:
        return len(self.schedule.sigmas)

    def sample(self, x0: Latents, noise: Latents, t: Timesteps) -> tuple[Latents, Latents]:
        sigma = self.schedule.levels(t, x0).view(-1, *[1] * (x0.ndim - 1))
        return (1 - sigma) * x0 + sigma * noise, noise - x0


def path_of(schedule: NoiseSchedule | FlowSchedule, device: torch.device) -> Path:
    """The path a network was trained on, its table on `device`."""
    if isinstance(schedule, FlowSchedule):
        return FlowPath(schedule=replace(schedule, sigmas=schedule.sigmas.to(device, torch.float32)))
    alphas_cumprod = schedule.alphas_cumprod.to(device, torch.float32)
    match schedule.prediction:
        case "epsilon":
            return EpsilonPath(alphas_cumprod=alphas_cumprod)
        case "v_prediction":
            return VelocityPath(alphas_cumprod=alphas_cumprod)


def _rates(alphas_cumprod: Tensor, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(a_t) and sqrt(1 - a_t), one per sample, ready to multiply latents."""
    a_t = alphas_cumprod[t].view(-1, *[1] * (like.ndim - 1))
    return a_t.sqrt(), (1 - a_t).sqrt()
