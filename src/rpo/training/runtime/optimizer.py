"""What moves the weights: the optimiser and, if asked for, the moving average that is saved in their place."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from rpo.errors import RpoError
from rpo.training.config import TrainConfig

_AVERAGE = "average"
_LOSS_SCALE = "loss_scale"


class Descent:
    """An optimiser over named parameters, with all of its state as tensors that a checkpoint can hold.

    Where the parameters are split over processes (`Denoiser.shard`), so is the state; what is read out is whole on every process,
    and all of them must ask for it.
    """

    def __init__(self, config: TrainConfig, trained: Mapping[str, nn.Parameter]) -> None:
        self.trained = trained
        self._clip_norm, self._ema_decay, self._done = config.clip_norm, config.ema_decay, 0
        self._optimizer = _optimizer(config, trained.values())
        self._average = None if config.ema_decay is None else {name: value.detach().clone() for name, value in trained.items()}
        device = next(iter(trained.values())).device.type
        self._scaler = torch.amp.GradScaler(device, enabled=config.precision == "fp16")

    def backward(self, loss: Tensor) -> None:
        """Adds the loss's gradients; in fp16 they are scaled up so that small ones do not vanish."""
        self._scaler.scale(loss).backward()

    def step(self, lr: float) -> Tensor:
        """Moves the parameters by their gradients, which are used up; gives the gradients' norm before it was cut.

        A step whose gradients are too large for fp16 is skipped and has the norm 0; the next ones are scaled less.
        """
        for settings in self._optimizer.param_groups:
            settings["lr"] = lr
        self._scaler.unscale_(self._optimizer)
        norm = _whole(nn.utils.clip_grad_norm_(self.trained.values(), self._clip_norm))
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad()
        self._done += 1
        if self._average is not None and self._ema_decay is not None:
            decay = min(self._ema_decay, (1 + self._done) / (10 + self._done))  # the first steps would weigh for ever
            with torch.no_grad():
                averages: list[Tensor] = [*self._average.values()]
                weights: list[Tensor] = [*self.trained.values()]
                torch._foreach_lerp_(averages, weights, 1 - decay)  # pyright: ignore[reportPrivateUsage]
        return torch.where(norm.isfinite(), norm, 0.0) if self._scaler.is_enabled() else norm

    def weights(self) -> dict[str, Tensor]:
        """The parameters, whole and on the CPU, until the next step: they may be the very same memory."""
        return {name: _on_cpu(value) for name, value in self.trained.items()}

    def result(self) -> dict[str, Tensor]:
        """What training is for: the parameters' moving average where there is one, else the parameters."""
        return self.weights() if self._average is None else {name: _on_cpu(value) for name, value in self._average.items()}

    def state(self) -> dict[str, Tensor]:
        """All else that the next step depends on, by PARAMETER/WHAT, whole and on the CPU."""
        every = [(name, self._optimizer.state.get(parameter, {})) for name, parameter in self.trained.items()]
        kept = {f"{name}/{key}": _on_cpu(torch.as_tensor(value)) for name, values in every for key, value in values.items()}
        kept |= {f"{name}/{_AVERAGE}": _on_cpu(value) for name, value in (self._average or {}).items()}
        if self._scaler.is_enabled():
            scale = self._scaler.state_dict()
            kept[_LOSS_SCALE] = torch.tensor([scale["scale"], scale["_growth_tracker"]], dtype=torch.float64)
        return kept

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor], state: Mapping[str, Tensor], steps: int) -> None:
        """Takes up what was read out after `steps` steps. Raises `RpoError` when the weights are another network's."""
        if set(weights) != set(self.trained):
            raise RpoError("they are another network's")
        self._done = steps
        if self._scaler.is_enabled():
            scale, growth = state[_LOSS_SCALE].tolist()
            self._scaler.load_state_dict({**self._scaler.state_dict(), "scale": scale, "_growth_tracker": int(growth)})
        for name, parameter in self.trained.items():
            parameter.copy_(_beside(parameter, weights[name]))
            mine = {key.removeprefix(f"{name}/"): value for key, value in state.items() if key.startswith(f"{name}/")}
            average = mine.pop(_AVERAGE, None)
            if self._average is not None and average is not None:
                self._average[name].copy_(_beside(parameter, average))
            if mine:
                self._optimizer.state[parameter] = {key: self._restored(parameter, value) for key, value in mine.items()}

    def _restored(self, parameter: nn.Parameter, value: Tensor) -> Any:
        """Of the kind and in the place that the optimiser keeps it: bitsandbytes and transformers
        count steps with a plain number, torch's Adafactor on the CPU."""
        if value.ndim == 0 and not isinstance(self._optimizer, torch.optim.AdamW):
            return value if isinstance(self._optimizer, torch.optim.Adafactor) else value.item()
        return _beside(parameter, value)


def _optimizer(config: TrainConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    settings: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    match config.optimizer:
        case "adamw":
            return torch.optim.AdamW(parameters, fused=True, **settings)
        case "adafactor":
            return torch.optim.Adafactor(parameters, **settings)
        case "adafactor_transformers":
            from transformers.optimization import Adafactor

            # As Salesforce's SDXL recipe sets it (SalesforceAIResearch/DiffusionDPO, train.py).
            return Adafactor(parameters, clip_threshold=1.0, scale_parameter=False, relative_step=False, **settings)
        case "adamw8bit":
            try:
                from bitsandbytes.optim import AdamW8bit
            except ImportError as error:
                raise RpoError(
                    "optimizer 'adamw8bit' needs bitsandbytes; install it with: pip install 'rpo-diffusion[adamw8bit]'"
                ) from error
            return AdamW8bit(parameters, **settings)


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _on_cpu(value: Tensor) -> Tensor:
    return _whole(value.detach()).cpu().contiguous()


def _beside(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """On its device and, where it has its shape, in its memory layout: fused kernels walk all of them side by side."""
    if value.shape != parameter.shape:
        return value.to(parameter.device)
    if isinstance(parameter, DTensor):
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None)
    return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
