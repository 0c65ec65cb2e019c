"""What a run says about itself: one JSON line per step, and an alarm when the chosen images get worse.

Margins can grow while both errors rise, the rejected one faster: the loss falls and the model spoils. So the chosen error is
held against the reference's.
"""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rpo.core.parquet import append_text, write_text
from rpo.core.records import read_lines, record_line
from rpo.errors import RpoError
from rpo.training.objectives.preference import PairErrors

ADVICE = {
    "chosen side worse than the reference": "the margin grows by spoiling both sides. "
    "Look at the pairs' health, or lower lr or k, or wrap the objective in a safeguard.",
    "margin from the rejected side alone": "the chosen images have gained nothing. "
    "Add a pull towards them (WithSFT), or scale the rejected side's gradient (WinnerPreserving, LoserGradient).",
    "all pairs told apart": "there is little left to learn from them but noise. Stop here, bring more pairs, or lower lr.",
}
"""Every alarm, what it means and what to do about it."""


@dataclass(frozen=True, kw_only=True)
class Trend:
    """Exponential averages of a value and of its square, one value per step."""

    steps: int = 0
    mean: float = 0.0
    square: float = 0.0

    DECAY = 0.95
    WARM_STEPS = 20

    def add(self, value: float, weight: float = 1.0) -> "Trend":
        """After one more value, which counts as `weight` steps, at least as one."""
        weight = max(1.0, weight)
        keep = self.DECAY**weight if self.steps else 0.0
        return Trend(
            steps=self.steps + round(weight),
            mean=keep * self.mean + (1 - keep) * value,
            square=keep * self.square + (1 - keep) * value * value,
        )

    @property
    def sign(self) -> int:
        """1 or -1 when the average is off 0 by more than three of its own standard errors, else 0."""
        window = min(self.steps, (1 + self.DECAY) / (1 - self.DECAY))
        error = math.sqrt(max(0.0, self.square - self.mean * self.mean) / max(1.0, window))
        if self.steps < self.WARM_STEPS or abs(self.mean) <= 3 * error or self.mean == 0:
            return 0
        return 1 if self.mean > 0 else -1


@dataclass(frozen=True, kw_only=True)
class Watch:
    """What the alarms are raised from."""

    chosen: Trend = Trend()
    """Chosen error less the reference's."""
    rejected: Trend = Trend()
    """The same of the rejected side."""
    accuracy: Trend = Trend()
    """Share of (pair, draw) told apart where neither noise nor timestep was trained on: draws come back, and are learned by heart."""

    SATURATED = 0.995
    DECISIONS = 32
    """Pairs and draws that count as one step of the accuracy's trend."""

    def add(self, line: Mapping[str, Any]) -> "Watch":
        """After a step whose metrics are `line`."""
        return Watch(
            chosen=self.chosen.add(line["chosen_over_reference"]),
            rejected=self.rejected.add(line["rejected_over_reference"]),
            accuracy=self._accuracy(line),
        )

    def _accuracy(self, line: Mapping[str, Any]) -> Trend:
        measured = [line[key] for key in ("held_out_draw_accuracy", "fresh_draw_accuracy") if key in line]
        if measured:
            return self.accuracy.add(measured[0], line["measured_draws"] / self.DECISIONS)
        return self.accuracy.add(line["accuracy"]) if line.get("fresh") else self.accuracy

    @property
    def alarms(self) -> tuple[str, ...]:
        """Keys of `ADVICE`."""
        rung = {
            "chosen side worse than the reference": self.chosen.sign > 0,
            "margin from the rejected side alone": self.chosen.sign == 0 and self.rejected.sign > 0,
            "all pairs told apart": self.accuracy.steps >= Trend.WARM_STEPS and self.accuracy.mean > self.SATURATED,
        }
        return tuple(name for name, rings in rung.items() if rings)


class MetricsLog:
    """`metrics.jsonl`: a line per step, in order, none twice. Values stay on the device until they are written."""

    def __init__(self, path: Path | None, *, step: int, say: Callable[[str], None] = lambda line: None) -> None:
        """Drops the lines after `step`, which a killed run wrote and a resumed one will write again. Without a path nothing is written.

        Says how many lines up to `step` are lost because they are cut or changed.
        """
        self._path = path
        self._waiting: list[tuple[dict[str, float | int], dict[str, Tensor]]] = []
        if path is None:
            return
        lines, damaged = read_lines(path)
        kept = [line for line in lines if isinstance(line.get("step"), int) and line["step"] <= step]
        if damaged and len(kept) < step:
            say(f"{path}: {len(damaged)} lines are damaged (line {damaged[0]} first) and {step - len(kept)} of {step} steps have no line")
        write_text(path, "".join(map(record_line, kept)))

    def add(self, values: Mapping[str, float | int], tensors: Mapping[str, Tensor]) -> None:
        """A step's line: plain values, and scalars that the device may still be computing."""
        self._waiting.append((dict(values), dict(tensors)))

    def flush(self, watch: Watch) -> tuple[Watch, list[dict[str, Any]]]:
        """Writes the waiting lines to the disk; gives the watch after them and the lines.

        Waits for the device once. Raises `RpoError` when a loss is no number.
        """
        if not self._waiting:
            return watch, []
        names = [list(tensors) for _, tensors in self._waiting]
        numbers = iter(torch.stack([tensor.float() for _, tensors in self._waiting for tensor in tensors.values()]).tolist())
        lines: list[dict[str, Any]] = []
        for (values, _), keys in zip(self._waiting, names, strict=True):
            line: dict[str, Any] = {**values, **{key: next(numbers) for key in keys}}
            if not math.isfinite(line["loss"]) or not math.isfinite(line["gradient_norm"]):
                raise RpoError(f"the loss or its gradient is no number at step {line['step']}; lower lr or k, or use precision='fp32'")
            if "chosen_over_reference" in line:
                watch = watch.add(line)
                line.pop("fresh", None)
                line |= {"chosen_drift": watch.chosen.mean, "alarm": "; ".join(watch.alarms)}
            lines.append(line)
        self._waiting.clear()
        if self._path is not None:
            append_text(self._path, "".join(map(record_line, lines)))
        return watch, lines


def last_line(path: Path) -> dict[str, Any]:
    """The newest line of a `metrics.jsonl`, or nothing when there is none."""
    lines, damaged = read_lines(path)
    if damaged and damaged[-1] > len(lines):
        warnings.warn(f"{path}: line {damaged[-1]}, the last, is damaged; the line before it is taken", stacklevel=2)
    return lines[-1] if lines else {}


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
    return preferred(margin).mean()


def preferred(margin: Tensor) -> Tensor:
    """1 where the chosen side is preferred more than by the reference, 0 where less, a half for a tie."""
    return (margin.sign() + 1) / 2
