"""Steps, optimizers, resume, memory and the absence of waits on the card."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tuning import BASE, config_for, first_visits, prepared, shape_pairs

from rpo.training.dry_run import activation_bytes
from rpo.training.loop import take_step, train
from rpo.training.runtime.optimizer import Descent
from tiny_diffusion import make_pairs, save_pipeline
from tiny_families import FAMILIES, save_family

Within = Callable[..., None]


def steps(training: Any, count: int) -> list[float]:
    """Losses of the first steps; each must move every trained weight that has a gradient, and stay finite."""
    descent = Descent(training.config, training.denoiser.trainable())
    before = {name: weight.detach().clone() for name, weight in training.denoiser.trainable().items()}
    losses = [float(take_step(training, step, descent)["loss"]) for step in range(count)]
    assert all(abs(loss) < 1e4 for loss in losses), losses
    changed = [not torch.equal(weight, before[name]) for name, weight in training.denoiser.trainable().items()]
    assert sum(changed) > 0.5 * len(changed), f"{sum(changed)} of {len(changed)} trained tensors moved"
    assert all(weight.isfinite().all() for weight in training.denoiser.trainable().values())
    return losses


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "adamw8bit"])
def test_optimizers_step(card: torch.device, optimizer: str, precision: str, tmp_path: Path) -> None:
    if optimizer == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    model = str(save_pipeline(tmp_path / "model"))
    settings = {"optimizer": optimizer, "precision": precision, "lora_rank": None, "lr": 1e-4, "ema_decay": 0.9}
    losses = steps(prepared(config_for(model, **settings), make_pairs(8), card, tmp_path), 4)
    assert losses[-1] < losses[0] + 0.5, losses


@pytest.mark.parametrize("lora_rank", [2, None], ids=["lora", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_step_in_bf16(card: torch.device, family: str, lora_rank: int | None, tmp_path: Path) -> None:
    model = str(save_family(family, tmp_path / "model"))
    config = config_for(model, precision="bf16", lora_rank=lora_rank, batch_pairs=2, caption_dropout=0.5, resolution=64)
    steps(prepared(config, shape_pairs(4), card, tmp_path), 3)


@pytest.mark.parametrize(
    ("family", "precision"),
    [("embedded base", "bf16"), *product([name for name in FAMILIES if name != "z_image"], ["fp32", "bf16", "fp16"])],
)
def test_a_step_never_waits_for_the_device(card: torch.device, family: str, precision: str, tmp_path: Path) -> None:
    """Z-Image reads the lengths of its prompts back once per call, which its code says."""
    model = BASE if family == "embedded base" else str(save_family(family, tmp_path / "model"))
    config = config_for(model, precision=precision, batch_pairs=4, accumulation=2, resolution=64, unchanged_weight=0.5, ema_decay=0.9)
    training = prepared(config, shape_pairs(8), card, tmp_path)
    descent = Descent(config, training.denoiser.trainable())
    for step in range(2):
        take_step(training, step, descent)
    if card.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        metrics = take_step(training, 2, descent)
    finally:
        if card.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert float(metrics["loss"]) > 0


_CHILD = """
import json, os, signal, sys, threading, time
from pathlib import Path
from rpo.training.loop import train
from tiny_diffusion import make_pairs
from tuning import config_for
model, run, settings = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
def kill_in_the_middle():
    while not (run / "train" / "checkpoints" / "step-000040").exists():
        time.sleep(0.002)
    os.kill(os.getpid(), signal.SIGKILL)
threading.Thread(target=kill_in_the_middle, daemon=True).start()
train(config_for(model, **settings), make_pairs(8), run)
"""


def test_resume_after_a_kill(card: torch.device, tmp_path: Path, within: Within) -> None:
    """Bitwise equal on a CPU; on a card as far as its kernels give the same bits twice."""
    model = str(save_pipeline(tmp_path / "model"))
    settings = {"steps": 120, "batch_pairs": 4, "checkpoint_every": 20, "keep_checkpoints": 9, "lr": 1e-3}
    command = [sys.executable, "-c", _CHILD, model, str(tmp_path / "killed"), json.dumps(settings)]
    paths = os.pathsep.join([*sys.path, *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    child = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": paths}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    whole = train(config_for(model, **settings), make_pairs(8), tmp_path / "whole")
    _, errors = child.communicate(timeout=240)
    assert child.returncode == -signal.SIGKILL, errors[-2000:]
    cut = train(config_for(model, **settings), make_pairs(8), tmp_path / "killed", resume=True)
    left, right = (load_file(result.weights / "pytorch_lora_weights.safetensors") for result in (whole, cut))
    apart = max(float((left[name].float() - right[name].float()).norm() / left[name].float().norm().clamp(min=1e-12)) for name in left)
    within("weights of the resumed run off the whole one's", apart, 0.0 if card.type == "cpu" else 5e-2)


@pytest.mark.parametrize(("lora_rank", "precision"), [(None, "fp32"), (None, "bf16"), (4, "bf16")])
def test_memory_estimate_against_the_peak(
    card: torch.device, lora_rank: int | None, precision: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Weights, gradients, the optimizer's state and the activations that a dry run counts."""
    pairs = 8 if card.type == "cpu" else 1024
    before = torch.cuda.memory_allocated() if card.type == "cuda" else 0
    config = config_for(lora_rank=lora_rank, precision=precision, batch_pairs=pairs, draws=1, steps=1, cache_batch=256)
    training = prepared(config, shape_pairs(8) * (pairs // 8), card, tmp_path)
    network: Any = training.denoiser._network  # pyright: ignore[reportAttributeAccessIssue, reportPrivateUsage]
    trained = sum(weight.numel() for weight in training.denoiser.trainable().values())
    weights = sum(weight.nbytes for weight in network.parameters())
    estimate = weights + (config.bytes_per_weight - 4.0) * trained + activation_bytes(training, first_visits(training))
    record_property("estimate", f"{estimate / 2**30:.3f} GiB")
    descent = Descent(config, training.denoiser.trainable())
    take_step(training, 0, descent)
    if card.type == "cpu":
        return
    torch.cuda.reset_peak_memory_stats()
    take_step(training, 0, descent)
    peak = torch.cuda.max_memory_allocated() - before
    record_property("peak", f"{peak / 2**30:.3f} GiB")
    assert abs(estimate / peak - 1) <= 0.15, f"estimate {estimate / 2**30:.3f} GiB, peak {peak / 2**30:.3f} GiB"


def test_a_whole_run_in_half_precision(card: torch.device, tmp_path: Path) -> None:
    """Held-out pairs, the best checkpoint and a file of weights, as `rpo train` makes them."""
    model = str(save_pipeline(tmp_path / "model"))
    began = time.monotonic()
    settings = {"precision": "bf16", "steps": 8, "batch_pairs": 4, "eval_every": 4, "checkpoint_every": 4, "log_every": 2, "result": "best"}
    result = train(config_for(model, **settings), make_pairs(8, held_out=3), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "train" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 8 and 0 <= lines[-1]["held_out_accuracy"] <= 1
    assert load_file(result.weights / "pytorch_lora_weights.safetensors")
    assert time.monotonic() - began < 120
