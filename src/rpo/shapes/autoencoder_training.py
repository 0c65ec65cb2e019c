"""Training of the autoencoder that the base model and the editor share."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from rpo.shapes import networks
from rpo.shapes.fit import fit
from rpo.shapes.recognition import to_pixels
from rpo.shapes.render import place, render
from rpo.shapes.scenes import scenes

_KL_WEIGHT = 1e-4


def train_autoencoder(*, seed: int, folder: Path, steps: int, pictures: int = 16_000, batch: int = 16) -> AutoencoderKL:
    """Absolute and squared error, four times as strong on what is not background, and a weak pull towards a normal distribution."""
    torch.manual_seed(seed)
    vae = networks.autoencoder()
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
        foreground = (pixels - pixels[:, :, :1, :1]).abs().amax(1, keepdim=True) > 0.05  # a corner is always background
        divergence = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        return ((1 + 3 * foreground) * (error.abs() + 2 * error.square())).mean() + _KL_WEIGHT * divergence

    fit("autoencoder", {"vae": vae}, loss, steps=steps, lr=2e-3, folder=folder, ema_decay=0.998)
    return vae
