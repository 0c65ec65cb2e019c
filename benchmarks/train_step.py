"""Pairs per second of a Diffusion-DPO step: our caches against the naive step, on one model, batch and precision.

    python benchmarks/train_step.py path/to/pipeline --micro-pairs 4 --side 512 --rank 16 --precision bf16

Both sides run in this process, in turns, on the same random images and prompts, with the same network, optimiser and objective.
The naive step encodes both images with the VAE and the prompts with the text encoder, and runs the reference live (adapters off,
or a second network in full tuning), as published scripts do. Ours reads latents, embeddings and reference errors from the cache
the time to load the model and fill that cache is printed apart.
"""

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

from rpo.data.images import decode_image, encode_png
from rpo.data.pairs import Pair
from rpo.models.denoiser import Posterior
from rpo.train.batches import Visit
from rpo.train.config import TrainConfig
from rpo.train.denoising import pair_errors
from rpo.train.interruption import StopRequest
from rpo.train.loop import Training, policy_and_reference_errors, prepare
from rpo.train.objectives import PairErrors
from rpo.train.parallel import processes
from rpo.train.reference import AdapterOff, ReferenceProvider, SecondModel


def random_pairs(num_pairs: int, side: int) -> list[Pair]:
    rng = np.random.default_rng(0)
    images = [encode_png(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(2 * num_pairs)]
    unused = {"critique": "{}", "instruction": "", "scores": "{}", "provenance": "{}"}
    return [
        Pair(id=f"pair-{i}", prompt=f"prompt {i}", chosen=images[2 * i], rejected=images[2 * i + 1], gap=1.0, split="train", **unused)
        for i in range(num_pairs)
    ]


def naive_errors(training: Training, reference: ReferenceProvider, pairs: list[Pair], visits: list[Visit]) -> PairErrors:
    """As a script without caches computes them, from encoded images and text."""
    sides: list[Posterior] = []
    for name in ("chosen", "rejected"):
        pixels = np.stack([decode_image(getattr(pairs[visit.pair], name)) for visit in visits])
        sides.append(training.denoiser.encode_images(pixels))
    conditions = training.denoiser.encode_prompts([pairs[visit.pair].prompt for visit in visits])
    cached = training.pairs.inputs(visits, training.noise)
    inputs = dataclasses.replace(cached, chosen=sides[0], rejected=sides[1], conditions=conditions)
    ref_chosen, ref_rejected = reference.errors(visits, inputs)
    chosen, rejected, _ = pair_errors(training.denoiser, training.path, inputs)
    return PairErrors(chosen, rejected, ref_chosen, ref_rejected)


def timed_step(training: Training, optimizer: torch.optim.Optimizer, errors: Callable[[], PairErrors]) -> float:
    """Seconds of forward, backward and update."""
    synchronise(training)
    started = time.perf_counter()
    training.config.objective(errors()).mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    synchronise(training)
    return time.perf_counter() - started


def synchronise(training: Training) -> None:
    if training.denoiser.device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="StableDiffusionPipeline folder or hub id")
    parser.add_argument("--micro-pairs", type=int, default=4, help="pairs per step")
    parser.add_argument("--side", type=int, default=512, help="image side in pixels")
    parser.add_argument("--rank", type=int, default=16, help="LoRA rank; 0 tunes the whole network")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--rounds", type=int, default=20, help="steps of each kind, in turns, after two that warm up")
    args = parser.parse_args()

    pairs = random_pairs(args.micro_pairs * 2, args.side)
    config = TrainConfig(
        model=args.model,
        steps=2,
        batch_pairs=args.micro_pairs,
        accumulation=1,
        lora_rank=args.rank or None,
        precision=args.precision,
        draws=1,
        caption_dropout=0.0,
        lr=1e-8,
    )
    with tempfile.TemporaryDirectory() as cache:
        started = time.perf_counter()
        with processes() as group:
            training = prepare(config, pairs, [], Path(cache), StopRequest(), Progress(console=Console(quiet=True)), group)
        filling = time.perf_counter() - started
        frozen = training.denoiser.frozen_copy() if args.rank == 0 else None
        reference = AdapterOff(training.denoiser, training.path) if frozen is None else SecondModel(frozen, training.path)
        optimizer = torch.optim.AdamW(training.denoiser.trainable().values(), lr=config.lr, fused=True)
        seconds: dict[str, list[float]] = {"ours": [], "naive": []}
        for number in range(args.rounds + 2):
            first = number % 2 * args.micro_pairs
            visits = [Visit(pair=first + i, number=0) for i in range(args.micro_pairs)]
            ours = timed_step(training, optimizer, lambda visits=visits: policy_and_reference_errors(training, visits))
            naive = timed_step(training, optimizer, lambda visits=visits: naive_errors(training, reference, pairs, visits))
            if number >= 2:
                seconds["ours"].append(ours)
                seconds["naive"].append(naive)
    rate = {name: args.micro_pairs / statistics.median(values) for name, values in seconds.items()}
    device = torch.cuda.get_device_name() if training.denoiser.device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    tuning = f"LoRA rank {args.rank}" if args.rank else "full"
    print(f"{args.model}: {tuning}, {args.precision}, {args.side} px, {args.micro_pairs} pairs a step, {device}")
    for name, values in seconds.items():
        low, high = args.micro_pairs / max(values), args.micro_pairs / min(values)
        print(f"{name:>6}: {rate[name]:8.3f} pairs/s (median of {len(values)}; {low:.3f} to {high:.3f})")
    print(f" ratio: {rate['ours'] / rate['naive']:8.2f}")
    print(f"loading and filling the cache, 1 draw: {filling / len(pairs):.3f} s per pair")


if __name__ == "__main__":
    main()
