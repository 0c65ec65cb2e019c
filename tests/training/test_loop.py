import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import load_file
from torch._dynamo.exc import TorchDynamoException

import rpo.training.inputs.cache as cache_module
from rpo.core.records import read_lines
from rpo.data.images import EncodedImage, decode_image, encode_png
from rpo.data.pairs import Pair
from rpo.errors import RpoError
from rpo.models.diffusers_denoiser import DiffusersDenoiser, load_denoiser
from rpo.training.config import TrainConfig
from rpo.training.dry_run import rehearse
from rpo.training.inputs.batches import Visit, epoch_order, micro_batches, step_visits
from rpo.training.inputs.cache import Cache, encode_all_prompts
from rpo.training.inputs.errors import pair_errors
from rpo.training.inputs.reference import CachedScalars, SecondModel, precompute
from rpo.training.loop import TrainResult, policy_and_reference_errors, train
from rpo.training.objectives.preference import SFT, DiffusionDPO, PairErrors
from rpo.training.runtime.distributed import Processes
from rpo.training.runtime.interruption import StopRequest
from rpo.training.setup import Training, prepare
from tiny_diffusion import make_pairs, picture, save_pipeline

ALONE = Processes(device=torch.device("cpu"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("model"))


def config_for(model: Path, **settings: Any) -> TrainConfig:
    defaults: dict[str, Any] = {
        "objective": DiffusionDPO(k=50.0),
        "steps": 6,
        "batch_pairs": 4,
        "accumulation": 2,
        "lr": 1e-3,
        "warmup_steps": 2,
        "lora_rank": 2,
        "draws": 2,
        "cache_batch": 6,
        "log_every": 2,
        "eval_every": 3,
        "checkpoint_every": 4,
    }
    return TrainConfig(model=str(model), **{**defaults, **settings})


def prepared(config: TrainConfig, folder: Path, num_pairs: int = 5, pairs: Sequence[Pair] | None = None) -> Training:
    pairs = make_pairs(num_pairs) if pairs is None else pairs
    return prepare(config, pairs, [], folder, StopRequest(), Progress(console=Console(quiet=True)), ALONE)


def weights_of(result: TrainResult) -> dict[str, torch.Tensor]:
    file = "pytorch_lora_weights.safetensors" if result.lora else "unet/diffusion_pytorch_model.safetensors"
    return load_file(result.weights / file)


def lines_of(run: Path) -> list[dict[str, Any]]:
    lines, damaged = read_lines(run / "train" / "metrics.jsonl")
    assert not damaged
    return lines


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def gradients(training: Training) -> dict[str, torch.Tensor]:
    """Of the first step, as the loop sums them."""
    config, trained = training.config, training.denoiser.trainable()
    for visits in micro_batches(config, 0, len(training.pairs)):
        (config.objective(policy_and_reference_errors(training, visits)).sum() / config.batch_pairs).backward()
    return {name: parameter.grad.clone() for name, parameter in trained.items() if parameter.grad is not None}


def test_an_epoch_shows_each_pair_once_and_every_epoch_has_its_own_order() -> None:
    visits = [visit for step in range(9) for visit in step_visits(step, num_pairs=6, batch_pairs=4, seed=1)]
    epochs = [visits[start : start + 6] for start in range(0, 36, 6)]
    for number, epoch in enumerate(epochs):
        assert sorted(visit.pair for visit in epoch) == list(range(6)) and {visit.number for visit in epoch} == {number}
    assert len({tuple(visit.pair for visit in epoch) for epoch in epochs}) > 3
    assert epoch_order(1, 0, 50) != epoch_order(2, 0, 50)


def test_the_first_loss_is_log_2(model: Path, tmp_path: Path) -> None:
    train(config_for(model, steps=1), make_pairs(5), tmp_path)
    assert lines_of(tmp_path)[0]["loss"] == pytest.approx(np.log(2), abs=2e-5)


@pytest.mark.parametrize(("lora_rank", "unchanged"), [(2, 1.0), (None, 1.0), (2, 0.1)])
def test_cached_errors_are_the_live_reference_s(model: Path, tmp_path: Path, lora_rank: int | None, unchanged: float) -> None:
    """Also after the policy has moved away."""
    settings = {"lora_rank": lora_rank, "draws": 3, "steps": 4, "unchanged_weight": unchanged}
    cached, live = (prepared(config_for(model, reference=kind, **settings), tmp_path) for kind in ("cached", "live"))
    for training in (cached, live):
        with torch.no_grad():
            for parameter in training.denoiser.trainable().values():
                parameter.add_(0.05)
    visits = [Visit(pair=pair, number=number) for pair, number in ((0, 0), (3, 1), (4, 2), (1, 3), (2, 0))]
    left, right = policy_and_reference_errors(cached, visits), policy_and_reference_errors(live, visits)
    assert torch.allclose(left.ref_chosen, right.ref_chosen, rtol=1e-5)
    assert torch.allclose(left.ref_rejected, right.ref_rejected, rtol=1e-5)
    assert torch.equal(left.chosen, right.chosen)
    assert not torch.allclose(left.chosen, left.ref_chosen, rtol=1e-3)


def test_an_offloaded_reference_is_the_live_one(model: Path, tmp_path: Path) -> None:
    """It computes the same; on a GPU it leaves the device between two steps, which `meta` stands in for here."""
    settings = {"lora_rank": None, "steps": 4}
    live, offloaded = (prepared(config_for(model, reference=kind, **settings), tmp_path) for kind in ("live", "offloaded"))
    assert equal(gradients(live), gradients(offloaded))
    frozen = live.denoiser.frozen_copy()
    seen: list[str] = []
    frozen.move = lambda device: seen.append(device.type)
    reference = SecondModel(frozen, live.path, offload=True)
    reference._device = torch.device("meta")
    visits = [Visit(pair=0, number=0)]
    reference.errors(visits, live.pairs.inputs(visits, live.noise))
    assert seen == ["cpu", "meta", "cpu"]


def test_held_out_errors_of_another_model_come_before_it_is_sent_away(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    monkeypatch.setattr(DiffusersDenoiser, "move", lambda self, device: events.append("moved"))

    def spied(*arguments: Any, **options: Any) -> CachedScalars:
        events.append("computed")
        return precompute(*arguments, **options)

    monkeypatch.setattr("rpo.training.setup.precompute", spied)
    other = save_pipeline(tmp_path / "other", seed=7)
    config = config_for(model, reference="offloaded", reference_model=str(other))
    pairs = make_pairs(5)
    prepare(config, pairs, pairs[:2], tmp_path, StopRequest(), Progress(console=Console(quiet=True)), ALONE)
    assert events == ["moved", "moved", "computed", "moved"]  # the policy beside the encoders, then the reference


@pytest.mark.parametrize("draws", [3, None])
def test_flipped_visits_see_both_images_mirrored(model: Path, tmp_path: Path, draws: int | None) -> None:
    pairs = make_pairs(70)  # two files of images and two of mirror images
    plain, flipped = (
        prepared(config_for(model, steps=60, flip=flip, draws=draws, reference="live", lora_rank=None), tmp_path, pairs=pairs)
        for flip in (False, True)
    )
    visits = [Visit(pair=pair, number=number) for pair in range(70) for number in range(3)]
    before, after = plain.pairs.inputs(visits, plain.noise), flipped.pairs.inputs(visits, flipped.noise)
    assert torch.equal(before.draws.noise, after.draws.noise), "the noise is not mirrored with them"
    turned = after.draws.mirrored
    assert 0.3 < turned.float().mean() < 0.7
    for side in ("chosen", "rejected"):
        assert torch.equal(getattr(after, side).mean[~turned], getattr(before, side).mean[~turned])
        images = [
            decode_image(getattr(pairs[visit.pair], side).read())[:, ::-1] for visit, flag in zip(visits, turned, strict=True) if flag
        ]
        wanted = plain.denoiser.encode_images(np.stack(images)).mean
        assert torch.allclose(getattr(after, side).mean[turned], wanted, atol=1e-4)
        assert not torch.allclose(getattr(after, side).mean[turned], getattr(before, side).mean[turned], atol=1e-2)


def test_cached_errors_of_flipped_visits_are_the_live_reference_s(model: Path, tmp_path: Path) -> None:
    cached, live = (prepared(config_for(model, flip=True, draws=3, reference=kind), tmp_path) for kind in ("cached", "live"))
    visits = [Visit(pair=pair, number=number) for pair in range(4) for number in range(5)]
    left, right = policy_and_reference_errors(cached, visits), policy_and_reference_errors(live, visits)
    assert torch.allclose(left.ref_chosen, right.ref_chosen, rtol=1e-5) and torch.allclose(left.ref_rejected, right.ref_rejected, rtol=1e-5)


@pytest.mark.parametrize("lora_rank", [2, None])
def test_in_half_precision_too_whatever_else_was_in_the_batch(model: Path, tmp_path: Path, lora_rank: int | None) -> None:
    """A policy that has not moved finds no margin, also at k = 2500. Of the CPU's kernels alone."""
    training = prepared(config_for(model, lora_rank=lora_rank, draws=1, precision="bf16", cache_batch=6), tmp_path)
    for pairs in ([4, 0, 2, 1, 3], [3, 1], [2]):
        errors = policy_and_reference_errors(training, [Visit(pair=pair, number=0) for pair in pairs])
        assert (2500 * errors.margin()).abs().max() < 0.05


@pytest.mark.parametrize(("lora_rank", "reference"), [(2, "cached"), (2, "live"), (None, "cached"), (None, "live")])
def test_another_model_can_be_the_reference(model: Path, tmp_path: Path, lora_rank: int | None, reference: str) -> None:
    other = save_pipeline(tmp_path / "other", seed=7)
    settings = {"lora_rank": lora_rank, "reference": reference}
    of_other = prepared(config_for(model, reference_model=str(other), **settings), tmp_path)
    visits = [Visit(pair=pair, number=0) for pair in range(3)]
    found = policy_and_reference_errors(of_other, visits)
    inputs = of_other.pairs.inputs(visits, of_other.noise)
    with torch.no_grad():
        network = load_denoiser(str(other), lora=None, dtype=torch.float32, device=torch.device("cpu"), seed=0)
        chosen, rejected = pair_errors(network, of_other.path, inputs)[:2]
    assert torch.allclose(found.ref_chosen, chosen, rtol=1e-5) and torch.allclose(found.ref_rejected, rejected, rtol=1e-5)
    assert not torch.allclose(found.ref_chosen, found.chosen, rtol=1e-3)


def test_the_network_is_not_on_the_device_beside_the_encoders(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    for name in ("move", "encode_images", "encode_prompts", "free_encoders"):
        method = getattr(DiffusersDenoiser, name)

        def noted(self: DiffusersDenoiser, *given: Any, name: str = name, method: Any = method) -> Any:
            done.append(name)
            return method(self, *given)

        monkeypatch.setattr(DiffusersDenoiser, name, noted)
    prepared(config_for(model, lora_rank=2), tmp_path)
    assert list(dict.fromkeys(done)) == ["move", "encode_images", "encode_prompts", "free_encoders"] and done[-1] == "move"
    assert done.count("move") == 2


def test_a_reference_that_predicts_something_else_is_refused(model: Path, tmp_path: Path) -> None:
    scheduler = shutil.copytree(model, tmp_path / "other") / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps({**json.loads(scheduler.read_text()), "prediction_type": "epsilon"}))
    with pytest.raises(ValueError, match="another target"):
        prepared(config_for(model, reference_model=str(tmp_path / "other")), tmp_path)


def test_embeddings_too_large_for_half_precision_are_kept_whole(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser = load_denoiser(str(model), lora=None, dtype=torch.float32, device=torch.device("cpu"), seed=0)
    size = {"a star": 1e6, "a circle": 1.0}
    monkeypatch.setattr(denoiser, "encode_prompts", lambda prompts: {"embeds": torch.tensor([[[size[prompt]]] for prompt in prompts])})
    for prompts in (["a circle"], ["a circle", "a star"]):
        rows, row = encode_all_prompts(denoiser, prompts, Cache(folder=tmp_path, group=ALONE), dtype=torch.float16)
        assert [rows.take("embeds", [row[prompt]]).item() for prompt in prompts] == [size[prompt] for prompt in prompts]


@pytest.mark.parametrize("lora_rank", [2, None])
def test_accumulation_gives_the_gradient_of_the_big_batch(model: Path, tmp_path: Path, lora_rank: int | None) -> None:
    whole, parts = (
        gradients(prepared(config_for(model, batch_pairs=8, accumulation=parts, lora_rank=lora_rank), tmp_path)) for parts in (1, 4)
    )
    left, right = (torch.cat([gradient[name].flatten() for name in whole]) for gradient in (whole, parts))
    assert whole.keys() == parts.keys() and left.norm() > 1e-3
    assert (left - right).norm() < 1e-4 * left.norm()


def test_a_dropped_caption_is_dropped_on_both_sides_and_for_the_reference(model: Path, tmp_path: Path) -> None:
    training = prepared(config_for(model, caption_dropout=0.5), tmp_path, num_pairs=8)
    inputs = training.pairs.inputs([Visit(pair=pair, number=0) for pair in range(8)], training.noise)
    empty, *_ = training.denoiser.encode_prompts([""])["embeds"]
    dropped = [torch.equal(embeds, empty) for embeds in inputs.conditions["embeds"]]
    assert dropped == inputs.draws.drop_prompt.tolist() and 0 < sum(dropped) < 8


def test_held_out_pairs_keep_their_captions_and_have_noise_of_their_own(model: Path, tmp_path: Path) -> None:
    pairs = make_pairs(8, held_out=4)
    config = config_for(model, caption_dropout=1.0)
    training = prepare(config, pairs[:4], pairs[4:], tmp_path, StopRequest(), Progress(console=Console(quiet=True)), ALONE)
    assert training.held_out is not None and training.held_out.ids == ["pair-4", "pair-5", "pair-6", "pair-7"]
    visits = [Visit(pair=0, number=0)]
    assert training.pairs.inputs(visits, training.noise).draws.drop_prompt.all()
    held_out = training.held_out.inputs(visits, training.held_out_noise)
    assert not held_out.draws.drop_prompt.any()
    assert torch.equal(held_out.conditions["embeds"], training.denoiser.encode_prompts([pairs[4].prompt])["embeds"])
    shape = tuple(held_out.draws.noise.shape[1:])
    assert not torch.equal(training.noise.draws(["pair-4"], [0], shape).noise, held_out.draws.noise)


def test_a_lora_loads_into_the_pipeline_and_changes_its_picture(model: Path, tmp_path: Path) -> None:
    result = train(config_for(model, lr=0.05), make_pairs(5), tmp_path)
    pipeline = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    before = picture(pipeline)
    pipeline.load_lora_weights(result.weights)
    assert result.lora and np.abs(picture(pipeline) - before).max() > 1e-3


def test_full_weights_load_as_a_pipeline(model: Path, tmp_path: Path) -> None:
    result = train(config_for(model, lora_rank=None), make_pairs(5), tmp_path)
    before, after = (picture(StableDiffusionPipeline.from_pretrained(path, safety_checker=None)) for path in (model, result.weights))
    assert not result.lora and np.abs(after - before).max() > 1e-3


def test_training_prefers_the_chosen_side_also_on_held_out_pairs(model: Path, tmp_path: Path) -> None:
    result = train(config_for(model, steps=40, lora_rank=None), make_pairs(16, held_out=4), tmp_path)
    assert result.metrics["loss"] < 0.5 and result.metrics["held_out_accuracy"] == 1.0
    assert result.metrics["margin_p50"] > 0


def test_every_step_has_its_line(model: Path, tmp_path: Path) -> None:
    result = train(config_for(model), make_pairs(6, held_out=2), tmp_path)
    lines = lines_of(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "held_out_accuracy" in line] == [3, 6]
    assert [line["lr"] for line in lines[:3]] == [0.5e-3, 1e-3, 1e-3]
    fields = {"loss", "gradient_norm", "seconds", "chosen_over_reference", "rejected_over_reference", "accuracy", "chosen_drift", "alarm"}
    assert fields | {"margin_p10", "margin_p50", "margin_p90"} <= lines[0].keys()
    assert result.metrics == {name: value for name, value in lines[-1].items() if name != "sha256"}


def test_sft_runs_without_a_reference(model: Path, tmp_path: Path) -> None:
    train(config_for(model, objective=SFT(), draws=None, steps=40, lora_rank=None), make_pairs(5, held_out=1), tmp_path)
    lines = lines_of(tmp_path)
    assert lines[0]["loss"] == pytest.approx(lines[0]["chosen_error"]) and "alarm" not in lines[0]
    assert lines[-1]["held_out_chosen_over_reference"] < 0
    assert not list((tmp_path / "train" / "cache").glob("reference-*"))[1:]  # only the held-out pairs'


def test_fresh_draws_with_a_live_reference(model: Path, tmp_path: Path) -> None:
    train(config_for(model, draws=None, reference="live"), make_pairs(5), tmp_path)
    assert len(lines_of(tmp_path)) == 6


def test_bf16(model: Path, tmp_path: Path) -> None:
    for lora_rank in (2, None):
        result = train(config_for(model, precision="bf16", lora_rank=lora_rank), make_pairs(5, held_out=1), tmp_path / str(lora_rank))
        assert all(tensor.dtype == torch.float32 for tensor in weights_of(result).values())
        assert lines_of(tmp_path / str(lora_rank))[0]["loss"] == pytest.approx(np.log(2), abs=0.02)


def test_held_out_pairs_do_not_touch_the_weights(model: Path, tmp_path: Path) -> None:
    pairs, others = make_pairs(6, held_out=2), make_pairs(6, held_out=2, seed=7)
    results = [train(config_for(model), [*pairs[:4], *held_out], tmp_path / str(i)) for i, held_out in enumerate((pairs[4:], others[4:]))]
    assert equal(*map(weights_of, results))


@pytest.mark.parametrize("settings", [{"ema_decay": 0.9}, {"optimizer": "adafactor"}])
def test_other_ways_down(model: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    plain = weights_of(train(config_for(model), make_pairs(4), tmp_path / "plain"))
    other = weights_of(train(config_for(model, **settings), make_pairs(4), tmp_path / "other"))
    assert plain.keys() == other.keys() and not equal(plain, other)
    assert all(torch.isfinite(value).all() for value in other.values())


def test_fp16(model: Path, tmp_path: Path) -> None:
    result = train(config_for(model, precision="fp16", lora_rank=None, log_every=1), make_pairs(5, held_out=1), tmp_path)
    lines = lines_of(tmp_path)
    assert lines[0]["loss"] == pytest.approx(np.log(2), abs=0.02)
    assert lines[-1]["gradient_norm"] > 0 and lines[-1]["loss"] < lines[0]["loss"]
    assert all(tensor.dtype == torch.float32 for tensor in weights_of(result).values())


def test_the_best_weights_are_those_of_the_best_step(model: Path, tmp_path: Path) -> None:
    config = config_for(model, objective=Spoil(), steps=12, lr=3e-2, result="best", keep_checkpoints=1)
    best = train(config, make_pairs(6, held_out=2), tmp_path / "best")
    accuracies = {line["step"]: line["held_out_accuracy"] for line in lines_of(tmp_path / "best") if "held_out_accuracy" in line}
    step = max(accuracies, key=lambda at: (accuracies[at], -at))
    assert step < 12, "the last step must not be the best for this test to tell anything"
    shorter = train(replace(config, steps=step, result="last"), make_pairs(6, held_out=2), tmp_path / "shorter")
    assert equal(weights_of(best), weights_of(shorter))
    with pytest.raises(ValueError, match="result='best' needs held-out pairs"):
        train(config, make_pairs(6), tmp_path / "none")


def test_what_cannot_be_compiled_runs_as_it_is_and_says_so(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*inputs: Any, **conditions: Any) -> Any:
        raise TorchDynamoException("no compiler")

    monkeypatch.setattr(torch.nn.Module, "compile", lambda network: setattr(network, "_compiled_call_impl", refuse))
    with pytest.warns(UserWarning, match="cannot be compiled here and runs as it is, more slowly: no compiler"):
        compiled = weights_of(train(config_for(model, compile=True), make_pairs(4), tmp_path / "compiled"))
    assert equal(compiled, weights_of(train(config_for(model), make_pairs(4), tmp_path / "plain")))


@pytest.mark.slow
@pytest.mark.parametrize("lora_rank", [2, None])
def test_a_compiled_network_computes_the_same(model: Path, tmp_path: Path, lora_rank: int | None) -> None:
    settings: dict[str, Any] = {"lora_rank": lora_rank, "reference": "live"}
    compiled = train(config_for(model, compile=True, **settings), make_pairs(4), tmp_path / "compiled")
    plain = train(config_for(model, **settings), make_pairs(4), tmp_path / "plain")
    assert compiled.metrics["loss"] == pytest.approx(plain.metrics["loss"], rel=1e-3)
    one, two = weights_of(compiled), weights_of(plain)
    assert one.keys() == two.keys() and all(torch.allclose(one[name], two[name], atol=1e-3) for name in one)


def test_generation_noise_is_the_sources_own(model: Path, tmp_path: Path) -> None:
    pairs = [replace(pair, provenance=json.dumps({"seed": 100 + i})) for i, pair in enumerate(make_pairs(3))]
    training = prepared(config_for(model, generation_noise=True, draws=2), tmp_path / "cache", pairs=pairs)
    visits = [Visit(pair=2, number=0), Visit(pair=2, number=1), Visit(pair=0, number=1)]
    draws = training.pairs.inputs(visits, training.noise).draws
    first = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(102))
    assert torch.equal(draws.noise[0], first[0]) and torch.equal(draws.noise[1], first[0]) and not torch.equal(draws.noise[2], first[0])
    assert draws.timestep[0] != draws.timestep[1]
    assert policy_and_reference_errors(training, visits).margin().abs().max() < 1e-6
    with pytest.raises(ValueError, match=r"3 of 3 pairs, \S+ among them, do not say what noise"):
        prepared(config_for(model, generation_noise=True), tmp_path / "cache", pairs=make_pairs(3))
    with pytest.raises(ValueError, match="resolution=16 changes some"):
        prepared(config_for(model, generation_noise=True, resolution=16), tmp_path / "cache", pairs=pairs)


@dataclass(frozen=True)
class Spoil:
    """The opposite of fine-tuning."""

    def paired(self) -> bool:
        return True

    def referenced(self) -> bool:
        return True

    def __call__(self, errors: PairErrors) -> torch.Tensor:
        return -errors.chosen

    def describe(self) -> str:
        return "spoil"


def test_an_alarm_stops_the_run_when_asked_and_resume_goes_on(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_for(model, objective=Spoil(), steps=60, lr=1e-2, log_every=5, stop_on_alarm=True)
    with pytest.raises(RpoError, match=r"stopped at step \d+: chosen side worse than the reference"):
        train(config, make_pairs(4), tmp_path)
    stopped = len(lines_of(tmp_path))
    assert 20 <= stopped < 60 and not (tmp_path / "train" / "weights").exists()
    capsys.readouterr()
    assert train(config, make_pairs(4), tmp_path, resume=True).metrics["step"] == 60
    assert "chosen side worse" not in capsys.readouterr().err  # it has been told


def test_a_pair_of_weight_zero_is_as_if_it_were_silent(model: Path, tmp_path: Path) -> None:
    pairs, others = make_pairs(5), make_pairs(5, seed=7)
    results = [
        train(config_for(model), [*pairs[:4], replace(last, weight=0.0)], tmp_path / str(i)) for i, last in enumerate((pairs[4], others[4]))
    ]
    left, right = map(weights_of, results)
    assert all(torch.allclose(left[name], right[name], atol=1e-6) for name in left)


def test_the_seed_decides(model: Path, tmp_path: Path) -> None:
    first, again, other = (
        weights_of(train(config_for(model, seed=seed), make_pairs(5), tmp_path / str(i))) for i, seed in enumerate((0, 0, 1))
    )
    assert equal(first, again) and not equal(first, other)


def test_the_cache_is_found_again_and_damage_is_noticed(model: Path, tmp_path: Path) -> None:
    config = config_for(model)
    result = train(config, make_pairs(5), tmp_path)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "train" / "cache").iterdir()}
    assert {path.name.split("-")[0] for path in files} == {"latents", "prompts", "reference"}
    first = weights_of(result)
    train(replace(config, lr=2e-3), make_pairs(5), tmp_path, overwrite=True)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "train" / "cache").iterdir()} == files
    for path in files:  # seen by size, before the first step
        path.write_bytes(path.read_bytes()[:-3])
    with pytest.warns(UserWarning, match="is damaged .* and is computed again"):
        result = train(config, make_pairs(5), tmp_path, overwrite=True)
    assert equal(weights_of(result), first)
    for path in files:  # seen by content, before a row is used
        content = bytearray(path.read_bytes())
        content[-3] ^= 0xFF
        path.write_bytes(content)
        with pytest.raises(RpoError, match=f"{path.name} is damaged .*not trained on and is removed. Go on with --resume"):
            train(config, make_pairs(5), tmp_path, overwrite=True)
        assert not path.exists()
        result = train(config, make_pairs(5), tmp_path, resume=True)
        assert equal(weights_of(result), first)


def test_the_cache_is_hashed_when_it_is_read_and_not_at_the_start(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_for(model, batch_pairs=4, steps=1)
    prepare(config, make_pairs(80), [], tmp_path, StopRequest(), Progress(), ALONE)
    hashed: list[int] = []
    content = cache_module._content
    monkeypatch.setattr(cache_module, "_content", lambda tensors: hashed.append(1) or content(tensors))
    training = prepare(config, make_pairs(80), [], tmp_path, StopRequest(), Progress(), ALONE)
    assert not hashed
    visits = step_visits(0, num_pairs=80, batch_pairs=4, seed=0)
    policy_and_reference_errors(training, visits)
    policy_and_reference_errors(training, visits)
    assert 3 <= len(hashed) <= 5, "each file of a visit once"


@pytest.mark.parametrize(("steps", "images", "errors"), [(1, 8, 4), (3, 24, 12), (4, 40, 16), (5, 40, 20), (6, 40, 24), (40, 40, 60)])
def test_a_short_run_computes_what_its_steps_come_to(model: Path, tmp_path: Path, steps: int, images: int, errors: int) -> None:
    """20 pairs, 4 a step, 3 draws: images of the pairs visited (all of them above three quarters), errors of the pair-draws visited."""
    config = config_for(model, steps=steps, draws=3)
    pairs = make_pairs(20)
    training = prepared(config, tmp_path, pairs=pairs)
    rows = {kind: [load_file(path) for path in tmp_path.glob(f"{kind}-*")] for kind in ("latents", "reference")}
    assert sum(len(part["mean"]) for part in rows["latents"]) == images
    measured = 4 * 20 if steps > 15 else 0  # draws that are not trained on, where those that are come back
    assert sum(part["chosen"].numel() for part in rows["reference"]) == errors + measured
    live = prepared(replace(config, reference="live"), tmp_path / "live", pairs=pairs)
    for step in range(steps):
        visits = step_visits(step, num_pairs=20, batch_pairs=4, seed=0)
        cached, expected = (policy_and_reference_errors(one, visits).ref_chosen for one in (training, live))
        assert cached is not None and expected is not None
        torch.testing.assert_close(cached, expected)


def test_a_resized_and_an_odd_image(model: Path, tmp_path: Path) -> None:
    pairs = make_pairs(5)
    large = EncodedImage.of(encode_png(np.zeros((48, 64, 3), dtype=np.uint8)))
    with pytest.raises(ValueError, match="not all of one size; set a resolution"):
        train(config_for(model), [*pairs[:4], replace(pairs[4], chosen=large)], tmp_path / "odd")
    train(config_for(model, resolution=16), [*pairs[:4], replace(pairs[4], chosen=large)], tmp_path / "resized")


def test_refusals(model: Path, tmp_path: Path) -> None:
    with pytest.raises(RpoError, match="no pairs to train on"):
        train(config_for(model), make_pairs(2, held_out=2), tmp_path)
    with pytest.raises(ValueError, match="timesteps must end at 1000 or before"):
        train(config_for(model, timesteps=(0, 1001)), make_pairs(4), tmp_path / "timesteps")
    train(config_for(model), make_pairs(4), tmp_path / "run")
    with pytest.raises(RpoError, match="--resume goes on with it"):
        train(config_for(model), make_pairs(4), tmp_path / "run")
    with pytest.raises(RpoError, match=r"started with lr = 0\.001, now it is 0\.5"):
        train(config_for(model, lr=0.5), make_pairs(4), tmp_path / "run", resume=True)
    with pytest.raises(RpoError, match="started with pairs = "):
        train(config_for(model), make_pairs(5), tmp_path / "run", resume=True)


@dataclass(frozen=True)
class Greedy(DiffusionDPO):
    """An objective that the memory is too small for."""

    def __call__(self, errors: PairErrors) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB. GPU 0 has a total capacity of 8.00 GiB")


def test_full_memory_is_an_error_with_advice(model: Path, tmp_path: Path) -> None:
    config = config_for(model, objective=Greedy())
    with pytest.raises(RpoError, match=r"2 pairs at once.*Tried to allocate 9.00 GiB\).*accumulation from 2"):
        train(config, make_pairs(5), tmp_path)
    with pytest.raises(RpoError, match="accumulation"):
        rehearse(config, make_pairs(5), print)


def test_another_model_in_the_same_place_is_refused(model: Path, tmp_path: Path) -> None:
    place = Path(shutil.copytree(model, tmp_path / "model"))
    train(config_for(place), make_pairs(4), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "train" / "weights")
    shutil.rmtree(place)
    save_pipeline(place, seed=5)
    with pytest.raises(RpoError, match="is not the model that"):
        train(config_for(place), make_pairs(4), tmp_path / "run", resume=True)


def test_latents_and_errors_of_another_decoder_are_not_taken(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images with an ICC profile have other colors since profiles are followed: caches of before are left alone."""
    prepared(config_for(model), tmp_path)
    before = {kind: {path.name for path in tmp_path.glob(f"{kind}-*")} for kind in ("latents", "reference", "prompts")}
    for module in ("inputs.cache", "setup"):
        monkeypatch.setattr(f"rpo.training.{module}.PIXELS", "pixels 1")
    prepared(config_for(model), tmp_path)
    added = {kind: {path.name for path in tmp_path.glob(f"{kind}-*")} - names for kind, names in before.items()}
    assert added["latents"] and added["reference"] and not added["prompts"]
