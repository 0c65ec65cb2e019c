"""What moves the weights: the optimiser and, if asked for, the moving average that is saved in their place."""

from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rpo.train.config import TrainConfig

_AVERAGE = "average"


class Descent:
    """An optimiser over named parameters, with all of its state as tensors that a checkpoint can hold."""

    def __init__(self, config: TrainConfig, trained: Mapping[str, nn.Parameter]) -> None:
        self.trained = trained
        self._clip_norm, self._ema_decay, self._done = config.clip_norm, config.ema_decay, 0
        self._optimizer = _optimizer(config, trained.values())
        self._average = None if config.ema_decay is None else {name: value.detach().clone() for name, value in trained.items()}

    def step(self, lr: float) -> Tensor:
        """Moves the parameters by their gradients, which are used up; gives the gradients' norm before it was cut."""
        for settings in self._optimizer.param_groups:
            settings["lr"] = lr
        norm = nn.utils.clip_grad_norm_(self.trained.values(), self._clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._done += 1
        if self._average is not None and self._ema_decay is not None:
            decay = min(self._ema_decay, (1 + self._done) / (10 + self._done))  # the first steps would weigh for ever
            for name, value in self.trained.items():
                self._average[name].lerp_(value.detach(), 1 - decay)
        return norm

    def tensors(self) -> dict[str, Tensor]:
        """The state, by PARAMETER/WHAT."""
        state = self._optimizer.state
        kept = {f"{name}/{key}": value for name, parameter in self.trained.items() for key, value in state.get(parameter, {}).items()}
        return kept | {f"{name}/{_AVERAGE}": value for name, value in (self._average or {}).items()}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        """Takes up the state after `steps` steps."""
        self._done = steps
        for name, parameter in self.trained.items():
            mine = {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}
            average = mine.pop(_AVERAGE, None)
            if self._average is not None and average is not None:
                self._average[name].copy_(average)
            if mine:
                self._optimizer.state[parameter] = {key: _beside(parameter, value) for key, value in mine.items()}

    @contextmanager
    def averaged(self) -> Generator[None, None, None]:
        """Within it the parameters are their average, where there is one."""
        if self._average is None:
            yield
            return
        last = {name: value.detach().clone() for name, value in self.trained.items()}
        self._put(self._average)
        try:
            yield
        finally:
            self._put(last)

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self.trained.items():
            parameter.copy_(values[name])


def _optimizer(config: TrainConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    match config.optimizer:
        case "adamw":
            return torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay, fused=True)
        case "adafactor":
            return torch.optim.Adafactor(parameters, lr=config.lr, weight_decay=config.weight_decay)


def _beside(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """On its device and, where it has its shape, in its memory layout: fused kernels walk all of them side by side."""
    if value.shape != parameter.shape:
        return value.to(parameter.device)
    return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
