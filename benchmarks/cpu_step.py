"""Seconds of a cached training step on a CPU with one thing changed at a time, in turns in one process.

    python benchmarks/cpu_step.py src/rpo/shapes/weights/base --side 64 --micro-pairs 32 --rank 0

`learned` moves the reference's errors away, so that pairs are told apart as after some hundred steps at the default k = 2500; the other
rows are of the untuned network. Figures are CPU seconds of this process (one thread), medians.
"""

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from random_pipelines import ARCHITECTURES
from rich.console import Console
from rich.progress import Progress
from train_step import random_pairs

from rpo.models import denoiser as precision
from rpo.models import diffusers_denoiser
from rpo.training.config import TrainConfig
from rpo.training.inputs import errors as denoising
from rpo.training.inputs.batches import Visit
from rpo.training.loop import policy_and_reference_errors
from rpo.training.runtime.distributed import processes
from rpo.training.runtime.interruption import StopRequest
from rpo.training.runtime.optimizer import Descent
from rpo.training.setup import Training, prepare

Step = Callable[[], None]


def prepared(config: TrainConfig, args: argparse.Namespace, cache: Path) -> Training:
    pairs = random_pairs(args.micro_pairs, args.side)
    with processes() as group:
        return prepare(config, pairs, [], cache, StopRequest(), Progress(console=Console(quiet=True)), group)


def step_of(training: Training, told_apart: bool) -> Step:
    """A step at a learning rate that moves nothing; logits spread from 60 to 140 where pairs are told apart."""
    config = training.config
    descent = Descent(config, training.denoiser.trainable())
    visits = [Visit(pair=pair, number=0) for pair in range(config.batch_pairs)]
    away = torch.linspace(60, 140, config.batch_pairs) / 2500 if told_apart else torch.zeros(config.batch_pairs)

    def step() -> None:
        errors = policy_and_reference_errors(training, visits)
        assert errors.ref_chosen is not None
        descent.backward(config.objective(dataclasses.replace(errors, ref_chosen=errors.ref_chosen + away)).mean())
        descent.step(config.lr)

    return step


def with_denormals(step: Step) -> Step:
    def run() -> None:
        before, denoising._TRACE = denoising._TRACE, 0.0
        step()
        denoising._TRACE = before

    return run


def with_attention_in_bf16(step: Step) -> Step:
    class Unchanged(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    def run() -> None:
        diffusers_denoiser.Float32Attention = Unchanged
        step()
        diffusers_denoiser.Float32Attention = precision.Float32Attention

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help=f"folder of a pipeline, or one of {', '.join(ARCHITECTURES)} for random weights")
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--micro-pairs", type=int, default=32)
    parser.add_argument("--rank", type=int, default=0, help="LoRA rank; 0 tunes the whole network")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", help="names of rows")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        model = args.model
        if model in ARCHITECTURES:
            model = str(Path(folder) / model)
            ARCHITECTURES[args.model](Path(model))
        config = TrainConfig(
            model=model,
            steps=1,
            batch_pairs=args.micro_pairs,
            accumulation=1,
            lora_rank=args.rank or None,
            draws=1,
            lr=1e-12,
        )
        wanted = lambda name: not args.only or name in args.only  # noqa: E731
        plain = prepared(config, args, Path(folder) / "cache")
        ways: dict[str, Step] = {"as it is": step_of(plain, False)}
        ways["learned, as it is"] = step_of(plain, True)
        ways["learned, denormals kept"] = with_denormals(ways["learned, as it is"])
        if wanted("channels last"):
            last = prepared(config, args, Path(folder) / "cache")
            last.denoiser._network.to(memory_format=torch.channels_last)
            ways["channels last"] = step_of(last, False)
        if wanted("bf16"):
            half = prepared(dataclasses.replace(config, precision="bf16"), args, Path(folder) / "cache")
            ways["bf16"] = step_of(half, False)
            ways["bf16, attention in bf16"] = with_attention_in_bf16(ways["bf16"])
        ways = {name: step for name, step in ways.items() if wanted(name)}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(args.rounds + 1):
            for name, step in ways.items():
                began = time.process_time()
                step()
                if number:  # the first warms up
                    seconds[name].append(time.process_time() - began)
    print(f"{args.model}, {args.side} px, {args.micro_pairs} pairs, {'full' if not args.rank else f'LoRA {args.rank}'}, one thread")
    print("| way | CPU s per step (fastest to slowest) |\n|---|---|")
    for name, taken in seconds.items():
        print(f"| {name} | {statistics.median(taken):.3f} ({min(taken):.3f} to {max(taken):.3f}) |")


if __name__ == "__main__":
    main()
