"""What the checks on a card share: the embedded base model prepared on any device, and the same network in float64 on the CPU."""

import copy
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

from rpo.data.images import EncodedImage, encode_png
from rpo.data.pairs import Pair
from rpo.models.denoiser import FlowSchedule
from rpo.shapes.render import render_scene
from rpo.shapes.scenes import caption, scenes
from rpo.shapes.weights import weights_folder
from rpo.training.config import TrainConfig
from rpo.training.inputs.batches import Visit
from rpo.training.inputs.errors import PairInputs, pair_errors
from rpo.training.objectives.preference import DiffusionDPO, PairErrors
from rpo.training.runtime.distributed import Processes
from rpo.training.runtime.interruption import StopRequest
from rpo.training.setup import Training, prepare

BASE = str(weights_folder() / "base")
CPU = torch.device("cpu")


def shape_pairs(count: int) -> list[Pair]:
    """Renders of the embedded world: the chosen image shows the prompt, the rejected one another scene."""
    rng = np.random.default_rng(0)
    source = scenes(rng, held_out=False)
    pairs = []
    for number in range(count):
        scene, other = next(source), next(source)
        chosen, rejected = (EncodedImage.of(encode_png(render_scene(each, rng))) for each in (scene, other))
        unused = {"critique": "{}", "instruction": "", "scores": "{}", "provenance": "{}"}
        pairs.append(Pair(id=f"pair-{number}", prompt=caption(scene), chosen=chosen, rejected=rejected, gap=1.0, split="train", **unused))
    return pairs


def config_for(model: str = BASE, **settings: Any) -> TrainConfig:
    defaults: dict[str, Any] = {
        "objective": DiffusionDPO(k=50.0),
        "steps": 6,
        "batch_pairs": 8,
        "accumulation": 1,
        "lr": 1e-3,
        "warmup_steps": 1,
        "lora_rank": 4,
        "draws": 2,
        "cache_batch": 16,
    }
    return TrainConfig(model=model, **{**defaults, **settings})


def prepared(config: TrainConfig, pairs: Sequence[Pair], device: torch.device, folder: Path) -> Training:
    group = Processes(device=device)
    return prepare(config, pairs, [], folder / device.type, StopRequest(), Progress(console=Console(quiet=True)), group)


def perturb(training: Training, size: float = 0.02) -> None:
    """Moves the policy off the reference, the same way on every device."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in training.denoiser.trainable().values():
            weight.add_((size * torch.randn(weight.shape, generator=generator)).to(weight.device))


def moved(value: Any, device: torch.device) -> Any:
    """The same dataclasses, tuples and mappings with every tensor on `device`."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: moved(getattr(value, field.name), device) for field in fields(value)})
    if isinstance(value, tuple):
        return type(value)(*(moved(item, device) for item in value))
    if isinstance(value, Mapping):
        return {name: moved(item, device) for name, item in value.items()}
    return value


class Exact:
    """A denoiser's network in float64."""

    def __init__(self, training: Training) -> None:
        self._denoiser: Any = training.denoiser
        self.network = copy.deepcopy(self._denoiser._network).double()

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, conditions: Mapping[str, torch.Tensor]) -> torch.Tensor:
        schedule = self._denoiser.schedule
        level = schedule.levels(t, x_t) if isinstance(schedule, FlowSchedule) else t
        doubled = {name: rows.double() if rows.is_floating_point() else rows for name, rows in conditions.items()}
        return self._denoiser._family.predict(self.network, x_t.double(), level, doubled)


@dataclass(frozen=True)
class Outcome:
    """Of one micro-batch: errors of both sides, loss per pair, and the gradient of all trained weights as one vector, float64."""

    errors: torch.Tensor
    losses: torch.Tensor
    gradient: torch.Tensor


def outcome(training: Training, network: Any, trained: Mapping[str, torch.nn.Parameter], inputs: PairInputs, ref: torch.Tensor) -> Outcome:
    """Against given reference errors (2, pairs)."""
    scale = 1024.0 if training.config.precision == "fp16" else 1.0
    sides = pair_errors(network, training.path, inputs)
    losses = training.config.objective(PairErrors(sides.chosen, sides.rejected, *ref.to(sides.chosen)))
    (scale * losses.mean()).backward()
    gradient = torch.cat([trained[name].grad.detach().double().cpu().flatten() / scale for name in sorted(trained)])
    return Outcome(torch.stack([sides.chosen, sides.rejected]).detach().double().cpu(), losses.detach().double().cpu(), gradient)


def first_visits(training: Training) -> list[Visit]:
    return [Visit(pair=pair, number=0) for pair in range(training.config.micro_pairs)]


def relative(value: torch.Tensor, exact: torch.Tensor) -> float:
    """Norm of the difference over the norm; infinite where a value is no number."""
    distance = float((value.double().cpu() - exact.double().cpu()).norm() / exact.double().norm())
    return distance if np.isfinite(distance) else float("inf")


@contextmanager
def tf32(allowed: bool):
    """Whether convolutions may round float32 to TF32; products may not, as is torch's default."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
