"""Every family against its own pipeline: what it encodes, predicts, saves, and that it trains."""

import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode

from rpo.backends.diffusers.generate import GeneratorConfig
from rpo.backends.diffusers.pipelines import load_lora, load_pipeline
from rpo.data.images import EncodedImage, encode_png
from rpo.errors import RpoError
from rpo.models.denoiser import Denoiser, FlowSchedule
from rpo.models.diffusers_denoiser import LORA_FILE, DiffusersDenoiser, load_denoiser, load_reference
from rpo.models.family import FAMILIES as KNOWN
from rpo.models.family import family_of
from rpo.models.lora import Lora
from rpo.models.pipeline_folder import flow_schedule
from rpo.training.config import TrainConfig
from rpo.training.inputs.batches import Visit
from rpo.training.inputs.paths import path_of
from rpo.training.loop import train
from rpo.training.objectives.preference import DiffusionDPO
from rpo.training.runtime.distributed import Processes
from rpo.training.runtime.interruption import StopRequest
from rpo.training.setup import prepare
from tiny_diffusion import make_pairs
from tiny_families import FAMILIES, PROMPT, disturb, euler_to_data, picture, pipeline_of, save_family

CPU = torch.device("cpu")
CLASSES = {"flux": "FluxPipeline", "stable_diffusion_3": "StableDiffusion3Pipeline", "z_image": "ZImagePipeline"}


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family(request.param, tmp_path_factory.mktemp(request.param) / "model")


def load(model: Path, lora: Lora | None = None) -> DiffusersDenoiser:
    return load_denoiser(str(model), lora=lora, dtype=torch.float32, device=CPU, seed=0)


LEVELS = (950, 500, 60)
"""Timesteps, or places in the table of a flow's noise levels, at which networks and targets are compared."""


def asked(pipeline: Any, **options: Any) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(noisy latents, timestep, what the scheduler is given) of every step in which the pipeline draws one picture without guidance."""
    seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    step = pipeline.scheduler.step

    def record(output: torch.Tensor, t: torch.Tensor, sample: torch.Tensor, **options: Any) -> Any:
        seen.append((sample.clone(), t.clone(), output.clone()))
        return step(output, t, sample, **options)

    pipeline.scheduler.step = record
    off = 0.0 if type(pipeline).__name__ == "ZImagePipeline" else 1.0
    generator = torch.Generator().manual_seed(0)
    settings = {"num_inference_steps": 3, "height": 64, "width": 64, "output_type": "latent", **options}
    pipeline(PROMPT, guidance_scale=off, generator=generator, **settings)
    if type(pipeline).__name__ == "FluxPipeline":
        spread = lambda packed: pipeline._unpack_latents(packed, 64, 64, pipeline.vae_scale_factor)  # noqa: E731
        return [(spread(x_t), t, spread(out)) for x_t, t, out in seen]
    return seen


@torch.no_grad()
def test_predicts_what_its_pipeline_predicts(model: Path) -> None:
    """At the noise levels that are trained on: a flow's pipeline is sent to them, with no shift of its own."""
    pipeline, denoiser = pipeline_of(model), load(model)
    assert isinstance(denoiser, Denoiser)
    conditions = denoiser.encode_prompts([PROMPT, "two blue stars"])
    first, other = ({name: values[row : row + 1] for name, values in conditions.items()} for row in (0, 1))
    if isinstance(denoiser.schedule, FlowSchedule):
        sigmas = denoiser.schedule.levels(torch.tensor(LEVELS), torch.empty(len(LEVELS), 4, 8, 8))
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
        drawn = zip(LEVELS, asked(pipeline, sigmas=sigmas.tolist()), strict=True)
        calls = [(x_t, torch.tensor([level]), out) for level, (x_t, _, out) in drawn]
        assert torch.allclose(pipeline.scheduler.sigmas[:-1], sigmas)
    else:
        calls = [(x_t, t.view(1).long(), out) for x_t, t, out in asked(pipeline)]
    assert len(calls) == 3
    for x_t, t, expected in calls:
        got = denoiser.predict(x_t, t, first)
        assert torch.allclose(got, expected, atol=1e-4), (got - expected).abs().max()
        assert not torch.allclose(denoiser.predict(x_t, t, other), expected)


@torch.no_grad()
def test_a_network_that_hits_the_target_takes_its_scheduler_to_the_data(model: Path) -> None:
    """x_t is what the pipeline's scheduler makes of data and noise, and the target is what that needs to undo it in one step."""
    denoiser = load(model)
    path = path_of(denoiser.schedule, CPU)
    x0, noise = torch.randn((2, len(LEVELS), 4, 8, 8), generator=torch.Generator().manual_seed(0))
    x_t, target = path.sample(x0, noise, torch.tensor(LEVELS))
    if denoiser._family.flow:
        own = FlowMatchEulerDiscreteScheduler.from_pretrained(model, subfolder="scheduler")
        if own.config.use_dynamic_shifting:
            own.set_timesteps(sigmas=own.sigmas.tolist(), mu=calculate_shift(4 * 4))
        places = own.timesteps[[path.num_timesteps - 1 - level for level in LEVELS]]
        assert torch.allclose(x_t, own.scale_noise(x0, places, noise), atol=1e-6)
        back = [euler_to_data(t / 1000, target[row], x_t[row]) for row, t in enumerate(places)]
    else:
        diffusion = DDPMScheduler.from_pretrained(model, subfolder="scheduler")
        assert torch.allclose(x_t, diffusion.add_noise(x0, noise, torch.tensor(LEVELS)), atol=1e-6)
        back = [diffusion.step(target[row], t, x_t[row]).pred_original_sample for row, t in enumerate(LEVELS)]
    assert torch.allclose(torch.stack(back), x0, atol=1e-4)


@pytest.mark.parametrize("side", [512, 768, 1024])
@pytest.mark.parametrize("settings", [{}, {"time_shift_type": "linear"}, {"base_shift": 0.3, "max_shift": 2.0, "max_image_seq_len": 8192}])
@pytest.mark.parametrize("family", ["flux", "stable_diffusion_3", "z_image"])
def test_noise_levels_are_shifted_by_resolution_as_the_pipeline_samples(
    family: str, settings: dict[str, Any], side: int, tmp_path: Path
) -> None:
    """The pipelines give their scheduler mu of the image's tokens: diffusers' own function and scheduler are the truth."""
    own = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, **settings)
    own.save_pretrained(tmp_path / "scheduler")
    schedule = flow_schedule(tmp_path, CPU, family_of(CLASSES[family]).patch)
    of, before = own.config, own.sigmas
    mu = calculate_shift((side // 16) ** 2, of.base_image_seq_len, of.max_image_seq_len, of.base_shift, of.max_shift)
    own.set_timesteps(sigmas=before.tolist(), mu=mu)
    latents = torch.zeros(1000, 1, side // 8, side // 8)
    levels = schedule.levels(torch.arange(1000), latents)
    assert torch.allclose(levels.flip(0), own.sigmas[:-1], atol=1e-6)
    assert not torch.allclose(levels, schedule.sigmas, atol=1e-2), "the shift is no small one"
    x_t, _ = path_of(schedule, CPU).sample(latents, latents + 1, torch.arange(1000))
    assert torch.equal(x_t[:, 0, 0, 0], levels), "noisy latents and the network's level agree"


def test_a_scheduler_without_a_shift_by_resolution_keeps_its_table(tmp_path: Path) -> None:
    own = FlowMatchEulerDiscreteScheduler(shift=3.0)
    own.save_pretrained(tmp_path / "scheduler")
    schedule = flow_schedule(tmp_path, CPU, 2)
    assert torch.equal(schedule.levels(torch.arange(1000), torch.zeros(1000, 1, 128, 128)).flip(0), own.sigmas)


def test_the_shift_by_resolution_is_part_of_what_the_network_is(tmp_path: Path) -> None:
    """Reference errors and runs of versions that trained without it are not taken for those with it."""
    model = save_family("flux", tmp_path / "model")
    assert load(model).digests["network"].endswith("shifted by resolution")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(model / "scheduler")
    assert "shifted" not in load(model).digests["network"]


@pytest.mark.parametrize("odd", [{"base_image_seq_len": 4096}, {"max_shift": "high"}, {"max_shift": float("nan")}])
def test_a_shift_that_is_none_is_one_line(odd: dict[str, Any], tmp_path: Path) -> None:
    FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).save_pretrained(tmp_path / "scheduler")
    file = tmp_path / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | odd))
    with pytest.raises(RpoError, match="scheduler could not be loaded"):
        flow_schedule(tmp_path, CPU, 2)


@torch.no_grad()
@pytest.mark.parametrize("zeros", [True, False])
def test_a_dropped_prompt_is_what_sdxl_measures_guidance_from(zeros: bool, tmp_path: Path) -> None:
    model = save_family("stable_diffusion_xl", tmp_path / "model")
    digest = load(model).digests["prompts"]
    index = model / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "force_zeros_for_empty_prompt": zeros}))
    denoiser = load(model)
    _, embeds, _, pooled = pipeline_of(model).encode_prompt(PROMPT, device=CPU)
    dropped = denoiser.encode_prompts([PROMPT, ""])
    assert torch.allclose(dropped["embeds"][1], embeds[0], atol=1e-5) and torch.allclose(dropped["pooled"][1], pooled[0], atol=1e-5)
    assert (dropped["embeds"][1].abs().max() == 0) == zeros and dropped["embeds"][0].abs().max() > 0
    assert (denoiser.digests["prompts"] == digest) == zeros


@torch.no_grad()
def test_sdxl_is_told_the_size_and_crop_of_the_chosen_image(tmp_path: Path) -> None:
    model = save_family("stable_diffusion_xl", tmp_path / "model")
    wide = EncodedImage.of(encode_png(np.zeros((96, 128, 3), dtype=np.uint8)))
    pairs = [replace(pair, prompt=PROMPT, chosen=wide) for pair in make_pairs(2)]
    config = TrainConfig(model=str(model), steps=1, batch_pairs=2, accumulation=1, draws=1, resolution=64)
    alone = Processes(device=CPU)
    training = prepare(config, pairs, [], tmp_path / "cache", StopRequest(), Progress(console=Console(quiet=True)), alone)
    conditions = training.pairs.inputs([Visit(pair=0, number=0)], training.noise).conditions
    framing = [96, 128, 0, 16 * 64 / 96]
    assert conditions["framing"].tolist() == [pytest.approx(framing)]
    calls = asked(pipeline_of(model), original_size=tuple(framing[:2]), crops_coords_top_left=tuple(framing[2:]), target_size=(64, 64))
    untold = {name: values for name, values in conditions.items() if name != "framing"}
    for x_t, t, expected in calls:
        got, default = (training.denoiser.predict(x_t, t.view(1).long(), told) for told in (conditions, untold))
        assert torch.allclose(got, expected, atol=1e-4) and not torch.allclose(default, expected, atol=1e-4)


class AttentionTypes(TorchFunctionMode):
    """Writes down in what precision attention is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            self.seen.add(args[0].dtype if args else (kwargs or {})["query"].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch's, of RMS norms under autocast
@torch.no_grad()
def test_a_reference_in_half_precision_has_the_policy_s_bits(model: Path) -> None:
    """Where the policy is tuned in full, its matrices are rounded by autocast; norms stay as they are."""
    policy = load_denoiser(str(model), lora=None, dtype=torch.bfloat16, device=CPU, seed=0)
    conditions = policy.encode_prompts([PROMPT, ""])
    x_t, t = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(0)), torch.tensor([10, 900])
    with AttentionTypes() as attention:
        expected = policy.predict(x_t, t, conditions)
    assert attention.seen == {torch.float32}, "in bf16 its backward pass is slow on a CPU"
    exact = load(model).predict(x_t, t, conditions)
    assert (expected - exact).norm() < 0.05 * exact.norm() and not torch.equal(expected.float(), exact)
    size = sum(weight.nbytes for weight in policy._network.parameters())
    for frozen in (policy.frozen_copy(), load_reference(str(model), beside=None, dtype=torch.bfloat16, device=CPU)):
        assert torch.equal(frozen.predict(x_t, t, conditions), expected)
        assert sum(weight.nbytes for weight in frozen._network.parameters()) < 0.6 * size
        assert not frozen.trainable() and policy.trainable()


@torch.no_grad()
def test_a_batch_is_what_its_samples_are_alone(model: Path) -> None:
    denoiser = load(model)
    conditions = denoiser.encode_prompts([PROMPT, "", "two blue stars"])
    x_t, t = torch.randn((3, 4, 8, 8), generator=torch.Generator().manual_seed(0)), torch.tensor([10, 500, 999])
    together = denoiser.predict(x_t, t, conditions)
    for row in range(3):
        alone = denoiser.predict(x_t[row : row + 1], t[row : row + 1], {name: values[row : row + 1] for name, values in conditions.items()})
        assert torch.allclose(alone, together[row : row + 1], atol=1e-5)


def test_a_saved_lora_gives_the_same_picture(model: Path, tmp_path: Path) -> None:
    denoiser = load(model, Lora(rank=4, alpha=2.0, targets=("attention", "feed_forward")))
    disturb(denoiser)
    denoiser.save(tmp_path / "weights", denoiser.trainable())
    pipeline = pipeline_of(model)
    base = picture(pipeline)
    pipeline.load_lora_weights(tmp_path / "weights")
    loaded = picture(pipeline)
    assert np.abs(loaded - base).max() > 0.01
    pipeline.unload_lora_weights()
    setattr(pipeline, denoiser._family.part, denoiser._network)
    assert np.allclose(picture(pipeline), loaded, atol=1e-3)
    names = list(load_file(tmp_path / "weights" / LORA_FILE))
    prefix = "lora_unet_" if denoiser._family.part == "unet" else "transformer."
    assert all(name.startswith(prefix) for name in names)


def test_a_saved_pipeline_gives_the_same_picture(model: Path, tmp_path: Path) -> None:
    denoiser = load(model)
    disturb(denoiser)
    denoiser.save(tmp_path / "weights", denoiser.trainable())
    pipeline = pipeline_of(model)
    base = picture(pipeline)
    setattr(pipeline, denoiser._family.part, denoiser._network)
    expected = picture(pipeline)
    assert np.abs(expected - base).max() > 0.01
    assert np.allclose(picture(pipeline_of(tmp_path / "weights")), expected, atol=1e-4)


@pytest.mark.parametrize("rank", [2, None])
def test_trains(model: Path, rank: int | None, tmp_path: Path) -> None:
    config = TrainConfig(
        model=str(model),
        objective=DiffusionDPO(k=10.0),
        steps=3,
        batch_pairs=2,
        accumulation=1,
        lr=1e-2,
        warmup_steps=0,
        lora_rank=rank,
        draws=2,
        log_every=1,
    )
    result = train(config, make_pairs(4, held_out=1), tmp_path)
    lines = (tmp_path / "train" / "metrics.jsonl").read_text().splitlines()
    assert f'"loss": {np.log(2):.4f}' in lines[0]  # policy and reference still agree
    assert abs(float(result.metrics["loss"]) - np.log(2)) > 1e-6
    pipeline = pipeline_of(model if rank else result.weights)
    if rank:
        pipeline.load_lora_weights(result.weights)
    assert np.isfinite(picture(pipeline)).all()


def test_its_generator_draws_each_picture_from_its_own_seed(model: Path, tmp_path: Path) -> None:
    denoiser = load(model, Lora(rank=2))
    disturb(denoiser)
    denoiser.save(tmp_path / "weights", denoiser.trainable())
    base = GeneratorConfig(model=str(model), steps=2, guidance=1.0, side=64)
    tuned = base.tuned(tmp_path / "weights").build()
    together = tuned.generate([PROMPT, "two blue stars"], [5, 6])
    (alone,) = tuned.generate(["two blue stars"], [6])
    assert np.abs(alone.astype(int) - together[1].astype(int)).max() <= 1
    assert np.abs(base.build().generate([PROMPT], [5])[0].astype(int) - together[0].astype(int)).max() > 1


def test_adapters_for_layers_that_are_not_there_are_refused(model: Path) -> None:
    if not load(model)._family.flow:
        pytest.skip("a UNet has convolutions")
    with pytest.raises(ValueError, match="'convolution' reaches no layer"):
        load(model, Lora(targets=("attention", "convolution")))


def test_the_layers_that_a_network_is_split_into_are_there(model: Path) -> None:
    denoiser = load(model)
    assert denoiser._blocks() and denoiser._network not in denoiser._blocks()


def test_every_family_is_one_line() -> None:
    assert sorted(KNOWN.values()) == sorted(f"rpo.models.{name}" for name in FAMILIES), "each is held against its pipeline here"
    assert all((family := family_of(name)) is not None and family.pipeline.__name__ == name for name in KNOWN)
    assert family_of("KandinskyPipeline") is None


def test_sd3_without_t5_is_the_pipeline_without_it(tmp_path: Path) -> None:
    """Null parts of the index stay null: the usual set-up for small GPUs."""
    model = save_family("stable_diffusion_3", tmp_path / "model")
    index = json.loads((model / "model_index.json").read_text())
    index |= {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    (model / "model_index.json").write_text(json.dumps(index))
    denoiser = load(model, Lora(rank=2))
    pipeline, _ = load_pipeline(str(model), device="cpu")
    expected = pipeline.encode_prompt(PROMPT, PROMPT, PROMPT, device=CPU, do_classifier_free_guidance=False)
    conditions = denoiser.encode_prompts([PROMPT])
    assert torch.equal(conditions["embeds"], expected[0]) and torch.equal(conditions["pooled"], expected[2])
    with pytest.warns(UserWarning, match="longer than the text encoder's"):
        denoiser.encode_prompts(["red " * 100])
    disturb(denoiser)
    base = picture(pipeline)
    denoiser.save(tmp_path / "weights", denoiser.trainable())
    pipeline.load_lora_weights(tmp_path / "weights")
    assert np.abs(picture(pipeline) - base).max() > 0.01


@pytest.mark.parametrize(
    "index",
    [
        "[]", "{", "[" * 100_000, '{"_class_name": "StableDiffusion3Pipeline", "text_encoder": ["transformers", "pipeline"]}',
        '{"_class_name": "StableDiffusion3Pipeline", "text_encoder": [1]}', '{"_class_name": ["x"]}', " " * 2_000_000,
    ],
    ids=["list", "cut", "deep", "function", "short", "name", "large"],
)  # fmt: skip
def test_a_hostile_index_is_one_line(index: str, tmp_path: Path) -> None:
    model = save_family("stable_diffusion_3", tmp_path / "model")
    (model / "model_index.json").write_text(index)
    with pytest.raises(RpoError) as refused:
        load(model).encode_prompts([PROMPT])
    assert "model" in str(refused.value) and "\n" not in str(refused.value)


HUGE = {
    "layers": ("text_encoder/config.json", {"num_hidden_layers": 10**6}),
    "nested": ("transformer/config.json", {"inner": [{"num_layers": 10**6}]}),
    "list": ("vae/config.json", {"depths": [900, 900]}),
    "float": ("transformer/config.json", {"layers_per_block": 1e30}),
    "digits": ("vae/config.json", {"x": 1}),
    "tokens": ("tokenizer/added_tokens.json", {f"<{number}>": number for number in range(60_000)}),
    "decoder": (
        "tokenizer/tokenizer_config.json",
        {"added_tokens_decoder": {n: {"content": str(n), "lstrip": False} for n in range(60_000)}},
    ),
    "large": ("scheduler/scheduler_config.json", {"x": " " * 2**21}),
}


@pytest.fixture(scope="module")
def stable_diffusion_3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family("stable_diffusion_3", tmp_path_factory.mktemp("sd3") / "model")


@pytest.mark.parametrize("case", HUGE)
def test_a_configuration_too_large_to_build_is_one_line_at_once(case: str, stable_diffusion_3: Path, tmp_path: Path) -> None:
    file, content = HUGE[case]
    model = shutil.copytree(stable_diffusion_3, tmp_path / "model", copy_function=os.link)
    (model / file).unlink(missing_ok=True)
    (model / file).write_text("9" * 100_000 if case == "digits" else json.dumps(content))
    for load_it in (lambda: load(model), lambda: load_pipeline(str(model), device="cpu")):
        began = time.monotonic()
        with pytest.raises(RpoError, match=f"{file} could not be loaded") as refused:
            load_it()
        assert "\n" not in str(refused.value) and time.monotonic() - began < 5


def test_a_configuration_that_is_a_pipe_is_not_waited_for(stable_diffusion_3: Path, tmp_path: Path) -> None:
    model = shutil.copytree(stable_diffusion_3, tmp_path / "model", copy_function=os.link)
    (model / "vae" / "config.json").unlink()
    os.mkfifo(model / "vae" / "config.json")
    with pytest.raises(RpoError, match=r"config.json could not be loaded .it is no regular file"):
        load(model)


def test_a_lora_of_an_absurd_rank_is_refused(stable_diffusion_3: Path, tmp_path: Path) -> None:
    pipeline, _ = load_pipeline(str(stable_diffusion_3), device="cpu")
    name, wide = "transformer.transformer_blocks.0.attn.to_q", tmp_path / "wide.safetensors"
    save_file({f"{name}.lora_A.weight": torch.zeros(5000, 8), f"{name}.lora_B.weight": torch.zeros(8, 5000)}, wide)
    with pytest.raises(RpoError, match="rank 5,000, at most 4,096"):
        load_lora(pipeline, str(wide))
