"""Those who look on while a model is tuned: trackers that are told its metrics, and sheets of sample pictures.

The trackers are accelerate's. A sheet holds the same prompts and noise every time; its weights go through a file, as a user's would.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from torch import Tensor

from rpo.arrays import Image
from rpo.core.atomic import sweep_folders, temporary_folder
from rpo.core.parquet import atomic_path
from rpo.data.images import encode_png
from rpo.errors import RpoError
from rpo.models.denoiser import Denoiser
from rpo.training.config import TrainConfig

Draw = Callable[[Path, Sequence[str]], Sequence[Image]]
"""(folder with weights as they are saved, prompts) -> a picture of each, from noise that is always the same."""


class Onlookers:
    """Of one run, all they write going to its folder."""

    def __init__(self, config: TrainConfig, prompts: Sequence[str], draw: Draw | None, folder: Path) -> None:
        """`prompts` are shown unless the config names others. Raises `RpoError` for a tracker that is unknown or not installed."""
        self._every, self._draw, self._folder = config.samples_every, draw, folder
        self._prompts = config.sample_prompts or prompts
        if self._every is not None and draw is None:
            raise ValueError("samples_every needs somebody who draws; give `draw`, or leave it out")
        self._trackers = [_tracker(name, folder) for name in config.trackers]

    def told(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """New lines of `metrics.jsonl`."""
        for tracker in self._trackers:
            for line in lines:
                tracker.log({name: value for name, value in line.items() if isinstance(value, float)}, step=line["step"])

    def due(self, step: int) -> bool:
        """Whether a sheet is to be made after `step`."""
        return self._every is not None and step % self._every == 0

    def shown(self, denoiser: Denoiser, weights: Mapping[str, Tensor], step: int) -> None:
        """Makes the sheet `samples/step-000200.png`, pictures side by side."""
        assert self._draw is not None
        sheets = self._folder / "samples"
        sheets.mkdir(exist_ok=True)
        sweep_folders(sheets)
        with temporary_folder(sheets / "weights") as folder:
            denoiser.save(folder, weights)
            images = np.stack(list(self._draw(folder, self._prompts)))
        with atomic_path(sheets / f"step-{step:06d}.png") as partial:
            partial.write_bytes(encode_png(np.concatenate(list(images), axis=1)))
        for tracker in self._trackers:
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"samples": images}, step=step, **layout)

    def finish(self) -> None:
        for tracker in self._trackers:
            tracker.finish()


def _tracker(name: str, folder: Path) -> Any:
    if name not in map(str, get_available_trackers()):
        raise RpoError(f"tracker {name!r} is not installed; install it with: pip install {name}")
    place: dict[str, Any] = {"logging_dir": folder} if name == "tensorboard" else {"dir": folder}
    tracker = LOGGER_TYPE_TO_CLASS[name]("rpo", **place)
    tracker.start()
    return tracker
