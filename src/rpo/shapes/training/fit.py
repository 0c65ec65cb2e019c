"""One resumable training loop for every small network of the embedded world.

The batch of a step is a pure function of (seed, step), so a run that is killed and started again ends with the same weights.
"""

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.progress import track
from torch import nn

from rpo.errors import RpoError


class _State:
    """The network, its optimizer and its moving average, kept in one file of our own (read back with `weights_only=True`)."""

    def __init__(self, modules: dict[str, nn.Module], path: Path, steps: int, lr: float) -> None:
        self.network = nn.ModuleDict(modules)
        self.parameters = [p for p in self.network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
        self.average = [p.detach().clone() for p in self.parameters]
        self.path, self.steps, self.step = path, steps, 0
        if not path.exists():
            return
        state = torch.load(path, weights_only=True)
        if state["steps"] != steps:
            raise RpoError(f"{path} belongs to a run of {state['steps']} steps, not {steps}; delete it to start again")
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average, self.step = state["average"], state["step"]

    def save(self, step: int) -> None:
        partial = self.path.with_suffix(".tmp")
        tensors = {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict(), "average": self.average}
        torch.save(tensors | {"step": step, "steps": self.steps}, partial)
        os.replace(partial, self.path)

    def descend(self, value: torch.Tensor, rate: float, ema_decay: float | None) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        if ema_decay is not None:
            torch._foreach_lerp_(  # pyright: ignore[reportPrivateUsage]  (as torch.optim.swa_utils does)
                self.average, [p.detach() for p in self.parameters], 1 - ema_decay
            )

    @torch.no_grad()
    def take_average(self) -> None:
        for parameter, mean in zip(self.parameters, self.average, strict=True):
            parameter.copy_(mean)


def fit(
    name: str,
    modules: dict[str, nn.Module],
    loss: Callable[[int], torch.Tensor],
    *,
    steps: int,
    lr: float,
    folder: Path,
    lr_end: float = 0.0,
    ema_decay: float | None = 0.999,
    warmup_steps: int = 100,
    checkpoint_every_s: float = 60.0,
) -> None:
    """Minimises `loss(step)` over the parameters of `modules` with AdamW and a cosine schedule from `lr` to `lr_end`.

    Leaves the exponential moving average of the weights in `modules` when `ema_decay` is set. State is kept in
    `folder/NAME.pt` and the log in `folder/NAME.jsonl`.
    """
    state = _State(modules, folder / f"{name}.pt", steps, lr)
    start, began, last_save, running = state.step, time.monotonic(), time.monotonic(), None
    state.network.train()
    for step in track(range(start, steps), description=f"{name:>12}", total=steps - start):
        value = loss(step)
        rate = (lr_end + (lr - lr_end) * 0.5 * (1 + math.cos(math.pi * step / steps))) * min(1.0, (step + 1) / warmup_steps)
        state.descend(value, rate, ema_decay and min(ema_decay, (1 + step) / (10 + step)))
        running = value.item() if running is None else 0.98 * running + 0.02 * value.item()
        if step % 100 == 99 or step == steps - 1:
            with (folder / f"{name}.jsonl").open("a") as file:
                file.write(json.dumps({"step": step + 1, "loss": running, "seconds": round(time.monotonic() - began, 1)}) + "\n")
        if time.monotonic() - last_save >= checkpoint_every_s:
            state.save(step + 1)
            last_save = time.monotonic()
    if start < steps:
        state.save(steps)
    if ema_decay is not None:
        state.take_average()
    state.network.eval()
