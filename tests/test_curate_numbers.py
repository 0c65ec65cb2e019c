"""The numbers that curation promises, by the program that measures them. What needs a quiet machine or minutes is slow."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import rpo

PROGRAM = Path(__file__).parents[1] / "benchmarks" / "curate.py"


def measured(*arguments: str) -> dict[str, Any]:
    environment = os.environ | {"PYTHONPATH": str(Path(rpo.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(PROGRAM), *arguments]
    return json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def test_the_engine_costs_less_than_a_millisecond_per_row_and_stage() -> None:
    assert measured("overhead")["ms_per_row_and_stage"] <= 1.0


@pytest.mark.parametrize("rows", [20_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_a_million_rows_are_planned_and_scanned_in_a_minute_and_a_gigabyte(rows: int) -> None:
    found = measured("rows", str(rows))
    share = max(rows / 1_000_000, 0.1)
    assert found["plan_s"] + found["resume_s"] <= 60 * share and found["peak_gb"] <= 1.0


@pytest.mark.slow
def test_pairs_are_read_at_random_as_fast_as_they_are_decoded() -> None:
    found = measured("reads")
    assert found["64px_per_s"] >= 2000
    assert found["512px_per_s"] >= 0.8 * found["512px_decoding_alone_per_s"]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["local", "ray"])
def test_stages_overlap(engine: str) -> None:
    """Needs two free cores: the best of three counts."""
    assert max(measured("overlap", "--engine", engine)["efficiency"] for _ in range(3)) >= 0.9
