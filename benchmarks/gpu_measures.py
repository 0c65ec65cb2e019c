"""Parts of the GPU check: the machine, the checks of `tests/gpu`, the whole loop on the embedded world."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from gpu_part import Job

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "transformers", "diffusers", "accelerate", "peft", "triton", "bitsandbytes", "numpy", "huggingface-hub", "safetensors")
ON_CPU = ROOT / "benchmarks" / "loop_on_cpu.json"
"""What `rpo run shapes` gave on two cores: at first from docs/shapes.md, later by `python benchmarks/gpu_measures.py RUN_FOLDER`."""


def best_seconds(call: Callable[[], object], device: str, repeats: int = 10) -> float:
    """The fastest of some calls, by the card's own clock where there is one."""
    times = []
    for _ in range(3):
        call()
    for _ in range(repeats):
        if device == "cuda":
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            call()
            ended.record()
            torch.cuda.synchronize()
            times.append(began.elapsed_time(ended) / 1000)
        else:
            started = time.perf_counter()
            call()
            times.append(time.perf_counter() - started)
    return min(times)


def matrix_flops(device: str, dtype: torch.dtype, side: int) -> float:
    """FLOP/s of a product of two random square matrices."""
    left, right = (torch.randn((side, side), device=device, dtype=torch.float32).to(dtype) for _ in range(2))
    return 2 * side**3 / best_seconds(lambda: left @ right, device)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _driver() -> str | None:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=10).stdout.split("\n")[0].strip()
    except (OSError, subprocess.SubprocessError):
        return None


def machine(job: Job) -> None:
    found: dict[str, Any] = {
        "python": sys.version.split()[0],
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "host_memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "versions": {name: _version(name) for name in PACKAGES},
        "card": "none, CPU",
    }
    if job.device == "cuda":
        about = torch.cuda.get_device_properties(0)
        found |= {
            "card": about.name,
            "memory_gib": round(about.total_memory / 2**30, 1),
            "capability": f"{about.major}.{about.minor}",
            "multiprocessors": about.multi_processor_count,
            "cuda": torch.version.cuda,
            "driver": _driver(),
        }
    job.tell(found)
    side = 512 if job.smoke else 8192
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        found[f"{name}_tflops"] = matrix_flops(job.device, dtype, side) / 1e12
        job.tell(found)
    count = 2**20 if job.smoke else 2**31
    source = torch.randint(0, 255, (count,), dtype=torch.uint8, device=job.device)
    target = torch.empty_like(source)
    found["copy_gb_per_s"] = 2 * count / best_seconds(lambda: target.copy_(source), job.device) / 1e9  # read and written
    if job.device == "cuda":
        pinned = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
        part = target[: 2**28]
        found["host_to_card_gb_per_s"] = 2**28 / best_seconds(lambda: part.copy_(pinned, non_blocking=True), job.device) / 1e9
        found["card_to_host_gb_per_s"] = 2**28 / best_seconds(lambda: pinned.copy_(part, non_blocking=True), job.device) / 1e9
    job.tell(found)


class _Report:
    """A pytest plugin that hands on every outcome at once."""

    def __init__(self, job: Job, found: dict[str, Any]) -> None:
        self._job, self._found = job, found

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        name = report.nodeid.split("::", 1)[-1]
        line: dict[str, Any] = {"test": name, "outcome": report.outcome, "seconds": round(report.duration, 2)}
        line |= {"figures": dict(report.user_properties)} if report.user_properties else {}
        if report.outcome == "failed":
            crash = getattr(report.longrepr, "reprcrash", None)
            line["why"] = " ".join(str(crash.message if crash else report.longrepr).split())[:500]
            self._found["problems"].append(f"{name}: {line['why'][:200]}")
        elif report.outcome == "skipped":
            line["why"] = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)[:200]
        self._found["tests"].append(line)
        self._found["counts"][report.outcome] = self._found["counts"].get(report.outcome, 0) + 1
        self._job.tell(self._found)


def run_tests(job: Job, found: dict[str, Any], *selection: str) -> None:
    """Checks of `tests/gpu` in this process; fills `found` with their outcomes."""
    import pytest

    if job.smoke:
        os.environ["RPO_GPU_CHECK"] = "cpu"
    found |= {"tests": [], "counts": {}, "problems": []}
    job.tell(found)
    # Not the project's own options: they need more packages, and turn another version's warning into an error.
    options = ["-q", "-o", "addopts=", "-o", "filterwarnings=default", "-p", "no:cacheprovider", "-p", "no:randomly", "--tb=short"]
    options += ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), f"--basetemp={job.scratch / 'pytest'}"]
    code = pytest.main([*options, *selection], plugins=[_Report(job, found)])
    if code not in (0, 1) or not found["tests"]:
        found["problems"].append(f"pytest ended with {code!s}; see gpu_check.log")
    job.tell(found)


def correctness(job: Job) -> None:
    # On the CPU half precision is emulated and slow.
    few = ["-k", "(exact or fp32 or latents or image_of or resume or whole or z_image) and not full"] if job.smoke else []
    tests = ROOT / "tests" / "gpu"
    run_tests(job, {}, str(tests / "test_numbers_on_card.py"), str(tests / "test_training_on_card.py"), *few)


def loop_figures(run: Path) -> dict[str, Any]:
    """Seconds per stage, and the headline with its interval, of a finished run folder."""
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    headline = summary["headline"]
    names = ("base", "tuned", "difference", "ci95", "n")
    return {
        "seconds": summary["seconds"],
        "headline": headline,
        "figures": {name: summary["evaluation"][headline].get(name) for name in names},
        "pairs_kept": summary.get("pairs_kept"),
    }


def compared(ours: Mapping[str, Any], cpu: Mapping[str, Any]) -> list[str]:
    """Differences to the CPU's run that its intervals do not explain."""
    problems = []
    (low, high), (cpu_low, cpu_high) = ours["figures"]["ci95"], cpu["figures"]["ci95"]
    if high < cpu_low or low > cpu_high:
        problems.append(
            f"{ours['headline']}: the difference's interval {low:+.3f} to {high:+.3f} misses the CPU's {cpu_low:+.3f} to {cpu_high:+.3f}"
        )
    # Of a share of n prompts, with both runs' error: four standard errors at most.
    for side in ("base", "tuned"):
        mine, theirs, count = ours["figures"][side], cpu["figures"][side], ours["figures"]["n"]
        allowed = 4 * (2 * max(theirs * (1 - theirs), 0.01) / count) ** 0.5 if 0 <= theirs <= 1 else float("inf")
        if abs(mine - theirs) > allowed:
            problems.append(f"{ours['headline']}, {side}: {mine:.3f}, on the CPU {theirs:.3f}")
    return problems


SMALL = (
    "--curate.prompts.count 16 --train.steps 3 --train.batch-pairs 2 --train.draws 1 --evaluate.prompts.count 8 --allow-fingerprint".split()
)


def loop(job: Job) -> None:
    from rpo.cli import entry

    run, began = job.scratch / "run", time.monotonic()
    sys.argv = ["rpo", "run", "shapes", "--out", str(run), *(SMALL if job.smoke else [])]
    found: dict[str, Any] = {"problems": []}
    job.tell(found)
    try:
        entry()
    except SystemExit as ended:
        if ended.code:
            if (run / "summary.json").exists():
                job.tell({"seconds": json.loads((run / "summary.json").read_text())["seconds"], "problems": []})
            raise RuntimeError(f"rpo run shapes ended with {ended.code}; see gpu_check.log") from ended
    found |= {"total_s": round(time.monotonic() - began, 1), **loop_figures(run)}
    if ON_CPU.exists():
        found["cpu"] = json.loads(ON_CPU.read_text(encoding="utf-8"))
        if not job.smoke:
            found["problems"] = compared(found, found["cpu"])
    job.tell(found)


if __name__ == "__main__":
    ON_CPU.write_text(json.dumps(loop_figures(Path(sys.argv[1])), indent=2) + "\n", encoding="utf-8")
