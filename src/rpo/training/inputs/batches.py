"""Which pairs a step sees, and what the network gets of them. Both are pure functions of (seed, step)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from rpo.data.images import EncodedImage
from rpo.data.pairs import Pair
from rpo.models.denoiser import Denoiser, Posterior
from rpo.training.config import TrainConfig
from rpo.training.inputs.cache import Cache, Rows, encode_all_images, encode_all_prompts, sha256
from rpo.training.inputs.errors import PairInputs, edit_weights
from rpo.training.inputs.noise import Draws, NoiseProvider, seed_of

_FEW = 0.75
"""Share of the pairs up to which a short run encodes only those that it comes to; above it all, for longer runs to find."""


@dataclass(frozen=True, kw_only=True)
class Visit:
    """A pair's `number`-th appearance in training (0, 1, 2, ...)."""

    pair: int
    """Index in the list of pairs."""
    number: int


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, num_pairs: int) -> tuple[int, ...]:
    """The order in which an epoch goes through the pairs."""
    return tuple(np.random.default_rng(seed_of(seed, "order", epoch)).permutation(num_pairs).tolist())


def step_visits(step: int, *, num_pairs: int, batch_pairs: int, seed: int) -> list[Visit]:
    """The pairs of step 0, 1, 2, ...: epochs follow each other without a gap, each in its own order."""
    positions = range(step * batch_pairs, (step + 1) * batch_pairs)
    return [Visit(pair=epoch_order(seed, at // num_pairs, num_pairs)[at % num_pairs], number=at // num_pairs) for at in positions]


def first_visits(config: TrainConfig, num_pairs: int) -> tuple[int, list[int]]:
    """(how often the steps come to every pair, the pairs that they come to once more, in the list's order)."""
    whole, more = divmod(config.steps * config.batch_pairs, num_pairs)
    return whole, sorted(epoch_order(config.seed, whole, num_pairs)[:more])


def micro_batches(config: TrainConfig, step: int, num_pairs: int) -> Iterator[list[Visit]]:
    """The step's visits in `config.accumulation` parts."""
    visits = step_visits(step, num_pairs=num_pairs, batch_pairs=config.batch_pairs, seed=config.seed)
    for start in range(0, config.batch_pairs, config.micro_pairs):
        yield visits[start : start + config.micro_pairs]


class EncodedPairs:
    """Pairs as the network takes them: latents and embeddings in a cache, gathered per batch."""

    def __init__(
        self,
        pairs: Sequence[Pair],
        latents: tuple[Rows, dict[EncodedImage, int]],
        prompts: tuple[Rows, dict[str, int]],
        device: torch.device,
        unchanged_weight: float,
    ) -> None:
        self._unchanged_weight = unchanged_weight
        self.ids = [pair.id for pair in pairs]
        self.digests = [sha256(pair.id, pair.prompt, pair.chosen.sha256, pair.rejected.sha256) for pair in pairs]
        self._device = device
        self._latents, image_row = latents
        self._prompts, prompt_row = prompts
        # Pairs that no step comes to may have no row (-1).
        self._chosen = [image_row.get(pair.chosen, -1) for pair in pairs]
        self._rejected = [image_row.get(pair.rejected, -1) for pair in pairs]
        self._prompt = [prompt_row.get(pair.prompt, -1) for pair in pairs]
        self._empty_prompt = prompt_row[""]
        self._gap = torch.tensor([pair.gap for pair in pairs], dtype=torch.float32, device=device)
        self._weight = torch.tensor([pair.weight for pair in pairs], dtype=torch.float32, device=device)

    def __len__(self) -> int:
        return len(self.ids)

    def inputs(self, visits: Sequence[Visit], noise: NoiseProvider) -> PairInputs:
        """A batch on the device; nothing here waits for the device."""
        draws = noise.draws([self.ids[v.pair] for v in visits], [v.number for v in visits], self._latents.shape("mean"))
        prompts = [
            self._empty_prompt if dropped else self._prompt[visit.pair]
            for visit, dropped in zip(visits, draws.drop_prompt.tolist(), strict=True)
        ]
        further = [self._latents.mirrored_at * flag for flag in draws.mirrored.tolist()]
        chosen_rows, rejected_rows = (
            [side[visit.pair] + offset for visit, offset in zip(visits, further, strict=True)] for side in (self._chosen, self._rejected)
        )
        assert min(*chosen_rows, *rejected_rows, *prompts) >= 0, "a pair that no step comes to"
        chosen, rejected = self._posterior(chosen_rows), self._posterior(rejected_rows)
        conditions = {name: self._prompts.take(name, prompts) for name in self._prompts.names}
        conditions["framing"] = self._latents.take("framing", chosen_rows)
        return PairInputs(
            chosen=chosen,
            rejected=rejected,
            weights=edit_weights(chosen.mean, rejected.mean, self._unchanged_weight) if self._unchanged_weight < 1 else None,
            conditions={name: self._send(rows) for name, rows in conditions.items()},
            draws=Draws(
                timestep=self._send(draws.timestep),
                noise=self._send(draws.noise),
                latent_noise=self._send(draws.latent_noise),
                drop_prompt=self._send(draws.drop_prompt),
                mirrored=draws.mirrored,
            ),
        )

    def gap_and_weight(self, visits: Sequence[Visit]) -> tuple[Tensor, Tensor]:
        rows = self._send(torch.tensor([visit.pair for visit in visits]))
        return self._gap[rows], self._weight[rows]

    def _posterior(self, rows: Sequence[int]) -> Posterior:
        return Posterior(mean=self._send(self._latents.take("mean", rows)), std=self._send(self._latents.take("std", rows)))

    def _send(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else tensor


def encode_pairs(denoiser: Denoiser, config: TrainConfig, groups: Sequence[Sequence[Pair]], cache: Cache) -> list[EncodedPairs]:
    """Encodes all groups of pairs into the cache, then frees the encoders, which may be larger than the network: they take turns.

    Of the first group, whose pairs the steps come to, a run too short for three quarters of them encodes no others.
    """
    denoiser.move(torch.device("cpu"))
    whole, visited = first_visits(config, len(groups[0]))
    few = whole == 0 and len(visited) <= _FEW * len(groups[0])
    every = [pair for group in ([groups[0][at] for at in visited] if few else groups[0], *groups[1:]) for pair in group]
    images = [image for pair in every for image in (pair.chosen, pair.rejected)]
    latents = encode_all_images(
        denoiser,
        images,
        cache,
        resolution=config.resolution,
        dtype=config.cache_dtype,
        batch=config.cache_batch,
        flip=config.flip,
    )
    prompts = encode_all_prompts(denoiser, ["", *(pair.prompt for pair in every)], cache, dtype=config.cache_dtype)
    denoiser.free_encoders()
    denoiser.move(denoiser.device)
    return [EncodedPairs(group, latents, prompts, denoiser.device, config.unchanged_weight) for group in groups]
