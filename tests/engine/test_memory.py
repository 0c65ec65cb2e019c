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
    # One arena, no pools, large blocks given back at once: what allocators keep for themselves differs by 30 MB from run to run and
    # grows by 60 until it levels off, and would hide what rows leave behind.
    environment |= {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "131072", "ARROW_DEFAULT_MEMORY_POOL": "system"}
    command = [sys.executable, str(Path(memory_program.__file__)), str(folder), str(rows)]
    return float(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


@pytest.mark.parametrize("few", [256, pytest.param(4096, marks=pytest.mark.slow)])
def test_ten_times_the_rows_in_the_same_memory(tmp_path: Path, few: int) -> None:
    first = peak_mb(tmp_path / "few", few)
    second = peak_mb(tmp_path / "many", 10 * few)
    assert second <= 1.1 * first, f"{first:.0f} MB for {few} rows, {second:.0f} MB for {10 * few}"
