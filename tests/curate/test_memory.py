"""Peak memory does not grow with the number of rows."""

import os
import subprocess
import sys
from pathlib import Path

import memory_program
import pytest

import rpo


def peak_mb(folder: Path, rows: int) -> float:
    environment = os.environ | {"PYTHONPATH": str(Path(rpo.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(memory_program.__file__)), str(folder), str(rows)]
    return float(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


def test_what_rows_weigh_is_not_held(tmp_path: Path) -> None:
    """Short runs differ by some 30 MB, whatever their rows: the bar of ten per cent is for the long ones below."""
    few, many = 640, 6400
    grown = peak_mb(tmp_path / "many", many) - peak_mb(tmp_path / "few", few)
    weight = (many - few) * 2 * memory_program.IMAGE_BYTES / 1e6
    assert grown <= 0.25 * weight, f"{grown:.0f} MB more for rows that weigh {weight:.0f} MB more"


@pytest.mark.slow
def test_ten_times_the_rows_in_the_same_memory(tmp_path: Path) -> None:
    """But for the plan (prompts, ids, seeds), which is held whole: half a kilobyte a row."""
    few, many = 4096, 40_960
    first = max(peak_mb(tmp_path / f"few-{again}", few) for again in range(3))  # the same run takes 194 to 222 MB
    second = peak_mb(tmp_path / "many", many)
    assert second - (many - few) * 0.0005 <= 1.1 * first, f"{first:.0f} MB for {few} rows, {second:.0f} MB for {many}"
