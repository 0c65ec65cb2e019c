"""A disk fault or a kill at the Nth file operation: no traceback, and `--resume` gives the files of an undisturbed run."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SWEEP = Path(__file__).parent / "sweep.py"

pytestmark = pytest.mark.skipif(not (shutil.which("gcc") or shutil.which("cc")), reason="the faults are made by a library in C")


def swept(*options: str) -> list[dict[str, Any]]:
    """The counts that the sweep prints; it fails if any of them is not what it must be."""
    ran = subprocess.run([sys.executable, str(SWEEP), *options], capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]
    assert ran.returncode == 0, "\n".join(text for line in lines for text in line["wrong"]) or ran.stderr
    return lines


def test_some_operations_of_curation() -> None:
    for line in swept("--commands", "curate", "--kinds", "ENOSPC", "kill", "--points", "1"):
        assert line["fired"] and line["operations"] > 100
        assert not line["tracebacks"] and not line["did not go on"] and not line["differ"] and not line["unnamed"]


@pytest.mark.slow
@pytest.mark.parametrize("command", ["curate", "train", "evaluate", "report", "export"])
def test_operations_of_every_command(command: str) -> None:
    for line in swept("--commands", command, "--points", "30"):
        assert line["fired"] >= 6 or line["kind"] in ("cut", "EMFILE")


@pytest.mark.slow
def test_flipped_bits_of_every_file() -> None:
    (line,) = [line for line in swept("--commands", "--flips", "1") if "flips" in line]
    assert line["named"] > 20
