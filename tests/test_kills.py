"""The whole pipeline and its model's server, killed at random moments: the files are those of a calm run, no answer is paid for twice."""

import hashlib
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest

import rpo
from fake_vlm import LATENCY_S
from tiny_diffusion import save_pipeline

TESTS = Path(__file__).parent
SHARDS = "[0-9]*/*.parquet"
CONCURRENCY = 8


def program(arguments: Sequence[str], model: Path) -> subprocess.Popen[str]:
    paths = os.pathsep.join([str(Path(rpo.__file__).parents[1]), str(TESTS)])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "FAKE_MODEL": str(model)}
    return subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def serve(port: str, model: Path) -> tuple[subprocess.Popen[str], str]:
    server = program([str(TESTS / "fake_vlm.py"), port], model)
    assert server.stdout is not None
    url = server.stdout.readline().strip()
    assert url, server.communicate()[1]
    return server, url


def curate(folder: Path, url: str, rows: int, engine: str, model: Path) -> subprocess.Popen[str]:
    chats = [f"--curate.{chat}.server" for chat in ("critique.critic.chat", "instruct.instructor.chat")]
    settings = {"pacing.breaker-pause-s": "0.2", "pacing.concurrency-start": str(CONCURRENCY), "pacing.concurrency-max": str(CONCURRENCY)}
    told = [text for chat in chats for name, value in settings.items() for text in (f"{chat}.{name}", value)]
    recipe = f"{TESTS / 'fake_recipe.py'}:fake_vlm"
    wanted = ["--out", str(folder), "--resume", "--vlm-url", url, "--engine", engine, "--curate.prompts.count", str(rows)]
    return program(["-m", "rpo", "curate", recipe, *wanted, *told], model)


def finish(process: subprocess.Popen[str]) -> None:
    _, said = process.communicate(timeout=600)
    assert process.returncode == 0, said


def kill(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGKILL)
        process.communicate()


def attempts(folder: Path) -> list[tuple[str, str | None]]:
    """(question, outcome) of every request that was sent."""
    with closing(sqlite3.connect(folder / "ledger.sqlite", timeout=30)) as connection:
        return connection.execute("SELECT question, outcome FROM attempts").fetchall()


def progress(folder: Path) -> int:
    """Of its last signs of life, the later: what is committed, and what is asked."""
    files = [*folder.glob(SHARDS), *folder.glob("ledger.sqlite-wal")]
    return max((file.stat().st_mtime_ns for file in files), default=0)


def digests(folder: Path) -> dict[str, str]:
    files = [*folder.glob(SHARDS), folder / "pairs.parquet"]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "rows", "kills"), [("local", 2000, 100), ("ray", 600, 10)])
def test_nothing_is_lost(engine: str, rows: int, kills: int, tmp_path: Path) -> None:
    rng, model, folder = random.Random(kills), save_pipeline(tmp_path / "model"), tmp_path / "killed"
    server, url = serve("0", model)
    process = curate(folder, url, rows, engine, model)

    def alive() -> subprocess.Popen[str]:
        """The run; started again when it began while nobody answered, which it says."""
        if process.poll() is None:
            return process
        _, said = process.communicate()
        assert "nothing answers" in said, f"it must not end before all the kills: {said}"
        return curate(folder, url, rows, engine, model)

    try:
        for number in range(kills):
            before = progress(folder)
            while progress(folder) <= before:
                process = alive()
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 4 * LATENCY_S))
            if number % 3 == 1:  # a run that had an answer must outlive this, and wait until somebody answers again
                kill(server)
                server, _ = serve(url.rpartition(":")[2].removesuffix("/v1"), model)
            else:
                kill(process)
                process = curate(folder, url, rows, engine, model)
        calm = tmp_path / "calm"
        finish(process := alive())
        finish(process := curate(calm, url, rows, "local", model))
    finally:
        for started in (server, process):
            kill(started)
    assert digests(folder) == digests(calm)
    answered = [question for question, outcome in attempts(folder) if outcome == "answered"]
    assert len(answered) == len(set(answered)) == sum(outcome == "answered" for _, outcome in attempts(calm))
    settled = ("answered", "HTTP 400")
    lost = [
        outcome for _, outcome in attempts(folder) if not (outcome or "").startswith(settled) and "connection attempts" not in str(outcome)
    ]
    assert len(lost) <= 2 * CONCURRENCY * kills, "only what was under way is asked again, beside asking whether the server is there"
