"""Which part of a network a LoRA tunes; light to import, for configurations."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

LoraTarget = Literal["attention", "feed_forward", "convolution"]

TARGET_MODULES: Mapping[LoraTarget, tuple[str, ...]] = {
    "attention": ("to_q", "to_k", "to_v", "to_out.0"),
    "feed_forward": ("ff.net.0.proj", "ff.net.2"),
    "convolution": ("conv1", "conv2", "conv_shortcut", "proj_in", "proj_out"),
}
"""Names of the UNet's layers that each part of a LoRA reaches."""


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters (arXiv 2106.09685) in the UNet; the rest of it stays as it is."""

    rank: int = 16
    alpha: float | None = None
    """Scale times rank; None means `rank`, that is scale 1. Saved files carry the scale in their weights."""
    targets: tuple[LoraTarget, ...] = ("attention",)

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}; for full tuning give no Lora at all")
        if self.alpha is not None and not self.alpha > 0:
            raise ValueError(f"alpha must be above 0, got {self.alpha}; None means the rank")
        unknown = set(self.targets) - set(TARGET_MODULES)
        if unknown or not self.targets:
            raise ValueError(f"targets must be some of {', '.join(TARGET_MODULES)}; got {self.targets}")

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank
