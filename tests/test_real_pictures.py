"""A small part of benchmarks/real_pictures.py: the bars hold on photographs that come with scikit-image."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from planted import photographs
from real_pictures import check_lines, floor_lines, mended_lines

PLANTED = [
    "JPEG 75", "noise 5", "shift 4 px", "shift 4 px, paste 15 %", "zoom +5 %", "rotation 2°", "cast 20", "gamma 0.7", "paste 1 %",
    "paste 30 %", "recolor 5 %", "mirror", "another picture", "black",
]  # fmt: skip


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    """Astronaut, brick, camera, cell, cat, clock, coffee, coins."""
    return [picture for picture, _ in zip(photographs(None, 192), range(8), strict=False)]


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_change_is_judged_right(pictures: list[np.ndarray], name: str) -> None:
    [line] = check_lines(pictures, [name])
    assert line.bar and line.n >= 6 and line.value >= 1 - 1 / line.n, line  # one of eight may be wrong


def test_floors_and_controls_hold(pictures: list[np.ndarray]) -> None:
    lines = floor_lines(pictures * 4)
    assert len(lines) == 8 and all(line.met for line in lines), lines


def test_mended_pictures_are_labeled(pictures: list[np.ndarray]) -> None:
    """Denoised pictures and pictures without JPEG blocks: the floor of 0.1.0, made of the shift itself, labeled none."""
    lines = mended_lines(pictures)
    assert lines and all(line.met for line in lines), lines
