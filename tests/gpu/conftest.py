"""Checks that need a CUDA card. Without one they are skipped; `RPO_GPU_CHECK=cpu` runs them on the CPU, to try the checks themselves."""

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
ON_CPU = os.environ.get("RPO_GPU_CHECK") == "cpu"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not (ON_CPU or torch.cuda.is_available()):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA card"))


@pytest.fixture(scope="session")
def card() -> torch.device:
    return torch.device("cpu" if ON_CPU else "cuda")


@pytest.fixture(autouse=True)
def _memory_of_one_test() -> Iterator[None]:
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@pytest.fixture
def within(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Records figures with their bounds, then asserts them: `within(name, value, bound)`, or `within({name: value}, bounds)`."""

    def check(figures: str | Mapping[str, float], *rest: Any) -> None:
        values, bounds = ({figures: rest[0]}, rest[1:]) if isinstance(figures, str) else (figures, rest[0])
        for (name, value), bound in zip(values.items(), bounds, strict=True):
            record_property(name, f"{value:.3g} (bound {bound:.3g})")
        above = [f"{name}: {value:.3g}" for (name, value), bound in zip(values.items(), bounds, strict=True) if not value <= bound]
        assert not above, f"above the bound of {bounds}: {', '.join(above)}"

    return check
