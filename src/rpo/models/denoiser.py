"""What the trainer may know about a text-to-image network; one implementation per model family."""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.overrides import TorchFunctionMode

from rpo.arrays import Conditions, Images, Latents, Levels, Schedule, Timesteps

Component = Literal["images", "prompts", "network"]
Prediction = Literal["epsilon", "v_prediction"]


class Posterior(NamedTuple):
    """The autoencoder's Gaussian over latents, already in the network's scale: a latent is `mean + std * noise`."""

    mean: Latents
    std: Latents


@dataclass(frozen=True, kw_only=True)
class NoiseSchedule:
    """How the network was trained to see noise: x_t = sqrt(a_t) x0 + sqrt(1 - a_t) noise, a_t = `alphas_cumprod[t]`."""

    alphas_cumprod: Schedule
    prediction: Prediction
    """What the network predicts: the noise, or v = sqrt(a_t) noise - sqrt(1 - a_t) x0 (arXiv 2202.00512)."""

    def like(self, other: object) -> bool:
        """Whether networks of both can be given the same input and be measured against the same target."""
        return (
            isinstance(other, NoiseSchedule)
            and self.prediction == other.prediction
            and self.alphas_cumprod.shape == other.alphas_cumprod.shape
            and torch.allclose(self.alphas_cumprod, other.alphas_cumprod)
        )


@dataclass(frozen=True, kw_only=True)
class ResolutionShift:
    """Shift of noise levels that grows with the number of image tokens, as the pipelines sample: larger images need more noise to lose
    the same share of their content (arXiv 2403.03206, section 5.3.2). mu is linear in the tokens, through (`base_tokens`, `base_shift`) and
    (`max_tokens`, `max_shift`).
    """

    base_tokens: int
    max_tokens: int
    base_shift: float
    max_shift: float
    kind: Literal["exponential", "linear"]
    """Whether levels are shifted by exp(mu) or by mu."""
    patch: int
    """Side of the square of latents that is one token."""

    def factor(self, height: int, width: int) -> float:
        """s in sigma' = s sigma / (1 + (s - 1) sigma), for latents of this size."""
        tokens = (height // self.patch) * (width // self.patch)
        slope = (self.max_shift - self.base_shift) / (self.max_tokens - self.base_tokens)
        mu = self.base_shift + slope * (tokens - self.base_tokens)
        return math.exp(mu) if self.kind == "exponential" else mu


@dataclass(frozen=True, kw_only=True)
class FlowSchedule:
    """Flow matching: x_t = (1 - sigma_t) x0 + sigma_t noise; the network predicts noise - x0 (arXiv 2403.03206, eq. 13)."""

    sigmas: Schedule
    """The noise's share at each timestep, rising to 1; before the shift by resolution, if there is one."""
    shift: ResolutionShift | None = None

    def levels(self, t: Timesteps, latents: Latents) -> Levels:
        """The noise's share at timesteps `t` for latents of this size."""
        sigma = self.sigmas[t]
        if self.shift is None:
            return sigma
        factor = self.shift.factor(latents.shape[-2], latents.shape[-1])
        return factor * sigma / (1 + (factor - 1) * sigma)

    def like(self, other: object) -> bool:
        """Whether networks of both can be given the same input and be measured against the same target."""
        return (
            isinstance(other, FlowSchedule)
            and self.shift == other.shift
            and self.sigmas.shape == other.sigmas.shape
            and torch.allclose(self.sigmas, other.sigmas)
        )


@runtime_checkable
class Network(Protocol):
    """What computes an error."""

    def predict(self, x_t: Latents, t: Timesteps, conditions: Conditions) -> Latents:
        """The network's output at noise level `t`, in the dtype it computes in."""
        ...


@runtime_checkable
class Denoiser(Network, Protocol):
    """A network that can be tuned, with the encoders that feed it. Holds a device; not thread-safe."""

    @property
    def device(self) -> torch.device:
        """Where it computes; its network may be elsewhere meanwhile (`move`)."""
        ...

    @property
    def schedule(self) -> NoiseSchedule | FlowSchedule: ...

    @property
    def digests(self) -> Mapping[Component, str]:
        """Content hashes of what turns images into latents, prompts into embeddings, and of the untuned network: cache keys."""
        ...

    def encode_images(self, images: Images) -> Posterior:
        """Latent posteriors of RGB images whose sides are multiples of the autoencoder's stride."""
        ...

    def encode_prompts(self, prompts: Sequence[str]) -> Conditions:
        """One row per prompt, as the family's pipeline computes it; each distinct prompt is encoded once."""
        ...

    def free_encoders(self) -> None:
        """Gives back the memory of the image and text encoders; the next `encode_*` loads them again."""
        ...

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that training moves, by name, in a fixed order."""
        ...

    def base_network(self) -> AbstractContextManager[None]:
        """While it is open, `predict` is the untuned network's (adapters off). Raises `RpoError` under full tuning."""
        ...

    def frozen_copy(self) -> "Denoiser":
        """A second network with today's weights that no training moves: the reference of full tuning."""
        ...

    def move(self, device: torch.device) -> None:
        """Takes the network to another device, from which it must be back before it predicts; a no-op where it is there already."""
        ...

    def shard(self, over: DeviceMesh) -> None:
        """Splits the network over processes, each of which holds a part and calls `predict` as often as the others do (FSDP2).

        Gradients become the sum over them. Before the first step only.
        """
        ...

    def save(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Writes a tuned network into a new `folder`, in the format the family's pipeline loads: `weights` by names of `trainable`."""
        ...


class Float32Attention(TorchFunctionMode):
    """Attention in float32 inside an autocast region. In bf16 the backward pass of the CPU's flash attention is so slow that a whole step
    takes longer than in float32; everything else is faster in bf16 where the CPU has instructions for it (AMX, AVX512-BF16).
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        named = {**dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args, strict=False)), **(kwargs or {})}
        computed_in = named["query"].dtype
        with torch.autocast("cpu", enabled=False):
            return func(**{**named, **{name: named[name].float() for name in ("query", "key", "value")}}).to(computed_in)


def memory_format(device: torch.device) -> torch.memory_format:
    """The layout of images and weights with which convolutions are fastest: channels last on GPUs, and not on CPUs."""
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


def network_inputs(latents: Latents, device: torch.device) -> Tensor:
    """`latents` on `device`, in its memory layout."""
    return latents.to(device, memory_format=memory_format(device), non_blocking=True)
