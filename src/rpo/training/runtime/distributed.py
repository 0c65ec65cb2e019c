"""Several processes that tune one model: each takes its share of every step's pairs, and the gradients are summed.

`torchrun --nproc-per-node 8 -m rpo train ...` or `accelerate launch` starts them, on one machine or many that share the run folder.
Every process holds the whole network, or (`shard`) its part of it. A step sees the same pairs and noise whatever the number of
processes, so a run may be resumed with another number of them; the first process alone writes.
"""

import os
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from rpo.training.runtime.interruption import StopRequest

_Item = TypeVar("_Item")
_PATIENCE = timedelta(hours=2)
"""How long a process waits for the others, which may be building their part of the caches."""


_BUCKET = 2**24
"""Numbers of one message between processes: 64 MiB of float32."""


@dataclass(frozen=True, kw_only=True)
class Processes:
    """This process among those that train together; alone by default, and then nothing here costs anything."""

    rank: int = 0
    count: int = 1
    device: torch.device
    sharded: bool = False
    """Whether they hold one network together, and so must call it equally often."""

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def share(self, items: Sequence[_Item]) -> Sequence[_Item]:
        """This process's part."""
        return items[self.rank :: self.count]

    def equal_share(self, items: Sequence[_Item]) -> tuple[Sequence[_Item], list[bool]]:
        """This process's part, filled up to the length of the longest one, and which of it counts."""
        mine = list(self.share(items))
        missing = -(-len(items) // self.count) - len(mine)
        return [*mine, *items[:missing]], [True] * len(mine) + [False] * missing

    def mesh(self) -> DeviceMesh:
        return init_device_mesh(self.device.type, (self.count,))

    def wait(self) -> None:
        """Until every process is here."""
        if self.count > 1:
            dist.barrier()

    @contextmanager
    def first_goes_first(self) -> Generator[None, None, None]:
        """The first process runs the block alone, then the others do."""
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.count > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """The columns of all processes' tensors (rows, n), side by side; all of one shape."""
        if self.count == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.count)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts, dim=1)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Of all processes, bucket by bucket: one message for all would need as much memory again as all gradients."""
        if self.count == 1 or self.sharded:  # a network that is held together has summed them itself
            return
        for bucket in _buckets([parameter.grad for parameter in parameters if parameter.grad is not None]):
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            dist.all_reduce(flat)
            for gradient, part in zip(bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True):
                gradient.copy_(part.view_as(gradient))

    def asked(self, stop: StopRequest) -> bool:
        """Whether any process has been asked to stop: they all learn it at the same step."""
        mine = stop.signal is not None
        return mine if self.count == 1 else bool(self.total(torch.tensor(float(mine))))


def _buckets(gradients: Iterable[Tensor]) -> Generator[list[Tensor], None, None]:
    """Gradients in order, at most `_BUCKET` numbers together unless one alone is larger."""
    bucket: list[Tensor] = []
    for gradient in gradients:
        if bucket and sum(one.numel() for one in bucket) + gradient.numel() > _BUCKET:
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket


def launched_rank() -> int:
    """Which process this is, as torchrun and accelerate tell it; 0 when nothing launched it."""
    return int(os.environ.get("RANK", "0"))


@contextmanager
def processes(*, shard: bool = False) -> Generator[Processes, None, None]:
    """Joins the processes that were launched together, for the block; `shard` if they are to hold one network together."""
    count, cuda = int(os.environ.get("WORLD_SIZE", "1")), torch.cuda.is_available()
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if count == 1:
        yield Processes(device=torch.device(device.type))
        return
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=_PATIENCE)
    try:
        yield Processes(rank=launched_rank(), count=count, device=device, sharded=shard)
    finally:
        dist.destroy_process_group()
