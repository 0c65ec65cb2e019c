"""What a run says about itself: one JSON line per step, and an alarm when the chosen images get worse.

Margins can grow while both errors rise, the rejected one faster: the loss falls and the model spoils. So the chosen error is
held against the reference's.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rpo.data.shards import write_text
from rpo.errors import RpoError
from rpo.train.objectives import PairErrors


@dataclass(frozen=True, kw_only=True)
class Drift:
    """Exponential averages of (chosen error - reference's chosen error) and of its square, one value per step."""

    steps: int = 0
    mean: float = 0.0
    square: float = 0.0

    DECAY = 0.95
    WARM_STEPS = 20

    def add(self, value: float) -> "Drift":
        keep = self.DECAY if self.steps else 0.0
        return Drift(
            steps=self.steps + 1,
            mean=keep * self.mean + (1 - keep) * value,
            square=keep * self.square + (1 - keep) * value * value,
        )

    @property
    def alarm(self) -> bool:
        """The chosen error is above the reference's by more than three standard errors of its own average."""
        window = min(self.steps, (1 + self.DECAY) / (1 - self.DECAY))
        error = math.sqrt(max(0.0, self.square - self.mean * self.mean) / max(1.0, window))
        return self.steps >= self.WARM_STEPS and self.mean > 3 * error and self.mean > 0


class MetricsLog:
    """`metrics.jsonl`: a line per step, in order, none twice. Values stay on the device until they are written."""

    def __init__(self, path: Path, *, step: int) -> None:
        """Drops the lines after `step`, which a killed run wrote and a resumed one will write again."""
        self._path = path
        self._waiting: list[tuple[dict[str, float | int], dict[str, Tensor]]] = []
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if (number := _step_of(line)) is not None and number <= step]
        write_text(path, "".join(f"{line}\n" for line in kept))

    def add(self, values: Mapping[str, float | int], tensors: Mapping[str, Tensor]) -> None:
        """A step's line: plain values, and scalars that the device may still be computing."""
        self._waiting.append((dict(values), dict(tensors)))

    def flush(self, drift: Drift) -> tuple[Drift, list[dict[str, float | int | bool]]]:
        """Writes the waiting lines to the disk; gives the drift after them and the lines.

        Waits for the device once. Raises `RpoError` when a loss is no number.
        """
        if not self._waiting:
            return drift, []
        names = [list(tensors) for _, tensors in self._waiting]
        numbers = iter(torch.stack([tensor.float() for _, tensors in self._waiting for tensor in tensors.values()]).tolist())
        lines: list[dict[str, float | int | bool]] = []
        for (values, _), keys in zip(self._waiting, names, strict=True):
            line: dict[str, float | int | bool] = {**values, **{key: next(numbers) for key in keys}}
            if not math.isfinite(line["loss"]) or not math.isfinite(line["gradient_norm"]):
                raise RpoError(f"the loss or its gradient is no number at step {line['step']}; lower lr or k, or use precision='fp32'")
            if "chosen_over_reference" in line:
                drift = drift.add(line["chosen_over_reference"])
                line |= {"chosen_drift": drift.mean, "alarm": drift.alarm}
            lines.append(line)
        self._waiting.clear()
        with self._path.open("a") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())
        return drift, lines


def last_line(path: Path) -> dict[str, float | int | bool]:
    """The newest line of a `metrics.jsonl`, or nothing when there is none."""
    lines = path.read_text().splitlines() if path.exists() else []
    return json.loads(lines[-1]) if lines else {}


def batch_metrics(errors: PairErrors) -> dict[str, Tensor]:
    """What a batch of pairs says, as scalars on the device."""
    metrics = {"chosen_error": errors.chosen.mean()}
    if errors.rejected is not None:
        metrics["rejected_error"] = errors.rejected.mean()
    if errors.rejected is not None and errors.ref_chosen is not None and errors.ref_rejected is not None:
        margin = errors.margin()
        metrics |= {
            "chosen_over_reference": (errors.chosen - errors.ref_chosen).mean(),
            "rejected_over_reference": (errors.rejected - errors.ref_rejected).mean(),
            "margin_p10": margin.quantile(0.1),
            "margin_p50": margin.quantile(0.5),
            "margin_p90": margin.quantile(0.9),
            "accuracy": accuracy(margin),
        }
    return metrics


def accuracy(margin: Tensor) -> Tensor:
    """Share of pairs whose chosen side is preferred more than by the reference; ties count half."""
    return (margin.sign() + 1).mean() / 2


def _step_of(line: str) -> int | None:
    """None for a line that was cut off."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None
