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
    `folder/NAME.pt` (our own file, read back with `weights_only=True`) and the log in `folder/NAME.jsonl`.
    """
    network = nn.ModuleDict(modules)
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    average = [p.detach().clone() for p in parameters]
    checkpoint, log = folder / f"{name}.pt", folder / f"{name}.jsonl"
    start = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        if state["steps"] != steps:
            raise RpoError(f"{checkpoint} belongs to a run of {state['steps']} steps, not {steps}; delete it to start again")
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        average, start = state["average"], state["step"]

    def save(step: int) -> None:
        partial = checkpoint.with_suffix(".tmp")
        state = {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "average": average, "step": step, "steps": steps}
        torch.save(state, partial)
        os.replace(partial, checkpoint)

    began, last_save, running = time.monotonic(), time.monotonic(), None
    network.train()
    for step in track(range(start, steps), description=f"{name:>12}", total=steps - start):
        rate = lr_end + (lr - lr_end) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / warmup_steps)
        value = loss(step)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if ema_decay is not None:
            decay = min(ema_decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - decay)
        running = value.item() if running is None else 0.98 * running + 0.02 * value.item()
        if step % 100 == 99 or step == steps - 1:
            with log.open("a") as file:
                file.write(json.dumps({"step": step + 1, "loss": running, "seconds": round(time.monotonic() - began, 1)}) + "\n")
        if time.monotonic() - last_save >= checkpoint_every_s:
            save(step + 1)
            last_save = time.monotonic()
    if start < steps:
        save(steps)
    if ema_decay is not None:
        with torch.no_grad():
            for parameter, mean in zip(parameters, average, strict=True):
                parameter.copy_(mean)
    network.eval()
