"""Everything before the first step of training: the network, the pairs as it takes them, their noise, their reference errors."""

import json
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path as FilePath
from typing import Literal

import torch
from rich.progress import Progress

from rpo.data.images import image_size
from rpo.data.pairs import Pair
from rpo.errors import RpoError
from rpo.models.denoiser import Denoiser, memory_format
from rpo.models.diffusers_denoiser import load_denoiser, load_reference
from rpo.training.config import EVAL_DRAWS, TrainConfig
from rpo.training.inputs.batches import EncodedPairs, encode_pairs, first_visits
from rpo.training.inputs.cache import PIXELS, Cache, Tick, sha256
from rpo.training.inputs.noise import DrawRange, DrawTable, FreshDraws, GenerationNoise, NoiseProvider, seed_of
from rpo.training.inputs.paths import Path, path_of
from rpo.training.inputs.reference import AdapterOff, CachedScalars, ReferenceProvider, SecondModel, precompute
from rpo.training.runtime.distributed import Processes
from rpo.training.runtime.interruption import StopRequest


@dataclass(frozen=True, kw_only=True)
class Training:
    """All that the steps read: the network, the pairs as it takes them, and where their noise and reference come from."""

    config: TrainConfig
    group: Processes
    denoiser: Denoiser
    path: Path
    pairs: EncodedPairs
    noise: NoiseProvider
    reference: ReferenceProvider | None
    held_out: EncodedPairs | None
    """Pairs that are measured only; without any, training pairs at draws that are not trained on, if those that are come back."""
    measured: Literal["held_out", "fresh"]
    """Which of the two they are."""
    held_out_noise: DrawTable
    held_out_reference: CachedScalars | None


@contextmanager
def enough_memory(config: TrainConfig) -> Generator[None, None, None]:
    """Turns the error of a GPU whose memory is full into an `RpoError` that says what takes less."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RpoError(
            f"the GPU's memory is too small for {config.micro_pairs} pairs at once, or {config.cache_batch} images while the caches are "
            f"filled ({str(error).split('. GPU')[0]}). Raise --train.accumulation from {config.accumulation}: the same gradient in less "
            "memory. Or lower --train.cache-batch, set --train.gradient-checkpointing or --train.precision bf16, or tune a LoRA"
        ) from error


def prepare(
    config: TrainConfig,
    pairs: Sequence[Pair],
    held_out: Sequence[Pair],
    folder: FilePath,
    stop: StopRequest,
    progress: Progress,
    group: Processes,
) -> Training:
    """Everything before the first step; what is in the cache in `folder` already is not computed again."""
    device = group.device
    if device.type == "cuda":
        # FLUX in bf16 got NaN gradients on an H200 (torch 2.11, after one or two steps), and this kernel's backward pass is known to give
        # them (pytorch/pytorch#196678); the cause is not yet confirmed on a card. One setting for the whole process, because gradient
        # checkpointing computes the forward pass again.
        torch.backends.cuda.enable_cudnn_sdp(False)
    denoiser = _policy(config, device)
    frozen = _other_model(config, denoiser)
    path = path_of(denoiser.schedule, device)
    noise, held_out_noise = _noise(config, path, pairs)
    cache = Cache(folder=folder, group=group, tick=_ticker(progress, stop, "encoding images and prompts"))
    whole, further = first_visits(config, len(pairs))
    come_back = config.objective.referenced() and noise.num_draws is not None and whole + bool(further) > noise.num_draws
    measured = held_out or (pairs[: config.eval_pairs] if come_back else [])
    groups = encode_pairs(denoiser, config, [pairs, measured], cache)
    cache = replace(cache, tick=_ticker(progress, stop, "reference errors"))
    # On a GPU frozen weights are kept in half precision under a LoRA, and in float32 else.
    weights = f"adapters {config.lora_rank is not None}, {memory_format(device)}"
    told = (PIXELS, config.precision, weights, str(config.resolution), str(config.unchanged_weight), str(config.compile))
    key = sha256(*denoiser.digests.values(), *told)

    def scalars(of: EncodedPairs, table: NoiseProvider, num_draws: int, further: Sequence[int]) -> CachedScalars:
        if table.num_draws is not None and num_draws >= table.num_draws:
            num_draws, further = table.num_draws, ()
        given = frozen or denoiser
        return precompute(given, path, of, table, cache, num_draws=num_draws, further=further, batch=config.cache_batch, key=key)

    # Before the steps' own reference, which may send the frozen network away.
    held_out_reference = scalars(groups[1], held_out_noise, EVAL_DRAWS, ()) if measured else None
    training = Training(
        config=config,
        group=group,
        denoiser=denoiser,
        path=path,
        pairs=groups[0],
        noise=noise,
        reference=_reference(config, denoiser, frozen, path, lambda: scalars(groups[0], noise, whole, further)),
        held_out=groups[1] if measured else None,
        measured="held_out" if held_out else "fresh",
        held_out_noise=held_out_noise,
        held_out_reference=held_out_reference,
    )
    if config.shard:
        denoiser.shard(group.mesh())
    return training


def _noise(config: TrainConfig, path: Path, pairs: Sequence[Pair]) -> tuple[NoiseProvider, DrawTable]:
    """The draws of the steps, and others, always the same, of what is only measured."""
    timesteps = config.timesteps or (0, path.num_timesteps)
    if timesteps[1] > path.num_timesteps:
        raise ValueError(f"timesteps must end at {path.num_timesteps} or before for {config.model}, got {timesteps}")
    draws = DrawRange(
        seed=config.seed,
        timesteps=timesteps,
        num_timesteps=path.num_timesteps,
        drop_probability=config.caption_dropout,
        density=path.density,
        mirror_probability=0.5 if config.flip else 0.0,
    )
    noise: NoiseProvider = FreshDraws(range=draws) if config.draws is None else DrawTable(range=draws, num_draws=config.draws)
    if config.generation_noise:
        noise = GenerationNoise(of=noise, seeds=_generation_seeds(pairs, config.resolution))
    held_out_range = replace(draws, seed=seed_of(config.seed, "held out"), drop_probability=0.0, mirror_probability=0.0)
    return noise, DrawTable(range=held_out_range, num_draws=EVAL_DRAWS)


def _policy(config: TrainConfig, device: torch.device) -> Denoiser:
    return load_denoiser(
        config.model,
        lora=config.lora(),
        dtype=config.dtype,
        device=device,
        seed=seed_of(config.seed, "lora"),
        gradient_checkpointing=config.gradient_checkpointing,
        compile=config.compile,
        bytes_per_weight=4.0 if config.shard else config.bytes_per_weight,
    )


def _other_model(config: TrainConfig, policy: Denoiser) -> Denoiser | None:
    """The reference, where it is another model than the policy before tuning."""
    if config.reference_model is None or not config.objective.referenced():
        return None
    frozen = load_reference(config.reference_model, beside=config.lora(), dtype=config.dtype, device=policy.device)
    if not policy.schedule.like(frozen.schedule):
        raise ValueError(f"reference_model {config.reference_model} has other noise levels or another target than {config.model}")
    return frozen


def _reference(
    config: TrainConfig,
    denoiser: Denoiser,
    frozen: Denoiser | None,
    path: Path,
    scalars: Callable[[], CachedScalars],
) -> ReferenceProvider | None:
    if not config.objective.referenced():
        return None
    if config.reference == "live" and frozen is None and config.lora_rank is not None:
        return AdapterOff(denoiser, path)
    if config.reference != "cached":
        return SecondModel(frozen or denoiser.frozen_copy(), path, offload=config.reference == "offloaded")
    return scalars()


def _generation_seeds(pairs: Sequence[Pair], resolution: int | None) -> dict[str, int]:
    seeds = {pair.id: json.loads(pair.provenance).get("seed") for pair in pairs}
    unknown = [pair for pair, seed in seeds.items() if not isinstance(seed, int)]
    if unknown:
        raise ValueError(
            f"{len(unknown)} of {len(pairs)} pairs, {unknown[0]} among them, do not say what noise their source was generated from; "
            "leave generation_noise out"
        )
    sizes = {image_size(pair.chosen.read()) for pair in pairs if resolution is not None}
    if sizes - {(resolution, resolution)}:
        raise ValueError(
            f"generation_noise is of the size that images were generated in, and resolution={resolution} changes some to another"
        )
    return seeds


def _ticker(progress: Progress, stop: StopRequest, what: str) -> Tick:
    """Counts files of the cache, and stops between two of them when asked to."""
    bar = progress.add_task(what, total=None)

    def tick() -> None:
        progress.advance(bar)
        stop.check()

    return tick
