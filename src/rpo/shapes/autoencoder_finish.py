"""The autoencoder's last lessons: to read and to write what the two diffusion models draw.

A small network's latents lie a little beside those of any picture: a star's outline is soft, a colour is between two. An autoencoder
that has only seen pictures paints that faithfully, and encodes what it has painted as something else, so that no viewer agrees with
itself before and after a round trip. So the decoder learns to paint the picture that was meant so that others can read it, and
both halves learn to carry over what it has painted as it is. Clean pictures keep their latents, on which everything else was trained.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch.nn import functional as F

from rpo.shapes.autoencoder_training import importance
from rpo.shapes.denoiser_training import Denoiser, Tasks
from rpo.shapes.fit import fit
from rpo.shapes.recogniser_training import recogniser_loss
from rpo.shapes.recognition import Recogniser

_READING_WEIGHT = 0.1
"""Of the readers' losses beside the absolute errors."""
_NOISE_MAX = 0.3
"""Of the latents' own spread, on the pictures that no model has touched."""


def finish_autoencoder(
    vae: AutoencoderKL,
    base: Denoiser,
    editor: Denoiser,
    readers: Sequence[Recogniser],
    tasks: Tasks,
    *,
    seed: int,
    folder: Path,
    steps: int,
    size: int = 6,
) -> None:
    """Each batch holds `size` pictures as they are but for some noise, as the base model guesses them from their caption at any timestep,
    and as the editor makes them. Absolute error settles on one of two answers where the squared one mixes them; as in the
    autoencoder's own training it counts four times as much on what is not background. The readers must find in the painted picture
    what was meant, and in its round trip what they found before.
    """
    for reader in readers:
        reader.eval().requires_grad_(False)

    def loss(step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        plain, drawn = (tasks.drawing(size, "told", generator) for _ in range(2))
        edited = tasks.editing(size // 2, generator) + tasks.keeping(size - size // 2, base, generator)
        noise = _NOISE_MAX * torch.rand(size, 1, 1, 1, generator=generator) * torch.randn(plain.clean.shape, generator=generator)
        guesses = [plain.clean + noise, base.guess(drawn, generator, spread=0.6), editor.guess(edited, generator, spread=0.0)]
        rows = torch.cat([plain.rows, drawn.rows, edited.rows])
        meant = tasks.pixels(rows)
        painted = vae.decode(torch.cat(guesses) / tasks.scale).sample

        shown = torch.cat([meant[:size], painted[size:].detach().clamp(-1, 1)])
        latents = vae.encode(shown).latent_dist.mean
        again = vae.decode(latents[size:]).sample
        kept = F.mse_loss(latents[:size], plain.clean / tasks.scale)
        reading = torch.zeros(())
        for reader in readers:
            first = reader(painted)
            reading = reading + recogniser_loss(first, *tasks.truth(rows)) / len(readers)
            reading = reading + _disagreement({name: out[size:].detach() for name, out in first.items()}, reader(again)) / len(readers)
        return _difference(painted, meant) + _difference(again, shown[size:]) + _READING_WEIGHT * reading + kept

    fit("finish", {"vae": vae}, loss, steps=steps, lr=1e-3, folder=folder, ema_decay=0.998)
    _without_spread(vae)


@torch.no_grad()
def _without_spread(vae: AutoencoderKL) -> None:
    """Makes the posterior a point, as both diffusion models know it: whoever samples it gets its mean."""
    channels = vae.config.latent_channels
    vae.quant_conv.weight[channels:] = 0.0
    vae.quant_conv.bias[channels:] = -20.0


def _disagreement(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> torch.Tensor:
    """How much another round trip changes what a reader sees: divergences of its answers, those about things where it sees one."""
    heat = before["heat"].sigmoid()
    total = F.binary_cross_entropy_with_logits(after["heat"], heat)
    for field in ("size", "color", "shape"):
        told = F.kl_div(after[field].log_softmax(1), before[field].log_softmax(1), reduction="none", log_target=True).sum(1, keepdim=True)
        total = total + (heat * told).sum() / heat.sum().clamp(min=1.0)
    background = (after["background"].log_softmax(1), before["background"].log_softmax(1))
    return total + F.kl_div(*background, reduction="batchmean", log_target=True)


def _difference(painted: torch.Tensor, meant: torch.Tensor) -> torch.Tensor:
    return (importance(meant) * (painted - meant).abs()).mean()
