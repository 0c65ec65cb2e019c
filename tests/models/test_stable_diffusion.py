import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusionPipeline

from rpo.errors import RpoError
from rpo.models.denoiser import Denoiser
from rpo.models.diffusers_denoiser import DiffusersDenoiser, load_denoiser
from rpo.models.lora import Lora, merge_lora
from rpo.models.pipeline_folder import commit_of, resolve
from tiny_diffusion import SIDE, picture, save_pipeline

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("model"))


def load(model: Path, lora: Lora | None = None, dtype: torch.dtype = torch.float32, seed: int = 0) -> DiffusersDenoiser:
    return load_denoiser(str(model), lora=lora, dtype=dtype, device=CPU, seed=seed)


def pipeline_of(folder: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(folder, local_files_only=True, safety_checker=None, requires_safety_checker=False)


def some_input() -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn((2, 4, 8, 8), generator=generator), torch.tensor([10, 900]), {"embeds": torch.randn((2, 7, 16), generator=generator)}


def disturb(denoiser: DiffusersDenoiser) -> None:
    """As if it had been trained."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in denoiser.trainable().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def test_is_a_denoiser(model: Path) -> None:
    denoiser = load(model)
    assert isinstance(denoiser, Denoiser)
    assert denoiser.schedule.prediction == "v_prediction" and len(denoiser.schedule.alphas_cumprod) == 1000


def test_encodes_images_as_the_pipeline_s_autoencoder(model: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE, 3), dtype=np.uint8)
    pipeline = pipeline_of(model)
    with torch.no_grad():
        posterior = pipeline.vae.encode(pipeline.image_processor.preprocess(images.astype(np.float32) / 255)).latent_dist
    mean, std = load(model).encode_images(images)
    assert mean.shape == (3, 4, 8, 8)
    assert torch.allclose(mean, posterior.mean * pipeline.vae.config.scaling_factor, atol=1e-5)
    assert torch.allclose(std, posterior.std * pipeline.vae.config.scaling_factor, atol=1e-5)


def test_large_images_are_encoded_a_few_at_a_time(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE, 3), dtype=np.uint8)
    together, sizes, encode = load(model).encode_images(images), list[int](), AutoencoderKL.encode
    monkeypatch.setattr("rpo.models.diffusers_denoiser._PIXELS_AT_ONCE", 2 * SIDE**2)
    monkeypatch.setattr(AutoencoderKL, "encode", lambda self, x: sizes.append(len(x)) or encode(self, x))
    apart = load(model).encode_images(images)
    assert sizes == [2, 1]
    assert torch.allclose(apart.mean, together.mean, atol=1e-5) and torch.allclose(apart.std, together.std, atol=1e-5)


def test_encodes_prompts_as_the_pipeline_and_each_once(model: Path) -> None:
    denoiser, pipeline = load(model), pipeline_of(model)
    prompts = ["a red circle", "", "a red circle", "two blue stars"]
    with torch.no_grad():
        expected = pipeline.encode_prompt(prompts, CPU, 1, False)[0]
    embeds = denoiser.encode_prompts(prompts)["embeds"]
    assert torch.allclose(embeds, expected, atol=1e-6)
    assert torch.equal(embeds[0], embeds[2])


def test_warns_of_a_prompt_that_is_cut(model: Path) -> None:
    denoiser = load(model)
    with pytest.warns(UserWarning, match="1 of 2 prompts are longer"):
        denoiser.encode_prompts(["a red circle " * 30, "a red circle"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        denoiser.encode_prompts(["a red circle"])


def test_free_encoders_come_back_when_needed(model: Path) -> None:
    denoiser = load(model)
    before = denoiser.encode_prompts(["a red circle"])
    denoiser.free_encoders()
    assert denoiser._text is None and denoiser._vae is None
    assert torch.equal(denoiser.encode_prompts(["a red circle"])["embeds"], before["embeds"])


def test_refuses_sides_the_autoencoder_cannot_halve(model: Path) -> None:
    with pytest.raises(ValueError, match="multiples of 4, got 30x32"):
        load(model).encode_images(np.zeros((1, 30, 32, 3), dtype=np.uint8))


@pytest.mark.parametrize("lora", [Lora(rank=2), None])
def test_only_what_is_tuned_can_move(model: Path, lora: Lora | None) -> None:
    denoiser = load(model, lora)
    names = list(denoiser.trainable())
    assert names and all(("lora_" in name) == (lora is not None) for name in names)
    assert all(parameter.dtype == torch.float32 for parameter in denoiser.trainable().values())


def test_new_adapters_change_nothing_and_follow_the_seed(model: Path) -> None:
    base, tuned = load(model), load(model, Lora(rank=2))
    assert torch.equal(base.predict(*some_input()), tuned.predict(*some_input()))
    values = [torch.cat([p.flatten() for p in load(model, Lora(rank=2), seed=seed).trainable().values()]) for seed in (0, 0, 1)]
    assert torch.equal(values[0], values[1]) and not torch.equal(values[0], values[2])


def test_the_base_network_is_the_untuned_one(model: Path) -> None:
    base, tuned = load(model), load(model, Lora(rank=2))
    disturb(tuned)
    moved = tuned.predict(*some_input())
    with tuned.base_network():
        assert torch.equal(tuned.predict(*some_input()), base.predict(*some_input()))
    assert torch.equal(tuned.predict(*some_input()), moved) and tuned.trainable()
    with pytest.raises(RuntimeError), tuned.base_network():
        raise RuntimeError
    assert torch.equal(tuned.predict(*some_input()), moved)
    with pytest.raises(RpoError, match="full tuning"), base.base_network():
        pass


def test_a_frozen_copy_stays_behind(model: Path) -> None:
    policy = load(model)
    before, frozen = policy.predict(*some_input()), policy.frozen_copy()
    disturb(policy)
    assert torch.equal(frozen.predict(*some_input()), before) and not frozen.trainable()
    assert not torch.equal(policy.predict(*some_input()), before)


@pytest.mark.parametrize("lora", [Lora(rank=2), Lora(rank=4, alpha=2.0, targets=("attention", "feed_forward", "convolution"))])
def test_a_saved_lora_gives_the_same_network_and_picture(model: Path, lora: Lora, tmp_path: Path) -> None:
    denoiser = load(model, lora)
    disturb(denoiser)
    denoiser.save(tmp_path / "weights", denoiser.trainable())
    pipeline = pipeline_of(model)
    base_picture = picture(pipeline)
    pipeline.load_lora_weights(tmp_path / "weights")
    x_t, t, conditions = some_input()
    with torch.no_grad():
        assert torch.allclose(pipeline.unet(x_t, t, conditions["embeds"]).sample, denoiser.predict(x_t, t, conditions), atol=1e-5)
    loaded_picture = picture(pipeline)
    assert np.abs(loaded_picture - base_picture).max() > 0.01
    pipeline.unload_lora_weights()
    pipeline.unet = denoiser._network
    assert np.allclose(picture(pipeline), loaded_picture, atol=1e-4)


def test_a_merged_lora_draws_the_same_without_adapters(model: Path, tmp_path: Path) -> None:
    denoiser = load(model, Lora(rank=2))
    disturb(denoiser)
    denoiser.save(tmp_path / "weights", denoiser.trainable())
    pipeline = pipeline_of(model)
    pipeline.load_lora_weights(tmp_path / "weights")
    merge_lora(str(model), tmp_path / "weights", tmp_path / "merged")
    merged = pipeline_of(tmp_path / "merged")
    assert merged.unet.state_dict().keys() == pipeline_of(model).unet.state_dict().keys()
    assert np.allclose(picture(merged), picture(pipeline), atol=1e-4)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_saved_pipeline_is_the_base_with_the_tuned_network(model: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(model, source)
    (source / "vae" / "old.bin").write_bytes(b"pickle")
    (source / "run.py").write_text("raise SystemExit")
    denoiser = load(source)
    disturb(denoiser)
    before = denoiser.predict(*some_input())
    denoiser.save(tmp_path / "weights", denoiser.trainable())
    assert torch.equal(denoiser.predict(*some_input()), before)
    tuned, base = pipeline_of(tmp_path / "weights"), pipeline_of(model)
    for name, value in denoiser.trainable().items():
        assert torch.equal(tuned.unet.state_dict()[name], value)
    for part in ("vae", "text_encoder"):
        ours, theirs = getattr(tuned, part).state_dict(), getattr(base, part).state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert np.abs(picture(tuned) - picture(base)).max() > 0.01
    assert {path.suffix for path in (tmp_path / "weights").rglob("*") if path.is_file()} <= {".json", ".safetensors", ".txt"}


def test_digests_follow_the_weights(model: Path, tmp_path: Path) -> None:
    other = save_pipeline(tmp_path / "other", seed=1)
    first, again, second = load(model).digests, load(model).digests, load(other).digests
    assert first == again
    assert all(first[part] != second[part] for part in first)


@pytest.mark.parametrize("lora", [Lora(rank=2), None])
def test_half_precision_computes_close_to_single(model: Path, lora: Lora | None) -> None:
    single, half = load(model, lora).predict(*some_input()), load(model, lora, torch.bfloat16).predict(*some_input())
    assert half.dtype == torch.bfloat16
    assert torch.allclose(single, half.float(), atol=0.1)


def broken(model: Path, folder: Path, kind: str) -> Path:
    shutil.copytree(model, folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    index = folder / "model_index.json"
    match kind:
        case "flipped header":
            weights.write_bytes(b"\xff" * 64 + weights.read_bytes()[64:])
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:5000])
        case "absent":
            weights.rename(weights.with_suffix(".bin"))
        case "no index":
            index.unlink()
        case "another pipeline":
            index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": "KandinskyPipeline"}))
        case "another prediction":
            config = folder / "scheduler" / "scheduler_config.json"
            config.write_text(json.dumps({**json.loads(config.read_text()), "prediction_type": "sample"}))
        case "another kind of schedule":
            told = {"_class_name": "EDMDPMSolverMultistepScheduler", "prediction_type": "epsilon", "sigma_max": 80.0}
            (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(told))
        case "half precision only":
            weights.rename(weights.with_suffix(".fp16.safetensors"))
    return folder


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("flipped header", "unet could not be loaded"),
        ("truncated", "unet could not be loaded"),
        ("absent", "unet could not be loaded"),
        ("no index", "no model_index.json"),
        ("another pipeline", "holds a KandinskyPipeline"),
        ("another prediction", "prediction_type 'sample'"),
        ("another kind of schedule", "EDMDPMSolverMultistepScheduler, cannot be tuned"),
        ("half precision only", "variant 'fp16' only"),
    ],
)
def test_a_broken_folder_is_told(model: Path, tmp_path: Path, kind: str, message: str) -> None:
    with pytest.raises(RpoError, match=message):
        load(broken(model, tmp_path / "broken", kind))


def test_an_autoencoder_that_scales_channels_is_refused(model: Path, tmp_path: Path) -> None:
    config = shutil.copytree(model, tmp_path / "model") / "vae" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}))
    with pytest.raises(RpoError, match="scales every channel"):
        load(tmp_path / "model").encode_images(np.zeros((1, SIDE, SIDE, 3), dtype=np.uint8))


def test_missing_weights_are_not_made_up(model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(model, tmp_path / "model")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: value for name, value in load_file(weights).items() if name != "conv_out.bias"}, weights)
    with pytest.raises(RpoError, match=r"conv_out.bias"):
        load(folder)


def test_what_is_neither_folder_nor_hub_id_is_told(tmp_path: Path) -> None:
    with pytest.raises(RpoError, match="neither a folder nor a hub id"):
        load(tmp_path / "nothing")


def test_wrong_adapters_are_refused(model: Path) -> None:
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        Lora(rank=0)
    with pytest.raises(ValueError, match="targets must be some of"):
        Lora(targets=())


def test_a_hub_model_is_pinned_to_a_revision(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, str | None]] = []

    def download(name: str, revision: str | None = None, **options: object) -> str:
        calls.append((name, revision))
        return str(model)

    monkeypatch.setattr(DiffusionPipeline, "download", download)
    assert resolve("owner/name@0123abc") == resolve("owner/name") == model
    assert calls == [("owner/name", "0123abc"), ("owner/name", None)]
    assert commit_of("owner/name@0123abc") == model.name and commit_of(str(model)) is None
    for wrong in ("owner/name@", "name@0123abc"):
        with pytest.raises(RpoError, match="neither a folder nor a hub id"):
            resolve(wrong)
