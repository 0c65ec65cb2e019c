"""What a machine with a CUDA card says about this project, in ten minutes, without hub or network.

    python benchmarks/gpu_check.py --minutes 10 --out DIR          (or: make gpu-check)
    python benchmarks/gpu_check.py --out DIR --only correctness    repeats one part and keeps the others' figures
    python benchmarks/gpu_check.py --out DIR --cpu-smoke           every part with tiny sizes on the CPU, to try the check itself

Every part is a process with a time limit. `DIR/gpu_check.json` and `DIR/gpu_check.md` are written after every part and while one runs;
`DIR/gpu_check.log` holds what the parts printed. A part that fails, hangs or runs out of memory is reported, and the next one starts.
The package need not be installed, and its own lower bounds do not count: torch 2.11 and transformers 5.17 are enough. What else a machine
needs is in `benchmarks/gpu_requirements.txt`. Exit code 0: every part is done and has found nothing wrong.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gpu_tables import page

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
VERSION = 1
"""Of the JSON."""
START_LEAST_S = 8.0
"""A part does not start with less time left."""
IMPORT_S = 120.0
"""A part's imports may take this long on a disk that is read for the first time."""
_WRITE_EVERY_S = 2.0


@dataclass(frozen=True)
class Part:
    """A piece of the check, worth running alone."""

    name: str
    title: str
    where: str
    """module:function in this folder; the function takes a `gpu_part.Job`."""
    limit_s: float
    imports: tuple[str, ...] = ()
    """What it imports later, loaded while the part before it runs."""


_TESTS = ("pytest", "tiny_families", "rpo.training.dry_run")
_LOOP = ("rpo.cli.commands", "rpo.recipes.shapes", "rpo.api.curation", "rpo.api.training", "rpo.api.evaluation")
PARTS = (
    Part("machine", "Machine", "gpu_measures:machine", 40),
    Part("correctness", "Correctness", "gpu_measures:correctness", 170, _TESTS),
    Part("sd15_lora", "SD1.5, 512 px, LoRA", "gpu_speed:sd15_lora", 60),
    Part("sd15_full", "SD1.5, 512 px, full tuning", "gpu_speed:sd15_full", 70),
    Part("loop", "The whole loop: rpo run shapes", "gpu_measures:loop", 150, _LOOP),
    Part("sdxl_lora", "SDXL, 1024 px, LoRA", "gpu_speed:sdxl_lora", 75),
    Part("flux_lora", "FLUX.1-sized, 1024 px, LoRA", "gpu_speed:flux_lora", 100),
    Part("profile", "Profile of five cached steps", "gpu_speed:profiles", 70),
    Part("curation", "Curation: sampling and editing", "gpu_curation:curation", 75),
    Part("qwen_lora", "Qwen-Image-sized, 1024 px, LoRA: the network alone", "gpu_speed:qwen_lora", 75),
    Part("compile", "torch.compile: bounds and SD1.5 LoRA", "gpu_speed:compiled", 240),
)
"""In order of value: what is cut at the end is missed least."""
PLANTED = (
    Part("planted_failure", "A part that fails", "gpu_planted:failure", 10),
    Part("planted_hang", "A part that hangs", "gpu_planted:hang", 6),
    Part("planted_memory", "A part that runs out of memory", "gpu_planted:memory", 30),
)
"""Try the check itself: `--plant`."""


def revision() -> str:
    """Commit of this tree, with a plus where files differ from it; "unknown" for a copy without its repository."""
    git = ["git", "-C", str(ROOT)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+" if changed.stdout.strip() else "")


class Runner:
    """One part's process."""

    def __init__(self, part: Part, folder: Path, smoke: bool) -> None:
        self.part = part
        self._output, self._log, scratch = (folder / f"{part.name}{suffix}" for suffix in (".json", ".log", ".scratch"))
        scratch.mkdir()
        module, function = part.where.split(":")
        paths = [str(ROOT / "src"), str(HERE), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONUNBUFFERED": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            **({"CUDA_VISIBLE_DEVICES": ""} if smoke else {}),
        }
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(HERE / "gpu_part.py"), module, function, str(self._output), str(scratch), *part.imports],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=ROOT,
                start_new_session=True,
            )
        self._scratch = scratch

    def ready(self, seconds: float) -> None:
        """Waits for the imports, which do not count as the part's time."""
        until = time.monotonic() + seconds
        while not self._output.with_suffix(".ready").exists() and time.monotonic() < until and not self.ended(0.1):
            pass

    def begin(self, told: Mapping[str, Any]) -> None:
        """The card is the part's from now on."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it has died during its imports, which `ended` reports
            self._process.stdin.write(json.dumps(told).encode() + b"\n")
            self._process.stdin.flush()

    def ended(self, seconds: float) -> bool:
        """Waits so long at most."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def stop(self) -> None:
        """Kills the part with all that it has started."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, number)
            if self.ended(1.0 if number == signal.SIGTERM else 5.0):
                break
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)  # what it left behind

    def told(self) -> dict[str, Any]:
        """What the part has written so far."""
        try:
            return json.loads(self._output.read_text())
        except (OSError, ValueError):
            return {}

    def outcome(self) -> dict[str, Any]:
        """Status and figures of a process that has ended by itself."""
        told, code = self.told(), self._process.returncode
        if "status" not in told:
            if code == 0:
                told["status"] = "done"
            else:
                how = f"killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
                told |= {"status": "failed", "why": f"{how}; last line: {self.last_line()}"}
        return told

    def last_line(self) -> str:
        lines = [line.strip() for line in self.log().splitlines() if line.strip()]
        return lines[-1][:300] if lines else "none"

    def place(self) -> str:
        """Where the main thread of a part that is stopped was, by the stack that it wrote before its end."""
        main = self.log().rpartition("Current thread")[2] or self.log().rpartition("Thread 0x")[2]
        frames = [line.strip() for line in main.splitlines() if line.strip().startswith("File ")]
        return frames[0] if frames else f"an unknown place, after the line: {self.last_line()}"

    def log(self) -> str:
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def close(self) -> None:
        self.stop()
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        shutil.rmtree(self._scratch, ignore_errors=True)


class Check:
    """The parts one after the other, and the files that tell what came of them."""

    def __init__(self, out: Path, parts: Sequence[Part], *, minutes: float, smoke: bool, known: Mapping[str, Any], commit: str) -> None:
        self._out, self._parts, self._smoke = out, parts, smoke
        self._deadline = time.monotonic() + 60 * minutes
        self.state: dict[str, Any] = {
            "version": VERSION,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": commit,
            "minutes": minutes,
            "smoke": smoke,
            "parts": dict(known),
        }

    def run(self) -> None:
        with tempfile.TemporaryDirectory(prefix="gpu-check-", ignore_cleanup_errors=True) as folder:
            waiting: Runner | None = None
            runner: Runner | None = None
            try:
                for number, part in enumerate(self._parts):
                    runner = waiting or Runner(part, Path(folder), self._smoke)
                    following = self._parts[number + 1] if number + 1 < len(self._parts) else None
                    waiting = None
                    if following is not None and not self._smoke:  # the CPU smoke has no cores to spare
                        waiting = Runner(following, Path(folder), self._smoke)
                    self._run(runner)
                    runner = None
            finally:
                for each in (runner, waiting):
                    if each is not None:
                        each.close()

    def _run(self, runner: Runner) -> None:
        part = runner.part
        runner.ready(min(IMPORT_S, self._deadline - time.monotonic()))
        left = self._deadline - time.monotonic()
        if left < START_LEAST_S:
            runner.close()
            self._record(part, {"status": "not started", "why": f"{max(0.0, left):.0f} s were left"})
            return
        # A core or two take longer than a card, even for tiny sizes.
        limit = min(part.limit_s * (10 if self._smoke and part not in PLANTED else 1), left - 2)
        machine = self.state["parts"].get("machine", {}).get("result", {})
        began = time.monotonic()
        print(f"{part.name}: up to {limit:.0f} s", flush=True)
        runner.begin({"smoke": self._smoke, "limit_s": limit, "machine": machine})
        while not runner.ended(_WRITE_EVERY_S):
            took = time.monotonic() - began
            if took > limit:
                told = runner.told()
                runner.stop()
                why = f"stopped after {limit:.0f} s at {runner.place()}; its stack is in gpu_check.log"
                self._record(part, {**told, "status": "timed out", "why": why}, took, runner)
                return
            self._record(part, {**runner.told(), "status": "running"}, took)
        self._record(part, runner.outcome(), time.monotonic() - began, runner)

    def _record(self, part: Part, told: Mapping[str, Any], seconds: float = 0.0, runner: Runner | None = None) -> None:
        entry = {"title": part.title, "seconds": round(seconds, 1), "result": {}, **told}
        self.state["parts"][part.name] = entry
        if entry["status"] != "running":
            print(f"{part.name}: {entry['status']}, {seconds:.0f} s{': ' + entry['why'] if entry.get('why') else ''}", flush=True)
        if runner is not None:
            with (self._out / "gpu_check.log").open("a", encoding="utf-8") as log:
                log.write(f"===== {part.name}: {entry['status']}, {seconds:.1f} s\n{runner.log()}\n")
            runner.close()
        self.write()

    def write(self) -> None:
        order = [part.name for part in (*PLANTED, *PARTS)]
        parts = self.state["parts"]
        self.state["parts"] = {name: parts[name] for name in sorted(parts, key=lambda name: order.index(name) if name in order else 99)}
        for name, text in (("gpu_check.json", json.dumps(self.state, indent=1) + "\n"), ("gpu_check.md", page(self.state))):
            partial = self._out / f".{name}"
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, self._out / name)

    @property
    def sound(self) -> bool:
        """Whether every part of this run is done and found nothing wrong."""
        entries = [self.state["parts"].get(part.name, {}) for part in self._parts]
        return all(entry.get("status") == "done" and not entry["result"].get("problems") for entry in entries)


def earlier(out: Path) -> dict[str, Any]:
    """Parts of the check that the folder holds."""
    try:
        return json.loads((out / "gpu_check.json").read_text(encoding="utf-8"))["parts"]
    except (OSError, ValueError, KeyError):
        return {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="for the whole check")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument(
        "--only", action="append", default=[], metavar="PART", choices=[part.name for part in PARTS], help="may be repeated"
    )
    parser.add_argument("--plant", action="append", default=[], choices=[part.name.removeprefix("planted_") for part in PLANTED])
    parser.add_argument("--cpu-smoke", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--commit", help="what the tree is, for a copy without its repository")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    chosen = [part for part in PARTS if not arguments.only or part.name in arguments.only]
    planted = [part for part in PLANTED if part.name.removeprefix("planted_") in arguments.plant]
    minutes = arguments.minutes * (10 if arguments.cpu_smoke else 1)
    known = earlier(arguments.out) if arguments.only else {}
    if not known:
        (arguments.out / "gpu_check.log").write_text("")
    check = Check(
        arguments.out, [*planted, *chosen], minutes=minutes, smoke=arguments.cpu_smoke, known=known, commit=arguments.commit or revision()
    )

    def end(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)  # through the clean-up, which ends the part that runs

    signal.signal(signal.SIGTERM, end)
    check.write()
    check.run()
    print(page(check.state))
    raise SystemExit(0 if check.sound else 1)


if __name__ == "__main__":
    main()
