"""The frozen model that the policy is measured against: adapters off, a second network, or errors computed beforehand."""

from collections.abc import Sequence
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from rpo.arrays import PerPair
from rpo.models.denoiser import Denoiser
from rpo.training.inputs.batches import EncodedPairs, Visit
from rpo.training.inputs.cache import SHARD_ROWS, Cache, Rows, chunks, sha256
from rpo.training.inputs.errors import PairInputs, pair_errors
from rpo.training.inputs.noise import NoiseProvider
from rpo.training.inputs.paths import Path


@runtime_checkable
class ReferenceProvider(Protocol):
    """Gives the reference's (chosen, rejected) errors on exactly the inputs that the policy gets, without gradient."""

    def errors(self, visits: Sequence[Visit], inputs: PairInputs) -> tuple[PerPair, PerPair]: ...


class AdapterOff:
    """The policy's own network without its adapters: no second set of weights."""

    def __init__(self, denoiser: Denoiser, path: Path) -> None:
        self._denoiser, self._path = denoiser, path

    @torch.no_grad()
    def errors(self, visits: Sequence[Visit], inputs: PairInputs) -> tuple[PerPair, PerPair]:
        with self._denoiser.base_network():
            return pair_errors(self._denoiser, self._path, inputs)[:2]


class SecondModel:
    """A frozen network beside the policy, as full tuning needs when the reference runs live.

    With `offload` it waits in the host's memory, and is on the device only while it computes.
    """

    def __init__(self, frozen: Denoiser, path: Path, *, offload: bool = False) -> None:
        self._frozen, self._path = frozen, path
        self._device, self._waits_on = frozen.device, torch.device("cpu") if offload else frozen.device
        frozen.move(self._waits_on)

    @torch.no_grad()
    def errors(self, visits: Sequence[Visit], inputs: PairInputs) -> tuple[PerPair, PerPair]:
        self._frozen.move(self._device)
        try:
            return pair_errors(self._frozen, self._path, inputs)[:2]
        finally:
            self._frozen.move(self._waits_on)


class CachedScalars:
    """Two numbers per pair and draw, looked up: of the first draws of all pairs, and of one more draw of some."""

    def __init__(
        self, noise: NoiseProvider, device: torch.device, num_draws: int, every: Rows, further: Rows, pairs: Sequence[int]
    ) -> None:
        self._noise, self._device, self._num_draws = noise, device, num_draws
        self._every, self._further = every, further
        self._further_row = {pair: row for row, pair in enumerate(pairs)}

    def errors(self, visits: Sequence[Visit], inputs: PairInputs | None = None) -> tuple[PerPair, PerPair]:
        chosen, rejected = (torch.stack([self._error(side, visit) for visit in visits]) for side in ("chosen", "rejected"))
        return chosen.to(self._device, non_blocking=True), rejected.to(self._device, non_blocking=True)

    def _error(self, side: str, visit: Visit) -> Tensor:
        draw = self._noise.index(visit.number)
        return (
            self._every.row(side, visit.pair)[draw] if draw < self._num_draws else self._further.row(side, self._further_row[visit.pair])[0]
        )


def precompute(
    denoiser: Denoiser,
    path: Path,
    pairs: EncodedPairs,
    noise: NoiseProvider,
    cache: Cache,
    *,
    num_draws: int,
    further: Sequence[int] = (),
    batch: int,
    key: str,
) -> CachedScalars:
    """The reference errors of the first `num_draws` draws of every pair, and of the next draw of the pairs `further`, by `denoiser` as it
    is now: call before any step.

    `batch` samples go through the network at once; `key` names what the errors depend on beside pairs, draws and network.
    """
    if noise.num_draws is None:
        raise ValueError("cached reference errors need a table of draws, got fresh noise; set draws, or reference='live'")
    draws = sha256(repr(noise))

    def rows(some: Sequence[int], numbers: range) -> Rows:
        files = []
        for shard in chunks(some, SHARD_ROWS) if numbers else ():
            content = [pairs.digests[pair] for pair in shard]
            of = f"{len(numbers)}" if numbers.start == 0 else f"{numbers.start} to {numbers.stop}"
            name = sha256(denoiser.digests["network"], key, draws, of, str(batch), denoiser.device.type, *content)
            compute = partial(_table, denoiser, path, pairs, noise, shard, numbers, max(1, batch // 2))
            files.append((f"reference-{name[:20]}.safetensors", compute))
        return Rows(cache.all(files))

    every, more = rows(range(len(pairs)), range(num_draws)), rows(further, range(num_draws, num_draws + 1))
    return CachedScalars(noise, denoiser.device, num_draws=num_draws, every=every, further=more, pairs=further)


@torch.no_grad()
def _table(
    denoiser: Denoiser, path: Path, pairs: EncodedPairs, noise: NoiseProvider, shard: Sequence[int], draws: range, batch_pairs: int
) -> dict[str, Tensor]:
    visits = [Visit(pair=pair, number=draw) for pair in shard for draw in draws]
    parts = [pair_errors(denoiser, path, pairs.inputs(part, noise)) for part in chunks(visits, batch_pairs)]
    chosen, rejected = (torch.cat(side).view(-1, len(draws)) for side in list(zip(*parts, strict=True))[:2])
    return {"chosen": chosen, "rejected": rejected}
