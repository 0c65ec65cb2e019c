"""Two processes compute what one does, and a run changes hands between them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_resume import FORKS

from rpo.data.pairs import write_pairs
from rpo.errors import Interrupted
from rpo.training.config import TrainConfig
from rpo.training.loop import train
from rpo.training.objectives.preference import DiffusionDPO, DiffusionKTO
from rpo.training.runtime import distributed as parallel
from tiny_diffusion import make_pairs, save_pipeline


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("model"))


def config_for(model: str, **settings: Any) -> TrainConfig:
    defaults: dict[str, Any] = {
        "objective": DiffusionDPO(k=50.0),
        "steps": 12,
        "batch_pairs": 8,
        "accumulation": 2,
        "lr": 1e-3,
        "warmup_steps": 2,
        "lora_rank": 2,
        "draws": 2,
        "log_every": 2,
        "eval_every": 3,
        "checkpoint_every": 3,
    }
    return TrainConfig(model=model, **{**defaults, **settings})


def work(model: str, run: str, settings: dict[str, Any], launched: dict[str, str]) -> None:
    torch.set_num_threads(1)
    os.environ.update(launched)
    try:
        train(config_for(model, **settings), make_pairs(90, held_out=9), Path(run), resume=True)
    except Interrupted as stopped:
        raise SystemExit(128 + stopped.signum) from None


def start(model: Path, run: Path, count: int, **settings: Any) -> list[BaseProcess]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    together = []
    for rank in range(count):
        launched = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        together.append(FORKS.Process(target=work, args=(str(model), str(run), settings, launched)))
        together[-1].start()
    return together


def finish(together: list[BaseProcess]) -> list[int | None]:
    for process in together:
        process.join(timeout=120)
    return [process.exitcode for process in together]


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "train" / "metrics.jsonl").read_text().splitlines()]


def weights_of(run: Path, lora: bool) -> dict[str, torch.Tensor]:
    file = "pytorch_lora_weights.safetensors" if lora else "unet/diffusion_pytorch_model.safetensors"
    return load_file(run / "train" / "weights" / file)


def assert_same_run(left: Path, right: Path, lora: bool = True) -> None:
    ours, theirs = lines_of(left), lines_of(right)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == list(range(1, 13))
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        rounding = {"accuracy"} if mine["step"] == 1 else set()  # every margin is 0 but for rounding
        for name in mine.keys() - {"seconds", "alarm", "sha256"} - rounding:
            assert mine[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5), (mine["step"], name)
    one, two = weights_of(left, lora), weights_of(right, lora)
    assert one.keys() == two.keys()
    assert all(torch.allclose(one[name], two[name], atol=1e-4) for name in one)


@pytest.mark.parametrize(("lora_rank", "split"), [(2, False), (None, False), (2, True)])
def test_two_processes_train_what_one_does(model: Path, tmp_path: Path, lora_rank: int | None, split: bool) -> None:
    """Also where they hold the frozen network and its adapters together, which then are off for the reference in every step."""
    settings: dict[str, Any] = {"lora_rank": lora_rank, "reference": "live" if split else "cached"}
    assert finish(start(model, tmp_path / "one", 1, **settings)) == [0]
    assert finish(start(model, tmp_path / "two", 2, shard=split, **settings)) == [0, 0]
    assert_same_run(tmp_path / "one", tmp_path / "two", lora_rank is not None)
    shards = {folder: {path.name for path in (tmp_path / folder / "train" / "cache").iterdir()} for folder in ("one", "two")}
    assert shards["one"] == shards["two"] and len(shards["one"]) > 4


def test_a_statistic_over_the_batch_is_the_same_in_two_processes(model: Path, tmp_path: Path) -> None:
    """Diffusion-KTO measures each side against the mean advantage of the step's pairs."""
    k = {"objective": DiffusionKTO(k=50.0), "steps": 12, "lr": 1e-2}
    assert finish(start(model, tmp_path / "one", 1, accumulation=4, **k)) == [0]
    assert finish(start(model, tmp_path / "two", 2, accumulation=1, **k)) == [0, 0]
    assert_same_run(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize(
    ("first", "second", "split", "lora_rank"), [(2, 1, False, 2), (1, 2, False, 2), (2, 1, True, None), (1, 2, True, None), (2, 1, True, 2)]
)
def test_a_run_is_resumed_by_another_number_of_processes(
    model: Path, tmp_path: Path, first: int, second: int, split: bool, lora_rank: int | None
) -> None:
    """Also where two of them hold one network together (`shard`) and one alone holds it whole."""
    settings: dict[str, Any] = {"lora_rank": lora_rank} | ({"ema_decay": 0.9, "result": "best"} if split else {})
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert finish(start(model, whole, 1, **settings)) == [0]
    together = start(model, broken, first, shard=split and first > 1, **settings)
    while not list((broken / "train" / "checkpoints").glob("step-*")) and any(process.is_alive() for process in together):
        time.sleep(0.02)
    os.kill(together[-1].pid or 0, signal.SIGTERM)  # one of them is told; all stop at the same step
    codes = finish(together)
    assert codes in ([143] * first, [0] * first)  # or they were just done
    assert finish(start(model, broken, second, shard=split and second > 1, **settings)) == [0] * second
    assert_same_run(whole, broken, lora=lora_rank is not None)


def test_one_process_alone_does_not_split(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shard needs several processes"):
        train(config_for(str(model), shard=True, lora_rank=None), make_pairs(8), tmp_path)
    with pytest.raises(ValueError, match="shard is for fp32 or bf16 without compile"):
        config_for(str(model), shard=True, compile=True)


def test_a_batch_that_does_not_divide_is_told(model: Path, tmp_path: Path) -> None:
    assert finish(start(model, tmp_path / "run", 2, batch_pairs=3, accumulation=1)) == [1, 1]
    assert not (tmp_path / "run" / "train" / "config.json").exists()


def test_torchrun_launches_the_command_line(model: Path, tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs.parquet", make_pairs(30, held_out=4))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "rpo"]
    settings = {"model": model, "steps": 2, "batch-pairs": 2, "accumulation": 1, "precision": "fp32", "resolution": 32}
    options = [text for name, value in settings.items() for text in (f"--train.{name}", str(value))]
    command = [
        *launch,
        "train",
        "sd15_dpo",
        "--pairs",
        str(tmp_path / "pairs.parquet"),
        "--out",
        str(tmp_path / "run"),
        "--allow-fingerprint",
    ]
    done = subprocess.run([*command, *options], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "train" / "weights" / "pytorch_lora_weights.safetensors").exists()
    assert done.stderr.count("tuned weights in") == 1


def test_gradients_are_summed_in_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "_BUCKET", 10)
    sizes = [[gradient.numel() for gradient in bucket] for bucket in parallel._buckets(torch.zeros(size) for size in (4, 6, 1, 25, 3, 3))]
    assert sizes == [[4, 6], [1], [25], [3, 3]]
