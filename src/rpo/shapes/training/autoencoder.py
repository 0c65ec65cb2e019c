"""Training of the autoencoder that the base model and the editor share."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from rpo.shapes import networks
from rpo.shapes.recognition import to_pixels
from rpo.shapes.render import place, render
from rpo.shapes.scenes import scenes
from rpo.shapes.training.fit import fit

_KL_WEIGHT = 1e-4


def train_autoencoder(
    *, seed: int, folder: Path, steps: int, pictures: int = 16_000, batch: int = 16, begin_from: Path | None = None
) -> AutoencoderKL:
    """Absolute and squared error, four times as strong on what is not background, and a weak pull towards a normal distribution."""
    torch.manual_seed(seed)
    vae = networks.autoencoder()
    if begin_from:
        networks.begin(vae, begin_from / "base" / "vae")
        _with_spread(vae)
    rng = np.random.default_rng(seed)
    source = scenes(rng, held_out=False, two_things=0.75)
    shown = [next(source) for _ in range(pictures)]
    drawn = [(place(scene, rng), scene.background) for scene in shown]
    images = np.concatenate([render(drawn[i : i + 200]) for i in range(0, pictures, 200)])

    def loss(step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        chosen = torch.randint(pictures, (batch,), generator=generator)
        pixels = to_pixels(list(images[chosen.numpy()])).contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(pixels).latent_dist
        latents = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
        error = vae.decode(latents).sample - pixels
        divergence = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        return (importance(pixels) * (error.abs() + 2 * error.square())).mean() + _KL_WEIGHT * divergence

    fit("autoencoder", {"vae": vae}, loss, steps=steps, lr=2e-3, folder=folder, ema_decay=0.998)
    whiten(vae, to_pixels(list(images[:4000])))
    return vae


@torch.no_grad()
def _with_spread(vae: AutoencoderKL) -> None:
    """Gives back to the posterior the spread that finishing took from it, for the noise that keeps the latents smooth."""
    vae.quant_conv.bias[vae.config.latent_channels :] = -4.0


def importance(pixels: torch.Tensor) -> torch.Tensor:
    """Weight of each pixel's error (b, 1, h, w): 4 on what is not background, else 1."""
    return 1 + 3 * ((pixels - pixels[:, :, :1, :1]).abs().amax(1, keepdim=True) > 0.05)  # a corner is always background


@torch.no_grad()
def whiten(vae: AutoencoderKL, pixels: torch.Tensor) -> None:
    """Gives the latents' channels mean 0 and the identity as covariance, by folding the map into the two 1x1 convolutions round them.

    Without it the background's brightness has a thousand times the variance of what tells a star from a circle, and a diffusion
    model, whose loss is the same for every direction, learns the shapes last of all.
    """
    means = torch.cat([vae.encode(pixels[i : i + 100]).latent_dist.mean for i in range(0, len(pixels), 100)])
    cells = means.permute(0, 2, 3, 1).flatten(0, 2).double()
    centre = cells.mean(0)
    variances, axes = torch.linalg.eigh(torch.cov((cells - centre).T))
    scales = (variances + 0.01 * variances.mean()).sqrt()
    forth, back = (axes / scales) @ axes.T, (axes * scales) @ axes.T
    channels = len(centre)
    into, out = vae.quant_conv, vae.post_quant_conv
    weight, bias = into.weight[..., 0, 0].double(), into.bias.double()
    into.weight[:channels, :, 0, 0] = (forth @ weight[:channels]).float()
    into.bias[:channels] = (forth @ (bias[:channels] - centre)).float()
    into.bias[channels:] += forth.square().sum(1).log().float()  # the posterior's spread, were it equal in all directions
    weight = out.weight[..., 0, 0].double()
    out.bias += (weight @ centre).float()
    out.weight[..., 0, 0] = (weight @ back).float()
