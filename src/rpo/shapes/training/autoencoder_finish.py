"""The autoencoder's last lessons: to read and to write what the two diffusion models draw.

A small network's latents lie a little beside those of any picture: a star's outline is soft, a colour is between two. An autoencoder
that has only seen pictures paints that faithfully, and encodes what it has painted as something else, so that no viewer agrees with
itself before and after a round trip. So the decoder learns to commit itself: to paint the clean picture of what a reader sees in its
painting. Both halves learn to carry over what it has painted as it is. Clean pictures keep their latents, on which everything else
was trained.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.nn import functional as F

from rpo.shapes.networks import LATENT_CHANNELS
from rpo.shapes.recognition import Recogniser, View, to_pixels
from rpo.shapes.render import SHIFTS, SLOTS, Placed, nearest_slot, stand
from rpo.shapes.scenes import BACKGROUNDS, NEUTRAL_INSTRUCTION, Scene, caption, is_held_out, join_instructions, random_edits, scenes
from rpo.shapes.training.autoencoder import importance
from rpo.shapes.training.denoiser import Denoiser, Tasks, base_pipeline, cached, editor_pipeline
from rpo.shapes.training.fit import fit
from rpo.shapes.training.recognizer import label, recogniser_loss
from rpo.shapes.weights import BASE_SAMPLER, EDITOR_SAMPLER

_READING_WEIGHT = 0.1
"""Of the readers' losses beside the absolute errors."""
_NOISE_MAX = 0.3
"""Of the latents' own spread, on the pictures that no model has touched."""
_AT_ONCE = 50


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
    samples: int = 3000,
    size: int = 6,
) -> None:
    """Each batch holds `size` pictures as they are but for some noise, and twice as many that the two models have drawn. Absolute error
    settles on one of two answers where the squared one mixes them; as in the autoencoder's own training it counts four times as much
    on what is not background. The readers must find in the painted picture what was meant, and in its round trip what they found
    before. The first reader says what was meant by a drawing.
    """
    for reader in readers:
        reader.eval().requires_grad_(False)
    drawn = cached(folder / "drawn.pt", lambda: {"all": _drawings(base, editor, readers[0], samples, seed)})["all"]

    def loss(step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        plain = tasks.drawing(size, "true", generator)
        chosen = torch.randint(len(drawn["latents"]), (2 * size,), generator=generator)
        noise = _NOISE_MAX * torch.rand(size, 1, 1, 1, generator=generator) * torch.randn(plain.clean.shape, generator=generator)
        meant = torch.cat([tasks.pixels(plain.rows), to_pixels(list(drawn["images"][chosen].numpy()))])
        seen = drawn["things"][chosen], drawn["background"][chosen]
        truth = [torch.cat(parts) for parts in zip(tasks.truth(plain.rows), seen, strict=True)]
        painted = vae.decode(torch.cat([plain.clean + noise, drawn["latents"][chosen]]) / tasks.scale).sample

        shown = torch.cat([meant[:size], painted[size:].detach().clamp(-1, 1)])
        latents = vae.encode(shown).latent_dist.mean
        again = vae.decode(latents[size:]).sample
        kept = F.mse_loss(latents[:size], plain.clean / tasks.scale)
        reading = torch.zeros(())
        for reader in readers:
            first = reader(painted)
            reading = reading + recogniser_loss(first, *truth) / len(readers)
            reading = reading + _disagreement({name: out[size:].detach() for name, out in first.items()}, reader(again)) / len(readers)
        return _difference(painted, meant) + _difference(again, shown[size:]) + _READING_WEIGHT * reading + kept

    fit("finish", {"vae": vae}, loss, steps=steps, lr=1e-3, folder=folder, ema_decay=0.998)
    _without_spread(vae)


@torch.no_grad()
def _drawings(base: Denoiser, editor: Denoiser, reader: Recogniser, count: int, seed: int) -> dict[str, torch.Tensor]:
    """About `count` samples of the base model and as many edits of them, a third of those with the neutral instruction: `latents` of unit
    spread, and clean `images` of what the reader sees in them, with `things` and `background`. What it cannot read is left out.
    """
    rng, source = np.random.default_rng(seed), scenes(np.random.default_rng(seed + 1), held_out=False, two_things=0.8)
    draw, edit = base_pipeline(base), editor_pipeline(editor)
    for pipeline in (draw, edit):
        pipeline.set_progress_bar_config(disable=True)
    latents: list[torch.Tensor] = []
    pictures: list[tuple[list[Placed], str]] = []

    def sample(pipeline: Any, sampler: dict[str, Any], texts: list[str], **given: Any) -> tuple[list[np.ndarray], list[Scene | None]]:
        """Pictures and what the reader sees in them, which are kept where it sees a scene."""
        names = {"steps": "num_inference_steps", "guidance": "guidance_scale", "image_guidance": "image_guidance_scale"}
        options = {names[name]: value for name, value in sampler.items()}
        generator = [torch.Generator().manual_seed(int(n)) for n in rng.integers(2**31, size=len(texts))]
        made = pipeline(texts, generator=generator, output_type="latent", **given, **options).images
        pixels = pipeline.vae.decode(made / pipeline.vae.config.scaling_factor).sample.clamp(-1, 1)
        images = list(((pixels + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy())
        views = reader.view(images)
        for row, view in zip(made, views, strict=True):
            if _readable(view):
                latents.append(row)
                pictures.append((_standing(view), view.background))
        return images, [view.scene() if _readable(view) else None for view in views]

    for _ in range(0, count, _AT_ONCE):
        images, seen = sample(draw, BASE_SAMPLER, [caption(next(source)) for _ in range(_AT_ONCE)])
        told = [NEUTRAL_INSTRUCTION if scene is None else _instruction(scene, rng) for scene in seen]
        sample(edit, EDITOR_SAMPLER, told, image=torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255)
    if not latents:  # readers that are not trained yet see nothing anywhere
        size = draw.unet.config.sample_size
        latents, pictures = [torch.zeros(LATENT_CHANNELS, size, size)], [([], BACKGROUNDS[0])]
    truth = label(pictures)
    return {
        "latents": torch.stack(latents),
        "images": torch.from_numpy(truth.images),
        "things": truth.things,
        "background": truth.background,
    }


def _instruction(scene: Scene, rng: np.random.Generator) -> str:
    """None, one or two changes."""
    count = int(rng.integers(3))
    return join_instructions([edit.instruction for edit in random_edits(scene, rng, count)[2]]) if count else NEUTRAL_INSTRUCTION


def _readable(view: View) -> bool:
    """A scene, not one that is kept for evaluation, with each thing in a slot of its own."""
    scene = view.scene()
    return scene is not None and not is_held_out(scene) and len({nearest_slot(seen.x, seen.y) for seen in view.things}) == len(view.things)


def _standing(view: View) -> list[Placed]:
    """What was seen, each thing in the middle of the slot it is nearest to, in the shift that suits all of them best."""
    places = [nearest_slot(seen.x, seen.y) for seen in view.things]
    off = sum(seen.x + seen.y - sum(SLOTS[slot]) for slot, seen in zip(places, view.things, strict=True))
    return stand({slot: seen.thing for slot, seen in zip(places, view.things, strict=True)}, SHIFTS[int(off > 0)])


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
