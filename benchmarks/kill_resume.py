"""Kills `rpo curate shapes` and `rpo train shapes` at random moments and compares with runs that nobody disturbed.

    python benchmarks/kill_resume.py [CURATE_KILLS] [TRAIN_KILLS] [FAULT_POINTS]

Prints, for curation, whether every final file is equal and how many shards were made more than once per stage and kill; for training,
whether the weights are bitwise equal. Then the counts of `tests/faults/sweep.py`: at FAULT_POINTS file operations of every command
the disk fails, is full, cuts a write, or the process is killed; tracebacks and files that differ after `--resume` must be 0.
Takes some minutes.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CURATE = ["curate", "shapes", "--curate.prompts.count", "300"]
TRAIN = ["train", "shapes", "--train.steps", "40", "--train.checkpoint-every", "5", "--allow-fingerprint"]


def command(arguments: list[str], out: Path, resume: bool) -> list[str]:
    flags = ["--resume"] if resume else []
    return [sys.executable, "-c", "from rpo.cli import entry; entry()", *arguments, "--out", str(out), *flags]


def undisturbed(arguments: list[str], out: Path) -> float:
    began = time.monotonic()
    subprocess.run(command(arguments, out, out.exists()), check=True, capture_output=True)
    return time.monotonic() - began


def disturbed(arguments: list[str], out: Path, kills: int, seconds: float, rng: random.Random) -> int:
    """Runs until it ends, killing it up to `kills` times; returns how often it was killed."""
    done = 0
    while True:
        process = subprocess.Popen(command(arguments, out, True), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            # Past the imports, and spread so that the kills fall over the whole run.
            process.wait(timeout=None if done == kills else rng.uniform(0.3, 1.0) * max(8.0, 2.5 * seconds / kills))
            if process.returncode != 0:
                raise SystemExit(f"{arguments[0]} failed with {process.returncode}")
            return done
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            done += 1


def digests(folder: Path, pattern: str) -> dict[str, str]:
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob(pattern)) if p.is_file()}


def shards_made(folder: Path) -> dict[str, int]:
    logs = sorted(folder.glob("*/seconds.jsonl"))
    return {log.parent.name.split("-")[0]: sum(1 for line in log.read_text().splitlines() if line.startswith("{")) for log in logs}


def main() -> None:
    given = [int(value) for value in sys.argv[1:]]
    curate_kills, train_kills, points = [*given, *(20, 10, 5)[len(given) :]]
    rng = random.Random(0)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        whole, cut = Path(folder) / "whole", Path(folder) / "cut"
        seconds = undisturbed(CURATE, whole)
        kills = disturbed(CURATE, cut, curate_kills, seconds, rng)
        equal = digests(whole, "**/*.parquet") == digests(cut, "**/*.parquet")
        once, often = shards_made(whole), shards_made(cut)
        extra = {stage: often[stage] - once[stage] for stage in once}
        print(json.dumps({"curate": {"kills": kills, "files_equal": equal, "shards_made_again": extra}}))
        shutil.copytree(whole, Path(folder) / "trained")
        seconds = undisturbed(TRAIN, Path(folder) / "trained")
        kills = disturbed(TRAIN, whole, train_kills, seconds, rng)
        equal = digests(Path(folder) / "trained", "train/weights/**/*") == digests(whole, "train/weights/**/*")
        print(json.dumps({"train": {"kills": kills, "weights_bitwise_equal": equal}}), flush=True)
    sweep = Path(__file__).parents[1] / "tests" / "faults" / "sweep.py"
    raise SystemExit(subprocess.run([sys.executable, str(sweep), "--points", str(points), "--flips", "1"], check=False).returncode)


if __name__ == "__main__":
    main()
