"""Killed at random moments and started again, a run ends with the bits and the metrics of one that was never disturbed."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rpo.errors import Interrupted
from rpo.training.config import TrainConfig
from rpo.training.loop import train
from rpo.training.objectives.preference import DiffusionDPO
from tiny_diffusion import make_pairs, save_pipeline

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["rpo.training.loop", "tiny_diffusion"])


def config_for(model: Path, lora_rank: int | None) -> TrainConfig:
    return TrainConfig(
        model=str(model),
        objective=DiffusionDPO(k=50.0),
        steps=24,
        batch_pairs=4,
        accumulation=2,
        lr=1e-3,
        warmup_steps=2,
        lora_rank=lora_rank,
        draws=3,
        log_every=2,
        eval_every=5,
        checkpoint_every=3,
    )


def work(model: str, run: str, lora_rank: int | None) -> None:
    torch.set_num_threads(1)
    try:
        train(config_for(Path(model), lora_rank), make_pairs(9, held_out=2), Path(run), resume=True)
    except Interrupted as stopped:
        raise SystemExit(128 + stopped.signum) from None


def start(model: Path, run: Path, lora_rank: int | None) -> BaseProcess:
    process = FORKS.Process(target=work, args=(str(model), str(run), lora_rank))
    process.start()
    return process


def finish(model: Path, run: Path, lora_rank: int | None) -> float:
    """Seconds it took."""
    began = time.monotonic()
    process = start(model, run, lora_rank)
    process.join()
    assert process.exitcode == 0
    return time.monotonic() - began


def outcome(run: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    weights: dict[str, torch.Tensor] = {}
    for file in sorted((run / "train" / "weights").rglob("*.safetensors")):
        weights |= {f"{file.relative_to(run)}/{name}": tensor for name, tensor in load_file(file).items()}
    lines = [json.loads(line) for line in (run / "train" / "metrics.jsonl").read_text().splitlines()]
    return weights, [{name: value for name, value in line.items() if name not in ("seconds", "sha256")} for line in lines]


def assert_same_outcome(left: Path, right: Path) -> None:
    (weights, lines), (other_weights, other_lines) = outcome(left), outcome(right)
    assert weights and weights.keys() == other_weights.keys()
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)
    assert lines == other_lines and [line["step"] for line in lines] == list(range(1, 25))
    names = {path.name for path in (left / "train").iterdir()}
    assert names == {"cache", "checkpoints", "config.json", "metrics.jsonl", "weights"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("model"))


def killed_and_resumed(model: Path, folder: Path, lora_rank: int | None, kills: int, seed: int) -> None:
    duration = finish(model, folder / "whole", lora_rank)
    moments = random.Random(seed)
    for _ in range(kills):
        process = start(model, folder / "killed", lora_rank)
        time.sleep(moments.uniform(0, 1.1 * duration))
        process.kill()
        process.join()
    finish(model, folder / "killed", lora_rank)
    assert_same_outcome(folder / "killed", folder / "whole")


def test_killed_at_random_moments(model: Path, tmp_path: Path) -> None:
    killed_and_resumed(model, tmp_path, lora_rank=2, kills=4, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("lora_rank", [2, None])
@pytest.mark.parametrize("seed", range(1, 6))
def test_killed_often_at_random_moments(model: Path, tmp_path: Path, lora_rank: int | None, seed: int) -> None:
    killed_and_resumed(model, tmp_path, lora_rank, kills=5, seed=seed)


@pytest.mark.parametrize(("number", "lora_rank"), [(signal.SIGTERM, None), (signal.SIGINT, 2)])
def test_asked_to_stop_twice_and_resumed(model: Path, tmp_path: Path, number: signal.Signals, lora_rank: int | None) -> None:
    """A resume of a resume; each stop leaves a checkpoint of its very step."""
    finish(model, tmp_path / "whole", lora_rank)
    run = tmp_path / "stopped"
    metrics, checkpoints = run / "train" / "metrics.jsonl", run / "train" / "checkpoints"
    for lines in (5, 13):
        process = start(model, run, lora_rank)
        while process.is_alive() and (not metrics.exists() or len(metrics.read_text().splitlines()) < lines):
            time.sleep(0.01)
        assert process.pid is not None
        os.kill(process.pid, number)
        process.join()
        assert process.exitcode == 128 + number
        newest = max(int(path.name.removeprefix("step-")) for path in checkpoints.iterdir())
        assert len(metrics.read_text().splitlines()) == newest < 24
    finish(model, run, lora_rank)
    assert_same_outcome(run, tmp_path / "whole")


def test_a_damaged_checkpoint_costs_time_and_nothing_else(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(config_for(model, 2), make_pairs(9, held_out=2), tmp_path)
    before, folder = outcome(tmp_path), tmp_path / "train"
    shutil.rmtree(folder / "weights")
    (folder / "checkpoints" / "step-000024" / "trained.safetensors").write_bytes(b"rubbish")
    train(config_for(model, 2), make_pairs(9, held_out=2), tmp_path, resume=True)
    after = outcome(tmp_path)
    assert after[1] == before[1] and all(torch.equal(after[0][name], before[0][name]) for name in before[0])
    assert "step-000024 is damaged" in capsys.readouterr().err.replace("\n", "")


def test_a_finished_run_is_not_run_again(model: Path, tmp_path: Path) -> None:
    finish(model, tmp_path / "run", 2)
    file = tmp_path / "run" / "train" / "weights" / "pytorch_lora_weights.safetensors"
    written = file.stat().st_mtime_ns
    finish(model, tmp_path / "run", 2)
    assert file.stat().st_mtime_ns == written
