"""Whitening the latents changes their coordinates and nothing else."""

import numpy as np
import torch

from rpo.shapes import networks
from rpo.shapes.measure import renders
from rpo.shapes.recognition import to_pixels
from rpo.shapes.training.autoencoder import whiten
from rpo.shapes.training.autoencoder_finish import _without_spread


def test_whitened_latents_are_white_and_decode_as_before() -> None:
    torch.manual_seed(0)
    vae = networks.autoencoder().eval()
    pixels = to_pixels(renders(60, seed=1)[0])
    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist.mean
        before = vae.decode(latents).sample
        whiten(vae, pixels)
        white = vae.encode(pixels).latent_dist.mean
        after = vae.decode(white).sample
    assert torch.allclose(before, after, atol=1e-3)
    cells = white.permute(0, 2, 3, 1).flatten(0, 2).double().numpy()
    covariance = np.cov(cells.T)
    assert np.abs(cells.mean(0)).max() < 1e-3
    assert np.abs(covariance - np.diag(np.diag(covariance))).max() < 0.05, "no two channels go together"
    assert np.diag(covariance).max() <= 1.0 + 1e-3


def test_a_posterior_without_spread_is_its_mean() -> None:
    torch.manual_seed(0)
    vae = networks.autoencoder().eval()
    pixels = to_pixels(renders(4, seed=2)[0])
    with torch.no_grad():
        mean = vae.encode(pixels).latent_dist.mean
        _without_spread(vae)
        posterior = vae.encode(pixels).latent_dist
    assert torch.equal(posterior.mean, mean)
    assert torch.allclose(posterior.sample(torch.Generator().manual_seed(0)), mean, atol=1e-3)
