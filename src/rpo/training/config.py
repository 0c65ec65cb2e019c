"""Everything that decides what a training run computes."""

import math
from dataclasses import dataclass
from typing import Literal

import torch

from rpo.models.lora import Lora, LoraTarget
from rpo.training.objectives.preference import DiffusionDPO, Objective

EVAL_DRAWS = 4
"""Fixed draws per held-out pair, one in each quarter of the timesteps."""
_PERIODS = ("log_every", "eval_every", "checkpoint_every")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run. The defaults suit Stable Diffusion 1.5 at 512 pixels with a LoRA on one GPU."""

    model: str
    """Pipeline to tune, a folder or a hub id (owner/name, or owner/name@revision to pin a commit, tag or branch): Stable Diffusion 1 to
    3.5, SDXL, FLUX.1 or Z-Image."""
    objective: Objective = DiffusionDPO()
    """What is minimised."""
    steps: int = 2000
    """Optimiser steps."""
    batch_pairs: int = 32
    """Pairs per optimiser step."""
    accumulation: int = 4
    """Micro-batches per step: the same gradient in less memory. Must divide `batch_pairs`."""
    lr: float = 1e-5
    """Learning rate after the warm-up."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises linearly from near 0."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What follows: the learning rate stays, or falls towards 0 at the end, evenly or along half a cosine."""
    weight_decay: float = 0.01
    """Decoupled decay of the weights."""
    optimizer: Literal["adamw", "adafactor", "adafactor_transformers", "adamw8bit"] = "adamw"
    """Less memory in full tuning: Adafactor keeps sums of rows and columns in place of AdamW's two numbers per weight. `adafactor` is
    torch's: a step is `lr` times the tensor's root mean square (1e-3 at least), and `lr` at most 1/sqrt(step). `adafactor_transformers` is
    that of the public SDXL scripts, transformers' with a step of `lr` itself: 20 to 50 times as far at the same `lr`. `adamw8bit` (needs
    bitsandbytes) keeps AdamW's two numbers in a byte each."""
    ema_decay: float | None = None
    """Save the weights' exponential moving average with this decay, 0.999 say, in place of the last ones; None saves the last ones."""
    clip_norm: float = 1.0
    """The gradient's norm is cut to this."""
    lora_rank: int | None = 16
    """Rank of the adapters; None tunes every weight of the network."""
    lora_alpha: float | None = None
    """Scale of the adapters times their rank; None means the rank."""
    lora_targets: tuple[LoraTarget, ...] = ("attention",)
    """Which layers get adapters."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """What the network computes in; in fp32 newer GPUs round inside convolutions (TF32), as is torch's default. Errors, losses, trained
    weights and their averages are float32 whatever it is."""
    compile: bool = False
    """Let torch compile the network: minutes at the start, then faster steps. What cannot be compiled runs as it is, with a warning."""
    shard: bool = False
    """Split weights, gradients and the optimiser's state over the processes (FSDP2), for networks too big to tune on one GPU; with a LoRA
    the frozen weights as well."""
    seed: int = 0
    """Decides data order, noise, dropout and the adapters' first values."""
    draws: int | None = 8
    """Fixed draws of timestep and noise per pair, taken in turn over epochs; None draws anew on every visit."""
    generation_noise: bool = False
    """Add to both sides the noise that the source was generated from, whatever the timestep, in place of new noise. For our own pairs."""
    reference: Literal["cached", "live", "offloaded"] = "cached"
    """`cached` computes the reference's error of every draw before the first step; `live` runs the reference in every step; `offloaded`
    does so too and keeps its network in the host's memory meanwhile: for full tuning that needs the room on the GPU, and slow."""
    reference_model: str | None = None
    """Pipeline of the same family that the policy is measured against, a folder or a hub id (owner/name, owner/name@revision); None means
    the model before tuning."""
    timesteps: tuple[int, int] | None = None
    """Only timesteps from the first up to, not including, the second; None means all."""
    unchanged_weight: float = 1.0
    """How much the error counts where the two images of a pair agree, against 1 where they differ; 0 leaves only what the edit changed."""
    caption_dropout: float = 0.1
    """Share of draws whose prompt is replaced by the empty one, on both sides of the pair."""
    flip: bool = False
    """Mirror left and right on half of a pair's draws, both sides alike. Not for prompts that say left or right."""
    resolution: int | None = None
    """Side to which images are cropped and resized; None takes them as they are, all of one size."""
    cache_batch: int = 32
    """Images, prompts or samples at once while the caches are built."""
    log_every: int = 10
    """Steps between writes to `metrics.jsonl`, which has a line for each step."""
    eval_every: int = 50
    """Steps between measurements on held-out pairs."""
    eval_pairs: int = 64
    """Held-out pairs that are measured, at most."""
    checkpoint_every: int = 50
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay on the disk, beside the one that did best on held-out pairs."""
    result: Literal["last", "best"] = "last"
    """Whether the weights after the last step are the result, or those with the highest held-out accuracy."""
    samples_every: int | None = None
    """Steps between sheets of sample pictures in `train/samples`; None makes none. Loads the whole pipeline anew each time."""
    sample_prompts: tuple[str, ...] = ()
    """What they show; empty means the prompts of the first held-out pairs, or of the first pairs."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Where metrics and sample pictures go as well; `metrics.jsonl` is always written."""
    stop_on_alarm: bool = False
    """Stop, with a checkpoint, when the chosen images get worse, gain nothing, or all pairs are told apart; else only warn."""

    def __post_init__(self) -> None:
        for name in (*_PERIODS, "steps", "batch_pairs", "accumulation", "cache_batch", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("warmup_steps", "eval_pairs", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("lr", "clip_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("paired", "referenced"):
            if not callable(getattr(self.objective, name)):
                raise ValueError(
                    f"objective {type(self.objective).__name__}: {name} must be a method that returns a bool, not an attribute"
                )
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay must be above 0 and below 1, got {self.ema_decay}; None saves the last weights")
        if self.batch_pairs % self.accumulation:
            raise ValueError(f"accumulation must divide batch_pairs, got {self.accumulation} and {self.batch_pairs}")
        for name in ("caption_dropout", "unchanged_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        if self.draws is not None and self.draws < 1:
            raise ValueError(f"draws must be at least 1, got {self.draws}; None draws anew on every visit")
        if self.draws is None and self.reference == "cached" and self.objective.referenced():
            raise ValueError("reference='cached' needs a fixed number of draws, got draws=None; set draws=8, or reference='live'")
        if self.reference == "offloaded" and self.lora_rank is not None and self.reference_model is None:
            raise ValueError(
                "reference='offloaded' moves a second network, and a LoRA's reference is its own without adapters; take 'live'"
            )
        if self.flip and self.generation_noise:
            raise ValueError("flip would mirror images whose generation_noise is not mirrored; leave one of them out")
        if self.timesteps is not None and not 0 <= self.timesteps[0] < self.timesteps[1]:
            raise ValueError(f"timesteps must be (first, end) with 0 <= first < end, got {self.timesteps}")
        if self.samples_every is not None and self.samples_every < 1:
            raise ValueError(f"samples_every must be at least 1, got {self.samples_every}; None makes no sample pictures")
        if self.shard and self.optimizer == "adafactor_transformers":
            raise ValueError(
                "optimizer 'adafactor_transformers' knows no tensors that are split (shard); take 'adafactor', or leave shard out"
            )
        if self.shard and (self.compile or self.precision == "fp16"):
            raise ValueError("shard is for fp32 or bf16 without compile; change those, or leave shard out")
        self.lora()

    def lora(self) -> Lora | None:
        return None if self.lora_rank is None else Lora(rank=self.lora_rank, alpha=self.lora_alpha, targets=self.lora_targets)

    @property
    def dtype(self) -> torch.dtype:
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]

    @property
    def cache_dtype(self) -> torch.dtype:
        """Of stored latents and embeddings; half precision holds more digits than bf16 computes with."""
        return torch.float32 if self.precision == "fp32" else torch.float16

    @property
    def bytes_per_weight(self) -> float:
        """Of a trained weight, its gradient, the optimiser's state, the moving average and, in full tuning, a live reference's own."""
        state = {"adamw": 8.0, "adafactor": 0.0, "adafactor_transformers": 0.0, "adamw8bit": 2.0}[self.optimizer]
        twice = self.reference == "live" and self.lora_rank is None and self.objective.referenced()
        return 8.0 + state + 4.0 * (self.ema_decay is not None) + self.dtype.itemsize * twice

    @property
    def micro_pairs(self) -> int:
        return self.batch_pairs // self.accumulation

    def lr_at(self, step: int) -> float:
        """Learning rate of step 0, 1, 2, ..."""
        rising = min(1.0, (step + 1) / max(1, self.warmup_steps))
        gone = max(0, step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        falling = {"constant": 1.0, "linear": 1.0 - gone, "cosine": 0.5 * (1.0 + math.cos(math.pi * gone))}[self.lr_schedule]
        return self.lr * rising * falling
