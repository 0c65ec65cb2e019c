"""What a training run would take, found by doing its first steps and throwing them away."""

import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from rpo.core.described import described
from rpo.data.pairs import Pair
from rpo.training.config import TrainConfig
from rpo.training.inputs.batches import Visit, micro_batches
from rpo.training.loop import pairs_to_train_on, policy_and_reference_errors, take_step
from rpo.training.runtime.distributed import processes
from rpo.training.runtime.interruption import StopRequest
from rpo.training.runtime.optimizer import Descent
from rpo.training.setup import Training, enough_memory, prepare

PROBES = 3
_MIB = 2**20


def rehearse(config: TrainConfig, pairs: Sequence[Pair], say: Callable[[str], None]) -> None:
    """Says the resolved settings, steps, sizes of the caches and time per step, after probes on the first pairs. Leaves nothing behind.

    Raises `RpoError` or `ValueError` for whatever would stop the run itself.
    """
    training_pairs = pairs_to_train_on(pairs)
    say(json.dumps(described(config), indent=2))
    first = training_pairs[: PROBES * config.batch_pairs]
    with tempfile.TemporaryDirectory() as folder, processes(shard=config.shard) as group, enough_memory(config):
        began = time.monotonic()
        # So few steps that every pair needs the reference's error of one draw only.
        probe = replace(config, steps=PROBES, shard=config.shard and group.count > 1)
        training = prepare(probe, first, [], Path(folder), StopRequest(), Progress(console=Console(quiet=True)), group)
        preparing = time.monotonic() - began
        sizes = {kind: sum(path.stat().st_size for path in Path(folder).glob(f"{kind}-*")) for kind in ("latents", "prompts", "reference")}
        trained = training.denoiser.trainable()
        descent = Descent(config, trained)
        activations = activation_bytes(training, group.share(next(micro_batches(config, 0, len(first)))))
        seconds: list[float] = []
        for step in range(PROBES):
            began = time.monotonic()
            float(take_step(training, step, descent)["loss"])  # waits for the device
            seconds.append(time.monotonic() - began)
    count, share = len(training_pairs), len(training_pairs) / len(first)
    visits = config.steps * config.batch_pairs / count
    draws = min(config.draws or 1, math.ceil(visits))
    grown = {
        "latents": sizes["latents"] * _images(training_pairs) / _images(first),
        "prompts": sizes["prompts"] * _prompts(training_pairs) / _prompts(first),
        "reference errors": sizes["reference"] * share * draws,
    }
    # A pass without gradient is about a third of a step.
    filling = preparing * share + (draws - 1) * count / config.batch_pairs * min(seconds) / 3 * (config.reference == "cached")
    numbers = sum(parameter.numel() for parameter in trained.values())
    state = sum(tensor.nbytes for tensor in descent.state().values())
    say(f"{count} pairs, {config.steps} steps of {config.batch_pairs}: {visits:.1f} visits of each pair")
    say(f"{numbers:,} trained numbers: {(8 * numbers + state) / _MIB:,.1f} MiB with gradients and the optimiser's state")
    say(f"activations: {activations / _MIB:,.1f} MiB that {config.micro_pairs // group.count} pairs at once keep for the backward pass")
    say(f"caches: {', '.join(f'{kind} {size / _MIB:,.1f} MiB' for kind, size in grown.items())}")
    if group.device.type == "cuda":
        say(f"GPU memory: {torch.cuda.max_memory_reserved() / _MIB:,.0f} MiB of {torch.cuda.mem_get_info()[1] / _MIB:,.0f} in the probes")
    say(f"filling the caches: about {filling / 60:.1f} min, loading included")
    say(f"steps: {min(seconds):.2f} s each, the fastest of {PROBES}; about {min(seconds) * config.steps / 60:.1f} min in all")


def activation_bytes(training: Training, visits: Sequence[Visit]) -> int:
    """What a micro-batch keeps between its forward and its backward pass, each piece of memory once, the network's own weights left out."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        viewed = tensor._base  # pyright: ignore[reportPrivateUsage]
        if not isinstance(tensor if viewed is None else viewed, nn.Parameter):
            memory = tensor.untyped_storage()
            kept[memory.data_ptr()] = memory.nbytes()
        return tensor.detach()  # an output that is packed as it is refers to its own node, which no collector frees

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        errors = policy_and_reference_errors(training, visits)
    held = sum(kept.values())
    del errors  # until here it held all of them, so that no two shared an address
    return held


def _images(pairs: Sequence[Pair]) -> int:
    return len({image for pair in pairs for image in (pair.chosen.sha256, pair.rejected.sha256)})


def _prompts(pairs: Sequence[Pair]) -> int:
    return 1 + len({pair.prompt for pair in pairs})
