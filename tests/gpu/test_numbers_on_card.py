"""The embedded base on the card against the same network in float64 on the CPU, and what must hold at step 0."""

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from tuning import BASE, CPU, Exact, config_for, first_visits, moved, outcome, perturb, prepared, relative, shape_pairs, tf32

from rpo.training.inputs.errors import pair_errors
from rpo.training.inputs.reference import AdapterOff, SecondModel
from rpo.training.loop import policy_and_reference_errors
from rpo.training.objectives.preference import DiffusionDPO

Within = Callable[..., None]
PRECISIONS = ("fp32", "bf16", "fp16")
# Norms of differences over norms; (errors, losses, gradients). "exact" is fp32 without TF32.
# About three times what CPU autocast gives; TF32 keeps as many digits as fp16.
BOUNDS = {"exact": (1e-5, 1e-4, 1e-3), "fp32": (6e-4, 4e-2, 3e-2), "bf16": (6e-3, 2e-1, 1e-1), "fp16": (6e-4, 4e-2, 3e-2)}


@pytest.mark.parametrize("lora_rank", [4, None], ids=["lora", "full"])
@pytest.mark.parametrize("kind", BOUNDS)
def test_errors_losses_and_gradients(card: torch.device, kind: str, lora_rank: int | None, tmp_path: Path, within: Within) -> None:
    pairs, precision = shape_pairs(8), "fp32" if kind == "exact" else kind
    reference = prepared(config_for(lora_rank=lora_rank), pairs, CPU, tmp_path)
    visits = first_visits(reference)
    inputs = reference.pairs.inputs(visits, reference.noise)
    with torch.no_grad():
        ref = torch.stack(pair_errors(Exact(reference), reference.path, inputs)[:2])
    perturb(reference, 0.1 if lora_rank else 0.002)
    network = Exact(reference)
    trained = {name: weight for name, weight in network.network.named_parameters() if weight.requires_grad}
    exact = outcome(reference, network, trained, inputs, ref)

    with tf32(kind != "exact"):
        training = prepared(config_for(lora_rank=lora_rank, precision=precision), pairs, card, tmp_path)
        perturb(training, 0.1 if lora_rank else 0.002)
        ours = outcome(training, training.denoiser, training.denoiser.trainable(), moved(inputs, card), ref.to(card))
    names = ("errors", "losses", "gradient")
    within({f"{name} off float64": relative(getattr(ours, name), getattr(exact, name)) for name in names}, BOUNDS[kind])


def test_latents_and_embeddings(card: torch.device, tmp_path: Path, within: Within) -> None:
    """The encoders run in float32 on every device."""
    pairs = shape_pairs(8)
    host, ours = (prepared(config_for(), pairs, device, tmp_path) for device in (CPU, card))
    left, right = (each.pairs.inputs(first_visits(each), each.noise) for each in (host, ours))
    within("latents", relative(right.chosen.mean, left.chosen.mean), 5e-3)
    within("embeddings", relative(right.conditions["embeds"], left.conditions["embeds"]), 1e-3)
    assert torch.equal(right.draws.noise.cpu(), left.draws.noise)


@pytest.mark.parametrize("lora_rank", [4, None], ids=["lora", "full"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_cached_reference_against_live(card: torch.device, precision: str, lora_rank: int | None, tmp_path: Path, within: Within) -> None:
    """In the same precision; the cache was computed in batches of another size. Both begin at log 2, live ones exactly."""
    config = config_for(precision=precision, lora_rank=lora_rank, objective=DiffusionDPO(k=2500.0), cache_batch=6)
    training = prepared(config, shape_pairs(8), card, tmp_path)
    second = AdapterOff(training.denoiser, training.path) if lora_rank else SecondModel(training.denoiser.frozen_copy(), training.path)
    live = replace(training, reference=second)
    with torch.no_grad():
        ours, theirs = (policy_and_reference_errors(each, first_visits(each)) for each in (training, live))
    for side in ("ref_chosen", "ref_rejected"):
        within(side, relative(getattr(ours, side), getattr(theirs, side)), 3e-4 if precision == "fp32" else 3e-3)
    within("live loss off log 2", abs(float(config.objective(theirs).mean()) - math.log(2)), 1e-6)
    within("cached loss off log 2, k=2500", abs(float(config.objective(ours).mean()) - math.log(2)), 0.05 if precision == "fp32" else 0.3)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_without_adapters_it_is_the_base(card: torch.device, precision: str, tmp_path: Path, within: Within) -> None:
    pairs = shape_pairs(8)
    tuned = prepared(config_for(precision=precision), pairs, card, tmp_path)
    base = prepared(config_for(precision=precision, lora_rank=None), pairs, card, tmp_path)
    perturb(tuned, 0.3)
    inputs = tuned.pairs.inputs(first_visits(tuned), tuned.noise)
    with torch.no_grad():
        with tuned.denoiser.base_network():
            off = torch.stack(pair_errors(tuned.denoiser, tuned.path, inputs)[:2])
        on = torch.stack(pair_errors(tuned.denoiser, tuned.path, inputs)[:2])
        plain = torch.stack(pair_errors(base.denoiser, base.path, inputs)[:2])
    within("adapters off against base", relative(off, plain), 1e-6 if precision == "fp32" else 1e-2)
    assert relative(on, plain) > 3e-2, "the adapters change nothing, so the check above shows nothing"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradient_checkpointing_changes_nothing(card: torch.device, precision: str, tmp_path: Path, within: Within) -> None:
    pairs, outcomes = shape_pairs(8), []
    for checkpointing in (False, True):
        config = config_for(precision=precision, gradient_checkpointing=checkpointing)
        training = prepared(config, pairs, card, tmp_path)
        perturb(training, 0.1)
        inputs = training.pairs.inputs(first_visits(training), training.noise)
        ref = torch.stack(training.reference.errors(first_visits(training), inputs))
        outcomes.append(outcome(training, training.denoiser, training.denoiser.trainable(), inputs, ref))
    for name in ("errors", "losses", "gradient"):
        within(name, relative(getattr(outcomes[1], name), getattr(outcomes[0], name)), 1e-3 if precision == "fp32" else 2e-2)


@pytest.mark.parametrize("tokens", [16, 64, 528, 576, 1088], ids=str)
def test_gradients_of_attention_in_bf16(
    card: torch.device, tokens: int, within: Within, record_property: Callable[[str, object], None]
) -> None:
    """Heads laid out as in FLUX, without cuDNN's kernel, as in training; the figure of that kernel is recorded beside."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn((4, tokens, 2, 16), generator=generator, dtype=torch.float64) for _ in range(4)]

    def gradients(rows: list[torch.Tensor]) -> torch.Tensor:
        inputs = [row.detach().clone().requires_grad_() for row in rows[:3]]
        query, key, value = (row.permute(0, 2, 1, 3) for row in inputs)
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value).permute(0, 2, 1, 3).flatten(2)
        out.backward(rows[3].flatten(2))
        return torch.cat([row.grad.flatten() for row in inputs])

    half = [row.bfloat16() for row in rows]
    exact, there = gradients([row.double() for row in half]), [row.to(card) for row in half]
    allowed = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(False)
        off = relative(gradients(there), exact)
        if card.type == "cuda":
            torch.backends.cuda.enable_cudnn_sdp(True)
            with suppress(RuntimeError), sdpa_kernel(SDPBackend.CUDNN_ATTENTION):  # it does not take every shape
                record_property("cuDNN off float64", f"{relative(gradients(there), exact):.3g}")
    finally:
        torch.backends.cuda.enable_cudnn_sdp(allowed)
    within("gradients off float64", off, 2e-2)


def test_offloaded_reference_is_the_live_one(card: torch.device, tmp_path: Path, within: Within) -> None:
    pairs, errors = shape_pairs(8), {}
    for kind in ("live", "offloaded"):
        training = prepared(config_for(lora_rank=None, reference=kind), pairs, card, tmp_path)
        perturb(training, 0.002)
        with torch.no_grad():
            errors[kind] = policy_and_reference_errors(training, first_visits(training))
    within("reference errors", relative(errors["offloaded"].ref_chosen, errors["live"].ref_chosen), 1e-5)
    assert relative(errors["live"].chosen, errors["live"].ref_chosen) > 1e-4


def test_image_of_a_lora_from_the_card_on_the_cpu(card: torch.device, tmp_path: Path, within: Within) -> None:
    from diffusers import StableDiffusionPipeline

    training = prepared(config_for(), shape_pairs(8), card, tmp_path)
    perturb(training, 0.4)
    weights = {name: value.detach().cpu() for name, value in training.denoiser.trainable().items()}
    training.denoiser.save(tmp_path / "lora", weights)
    noise = torch.randn((4, 8, 8, 8), generator=torch.Generator().manual_seed(0))

    prompts = [pair.prompt for pair in shape_pairs(4)]

    def images(device: torch.device, lora: Path | None) -> torch.Tensor:
        pipeline: Any = StableDiffusionPipeline.from_pretrained(BASE, local_files_only=True, dtype=torch.float32)
        if lora is not None:
            pipeline.load_lora_weights(lora)
        pipeline.set_progress_bar_config(disable=True)
        with tf32(False):
            out = pipeline.to(device)(prompts, latents=noise.to(device), num_inference_steps=6, guidance_scale=1.5, output_type="np")
        return torch.from_numpy(out.images)

    there, here, base = images(card, tmp_path / "lora"), images(CPU, tmp_path / "lora"), images(CPU, None)
    within("mean difference of pixels, of 1", float((there - here).abs().mean()), 2e-3)
    assert float((here - base).abs().mean()) > 1e-2, "the LoRA changes nothing, so the check above shows nothing"
