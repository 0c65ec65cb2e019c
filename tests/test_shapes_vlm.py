"""As a new user would: the public fake server, a recipe that asks it, kills, caps, a key; all through the command line."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rpo.backends.chat.openai import hang_up
from rpo.cli import main
from rpo.engine.layers import read_run
from rpo.shapes.critic import ShapesCriticConfig
from rpo.shapes.serving import embedded_responder
from rpo.shapes.weights import weights_folder
from rpo.testing.server import FakeServer, Faults

ROWS = ["--curate.prompts.count", "40"]
CANARY = "sk-canary-abcdef0123456789"


@pytest.fixture(scope="module")
def server() -> Iterator[FakeServer]:
    critic = ShapesCriticConfig(model=str(weights_folder() / "critic")).build()
    with FakeServer(embedded_responder(critic), faults=Faults(rate=0.1, kinds=("500", "malformed")), key=CANARY) as server:
        yield server
        hang_up()


def curate(server: FakeServer, folder: Path, *more: str) -> int:
    return main(["curate", "shapes_vlm", "--out", str(folder), "--vlm-url", server.url, *ROWS, *more])


def test_the_wire_changes_nothing_and_is_accounted_for(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RPO_API_KEY", CANARY)
    wired, near = tmp_path / "wired", tmp_path / "near"
    assert curate(server, wired, "--max-calls", "30") == 1
    hang_up()
    said = " ".join(capsys.readouterr().err.split())
    assert "30 calls are made, and --max-calls is 30" in said and server.requests == 30
    assert curate(server, wired, "--resume") == 0
    assert main(["curate", "shapes", "--out", str(near), *ROWS]) == 0
    columns = ["prompt", "critique", "instruction", "edited", "chosen_side", "gap"]
    assert read_run(wired, columns).equals(read_run(near, columns))
    summary = json.loads((wired / "summary.json").read_text())
    critique, instruct = summary["wire"]
    assert (critique["purpose"], critique["answered"], instruct["answered"]) == ("critique", 40, summary["words"]["instructed"])
    assert critique["calls"] + instruct["calls"] == server.requests
    assert summary["words"]["asked"] == summary["words"]["parsed"] == 40 and critique["tokens_per_pair"] > 0
    before = server.requests
    assert curate(server, wired, "--resume") == 0 and server.requests == before
    assert curate(server, tmp_path / "again", "--answers", str(wired / "answers.sqlite")) == 0 and server.requests == before
    capsys.readouterr()
    assert main(["show", str(wired), "--stage", "critique", "--rows", "2"]) == 0
    assert "reasoning: I see" in capsys.readouterr().out
    assert main(["report", str(wired)]) == 0
    page = (wired / "report.html").read_text()
    assert "Critiques and instructions" in page and "Tokens for critique" in page and "Expected change" in page
    files = [path for folder in (wired, near) for path in folder.rglob("*") if path.is_file()]
    assert not any(CANARY.encode() in path.read_bytes() for path in files)


def test_a_model_over_a_wire_judges_and_is_no_evidence_where_it_criticised(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RPO_API_KEY", CANARY)
    run = tmp_path / "run"
    compared = ["--models", "one=base", "other=base", "--evaluate.prompts.count", "6", "--vlm-url", server.url, "--vlm-model"]
    assert curate(server, run) == 0
    before = server.requests
    assert main(["evaluate", "shapes_vlm", "--out", str(run), *compared, "another"]) == 0
    asked = server.requests - before
    assert main(["report", str(run)]) == 0 and "Vlm prefers" in (run / "report.html").read_text()
    other = json.loads((run / "summary.json").read_text())
    numbers, first = other["evaluation"], other["wire"]
    assert 1 <= numbers["vlm_follows"]["other"] <= 5 and numbers["vlm_prefers"]["win_rate"] == 0.5, "an image is no better than itself"
    assert not any("used_in_labelling" in numbers[name] for name in numbers if name.startswith("vlm_"))
    assert asked >= 6 * (3 + 1), "alike questions are put once"
    assert other["headline"] == "fully_correct"
    assert main(["evaluate", "shapes_vlm", "--out", str(run), *compared, "another"]) == 0 and server.requests == before + asked
    assert main(["evaluate", "shapes_vlm", "--out", str(run), *compared, "shapes"]) == 0
    numbers = json.loads((run / "summary.json").read_text())["evaluation"]
    assert all(numbers[name]["used_in_labelling"] for name in numbers if name.startswith("vlm_"))
    assert curate(server, run, "--resume") == 0
    assert json.loads((run / "summary.json").read_text())["wire"] == first, "what judges is no cost of making pairs"


def test_a_price_cap_needs_a_price_and_a_server_must_be_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "run"), *ROWS]
    assert main(["curate", "shapes_vlm", *out]) == 1
    assert "no server takes connections" in " ".join(capsys.readouterr().err.split())
    assert main(["curate", "shapes_vlm", *out, "--max-cost", "1"]) == 2
    assert "--max-cost needs the price of 'shapes'; add it to server.prices" in " ".join(capsys.readouterr().err.split())
    assert main(["curate", "shapes", *out, "--vlm-model", "x"]) == 2
    assert "this one asks none" in capsys.readouterr().err


def test_time_is_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["curate", "shapes", "--out", str(tmp_path / "run"), "--max-time", "0.00001"]) == 1
    assert "the time of --max-time is over; what is done is kept, go on with --resume" in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_two_kills_on_a_failing_wire(tmp_path: Path) -> None:
    critic = ShapesCriticConfig(model=str(weights_folder() / "critic")).build()
    with FakeServer(embedded_responder(critic), faults=Faults(rate=0.3)) as server:
        command = [sys.executable, "-m", "rpo", "curate", "shapes_vlm", "--out", str(tmp_path / "run"), "--resume", "--vlm-url", server.url]
        command += ["--curate.prompts.count", "50"]
        for chat in ("critique.critic.chat", "instruct.instructor.chat"):
            command += [f"--curate.{chat}.server.timeout-s", "1", f"--curate.{chat}.server.retry-after-max-s", "0.2"]
            command += [f"--curate.{chat}.server.pacing.breaker-pause-s", "1"]
        for target in (15, 40):
            process = subprocess.Popen(command, env=os.environ, stderr=subprocess.DEVNULL)
            while server.requests < target and process.poll() is None:
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            process.wait()
        done = subprocess.run(command, env=os.environ, stderr=subprocess.PIPE, text=True, check=False)
        assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    errors = sum(n for stage in summary["funnel"] for reason, n in stage["dropped"].items() if reason.startswith("error:"))
    assert summary["words"]["asked"] == 50 and errors <= 2 and summary["pairs_kept"] > 10
