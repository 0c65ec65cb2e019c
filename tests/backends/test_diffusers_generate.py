"""Generators and the projection onto what they draw, for every family that the trainer knows."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForImage2Image

from rpo.backends.diffusers.generate import GeneratorConfig, Projector, ProjectorConfig, _side
from rpo.errors import RpoError
from rpo.models.diffusers_denoiser import load_denoiser
from rpo.models.lora import Lora
from tiny_families import FAMILIES, save_family


@pytest.fixture(scope="module")
def projectors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Projector]:
    folder = tmp_path_factory.mktemp("families")
    return {
        name: ProjectorConfig(
            generator=GeneratorConfig(model=str(save_family(name, folder / name)), steps=4, guidance=1.0, side=64), strength=0.5
        ).build()
        for name in FAMILIES
    }


@pytest.fixture(params=FAMILIES)
def projector(projectors: dict[str, Projector], request: pytest.FixtureRequest) -> Projector:
    return projectors[request.param]


def pictures(count: int, side: int = 64) -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    return [np.kron(rng.integers(0, 256, (4, 4, 3)), np.ones((side // 4, side // 4, 1))).astype(np.uint8) for _ in range(count)]


PROMPTS = ["a red circle", "a blue square above a star", "a green star"]


def test_a_batch_is_what_its_rows_are_alone(projector: Projector) -> None:
    together = projector(pictures(3), PROMPTS, [1, 2, 3])
    for row, image in enumerate(together):
        alone = projector(pictures(3)[row : row + 1], PROMPTS[row : row + 1], [row + 1])[0]
        assert image.shape == (64, 64, 3)
        assert np.abs(image.astype(int) - alone).max() <= 1


def test_image_prompt_and_seed_decide(projector: Projector) -> None:
    image, prompt = pictures(1), PROMPTS[:1]
    first = projector(image, prompt, [1])[0]
    assert np.array_equal(first, projector(image, prompt, [1])[0])
    assert not np.array_equal(first, projector(image, prompt, [2])[0])
    assert not np.array_equal(first, projector(pictures(2)[1:], prompt, [1])[0])
    assert not np.array_equal(first, projector(image, PROMPTS[1:2], [1])[0])


def test_any_size_and_none(projector: Projector) -> None:
    assert projector([np.zeros((1, 1, 3), dtype=np.uint8)], PROMPTS[:1], [1])[0].shape == (64, 64, 3)
    assert projector([], [], []) == []


def test_less_strength_keeps_more(projectors: dict[str, Projector]) -> None:
    """Through the autoencoder alone, and after one step of four, or all."""
    generator = projectors["stable_diffusion"].config.generator
    image = pictures(1)
    weak, strong = (ProjectorConfig(generator=generator, strength=strength).build()(image, [""], [1])[0] for strength in (0.25, 1.0))
    other = [ProjectorConfig(generator=generator, strength=strength).build()(pictures(2)[1:], [""], [1])[0] for strength in (0.25, 1.0)]
    assert np.abs(weak.astype(int) - other[0]).mean() > np.abs(strong.astype(int) - other[1]).mean()


def test_what_cannot_start_from_an_image_is_told(projectors: dict[str, Projector], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of some editors diffusers says that they start from an image, and means the one to edit."""
    monkeypatch.setattr(AutoPipelineForImage2Image, "from_pipe", lambda drawn: drawn)
    with pytest.raises(RpoError, match="cannot start from an image"):
        projectors["flux"].config.build()


def test_the_side_of_a_family_that_says_none() -> None:
    assert _side(SimpleNamespace(transformer=SimpleNamespace(config={}), vae_scale_factor=8)) == 1024


def test_a_lora_is_not_rounded_into_half_precision_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A difference of a thousandth of the weights lies below bfloat16's steps: merged, much of it would be gone."""
    model = save_family("stable_diffusion", tmp_path / "model")
    denoiser = load_denoiser(str(model), lora=Lora(rank=2), dtype=torch.float32, device=torch.device("cpu"), seed=0)
    weights = {
        name: torch.randn(value.shape, generator=torch.Generator().manual_seed(0)) * 0.01 for name, value in denoiser.trainable().items()
    }
    denoiser.save(tmp_path / "weights", weights)
    monkeypatch.setattr("rpo.backends.diffusers.pipelines.pick_dtype", lambda device: torch.bfloat16)
    base = GeneratorConfig(model=str(model), steps=2)
    unets = [config.build().pipeline.unet for config in (base, base.tuned(tmp_path / "weights"))]
    layer = next(name for name, _ in unets[0].named_modules() if name.endswith("attn1.to_q"))
    plain, tuned = (unet.get_submodule(layer) for unet in unets)
    assert torch.equal(tuned.base_layer.weight, plain.weight)
    x = torch.randn((4, plain.in_features), generator=torch.Generator().manual_seed(1)).bfloat16()
    moved = tuned(x).float() - plain(x).float()
    assert moved.abs().max() > 0


def test_strength_is_checked(tmp_path: Path) -> None:
    generator = GeneratorConfig(model=str(tmp_path), steps=4)
    for strength in (0.0, 1.1, 0.2):
        with pytest.raises(ValueError, match="strength"):
            ProjectorConfig(generator=generator, strength=strength)
