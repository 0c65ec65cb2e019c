"""From latents and a draw to squared errors: the one place where the network is called."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rpo.arrays import PairLatents, PerPair, PerSample
from rpo.models.denoiser import Network, Posterior
from rpo.train.noise import Draws
from rpo.train.paths import Path


@dataclass(frozen=True, kw_only=True)
class PairInputs:
    """What the network needs to judge a batch of pairs, on its device. The prompt is the empty one where the draw says so."""

    chosen: Posterior
    rejected: Posterior
    prompt_embeds: Tensor
    """(p, l, d)."""
    draws: Draws


def pair_errors(network: Network, path: Path, inputs: PairInputs) -> tuple[PerPair, PerPair]:
    """(chosen, rejected) errors: same noise, timestep, latent sample and prompt on both sides, one network call for both."""
    draws = inputs.draws
    latents = torch.cat([_latents(inputs.chosen, draws), _latents(inputs.rejected, draws)])
    errors = sample_errors(
        network, path, latents, draws.noise.repeat(2, 1, 1, 1), draws.timestep.repeat(2), inputs.prompt_embeds.repeat(2, 1, 1)
    )
    chosen, rejected = errors.chunk(2)
    return chosen, rejected


def chosen_errors(network: Network, path: Path, inputs: PairInputs) -> PerPair:
    """The chosen side alone, for objectives that look no further."""
    draws = inputs.draws
    return sample_errors(network, path, _latents(inputs.chosen, draws), draws.noise, draws.timestep, inputs.prompt_embeds)


def sample_errors(network: Network, path: Path, latents: Tensor, noise: Tensor, t: Tensor, prompt_embeds: Tensor) -> PerSample:
    """Squared distance of the network's output from the path's target, averaged over channels and pixels, float32, per sample."""
    x_t, target = path.sample(latents, noise, t)
    prediction = network.predict(x_t, t, prompt_embeds)
    return (prediction.float() - target.float()).square().mean(dim=(1, 2, 3))


def _latents(posterior: Posterior, draws: Draws) -> PairLatents:
    return posterior.mean.float() + posterior.std.float() * draws.latent_noise
