"""Pairs per second of a Diffusion-DPO step: the naive way against ours, on one model, batch, precision and noise.

    python benchmarks/train_step.py path/to/pipeline --micro-pairs 32 --side 64 --rank 0
    python benchmarks/train_step.py sd15 --micro-pairs 4 --side 512 --rank 16 --precision bf16 --json sd15.json

`sd15` and `sdxl` are networks of full size with random weights, which are as fast as any. All ways run in this process, in turns, on
the same random images and prompts:

    naive     decodes and encodes both images and the prompt in every step, runs the reference live (adapters off, or a second network in
              full tuning) and reads the loss back, as published scripts do
    live      latents and embeddings from our cache, the reference live
    cached    the reference's errors from the cache as well
    compiled  the same with a compiled network (`--compile`)

Before any time is taken the losses of naive and live are compared. Memory is each way's own peak, without what only the others need.
"""

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from random_pipelines import ARCHITECTURES
from rich.console import Console
from rich.progress import Progress
from torch.utils.flop_counter import FlopCounterMode

from rpo.data.images import decode_image, encode_png
from rpo.data.pairs import Pair
from rpo.models.denoiser import Posterior
from rpo.train.batches import Visit
from rpo.train.config import TrainConfig
from rpo.train.denoising import pair_errors
from rpo.train.descent import Descent
from rpo.train.interruption import StopRequest
from rpo.train.loop import policy_and_reference_errors
from rpo.train.objectives import PairErrors
from rpo.train.parallel import processes
from rpo.train.preparation import Training, prepare
from rpo.train.reference import AdapterOff, ReferenceProvider, SecondModel

WARM_UP = 2
Way = Callable[[list[Visit]], PairErrors]


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


def step(training: Training, descent: Descent, way: Way, visits: list[Visit]) -> torch.Tensor:
    loss = training.config.objective(way(visits)).mean()
    descent.backward(loss)
    descent.step(training.config.lr)
    return loss.detach()


def seconds_of(training: Training, work: Callable[[], Any]) -> float:
    synchronise(training)
    started = time.perf_counter()
    work()
    synchronise(training)
    return time.perf_counter() - started


def synchronise(training: Training) -> None:
    if training.denoiser.device.type == "cuda":
        torch.cuda.synchronize()


def peak_memory(training: Training, frozen: Any, work: Callable[[], Any], needs_frozen: bool) -> float | None:
    """GiB on a GPU, None elsewhere."""
    if training.denoiser.device.type != "cuda":
        return None
    training.denoiser.free_encoders()
    if frozen is not None and not needs_frozen:
        frozen._network.cpu()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    work()
    peak = torch.cuda.max_memory_allocated() / 2**30
    if frozen is not None:
        frozen._network.to(training.denoiser.device)
    return peak


def matrix_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product on this device, the best of ten."""
    side = 8192 if device.type == "cuda" else 2048
    left, right = (torch.randn((side, side), device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        started = time.perf_counter()
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best


def ways_of(
    config: TrainConfig, pairs: list[Pair], folder: Path, compiled: bool
) -> tuple[Training, Any, dict[str, tuple[Training, Way]], float]:
    """The main training, its frozen network, every way with the training it moves, and the seconds to fill the cache."""

    def prepared(settings: TrainConfig) -> Training:
        with processes() as group:
            return prepare(settings, pairs, [], folder, StopRequest(), Progress(console=Console(quiet=True)), group)

    started = time.perf_counter()
    training = prepared(config)
    filling = time.perf_counter() - started
    frozen = training.denoiser.frozen_copy() if config.lora_rank is None else None
    reference = AdapterOff(training.denoiser, training.path) if frozen is None else SecondModel(frozen, training.path)
    live = dataclasses.replace(training, reference=reference)
    ways: dict[str, tuple[Training, Way]] = {
        "naive": (training, lambda visits: naive_errors(training, reference, pairs, visits)),
        "live": (training, lambda visits: policy_and_reference_errors(live, visits)),
        "cached": (training, lambda visits: policy_and_reference_errors(training, visits)),
    }
    if compiled:
        other = prepared(dataclasses.replace(config, compile=True))
        ways["compiled"] = (other, lambda visits: policy_and_reference_errors(other, visits))
    return training, frozen, ways, filling


def measure(args: argparse.Namespace, model: str) -> dict[str, Any]:
    pairs = random_pairs(args.micro_pairs * 2, args.side)
    config = TrainConfig(
        model=model,
        steps=2,
        batch_pairs=args.micro_pairs,
        accumulation=1,
        lora_rank=args.rank or None,
        precision=args.precision,
        gradient_checkpointing=args.gradient_checkpointing,
        draws=1,
        caption_dropout=0.0,
        lr=1e-8,
    )
    with tempfile.TemporaryDirectory() as cache:
        training, frozen, ways, filling = ways_of(config, pairs, Path(cache), args.compile)
        descents = {id(moved): Descent(config, moved.denoiser.trainable()) for moved, _ in ways.values()}
        batches = [[Visit(pair=first + i, number=0) for i in range(args.micro_pairs)] for first in (0, args.micro_pairs)]
        with torch.no_grad():
            losses = {name: float(config.objective(ways[name][1](batches[0])).mean()) for name in ("naive", "live", "cached")}
        allowed = 1e-5 if args.precision == "fp32" else 5e-3
        assert abs(losses["naive"] - losses["live"]) < allowed, f"naive and live differ: {losses}"
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(args.rounds + WARM_UP):
            for name, (moved, way) in ways.items():

                def work(moved: Training = moved, way: Way = way, name: str = name, number: int = number) -> None:
                    loss = step(moved, descents[id(moved)], way, batches[number % 2])
                    if name == "naive":
                        loss.item()

                took = seconds_of(training, work)
                if number >= WARM_UP:
                    seconds[name].append(took)
        counter = FlopCounterMode(display=False)
        with counter:
            step(training, descents[id(training)], ways["cached"][1], batches[0])
        peak = matrix_peak(training.denoiser.device, torch.float32 if args.precision == "fp32" else training.config.dtype)
        rows: dict[str, dict[str, float | None]] = {}
        for name, (moved, way) in ways.items():
            median = statistics.median(seconds[name])
            rows[name] = {
                "pairs_per_second": args.micro_pairs / median,
                "slowest": args.micro_pairs / max(seconds[name]),
                "fastest": args.micro_pairs / min(seconds[name]),
                "ratio": statistics.median(seconds["naive"]) / median,
                "peak_gib": peak_memory(
                    training,
                    frozen,
                    lambda moved=moved, way=way: step(moved, descents[id(moved)], way, batches[0]),
                    name in ("naive", "live"),
                ),
                "matrix_share": counter.get_total_flops() / median / peak if name in ("cached", "compiled") else None,
            }
    saved = (statistics.median(seconds["naive"]) - statistics.median(seconds["cached"])) / args.micro_pairs
    return {
        "model": args.model,
        "device": torch.cuda.get_device_name() if training.denoiser.device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "tuning": f"LoRA rank {args.rank}" if args.rank else "full",
        "precision": args.precision,
        "side": args.side,
        "micro_pairs": args.micro_pairs,
        "rounds": args.rounds,
        "losses": losses,
        "ways": rows,
        "cache_seconds_per_pair": filling / len(pairs),
        "visits_that_pay_for_the_cache": filling / len(pairs) / saved,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help=f"folder or hub id of a pipeline, or one of {', '.join(ARCHITECTURES)} for random weights")
    parser.add_argument("--micro-pairs", type=int, default=4, help="pairs per step")
    parser.add_argument("--side", type=int, default=512, help="image side in pixels")
    parser.add_argument("--rank", type=int, default=16, help="LoRA rank; 0 tunes the whole network")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--compile", action="store_true", help="measure the compiled network as well")
    parser.add_argument("--rounds", type=int, default=20, help=f"steps of each way, in turns, after {WARM_UP} that warm up")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = args.model
        if model in ARCHITECTURES:
            model = str(Path(folder) / model)
            ARCHITECTURES[args.model](Path(model))
        found = measure(args, model)
    print("{model}: {tuning}, {precision}, {side} px, {micro_pairs} pairs a step, {device}".format(**found))
    print("losses on fixed noise: " + ", ".join(f"{name} {loss:.6f}" for name, loss in found["losses"].items()))
    print("| way | pairs/s (slowest to fastest step) | ratio to naive | peak memory | share of the matrix peak |\n|---|---|---|---|---|")
    for name, row in found["ways"].items():
        memory = "" if row["peak_gib"] is None else f"{row['peak_gib']:.2f} GiB"
        share = "" if row["matrix_share"] is None else f"{100 * row['matrix_share']:.0f} %"
        speed = f"{row['pairs_per_second']:.3f} ({row['slowest']:.3f} to {row['fastest']:.3f})"
        print(f"| {name} | {speed} | {row['ratio']:.2f} | {memory} | {share} |")
    filling, visits = found["cache_seconds_per_pair"], found["visits_that_pay_for_the_cache"]
    print(f"loading and filling the cache, 1 draw: {filling:.3f} s per pair, paid back after {visits:.1f} visits of each")
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
