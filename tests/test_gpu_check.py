"""The GPU check itself, on the CPU: what its parts report, what it does with parts that go wrong, and the files it writes."""

import importlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu_check
import pytest
from gpu_measures import compared
from gpu_speed import kernel_summary
from gpu_tables import page
from gpu_wheels import wanted
from random_pipelines import ARCHITECTURES, random_weights, save_configs
from torch.autograd import DeviceType
from train_step import Settings, measure

PROGRAM = Path(gpu_check.__file__)


def run(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(PROGRAM), "--cpu-smoke", "--out", str(out), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def read(out: Path) -> dict[str, Any]:
    return json.loads((out / "gpu_check.json").read_text())


def test_parts_that_fail_hang_or_run_out_of_memory_are_reported_and_the_rest_goes_on(tmp_path: Path) -> None:
    ended = run(tmp_path, "--plant", "failure", "--plant", "hang", "--plant", "memory", "--only", "machine")
    assert ended.returncode == 1, ended.stderr
    found = read(tmp_path)
    assert found["smoke"] and found["version"] == 1 and found["commit"]
    parts = found["parts"]
    assert [parts[name]["status"] for name in parts] == ["failed", "timed out", "out of memory", "done"]
    assert "ValueError: planted failure (gpu_planted.py:" in parts["planted_failure"]["why"]
    assert "gpu_planted.py" in parts["planted_hang"]["why"] and "in hang" in parts["planted_hang"]["why"]
    assert [parts[f"planted_{name}"]["result"] for name in ("failure", "hang", "memory")] == [{"figure": 1}, {"figure": 2}, {"figure": 3}]
    assert parts["machine"]["result"]["versions"]["torch"] and parts["machine"]["result"]["fp32_tflops"] > 0
    told, log = (tmp_path / "gpu_check.md").read_text(), (tmp_path / "gpu_check.log").read_text()
    assert "| planted_hang | A part that hangs | timed out |" in told and "planted failure" in log and "TFLOP/s" in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu_check.json", "gpu_check.log", "gpu_check.md"]

    assert run(tmp_path, "--only", "machine").returncode == 0
    assert read(tmp_path)["parts"]["planted_hang"] == parts["planted_hang"], "what was not repeated has changed"


def test_a_check_that_is_stopped_leaves_what_was_done_and_no_process(tmp_path: Path) -> None:
    command = [sys.executable, str(PROGRAM), "--cpu-smoke", "--out", str(tmp_path), "--plant", "hang", "--only", "machine"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while time.monotonic() < until and "hang" not in (
        (tmp_path / "gpu_check.json").read_text() if (tmp_path / "gpu_check.json").exists() else ""
    ):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM
    entry = read(tmp_path)["parts"]["planted_hang"]
    assert entry["status"] in ("running", "timed out") and entry["result"] == {"figure": 2}
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert not [line for line in listed.splitlines() if "gpu_part.py gpu_planted" in line and str(tmp_path) in line]


def test_every_part_has_a_function_and_every_name_is_its_own() -> None:
    for part in (*gpu_check.PARTS, *gpu_check.PLANTED):
        module, function = part.where.split(":")
        assert callable(getattr(importlib.import_module(module), function))
    names = [part.name for part in (*gpu_check.PARTS, *gpu_check.PLANTED)]
    assert len(set(names)) == len(names)
    first = [part.name for part in gpu_check.PARTS]
    assert first[:2] == ["machine", "correctness"]


def event(name: str, first: float, last: float, on_card: bool = True, annotation: bool = False) -> SimpleNamespace:
    device = DeviceType.CUDA if on_card else DeviceType.CPU
    return SimpleNamespace(name=name, device_type=device, is_user_annotation=annotation, time_range=SimpleNamespace(start=first, end=last))


def test_a_profile_counts_kernels_once_and_finds_the_time_without_any() -> None:
    events = [
        event("gemm", 0, 40),
        event("gemm", 50, 90),
        event("add", 30, 45),  # overlaps with a kernel of another stream
        event("Memcpy HtoD", 95, 100),
        event("aten::mm", 0, 200, on_card=False),
        event("Optimizer.step#AdamW.step", 0, 200),
        event("a range", 0, 200, annotation=True),
    ]
    found = kernel_summary(events, steps=2, wall_us=200)
    assert found["step_ms"] == pytest.approx(0.1)
    assert found["idle_share"] == pytest.approx(1 - (45 + 40 + 5) / 200)
    assert found["kernels_per_step"] == 1.5 and found["copies_per_step"] == 0.5
    assert [row["name"] for row in found["largest"]] == ["gemm", "add", "Memcpy HtoD"]
    assert found["largest"][0]["share"] == pytest.approx(0.8)
    assert kernel_summary([], steps=2, wall_us=200)["idle_share"] is None


def loop_run(base: float, tuned: float, low: float, high: float) -> dict[str, Any]:
    figures = {"base": base, "tuned": tuned, "difference": tuned - base, "ci95": [low, high], "n": 400}
    return {"headline": "fully_correct", "figures": figures, "seconds": {"train": 3.0}, "pairs_kept": 500}


def test_the_loop_s_figures_are_held_against_the_cpu_s() -> None:
    cpu = loop_run(0.448, 0.99, 0.492, 0.59)
    assert compared(loop_run(0.455, 0.985, 0.48, 0.58), cpu) == []
    assert len(compared(loop_run(0.455, 0.6, 0.10, 0.19), cpu)) == 2
    assert len(compared(loop_run(0.1, 0.99, 0.85, 0.92), cpu)) == 2


def test_the_page_shows_problems_and_what_was_cut() -> None:
    state = {
        "date": "2026-11-28T00:00:00+00:00",
        "commit": "abc",
        "smoke": False,
        "parts": {
            "machine": {"title": "Machine", "status": "done", "seconds": 3, "result": {"card": "A card", "bf16_tflops": 700.0}},
            "correctness": {
                "title": "Correctness",
                "status": "timed out",
                "seconds": 9,
                "why": "stopped",
                "result": {
                    "tests": [{"test": "t[bf16]", "outcome": "failed", "why": "a|b"}],
                    "counts": {"failed": 1},
                    "problems": ["t: off"],
                },
            },
            "loop": {"title": "Loop", "status": "not started", "seconds": 0, "result": {}},
        },
    }
    told = page(state)
    assert told.startswith("# GPU check: A card, 2026-11-28, commit abc")
    assert "PROBLEM: t: off" in told and "| loop | Loop | not started |" in told and "a\\|b" in told and "700.0 TFLOP/s" in told


def test_wheels_that_a_machine_holds_are_left_out() -> None:
    names = [line.split("=")[0].split(">")[0] for line in wanted(["scipy", "pyarrow", "Pillow", "typing_extensions"])]
    assert "diffusers" in names and not {"scipy", "pyarrow", "pillow", "torch", "transformers"} & set(names)


@pytest.mark.parametrize("rank", [4, 0])
def test_a_step_of_a_network_that_no_file_holds(tmp_path: Path, rank: int) -> None:
    """Naive and live agree to rounding, and figures come one after the other."""
    told: list[dict[str, Any]] = []
    with random_weights():
        model = str(save_configs("sd15", tmp_path / "sd15", tiny=True))
        found = measure(Settings(model=model, side=32, micro_pairs=1, rank=rank, rounds=1), told.append, peak=1e12)
    assert found["disagreement"] is None and set(found["ways"]) == {"naive", "live", "cached"}
    assert found["tflop_per_step"] > 0 and found["ways"]["cached"]["matrix_share"] > 0
    assert "ways" not in told[0] and "ways" in told[-1]
    assert not list(tmp_path.rglob("*.safetensors")) and "sd15" in ARCHITECTURES


@pytest.mark.slow
def test_every_part_ends_on_the_cpu(tmp_path: Path) -> None:
    ended = subprocess.run([sys.executable, str(PROGRAM), "--cpu-smoke", "--out", str(tmp_path)], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout
    assert {entry["status"] for entry in read(tmp_path)["parts"].values()} == {"done"}
    assert len(read(tmp_path)["parts"]) == len(gpu_check.PARTS)
