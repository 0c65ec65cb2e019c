import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rpo.errors import RpoError
from rpo.training.config import TrainConfig
from rpo.training.loop import train
from rpo.training.runtime import trackers as onlookers
from tiny_diffusion import make_pairs, save_pipeline

SIDE = 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("model"))


def config_for(model: Path, **settings: Any) -> TrainConfig:
    defaults: dict[str, Any] = {"steps": 5, "batch_pairs": 2, "accumulation": 1, "lora_rank": 2, "draws": 2, "log_every": 2}
    return TrainConfig(model=str(model), **{**defaults, **settings})


def test_sheets_are_drawn_from_the_weights_as_they_are_saved(model: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, ...]] = []

    def draw(weights: Path, prompts: Sequence[str]) -> list[np.ndarray]:
        assert (weights / "pytorch_lora_weights.safetensors").exists()
        seen.append(tuple(prompts))
        return [np.full((SIDE, SIDE, 3), len(seen) * 10 + i, np.uint8) for i in range(len(prompts))]

    pairs = make_pairs(4, held_out=1)
    train(config_for(model, samples_every=2), pairs, tmp_path / "own", draw=draw)
    sheets = sorted((tmp_path / "own" / "train" / "samples").iterdir())
    assert [path.name for path in sheets] == ["step-000000.png", "step-000002.png", "step-000004.png"]
    assert seen[0][0] == pairs[-1].prompt and len(set(seen)) == 1
    sheet = np.asarray(Image.open(sheets[1]))
    assert sheet.shape == (SIDE, SIDE * len(seen[0]), 3)
    assert [int(sheet[0, i * SIDE, 0]) for i in range(len(seen[0]))] == [20 + i for i in range(len(seen[0]))]
    seen.clear()
    train(config_for(model, samples_every=5, sample_prompts=("a red circle",)), pairs, tmp_path / "named", draw=draw)
    assert seen == [("a red circle",)] * 2


def test_tensorboard_reads_metrics_and_pictures(model: Path, tmp_path: Path) -> None:
    config = config_for(model, trackers=("tensorboard",), samples_every=5)
    train(config, make_pairs(4), tmp_path, draw=lambda weights, prompts: [np.zeros((SIDE, SIDE, 3), np.uint8)] * len(prompts))
    events = EventAccumulator(str(tmp_path / "train" / "rpo"))
    events.Reload()
    assert [point.step for point in events.Scalars("loss")] == [1, 2, 3, 4, 5]
    assert {point.step for point in events.Images("samples")} == {0, 5}


def test_trackers_are_finished_when_a_run_stops(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finished: list[bool] = []
    monkeypatch.setattr(onlookers.Onlookers, "finish", lambda self: finished.append(True))
    monkeypatch.setattr(onlookers.Onlookers, "told", lambda self, lines: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(config_for(model), make_pairs(4), tmp_path)
    assert finished == [True]


def test_wandb_is_told_steps_and_writes_to_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[Any] = []
    run = type("Run", (), {"log": lambda self, values, step: said.append((step, values)), "finish": lambda self: said.append("finish")})()
    wandb: Any = ModuleType("wandb")
    wandb.init = lambda **settings: said.append(settings) or run
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(onlookers, "get_available_trackers", lambda: ["wandb"])
    watching = onlookers.Onlookers(TrainConfig(model="", trackers=("wandb",)), [], None, tmp_path)
    watching.told([{"step": 3, "loss": 0.5, "alarm": ""}])
    watching.finish()
    assert said == [{"project": "rpo", "dir": tmp_path}, (3, {"loss": 0.5}), "finish"]


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onlookers, "get_available_trackers", lambda: [])
    with pytest.raises(RpoError, match="tracker 'wandb' is not installed; install it with: pip install wandb"):
        onlookers.Onlookers(TrainConfig(model="", trackers=("wandb",)), [], None, tmp_path)
    with pytest.raises(ValueError, match="samples_every needs somebody who draws"):
        onlookers.Onlookers(TrainConfig(model="", samples_every=2), [], None, tmp_path)
