"""Parts of the GPU check: steps of full-size networks with random weights, and what the card does during them."""

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from gpu_measures import ROOT, run_tests
from gpu_part import Job, free_memory, out_of_memory
from random_pipelines import random_network, random_weights, save_configs
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from train_step import Settings, Way, measure, operations, random_pairs, ways_of

from rpo.models.denoiser import FlowSchedule, Posterior
from rpo.models.diffusers_denoiser import DiffusersDenoiser, _add_lora
from rpo.models.family import Family
from rpo.models.lora import Lora
from rpo.training.config import TrainConfig
from rpo.training.dry_run import activation_bytes
from rpo.training.inputs.batches import Visit
from rpo.training.inputs.errors import PairInputs, pair_errors
from rpo.training.inputs.noise import Draws
from rpo.training.inputs.paths import path_of
from rpo.training.objectives.preference import PairErrors
from rpo.training.runtime.optimizer import Descent

SMOKE = {"side": 32, "micro_pairs": 1, "rounds": 2, "precision": "fp32"}
"""Half precision is emulated on a CPU."""


def _peak(job: Job) -> float | None:
    """The measured bf16 matrix peak in FLOP/s; None lets it be measured again."""
    return None if job.smoke or "bf16_tflops" not in job.machine else 1e12 * job.machine["bf16_tflops"]


def speed(job: Job, name: str, settings: Settings, smaller: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Figures of the first of the settings that fits into memory: `settings`, then with each of the changes."""
    found: dict[str, Any] = {}

    def attempt(tried: Settings) -> str | None:
        began = time.monotonic()
        try:
            found.update(measure(tried, lambda figures: job.tell({**found, **figures, "model": name}), _peak(job)))
        except Exception as error:
            if not out_of_memory(error):
                raise
            return f"{tried.micro_pairs} pairs, {', '.join(tried.ways)}: out of memory after {time.monotonic() - began:.0f} s"
        return None

    with random_weights():
        model = str(save_configs(name, job.scratch / name, tiny=job.smoke))
        for changes in ({}, *smaller):
            tried = replace(settings, model=model, **{**changes, **(SMOKE if job.smoke else {})})
            why = attempt(tried)  # a function of its own: what a failed call held is free when it returns
            free_memory()
            if why is None:
                break
            found.setdefault("did_not_fit", []).append(why)
            job.tell(found)
        else:
            raise torch.OutOfMemoryError("; ".join(found["did_not_fit"]))
    found["model"] = name
    found["problems"] = [found["disagreement"]] if found.get("disagreement") else []
    job.tell(found)
    return found


def sd15_lora(job: Job) -> None:
    settings = Settings(model="", precision="bf16", micro_pairs=8, rounds=15, rounds_s=15)
    speed(job, "sd15", settings, [{"micro_pairs": 4}, {"micro_pairs": 2}, {"micro_pairs": 1}])


def sd15_full(job: Job) -> None:
    settings = Settings(model="", precision="bf16", micro_pairs=8, rank=0, rounds=12, rounds_s=18)
    ours = {"ways": ("live", "cached")}
    speed(job, "sd15", settings, [{"micro_pairs": 4}, {"micro_pairs": 2, **ours}, {"micro_pairs": 1, "ways": ("cached",)}])


def sdxl_lora(job: Job) -> None:
    settings = Settings(model="", precision="bf16", side=1024, micro_pairs=2, gradient_checkpointing=True, rounds=8, rounds_s=20)
    speed(job, "sdxl", settings, [{"micro_pairs": 1}, {"micro_pairs": 1, "ways": ("live", "cached")}])


def flux_lora(job: Job) -> None:
    settings = Settings(model="", precision="bf16", side=1024, micro_pairs=1, gradient_checkpointing=True, warm_up=1, rounds=5, rounds_s=15)
    speed(job, "flux", settings, [{"ways": ("live", "cached")}, {"side": 512, "ways": ("cached",)}])


def compiled(job: Job) -> None:
    """The bounds on the embedded base first, which compiles in less time."""
    if job.smoke:  # a C++ compiler takes ten minutes for what the check is tried with here
        torch.compile = partial(torch.compile, backend="eager")
    bounds: dict[str, Any] = {}
    few = ["-k", "fp32"] if job.smoke else []
    run_tests(job, bounds, str(ROOT / "tests" / "gpu" / "test_compile_on_card.py"), *few)
    free_memory()

    class Both(Job):
        def tell(self, result: Mapping[str, Any]) -> None:
            problems = [*bounds["problems"], *result.get("problems", [])]
            super().tell({**result, "tests": bounds["tests"], "counts": bounds["counts"], "problems": problems})

    both = Both(**vars(job))
    settings = Settings(model="", precision="bf16", micro_pairs=8, ways=("cached", "compiled"), rounds=15, rounds_s=15)
    speed(both, "sd15", settings, [{"micro_pairs": 4}, {"micro_pairs": 2}])


def _busy_us(spans: Sequence[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, end = 0.0, float("-inf")
    for first, last in sorted(spans):
        total += max(0.0, last - max(first, end))
        end = max(end, last)
    return total


def kernel_summary(events: Sequence[Any], steps: int, wall_us: float) -> dict[str, Any]:
    """Of the events of some profiled steps: the ten kernels that take most, launches per step, and how long the card had nothing to do."""
    ranges = ("ProfilerStep", "Optimizer.")  # a range that covers kernels is no kernel
    on_card = [
        event
        for event in events
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False) and not event.name.startswith(ranges)
    ]
    by_name: dict[str, list[float]] = {}
    for event in on_card:
        by_name.setdefault(event.name, []).append(event.time_range.end - event.time_range.start)
    total = sum(map(sum, by_name.values())) or 1.0
    spans = [(event.time_range.start, event.time_range.end) for event in on_card]
    kernels = [name for name in by_name if not name.startswith(("Memcpy", "Memset"))]
    most = sorted(by_name, key=lambda name: sum(by_name[name]), reverse=True)[:10]
    return {
        "step_ms": wall_us / steps / 1000,
        "idle_share": max(0.0, 1 - _busy_us(spans) / wall_us) if spans else None,
        "kernels_per_step": sum(len(by_name[name]) for name in kernels) / steps,
        "copies_per_step": (len(on_card) - sum(len(by_name[name]) for name in kernels)) / steps,
        "largest": [{"name": name[:160], "share": sum(by_name[name]) / total, "per_step": len(by_name[name]) / steps} for name in most],
    }


def _profiled(job: Job, rank: int, model: str) -> dict[str, Any]:
    steps = 2 if job.smoke else 5
    settings = Settings(model=model, precision="bf16", micro_pairs=8, rank=rank, ways=("cached",))
    if job.smoke:
        settings = replace(settings, **SMOKE)
    pairs = random_pairs(settings.micro_pairs * 2, settings.side)
    ways, _ = ways_of(settings, pairs, job.scratch / f"cache-{rank}")
    way, visits = ways["cached"], [Visit(pair=i, number=0) for i in range(settings.micro_pairs)]
    wait = nullcontext if job.device == "cpu" else torch.cuda.synchronize
    for _ in range(3):
        way.step(visits)
    wait()
    began = time.perf_counter()
    for _ in range(steps):
        way.step(visits)
    wait()
    plain_us = 1e6 * (time.perf_counter() - began)
    activities = [ProfilerActivity.CPU] if job.device == "cpu" else [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities) as recorded:
        for _ in range(steps):
            way.step(visits)
        wait()
    found = kernel_summary(list(recorded.events() or []), steps, plain_us)
    found["micro_pairs"] = settings.micro_pairs
    found["memory"] = _estimated(way, visits)
    return found


def _estimated(way: Way, visits: list[Visit]) -> dict[str, float | None]:
    """GiB of a cached step: as a dry run counts them, and the measured peak."""
    config, trained = way.training.config, way.training.denoiser.trainable()
    numbers = sum(weight.numel() for weight in trained.values())
    weights = sum(weight.nbytes for module in way.modules for weight in module.parameters())
    estimate = weights + (config.bytes_per_weight - 4.0) * numbers + activation_bytes(way.training, visits)
    peak = None
    if way.training.denoiser.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        way.step(visits)
        peak = torch.cuda.max_memory_allocated() / 2**30
    return {"estimate_gib": estimate / 2**30, "peak_gib": peak}


def profiles(job: Job) -> None:
    found: dict[str, Any] = {}
    with random_weights():
        model = str(save_configs("sd15", job.scratch / "sd15", tiny=job.smoke))
        for name, rank in (("LoRA", 16), ("full", 0)):
            found[name] = _profiled(job, rank, model)
            free_memory()
            job.tell(found)
    found["problems"] = [
        f"{name}: the estimate of {found[name]['memory']['estimate_gib']:.1f} GiB is not within 15 % of the peak, {peak:.1f} GiB"
        for name in ("LoRA", "full")
        if (peak := found[name]["memory"]["peak_gib"]) and abs(found[name]["memory"]["estimate_gib"] / peak - 1) > 0.15
    ]
    job.tell(found)


def _qwen_predict(transformer: Any, x_t: torch.Tensor, level: torch.Tensor, conditions: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """As the pipeline calls the network: latents packed two by two, time as the noise's share."""
    count, channels, height, width = x_t.shape
    packed = x_t.reshape(count, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(count, -1, 4 * channels)
    out = transformer(
        hidden_states=packed,
        timestep=level,
        encoder_hidden_states=conditions["embeds"],
        encoder_hidden_states_mask=None,
        img_shapes=[(1, height // 2, width // 2)] * count,
    ).sample
    return out.view(count, height // 2, width // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(x_t.shape)


def qwen_lora(job: Job) -> None:
    """Qwen-Image is no family of the trainer's yet: its network at full size in our step, on random latents and embeddings."""
    from diffusers import QwenImagePipeline, QwenImageTransformer2DModel

    device, dtype = torch.device(job.device), torch.float32 if job.smoke else torch.bfloat16
    size = {"num_layers": 2, "num_attention_heads": 1} if job.smoke else {}
    side, tokens, micro_pairs = (8, 8, 1) if job.smoke else (128, 128, 1)
    config = TrainConfig(
        model="qwen-image", steps=2, batch_pairs=micro_pairs, accumulation=1, precision="fp32" if job.smoke else "bf16", lr=1e-8
    )
    began = time.monotonic()
    network = random_network(QwenImageTransformer2DModel, size, dtype, device)
    family = Family(
        pipeline=QwenImagePipeline,
        network=QwenImageTransformer2DModel,
        part="transformer",
        encode=_no_text,
        reads=_no_text,
        predict=_qwen_predict,
    )
    lora = Lora(rank=16)
    _add_lora(network, family, lora, seed=0)
    network.enable_gradient_checkpointing()
    schedule = FlowSchedule(sigmas=torch.linspace(0.001, 1, 1000, device=device))
    denoiser = DiffusersDenoiser(family=family, folder=job.scratch, network=network, schedule=schedule, lora=lora, dtype=dtype)
    path, descent = path_of(schedule, device), Descent(config, denoiser.trainable())
    found: dict[str, Any] = {
        "model": "Qwen-Image's network alone",
        "weights": sum(weight.numel() for weight in network.parameters()),
        "created_s": round(time.monotonic() - began, 1),
        "tuning": "LoRA rank 16",
        "precision": config.precision,
        "side": 8 * side,
        "micro_pairs": micro_pairs,
        "gradient_checkpointing": True,
    }
    job.tell(found)

    def inputs() -> PairInputs:
        latents = [torch.randn((micro_pairs, 16, side, side), device=device) for _ in range(4)]
        flags = torch.zeros(micro_pairs, dtype=torch.bool, device=device)
        draws = Draws(
            timestep=torch.randint(0, 1000, (micro_pairs,), device=device),
            noise=latents[2],
            latent_noise=latents[3],
            drop_prompt=flags,
            mirrored=flags,
        )
        embeds = torch.randn((micro_pairs, tokens, network.config.joint_attention_dim), device=device)
        posteriors = [Posterior(mean=each, std=torch.full_like(each, 0.1)) for each in latents[:2]]
        return PairInputs(chosen=posteriors[0], rejected=posteriors[1], conditions={"embeds": embeds}, draws=draws)

    def reference(batch: PairInputs) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad(), denoiser.base_network():
            return pair_errors(denoiser, path, batch)[:2]

    def step(batch: PairInputs, known: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
        sides = pair_errors(denoiser, path, batch)
        loss = config.objective(PairErrors(sides.chosen, sides.rejected, *(known or reference(batch)))).mean()
        descent.backward(loss)
        descent.step(config.lr)
        return loss.detach()

    batch = inputs()
    known = reference(batch)
    wait = (lambda: None) if job.device == "cpu" else torch.cuda.synchronize
    seconds: dict[str, list[float]] = {"live": [], "cached": []}
    rounds = 2 if job.smoke else 5
    for number in range(rounds + 1):
        for name in seconds:
            wait()
            started = time.perf_counter()
            loss = step(batch, known if name == "cached" else None)
            wait()
            if number:
                seconds[name].append(time.perf_counter() - started)
        if number == 0:
            found["losses"] = {"cached": float(loss)}
        else:
            found |= {"rounds": number, "ways": _rows(seconds, micro_pairs)}
            job.tell(found)
    counted = operations(_Counted(step, batch, known), [])
    if counted and (peak := _peak(job)):
        found["ways"]["cached"]["matrix_share"] = counted / sorted(seconds["cached"])[len(seconds["cached"]) // 2] / peak
    found["tflop_per_step"] = counted and counted / 1e12
    if job.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step(batch, known)
        found["ways"]["cached"]["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    found["problems"] = (
        [] if abs(found["losses"]["cached"] - 0.6931) < 0.1 else [f"the first loss is {found['losses']['cached']:.4f}, not log 2"]
    )
    job.tell(found)


def _no_text(*_: Any) -> Any:
    raise NotImplementedError("the network alone has no text encoder")


class _Counted:
    """A step as `operations` takes it."""

    def __init__(self, step: Any, batch: PairInputs, known: tuple[torch.Tensor, torch.Tensor]) -> None:
        self._call = lambda: step(batch, known)

    def step(self, _: list[Visit]) -> None:
        self._call()


def _rows(seconds: Mapping[str, Sequence[float]], micro_pairs: int) -> dict[str, dict[str, float | None]]:
    medians = {name: sorted(took)[len(took) // 2] for name, took in seconds.items()}
    return {
        name: {
            "pairs_per_second": micro_pairs / medians[name],
            "slowest": micro_pairs / max(took),
            "fastest": micro_pairs / min(took),
            "ratio": medians["live"] / medians[name],
            "peak_gib": None,
            "matrix_share": None,
        }
        for name, took in seconds.items()
    }
