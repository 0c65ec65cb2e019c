"""Killed at random moments, nothing that was answered is asked again, and the end is the same as without."""

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rpo.engine.layers import read_run
from rpo.testing.server import FakeServer
from vlm_pipeline import CONCURRENCY, answer

PROGRAM = Path(__file__).parent.parent / "vlm_pipeline.py"
COLUMNS = ["prompt", "critique", "critique_raw", "instructions", "instruction"]


def start(folder: Path, url: str, rows: int) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, str(PROGRAM), str(folder), url, str(rows)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "ready\n", process.communicate()[1]
    return process


def finish(process: subprocess.Popen[str]) -> None:
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said


@pytest.mark.parametrize(("rows", "kills"), [(24, 2), pytest.param(200, 100, marks=pytest.mark.slow)])
def test_kills(rows: int, kills: int, tmp_path: Path) -> None:
    rng, killed = random.Random(kills), 0
    folder, oracle = tmp_path / "killed", tmp_path / "whole"
    with FakeServer(answer, latency_s=0.2) as server:
        while killed < kills:
            process, before = start(folder, server.url, rows), server.requests
            wanted = before + rng.randint(1, 3)
            while server.requests < wanted:
                assert process.poll() is None, "it must not be done before all the kills"
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.12))  # less than an answer takes: the newest request is under way
            process.send_signal(signal.SIGKILL)
            process.communicate()
            killed += 1
        finish(start(folder, server.url, rows))
        asked, questions = server.requests, dict(server.questions)
        with sqlite3.connect(folder / "ledger.sqlite") as connection:
            tried = connection.execute("SELECT question, outcome FROM attempts ORDER BY number").fetchall()
        answered = [question for question, outcome in tried if outcome == "answered"]
        lost = sum(outcome is None for _, outcome in tried)
        # Each question was answered once; beyond that only what was under way when the process died.
        assert len(answered) == len(set(answered)) == len(questions)
        assert asked <= len(tried) == len(answered) + lost and lost <= CONCURRENCY * kills
        assert lost >= kills, "the kills hit requests that were under way"
        finish(start(folder, server.url, rows))
        assert server.requests == asked
        finish(start(oracle, server.url, rows))
        assert server.requests == asked + len(questions)
    assert read_run(folder, COLUMNS).equals(read_run(oracle, COLUMNS))


def test_a_stop_by_signal_keeps_what_was_answered(tmp_path: Path) -> None:
    with FakeServer(answer, latency_s=0.03) as server:
        process = start(tmp_path / "run", server.url, 48)
        while server.requests < 20:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
        assert process.returncode == 143
        finish(start(tmp_path / "run", server.url, 48))
        assert max(server.questions.values()) == 1
