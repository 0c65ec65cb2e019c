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

The errors of both sides must agree between naive and live, and so must their losses; the others' are printed: a reference that was
computed in batches of another size differs in its last digits, which k multiplies. Memory is each way's own peak, without what only the
others need. With gradient checkpointing the share of the matrix peak counts the recomputed operations too.
"""

import argparse
import copy
import dataclasses
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path as FilePath
from typing import Any

import numpy as np
import torch
from random_pipelines import ARCHITECTURES, random_weights, save_configs
from rich.console import Console
from rich.progress import Progress
from torch.autograd import DeviceType
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from rpo.data.images import EncodedImage, encode_png
from rpo.data.pairs import Pair
from rpo.models.denoiser import FlowSchedule, Posterior
from rpo.models.diffusers_denoiser import DiffusersDenoiser
from rpo.training.config import TrainConfig
from rpo.training.inputs.batches import Visit
from rpo.training.inputs.errors import PairInputs, pair_errors
from rpo.training.inputs.paths import Path
from rpo.training.inputs.reference import AdapterOff, SecondModel
from rpo.training.loop import policy_and_reference_errors
from rpo.training.objectives.preference import PairErrors
from rpo.training.runtime.distributed import processes
from rpo.training.runtime.interruption import StopRequest
from rpo.training.runtime.optimizer import Descent
from rpo.training.setup import Training, prepare

WAYS = ("naive", "live", "cached", "compiled")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """One measurement."""

    model: str
    """Folder or hub id of a pipeline."""
    micro_pairs: int = 4
    """Pairs per step."""
    side: int = 512
    """Image side in pixels."""
    rank: int = 16
    """LoRA rank; 0 tunes the whole network."""
    precision: str = "fp32"
    gradient_checkpointing: bool = False
    ways: Sequence[str] = WAYS[:3]
    """Some of `WAYS`, in that order; ratios are to the first."""
    warm_up: int = 2
    """Steps of each way before any time is taken."""
    rounds: int = 20
    """Steps of each way, in turns, after those that warm up."""
    rounds_s: float = float("inf")
    """Seconds after which no new round begins, once there are two."""
    profile: bool = False
    """Add the shares of the cached step's time."""

    def config(self, **changes: Any) -> TrainConfig:
        return TrainConfig(
            model=self.model,
            steps=2,
            batch_pairs=self.micro_pairs,
            accumulation=1,
            lora_rank=self.rank or None,
            precision=self.precision,
            gradient_checkpointing=self.gradient_checkpointing,
            draws=1,
            caption_dropout=0.0,
            cache_batch=max(2, min(32, 2**23 // self.side**2)),
            lr=1e-8,
            **changes,
        )


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
        # Frozen weights without a layout of their own are shared: a second copy of FLUX.1 would take 24 GB.
        shared = {id(weight): weight for weight in denoiser._network.parameters() if not weight.requires_grad and weight.ndim != 4}
        self.network = copy.deepcopy(denoiser._network, shared).to(memory_format=torch.contiguous_format)
        self.denoiser = copy.copy(denoiser)
        self.denoiser._network = self.network

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, conditions: Mapping[str, torch.Tensor]) -> torch.Tensor:
        denoiser = self.denoiser
        level = denoiser.schedule.levels(t, x_t) if isinstance(denoiser.schedule, FlowSchedule) else t
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

    def own_bytes(self) -> int:
        """What it keeps on the device between two steps: networks, encoders, the optimizer's state."""
        denoiser = self.training.denoiser
        text = getattr(denoiser._text, "components", {}).values()
        encoders = [part for part in (denoiser._vae, *text) if isinstance(part, torch.nn.Module)]
        kept = [tensor for module in (*self.modules, *encoders) for tensor in (*module.parameters(), *module.buffers())]
        optimizer = self.optimizer or (self.descent and self.descent._optimizer)
        assert optimizer
        kept += [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
        memory = [tensor.untyped_storage() for tensor in kept if tensor.device.type == "cuda"]
        return sum({storage.data_ptr(): storage.nbytes() for storage in memory}.values())


def seconds_of(way: Way, visits: list[Visit]) -> float:
    cuda = way.training.denoiser.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    way.step(visits)
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def peak_memory(way: Way, visits: list[Visit]) -> float | None:
    """GiB on a GPU while the way takes a step, without what only the others keep there; None elsewhere."""
    if way.training.denoiser.device.type != "cuda":
        return None
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    way.step(visits)
    return (torch.cuda.max_memory_allocated() - before + way.own_bytes()) / 2**30


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


def prepared(config: TrainConfig, pairs: list[Pair], folder: FilePath) -> Training:
    with processes() as group:
        return prepare(config, pairs, [], folder, StopRequest(), Progress(console=Console(quiet=True)), group)


def ways_of(settings: Settings, pairs: list[Pair], folder: FilePath) -> tuple[dict[str, Way], dict[str, float]]:
    """Every way, and the seconds to load the network and fill the cache, compiled too where it is."""
    config = settings.config()

    def ours(training: Training, live: bool) -> Way:
        denoiser = training.denoiser
        used, second = training, []
        if live:
            reference = AdapterOff(denoiser, training.path) if config.lora_rank else SecondModel(denoiser.frozen_copy(), training.path)
            used = dataclasses.replace(training, reference=reference)
            second = [reference._frozen._network] if isinstance(reference, SecondModel) else []
        errors = lambda visits: policy_and_reference_errors(used, visits)  # noqa: E731
        return Way(training, errors, (denoiser._network, *second), descent=Descent(config, denoiser.trainable()))

    def naive(training: Training) -> Way:
        plain = Plain(training.denoiser)
        frozen = None if config.lora_rank else Plain(training.denoiser)
        trained = [parameter for parameter in plain.network.parameters() if parameter.requires_grad]
        return Way(
            dataclasses.replace(training, denoiser=plain.denoiser),
            lambda visits: naive_errors(training, plain, frozen, pairs, visits),
            (plain.network, *([frozen.network] if frozen else [])),
            optimizer=torch.optim.AdamW(trained, lr=config.lr, weight_decay=config.weight_decay),
        )

    started, seconds = time.perf_counter(), {}
    ways: dict[str, Way] = {}
    if set(settings.ways) - {"compiled"}:
        training = prepared(config, pairs, folder)
        seconds["plain"] = time.perf_counter() - started
        makers = {"naive": naive, "live": lambda of: ours(of, live=True), "cached": lambda of: ours(of, live=False)}
        ways |= {name: makers[name](training) for name in settings.ways if name != "compiled"}
    if "compiled" in settings.ways:
        started = time.perf_counter()
        ways["compiled"] = ours(prepared(settings.config(compile=True), pairs, folder), live=False)
        seconds["compiled"] = time.perf_counter() - started
    return ways, seconds


def disagreement(errors: Mapping[str, PairErrors], losses: Mapping[str, float], precision: str) -> str | None:
    """How naive and live differ by more than rounding, or None."""
    if not {"naive", "live"} <= set(errors):
        return None
    allowed, loss_allowed = (1e-4, 1e-5) if precision == "fp32" else (5e-2, 5e-3)
    for side in ("chosen", "rejected", "ref_chosen", "ref_rejected"):
        theirs, mine = getattr(errors["naive"], side), getattr(errors["live"], side)
        if not torch.allclose(theirs, mine, rtol=allowed, atol=0.0):
            return f"naive and live differ: {side} {theirs.tolist()} {mine.tolist()}"
    if not abs(losses["naive"] - losses["live"]) < loss_allowed:
        return f"naive and live differ: losses {losses['naive']} {losses['live']}"
    return None


def operations(way: Way, visits: list[Visit]) -> float | None:
    """Floating-point operations of a step; None where torch cannot count them."""
    counter = FlopCounterMode(display=False)
    try:
        with counter:
            way.step(visits)
    except (RuntimeError, AssertionError, KeyError) as error:
        print(f"operations are not counted: {type(error).__name__}: {error}")
        return None
    return float(counter.get_total_flops())


def figures(settings: Settings, seconds: Mapping[str, Sequence[float]], counted: float | None, peak: float | None) -> dict[str, Any]:
    """One row for each way."""
    rows: dict[str, dict[str, float | None]] = {}
    first = statistics.median(seconds[settings.ways[0]])
    for name, took in seconds.items():
        median = statistics.median(took)
        rows[name] = {
            "pairs_per_second": settings.micro_pairs / median,
            "slowest": settings.micro_pairs / max(took),
            "fastest": settings.micro_pairs / min(took),
            "ratio": first / median,
            "peak_gib": None,
            "matrix_share": counted / median / peak if counted and peak and name in ("cached", "compiled") else None,
        }
    return rows


def measure(settings: Settings, tell: Callable[[dict[str, Any]], None] = lambda found: None, peak: float | None = None) -> dict[str, Any]:
    """All figures of one measurement. `tell` gets those that there are so far; `peak` is the matrix peak if it is known, in FLOP/s."""
    pairs = random_pairs(settings.micro_pairs * 2, settings.side)
    config = settings.config()
    with tempfile.TemporaryDirectory() as cache:
        ways, filling = ways_of(settings, pairs, FilePath(cache))
        device = next(iter(ways.values())).training.denoiser.device
        found: dict[str, Any] = {
            "model": settings.model,
            "device": torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads",
            "tuning": f"LoRA rank {settings.rank}" if settings.rank else "full",
            "precision": settings.precision,
            "side": settings.side,
            "micro_pairs": settings.micro_pairs,
            "gradient_checkpointing": settings.gradient_checkpointing,
            "cache_seconds_per_pair": filling.get("plain", filling.get("compiled", 0.0)) / len(pairs),
            "compile_seconds": filling.get("compiled"),
        }
        tell(dict(found))
        batches = [[Visit(pair=first + i, number=0) for i in range(settings.micro_pairs)] for first in (0, settings.micro_pairs)]
        with torch.no_grad():
            errors = {name: way.errors(batches[0]) for name, way in ways.items()}
        found["losses"] = losses = {name: float(config.objective(each).mean()) for name, each in errors.items()}
        found["disagreement"] = disagreement(errors, losses, settings.precision)
        del errors
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(settings.warm_up):
            for way in ways.values():
                seconds_of(way, batches[number % 2])
        began = time.perf_counter()
        for number in range(settings.rounds):
            for name, way in ways.items():
                seconds[name].append(seconds_of(way, batches[number % 2]))
            tell(found | {"rounds": number + 1, "ways": figures(settings, seconds, None, None)})
            if number and time.perf_counter() - began > settings.rounds_s:
                break
        cached = ways.get("cached")
        counted = operations(cached, batches[0]) if cached else None
        found |= {
            "rounds": len(next(iter(seconds.values()))),
            "ways": figures(settings, seconds, counted, (peak or matrix_peak(device, config.dtype)) if counted else None),
            "tflop_per_step": counted and counted / 1e12,
            "shares_of_cached": shares(cached, batches[0]) if settings.profile and cached else {},
        }
        for name, way in ways.items():
            found["ways"][name]["peak_gib"] = peak_memory(way, batches[0])
        if "naive" in ways and cached:
            saved = (statistics.median(seconds["naive"]) - statistics.median(seconds["cached"])) / settings.micro_pairs
            found["visits_that_pay_for_the_cache"] = found["cache_seconds_per_pair"] / saved if saved > 0 else None
    return found


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
    parser.add_argument("--rounds", type=int, default=20, help="steps of each way, in turns")
    parser.add_argument("--json", type=FilePath, help="write the figures to this file")
    args = parser.parse_args()
    settings = Settings(
        model=args.model,
        micro_pairs=args.micro_pairs,
        side=args.side,
        rank=args.rank,
        precision=args.precision,
        gradient_checkpointing=args.gradient_checkpointing,
        ways=WAYS if args.compile else WAYS[:3],
        rounds=args.rounds,
        profile=args.profile,
    )
    with tempfile.TemporaryDirectory() as folder, random_weights() if args.model in ARCHITECTURES else nullcontext():
        if args.model in ARCHITECTURES:
            settings = dataclasses.replace(settings, model=str(save_configs(args.model, FilePath(folder) / args.model)))
        found = measure(settings) | {"model": args.model}
    if found["disagreement"]:
        raise SystemExit(found["disagreement"])
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
    visits = found["visits_that_pay_for_the_cache"]
    paid = "never paid back" if visits is None else f"paid back after {visits:.1f} visits of each"
    print(f"loading and filling the cache, 1 draw: {found['cache_seconds_per_pair']:.3f} s per pair, {paid}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
