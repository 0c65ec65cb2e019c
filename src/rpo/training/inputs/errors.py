"""From latents and a draw to squared errors: the one place where the network is called."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rpo.arrays import Conditions, Latents, PairLatents, PairMaps, PerPair
from rpo.models.denoiser import Network, Posterior
from rpo.training.inputs.noise import Draws
from rpo.training.inputs.paths import Path

_CHANGED_FROM = 0.1
_TRACE = 1e-15


@dataclass(frozen=True, kw_only=True)
class PairInputs:
    """What the network needs to judge a batch of pairs, on its device. The prompt is the empty one where the draw says so."""

    chosen: Posterior
    rejected: Posterior
    conditions: Conditions
    """One row per pair."""
    draws: Draws
    weights: PairMaps | None = None
    """How much each place of both sides counts, 1 on average; None for all alike."""


class SideErrors(NamedTuple):
    """Squared distance of the network's output from the path's target, averaged over channels and (weighted) places, float32, per pair."""

    chosen: PerPair
    rejected: PerPair
    alignment: PerPair
    """Mean product of the two sides' residuals."""


def pair_errors(network: Network, path: Path, inputs: PairInputs) -> SideErrors:
    """Both sides with the same noise, timestep, latent sample and prompt, in one network call."""
    draws = inputs.draws
    latents = torch.cat([_latents(inputs.chosen, draws), _latents(inputs.rejected, draws)])
    conditions = {name: torch.cat([rows, rows]) for name, rows in inputs.conditions.items()}
    residuals = _residuals(network, path, latents, draws.noise.repeat(2, 1, 1, 1), draws.timestep.repeat(2), conditions)
    chosen, rejected = residuals.chunk(2)
    return SideErrors(*(_mean(product, inputs) for product in (chosen.square(), rejected.square(), chosen * rejected)))


def chosen_errors(network: Network, path: Path, inputs: PairInputs) -> PerPair:
    """The chosen side alone, for objectives that look no further."""
    draws = inputs.draws
    residuals = _residuals(network, path, _latents(inputs.chosen, draws), draws.noise, draws.timestep, inputs.conditions)
    return _mean(residuals.square(), inputs)


def edit_weights(chosen: PairLatents, rejected: PairLatents, unchanged: float) -> PairMaps:
    """Weights that are `unchanged` where the sides of a pair agree, 1 where they differ and next to it, brought to a mean of 1.

    They differ where their squared distance is above a tenth of the pair's largest. Sides that agree everywhere count alike everywhere.
    """
    distance = (chosen - rejected).square().mean(dim=1, keepdim=True)
    largest = distance.amax(dim=(2, 3), keepdim=True)
    changed = F.max_pool2d((distance > _CHANGED_FROM * largest).float(), 3, 1, 1)
    weights = unchanged + (1 - unchanged) * torch.where(largest > 0, changed, 1.0)
    return weights / weights.mean(dim=(2, 3), keepdim=True)


def _residuals(network: Network, path: Path, latents: Tensor, noise: Tensor, t: Tensor, conditions: Conditions) -> Latents:
    """The network's output less the path's target, float32."""
    x_t, target = path.sample(latents, noise, t)
    return network.predict(x_t, t, conditions).float() - target.float()


def _mean(values: Latents, inputs: PairInputs) -> PerPair:
    means = (values if inputs.weights is None else values * inputs.weights).mean(dim=(1, 2, 3))
    if means.requires_grad:
        means.register_hook(_without_traces)
    return means


def _without_traces(gradient: PerPair) -> PerPair:
    """0 in place of gradients below `_TRACE`: those of pairs that are told apart long since, sigmoid(-k m) of them.

    They move no weight (AdamW adds 1e-8 to what it divides by), and behind them the backward pass would compute with denormal numbers,
    for which a CPU takes many times as long.
    """
    return torch.where(gradient.abs() < _TRACE, 0.0, gradient)


def _latents(posterior: Posterior, draws: Draws) -> PairLatents:
    return posterior.mean.float() + posterior.std.float() * draws.latent_noise
