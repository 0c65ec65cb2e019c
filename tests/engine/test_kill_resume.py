"""Runs that are killed or stopped end with the same bytes as runs that are not."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import toy_pipeline
from toy_pipeline import NAMES, SHARD_ROWS, read_calls

import rpo
from rpo.engine.layers import read_run

PROGRAM = str(Path(toy_pipeline.__file__))
SOURCES = str(Path(rpo.__file__).parents[1])


def start(folder: Path, calls: Path, rows: int, delay_s: float, stuck: str = "", engine: str = "local") -> subprocess.Popen[str]:
    """The toy program, once it holds the lock and begins to work."""
    command = [sys.executable, PROGRAM, str(folder), str(calls), str(rows), str(delay_s), stuck, engine]
    environment = os.environ | {"PYTHONPATH": SOURCES, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None and process.stdout.readline() == "ready\n", process.communicate()[1]
    return process


def finish(process: subprocess.Popen[str], timeout_s: float = 60.0) -> int:
    """Its exit code; raises `TimeoutExpired` when it takes longer."""
    process.communicate(timeout=timeout_s)
    return process.returncode


def shards(folder: Path) -> dict[str, str]:
    files = sorted(folder.rglob("*.parquet"))
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def await_calls(calls: Path, count: int, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while len(read_calls(calls)) < count and time.monotonic() < until:
        time.sleep(0.002)


@pytest.mark.parametrize(
    ("engine", "wanted", "rows", "delay_s", "life_s"),
    [
        ("local", 10, 120, 0.012, (0.0, 0.14)),
        pytest.param("local", 100, 1200, 0.012, (0.0, 0.14), marks=pytest.mark.slow),
        pytest.param("ray", 10, 240, 0.3, (0.0, 3.0), marks=pytest.mark.slow),
    ],
)
def test_files_after_kills_equal_those_of_an_undisturbed_run(
    tmp_path: Path, engine: str, wanted: int, rows: int, delay_s: float, life_s: tuple[float, float]
) -> None:
    assert finish(start(tmp_path / "calm", tmp_path / "calm_calls", rows, delay_s), 300) == 0
    rng = random.Random(0)
    folder, calls = tmp_path / "killed", tmp_path / "killed_calls"
    kills = 0
    while True:
        before = len(read_calls(calls))
        process = start(folder, calls, rows, delay_s, engine=engine)
        if engine == "ray" or kills % 2:  # at work: a busy machine would kill every process before its first batch
            await_calls(calls, before + 1, 60 if engine == "ray" else 5)
        try:
            code = finish(process, rng.uniform(*life_s) if kills < wanted else 300)
        except subprocess.TimeoutExpired:
            process.kill()
            finish(process)
            kills += 1
            continue
        assert code == 0
        break
    assert kills == wanted, f"the run ended after {kills} kills: make it longer"
    assert shards(folder) == shards(tmp_path / "calm")
    assert not list(folder.rglob("*.tmp"))

    once = Counter((call["stage"], tuple(call["ids"])) for call in read_calls(tmp_path / "calm_calls"))  # type: ignore[arg-type]
    often = Counter((call["stage"], tuple(call["ids"])) for call in read_calls(calls))  # type: ignore[arg-type]
    assert set(once.values()) == {1}
    assert often.keys() == once.keys(), "batches are cut alike, however often the run is resumed"
    for name in NAMES:
        again = sum(len(ids) * (count - 1) for (stage, ids), count in often.items() if stage == name)
        assert again <= kills * SHARD_ROWS, f"stage {name} made {again} rows twice in {kills} kills"
    assert sum(often.values()) > sum(once.values()), "no kill hit a shard in the making"


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_commits_the_shards_in_hand_and_exits(tmp_path: Path, signum: signal.Signals, code: int) -> None:
    folder, calls = tmp_path / "run", tmp_path / "calls"
    process = start(folder, calls, 96, 0.05)
    await_calls(calls, 12)
    process.send_signal(signum)
    assert finish(process, 10) == code
    called = {row for call in read_calls(calls) if call["stage"] == "source" for row in call["ids"]}  # type: ignore[attr-defined]
    made = [path for path in shards(folder) if path.startswith("1_source")]
    assert len(called) == len(made) * SHARD_ROWS, "every row that was paid for is on the disk"
    before = len(read_calls(calls))
    assert finish(start(folder, calls, 96, 0.05)) == 0
    seen = Counter((call["stage"], tuple(call["ids"])) for call in read_calls(calls))  # type: ignore[arg-type]
    assert set(seen.values()) == {1} and len(read_calls(calls)) > before
    assert read_run(folder, ["score_text"]).num_rows == 96


@pytest.mark.slow
def test_a_signal_stops_a_run_on_ray_too(tmp_path: Path) -> None:
    folder, calls = tmp_path / "run", tmp_path / "calls"
    process = start(folder, calls, 96, 0.2, engine="ray")
    await_calls(calls, 12)
    process.send_signal(signal.SIGTERM)
    assert finish(process, 60) == 143
    assert finish(start(folder, calls, 96, 0.2, engine="ray"), 120) == 0
    assert finish(start(tmp_path / "calm", calls, 96, 0.2)) == 0
    assert shards(folder) == shards(tmp_path / "calm")


def test_a_batch_that_does_not_return_does_not_hold_up_the_exit(tmp_path: Path) -> None:
    process = start(tmp_path / "run", tmp_path / "calls", 40, 0.0, "edit")
    await_calls(tmp_path / "calls", 10)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert finish(process, 15) == 143
    assert time.monotonic() - began < 10
    assert not [path for path in shards(tmp_path / "run") if path.startswith("3_edit")]


def test_a_second_writer_is_refused_and_told_who_writes(tmp_path: Path) -> None:
    holder = start(tmp_path / "run", tmp_path / "calls", 40, 0.0, "source")
    await_calls(tmp_path / "calls", 1)
    command = [sys.executable, PROGRAM, str(tmp_path / "run"), str(tmp_path / "calls"), "40", "0"]
    environment = os.environ | {"PYTHONPATH": SOURCES}
    second = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=30, check=False)
    assert second.returncode != 0
    assert f"is being written by process {holder.pid}" in second.stderr
    holder.kill()
    finish(holder)
    assert finish(start(tmp_path / "run", tmp_path / "calls2", 40, 0.0)) == 0, "the lock ends with its process"
