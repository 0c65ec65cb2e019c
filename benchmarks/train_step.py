"""Pairs per second of a Diffusion-DPO step: the naive way against ours, on one model, batch, precision and noise.

    python benchmarks/train_step.py path/to/pipeline --micro-pairs 32 --side 64 --rank 0
    python benchmarks/train_step.py sd15 --micro-pairs 4 --side 512 --rank 16 --precision bf16 --json sd15.json

`sd15` and `sdxl` are networks of full size with random weights, which are as fast as any. All ways run in this process, in turns, on
the same random images and prompts:

    naive     decodes and encodes both images and the prompt in every step, runs the reference live (adapters off, or a second network in
              full tuning), leaves the network in the layout it was loaded in and the optimiser at its defaults, and reads the loss back, as
              published scripts do
    live      latents and embeddings from our cache, the reference live
    cached    the reference's errors from the cache as well
    compiled  the same with a compiled network (`--compile`)

Before any time is taken the errors of both sides must agree between naive and live, and so must their losses; the others' are printed: a
reference that was computed in batches of another size differs in its last digits, which k multiplies. Memory is each way's own peak,
without what only the others need.
"""

import argparse
import copy
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path as FilePath
from typing import Any

import numpy as np
import torch
from random_pipelines import ARCHITECTURES
from rich.console import Console
from rich.progress import Progress
from torch.autograd import DeviceType
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from rpo.data.images import EncodedImage, encode_png
from rpo.data.pairs import Pair
from rpo.models.denoiser import FlowSchedule, Posterior
from rpo.models.diffusers_denoiser import DiffusersDenoiser
from rpo.train.batches import Visit
from rpo.train.config import TrainConfig
from rpo.train.denoising import PairInputs, pair_errors
from rpo.train.descent import Descent
from rpo.train.interruption import StopRequest
from rpo.train.loop import policy_and_reference_errors
from rpo.train.objectives import PairErrors
from rpo.train.parallel import processes
from rpo.train.paths import Path
from rpo.train.preparation import Training, prepare
from rpo.train.reference import AdapterOff, SecondModel

WARM_UP = 2


def random_pairs(num_pairs: int, side: int) -> list[Pair]:
    rng = np.random.default_rng(0)
    images = [EncodedImage.of(encode_png(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))) for _ in range(2 * num_pairs)]
    unused = {"critique": "{}", "instruction": "", "scores": "{}", "provenance": "{}"}
    return [
        Pair(id=f"pair-{i}", prompt=f"prompt {i}", chosen=images[2 * i], rejected=images[2 * i + 1], gap=1.0, split="train", **unused)
        for i in range(num_pairs)
    ]


class Plain:
    """A network as a script has it: loaded and called, in the layout of the file, with encoders of its own."""

    def __init__(self, denoiser: DiffusersDenoiser) -> None:
        self.network = copy.deepcopy(denoiser._network).to(memory_format=torch.contiguous_format)
        self.denoiser = copy.copy(denoiser)
        self.denoiser._network = self.network

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, conditions: Mapping[str, torch.Tensor]) -> torch.Tensor:
        denoiser = self.denoiser
        level = denoiser.schedule.sigmas[t] if isinstance(denoiser.schedule, FlowSchedule) else t
        with torch.autocast(denoiser.device.type, dtype=denoiser._dtype, enabled=denoiser._dtype != torch.float32):
            return denoiser._family.predict(self.network, x_t.contiguous(), level, conditions)


@torch.no_grad()
def live_reference(plain: Plain, frozen: Plain | None, path: Path, inputs: PairInputs) -> tuple[torch.Tensor, torch.Tensor]:
    if frozen is not None:
        return pair_errors(frozen, path, inputs)[:2]
    plain.network.disable_adapters()
    errors = pair_errors(plain, path, inputs)[:2]
    plain.network.enable_adapters()
    return errors


def naive_errors(training: Training, plain: Plain, frozen: Plain | None, pairs: list[Pair], visits: list[Visit]) -> PairErrors:
    """As a script without caches computes them, from encoded images and text."""
    denoiser, dtype = plain.denoiser, training.config.dtype
    sides: list[Posterior] = []
    with torch.autocast(denoiser.device.type, dtype=dtype, enabled=dtype != torch.float32):  # our cache is filled in float32, theirs is not
        for name in ("chosen", "rejected"):
            pixels = np.stack([getattr(pairs[visit.pair], name).decode() for visit in visits])
            sides.append(denoiser.encode_images(pixels))
        conditions = denoiser.encode_prompts([pairs[visit.pair].prompt for visit in visits])
    cached = training.pairs.inputs(visits, training.noise)
    inputs = dataclasses.replace(cached, chosen=sides[0], rejected=sides[1], conditions={**cached.conditions, **conditions})
    ref_chosen, ref_rejected = live_reference(plain, frozen, training.path, inputs)
    chosen, rejected, _ = pair_errors(plain, training.path, inputs)
    return PairErrors(chosen, rejected, ref_chosen, ref_rejected)


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to take a step."""

    training: Training
    errors: Callable[[list[Visit]], PairErrors]
    modules: tuple[torch.nn.Module, ...]
    """What it keeps on the device."""
    descent: Descent | None = None
    """None for the naive one."""
    optimizer: torch.optim.Optimizer | None = None

    def step(self, visits: list[Visit]) -> None:
        loss = self.training.config.objective(self.errors(visits)).mean()
        if self.descent is not None:
            self.descent.backward(loss)
            self.descent.step(self.training.config.lr)
            return
        assert self.optimizer is not None
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.optimizer.param_groups[0]["params"], self.training.config.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        loss.item()

    def move(self, device: torch.device) -> None:
        """What it keeps on the device, the optimiser's numbers with it."""
        for module in self.modules:
            module.to(device)
        optimizer = self.optimizer or (self.descent and self.descent._optimizer)
        assert optimizer
        for kept in optimizer.state.values():
            kept.update({name: value.to(device) for name, value in kept.items() if isinstance(value, torch.Tensor) and value.ndim})


def seconds_of(way: Way, visits: list[Visit]) -> float:
    cuda = way.training.denoiser.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    way.step(visits)
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def peak_memory(ways: Mapping[str, Way], name: str, visits: list[Visit]) -> float | None:
    """GiB on a GPU while one way takes a step and what only the others need is on the CPU; None elsewhere."""
    device = ways[name].training.denoiser.device
    if device.type != "cuda":
        return None
    for way in ways.values():
        way.training.denoiser.free_encoders()
        way.move(torch.device("cpu"))
    ways[name].move(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    ways[name].step(visits)
    peak = torch.cuda.max_memory_allocated() / 2**30
    for way in ways.values():
        way.move(device)
    return peak


def shares(way: Way, visits: list[Visit]) -> dict[str, float]:
    """Of three steps' time, by what the device spends it on, the largest first. What an operation calls counts there, not with it."""
    cuda = way.training.denoiser.device.type == "cuda"
    with profile() as steps:
        for _ in range(3):
            way.step(visits)
    # On a GPU a kernel has a row of its own beside that of the operation it counts for.
    rows = [row for row in steps.key_averages() if row.device_type == DeviceType.CPU]
    spent = {row.key: row.self_device_time_total if cuda else row.self_cpu_time_total for row in rows}
    total = sum(spent.values())
    return {name: spent[name] / total for name in sorted(spent, key=spent.__getitem__, reverse=True)}


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


def ways_of(config: TrainConfig, pairs: list[Pair], folder: FilePath, compiled: bool) -> tuple[dict[str, Way], float]:
    """Every way, and the seconds to fill the cache."""

    def prepared(settings: TrainConfig) -> Training:
        with processes() as group:
            return prepare(settings, pairs, [], folder, StopRequest(), Progress(console=Console(quiet=True)), group)

    def ours(training: Training, live: bool, *more: torch.nn.Module) -> Way:
        denoiser = training.denoiser
        reference = AdapterOff(denoiser, training.path) if config.lora_rank else SecondModel(denoiser.frozen_copy(), training.path)
        used = dataclasses.replace(training, reference=reference) if live else training
        errors = lambda visits: policy_and_reference_errors(used, visits)  # noqa: E731
        second = [reference._frozen._network] if live and isinstance(reference, SecondModel) else []
        return Way(training, errors, (denoiser._network, *second, *more), descent=Descent(config, denoiser.trainable()))

    started = time.perf_counter()
    training = prepared(config)
    filling = time.perf_counter() - started
    plain = Plain(training.denoiser)
    frozen = None if config.lora_rank else Plain(training.denoiser)
    trained = [parameter for parameter in plain.network.parameters() if parameter.requires_grad]
    ways = {
        "naive": Way(
            dataclasses.replace(training, denoiser=plain.denoiser),
            lambda visits: naive_errors(training, plain, frozen, pairs, visits),
            (plain.network, *([frozen.network] if frozen else [])),
            optimizer=torch.optim.AdamW(trained, lr=config.lr, weight_decay=config.weight_decay),
        ),
        "live": ours(training, live=True),
        "cached": ours(training, live=False),
    }
    if compiled:
        ways["compiled"] = ours(prepared(dataclasses.replace(config, compile=True)), live=False)
    return ways, filling


def assert_equal(naive: PairErrors, ours: PairErrors, allowed: float) -> None:
    """Within a share of each error."""
    for side in ("chosen", "rejected", "ref_chosen", "ref_rejected"):
        theirs, mine = getattr(naive, side), getattr(ours, side)
        assert torch.allclose(theirs, mine, rtol=allowed, atol=0.0), f"naive and live differ: {side} {theirs.tolist()} {mine.tolist()}"


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
        ways, filling = ways_of(config, pairs, FilePath(cache), args.compile)
        device = ways["cached"].training.denoiser.device
        batches = [[Visit(pair=first + i, number=0) for i in range(args.micro_pairs)] for first in (0, args.micro_pairs)]
        with torch.no_grad():
            errors = {name: way.errors(batches[0]) for name, way in ways.items()}
        losses = {name: float(config.objective(found).mean()) for name, found in errors.items()}
        assert_equal(errors["naive"], errors["live"], 1e-4 if args.precision == "fp32" else 5e-2)
        assert abs(losses["naive"] - losses["live"]) < (1e-5 if args.precision == "fp32" else 5e-3), f"naive and live differ: {losses}"
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(args.rounds + WARM_UP):
            for name, way in ways.items():
                took = seconds_of(way, batches[number % 2])
                if number >= WARM_UP:
                    seconds[name].append(took)
        counter = FlopCounterMode(display=False)
        with counter:
            ways["cached"].step(batches[0])
        peak = matrix_peak(device, config.dtype)
        rows: dict[str, dict[str, float | None]] = {}
        for name in ways:
            median = statistics.median(seconds[name])
            rows[name] = {
                "pairs_per_second": args.micro_pairs / median,
                "slowest": args.micro_pairs / max(seconds[name]),
                "fastest": args.micro_pairs / min(seconds[name]),
                "ratio": statistics.median(seconds["naive"]) / median,
                "peak_gib": peak_memory(ways, name, batches[0]),
                "matrix_share": counter.get_total_flops() / median / peak if name in ("cached", "compiled") else None,
            }
        spent = shares(ways["cached"], batches[0]) if args.profile else {}
    saved = (statistics.median(seconds["naive"]) - statistics.median(seconds["cached"])) / args.micro_pairs
    return {
        "model": args.model,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "tuning": f"LoRA rank {args.rank}" if args.rank else "full",
        "precision": args.precision,
        "side": args.side,
        "micro_pairs": args.micro_pairs,
        "rounds": args.rounds,
        "losses": losses,
        "ways": rows,
        "shares_of_cached": spent,
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
    parser.add_argument("--profile", action="store_true", help="say what the cached step's time goes to")
    parser.add_argument("--rounds", type=int, default=20, help=f"steps of each way, in turns, after {WARM_UP} that warm up")
    parser.add_argument("--json", type=FilePath, help="write the figures to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = args.model
        if model in ARCHITECTURES:
            model = str(FilePath(folder) / model)
            ARCHITECTURES[args.model](FilePath(model))
        found = measure(args, model)
    print("{model}: {tuning}, {precision}, {side} px, {micro_pairs} pairs a step, {device}".format(**found))
    print("losses on fixed noise: " + ", ".join(f"{name} {loss:.6f}" for name, loss in found["losses"].items()))
    print("| way | pairs/s (slowest to fastest step) | ratio to naive | peak memory | share of the matrix peak |\n|---|---|---|---|---|")
    for name, row in found["ways"].items():
        memory = "" if row["peak_gib"] is None else f"{row['peak_gib']:.2f} GiB"
        share = "" if row["matrix_share"] is None else f"{100 * row['matrix_share']:.0f} %"
        speed = f"{row['pairs_per_second']:.3f} ({row['slowest']:.3f} to {row['fastest']:.3f})"
        print(f"| {name} | {speed} | {row['ratio']:.2f} | {memory} | {share} |")
    for name, share in list(found["shares_of_cached"].items())[:25]:
        print(f"{100 * share:5.1f} % {name}")
    filling, visits = found["cache_seconds_per_pair"], found["visits_that_pay_for_the_cache"]
    print(f"loading and filling the cache, 1 draw: {filling:.3f} s per pair, paid back after {visits:.1f} visits of each")
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
