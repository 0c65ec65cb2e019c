"""Disk faults at every file operation of every command: fail, cut a write, kill; then `--resume`, and the files of an undisturbed run.

    python tests/faults/sweep.py [--commands curate train] [--kinds ENOSPC kill] [--points 20] [--first 1]
    python tests/faults/sweep.py --commands --flips 1 [--files "*.json" "*.md"] [--most 10]

One process imports everything once, with `file_faults.c` preloaded; each try is a forked child that runs the command line's `main`
on a copy of a run folder. Prints a line of JSON per command and kind: tries, faults that fired, tracebacks, runs that did not go on,
files that differ. With --flips, bits of every file of a finished run folder are flipped, and every command must name the file or give
what it gives without. The exit code is 1 unless all of these are 0.
"""

import argparse
import ctypes
import errno
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RECIPE = f"{HERE.parent / 'fake_recipe.py'}:fake"
CURATE = ["--curate.prompts.count", "8"]
TRAIN = ["--train.steps", "4", "--train.checkpoint-every", "2", "--train.eval-every", "2", "--allow-fingerprint"]
EVALUATE = ["--evaluate.prompts.count", "4"]
COMMANDS = ("curate", "train", "evaluate", "report", "export")
KINDS = {
    "ENOSPC": (1, errno.ENOSPC, 0, 1),
    "full": (1, errno.ENOSPC, 1, 1),
    "EIO": (1, errno.EIO, 0, 0),
    "EMFILE": (1, errno.EMFILE, 0, 0),
    "cut": (2, errno.ENOSPC, 0, 1),
    "kill": (3, 0, 0, 0),
}
"""By name: what happens (1 fail, 2 cut, 3 kill), errno, whether all later operations fail too, whether only writing ones count."""
TIMES = ("recipe.json", "summary.json", "report.html", "README.md", "manifest.json", "metrics.jsonl", "state.json")
"""Files that hold times, or digests of files that do: they must be there, and may differ."""
SECONDS = 120


def build(folder: Path) -> Path:
    """The compiled shim. Raises `FileNotFoundError` without a compiler."""
    library = folder / "file_faults.so"
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise FileNotFoundError("no C compiler")
    command = [compiler, "-O1", "-shared", "-fPIC", "-D_FORTIFY_SOURCE=0", "-o", str(library), str(HERE / "file_faults.c"), "-ldl"]
    subprocess.run(command, check=True, capture_output=True)
    return library


def arguments(command: str, run: Path, *, again: bool = False) -> list[str]:
    """The command line of one step of the chain; `again` for the one that goes on after a fault."""
    match command:
        case "curate":
            return ["curate", RECIPE, "--out", str(run), *CURATE, *(["--resume"] if again else [])]
        case "train":
            return ["train", RECIPE, "--out", str(run), *TRAIN, *(["--resume"] if again else [])]
        case "evaluate":
            return ["evaluate", RECIPE, "--out", str(run), *EVALUATE]
        case "export":
            return ["export", str(run), *(["--overwrite"] if again else [])]
        case _:
            return [command, str(run)]


@dataclass(kw_only=True)
class Outcome:
    """What became of one child."""

    status: int
    said: str
    operations: tuple[int, int] = (0, 0)
    fired: bool = False
    where: str = ""

    @property
    def traceback(self) -> bool:
        return "Traceback (most recent call last)" in self.said or self.status not in (0, 1, -signal.SIGKILL)


def child(command: Sequence[str], root: Path, fault: tuple[int, int, int, int] = (0, 0, 0, 0), at: int = 0) -> Outcome:
    """Runs `rpo` with `command` in a forked child whose `at`-th file operation below `root` goes wrong."""
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile("w+") as report:
        pid = os.fork()
        if pid == 0:
            _act(command, root, fault, at, output.fileno(), report.fileno())
        deadline = time.monotonic() + SECONDS
        while (found := os.waitpid(pid, os.WNOHANG))[0] == 0:
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
                found = os.waitpid(pid, 0)
                output.write(b"Traceback (most recent call last): it hangs")
                break
            time.sleep(0.005)
        output.seek(0)
        report.seek(0)
        told: dict[str, Any] = json.loads(report.read() or "{}")
        status = os.waitstatus_to_exitcode(found[1])
        return Outcome(status=status, said=output.read().decode(errors="replace"), **(told or {"fired": status == -signal.SIGKILL}))


def _act(command: Sequence[str], root: Path, fault: tuple[int, int, int, int], at: int, output: int, report: int) -> None:
    """The child's part; never returns."""
    status = 70
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        from rpo.cli import main

        shim = ctypes.CDLL(None)
        shim.faults_count.restype, shim.faults_where.restype = ctypes.c_long, ctypes.c_char_p
        how, code, sticky, writes = fault
        shim.faults_arm(os.fsencode(root), how, code, ctypes.c_long(at), sticky, writes)
        try:
            status = main(command)
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else 1
        except BaseException:
            traceback.print_exc()
        told = {
            "operations": [shim.faults_count(0), shim.faults_count(1)],
            "fired": bool(shim.faults_fired()),
            "where": shim.faults_where().decode(),
        }
        shim.faults_arm(b"", 0, 0, ctypes.c_long(0), 0, 0)
        os.write(report, json.dumps(told).encode())
        if os.environ.get("RPO_SWEEP_MODULES"):
            Path(os.environ["RPO_SWEEP_MODULES"]).write_text("\n".join(sys.modules))
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def files(run: Path) -> dict[str, str]:
    """Digests of the files of a run folder; of those that hold times, only that they are there. Logs of times alone are left out."""
    found = [path for path in sorted(run.rglob("*")) if path.is_file() and path.name not in (".lock", "seconds.jsonl")]
    return {str(path.relative_to(run)): "there" if path.name in TIMES else hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


@dataclass(kw_only=True)
class World:
    """A model, and the run folder before and after each command, undisturbed."""

    home: Path
    run: Path
    before: dict[str, Path] = field(default_factory=dict[str, Path])
    after: dict[str, dict[str, str]] = field(default_factory=dict[str, dict[str, str]])
    operations: dict[str, tuple[int, int]] = field(default_factory=dict[str, tuple[int, int]])
    """By command: all operations below the run folder, and those that write."""

    @classmethod
    def made(cls, home: Path, commands: Sequence[str] = COMMANDS) -> "World":
        """Runs the first commands once, up to the last of `commands`, and imports what they import."""
        from tiny_diffusion import save_pipeline

        os.environ["FAKE_MODEL"] = str(save_pipeline(home / "model"))
        world = cls(home=home, run=home / "work" / "run")
        world.run.parent.mkdir()
        os.environ["RPO_SWEEP_MODULES"] = str(home / "modules")
        for command in COMMANDS[: 1 + max(map(COMMANDS.index, commands))]:
            world.before[command] = home / f"before-{command}"
            if world.run.exists():
                shutil.copytree(world.run, world.before[command])
            outcome = child(arguments(command, world.run), world.run)
            assert outcome.status == 0, outcome.said
            for name in (home / "modules").read_text().split():
                with suppress(Exception):
                    importlib.import_module(name)
            world.operations[command] = outcome.operations
            world.after[command] = files(world.run)
        shutil.copytree(world.run, home / "whole")
        del os.environ["RPO_SWEEP_MODULES"]
        return world

    def restore(self, command: str) -> None:
        """Puts the run folder back to what it was before a command."""
        shutil.rmtree(self.run, ignore_errors=True)
        if self.before[command].exists():
            shutil.copytree(self.before[command], self.run)

    def points(self, command: str, kind: str, count: int, first: int) -> list[int]:
        """Numbers of operations, spread over all of them."""
        total = self.operations[command][KINDS[kind][3]]
        stride = max(1, total // count)
        return list(range(1 + first % stride, total + 1, stride))


def sweep(world: World, command: str, kind: str, points: Sequence[int]) -> dict[str, Any]:
    """Tries each point; the counts, and the first few that went wrong."""
    fired = tracebacks = stuck = differ = silent = 0
    wrong: list[str] = []
    for at in points:
        world.restore(command)
        outcome = child(arguments(command, world.run), world.run, KINDS[kind], at)
        fired += outcome.fired
        again = child(arguments(command, world.run, again=True), world.run)
        left = files(world.run)
        odd = sorted(name for name in left.keys() | world.after[command].keys() if left.get(name) != world.after[command].get(name))
        one_line = outcome.status != 1 or (": " in outcome.said and world.run.name in outcome.said)
        tracebacks += outcome.traceback or again.traceback
        stuck += again.status != 0
        differ += bool(odd) and again.status == 0
        silent += not one_line
        if outcome.traceback or again.traceback or again.status or odd or not one_line:
            shown = outcome.said[-600:] if outcome.traceback or not one_line else again.said[-600:]
            wrong.append(f"{command} {kind} {at} ({outcome.where}): status {outcome.status}, again {again.status}, odd {odd[:4]}: {shown}")
    told = {"tries": len(points), "fired": fired, "tracebacks": tracebacks, "did not go on": stuck, "differ": differ, "unnamed": silent}
    return {"command": command, "kind": kind, "operations": world.operations[command][KINDS[kind][3]], **told, "wrong": wrong}


def flip(world: World, per_file: int, seed: int, pattern: str, most: int) -> dict[str, Any]:
    """Flips bits of every file of the finished run, one at a time; each command must name the file, or give what it gives without."""
    rng, tries, named, harmless = random.Random(seed), 0, 0, 0
    wrong: list[str] = []
    expected: dict[str, dict[str, str]] = {}
    for command in COMMANDS:
        shutil.rmtree(world.run)
        shutil.copytree(world.home / "whole", world.run)
        assert child(arguments(command, world.run, again=True), world.run).status == 0
        expected[command] = files(world.run)
    found = sorted(file for file in (world.home / "whole").rglob(pattern) if file.is_file() and file.name != ".lock")
    for path in found[seed % max(1, len(found) // most) :: max(1, len(found) // most)]:
        name = path.relative_to(world.home / "whole")
        for _ in range(per_file):
            data = bytearray(path.read_bytes())
            bit = rng.randrange(8 * len(data))
            data[bit // 8] ^= 1 << bit % 8
            for command in COMMANDS:
                shutil.rmtree(world.run)
                shutil.copytree(world.home / "whole", world.run)
                (world.run / name).write_bytes(data)
                outcome = child(arguments(command, world.run, again=True), world.run)
                tries += 1
                print(name, command, outcome.status, outcome.said[-200:], file=sys.stderr, flush=True)
                parts = (name.name, name.parent.name) if name.parent.name else (name.name,)
                if outcome.traceback:
                    wrong.append(f"{name} bit {bit}, {command}: {outcome.said[-600:]}")
                elif any(part in outcome.said for part in parts) and outcome.status in (0, 1):
                    named += 1
                elif {k: v for k, v in files(world.run).items() if k != str(name)} == {
                    k: v for k, v in expected[command].items() if k != str(name)
                } and outcome.status == 0:
                    harmless += 1
                else:
                    wrong.append(f"{name} bit {bit}, {command}: status {outcome.status}, not named: {outcome.said[-300:]}")
    return {"pattern": pattern, "files": len(found), "flips": tries, "named": named, "same result": harmless, "wrong": wrong}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commands", nargs="*", default=list(COMMANDS), choices=COMMANDS)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--points", type=int, default=20, help="points per command and kind")
    parser.add_argument("--first", type=int, default=0, help="offset of the first point, so that runs try different ones")
    parser.add_argument("--files", nargs="*", default=["*"], help="patterns of the names of the files whose bits are flipped")
    parser.add_argument("--flips", type=int, default=0, help="bits per file of a finished run")
    parser.add_argument("--most", type=int, default=10**6, help="files of the pattern, at most, spread over all of them")
    options = parser.parse_args()
    if os.environ.get("LD_PRELOAD", "").find("file_faults") < 0:
        with tempfile.TemporaryDirectory() as folder:
            paths = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
            preloaded = os.environ | {"LD_PRELOAD": str(build(Path(folder))), "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
            return subprocess.run([sys.executable, *sys.argv], env=preloaded, check=False).returncode
    bad = 0
    with tempfile.TemporaryDirectory() as home:
        world = World.made(Path(home), COMMANDS if options.flips else options.commands)
        for command in options.commands:
            for kind in options.kinds:
                began = time.monotonic()
                told = sweep(world, command, kind, world.points(command, kind, options.points, options.first))
                bad += len(told["wrong"])
                print(json.dumps(told | {"seconds": round(time.monotonic() - began, 1)}), flush=True)
        if options.flips:
            for pattern in options.files:
                told = flip(world, options.flips, options.first, pattern, options.most)
                bad += len(told["wrong"])
                print(json.dumps(told), flush=True)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
