"""Parts that go wrong on purpose, to see that the check reports them and goes on: `gpu_check.py --plant`."""

import time

from gpu_part import Job


def failure(job: Job) -> None:
    job.tell({"figure": 1.0})
    raise ValueError("planted failure")


def hang(job: Job) -> None:
    job.tell({"figure": 2.0})
    while True:
        time.sleep(1)


def memory(job: Job) -> None:
    import torch

    job.tell({"figure": 3.0})
    if job.device == "cuda":
        torch.empty(2 * torch.cuda.get_device_properties(0).total_memory, dtype=torch.uint8, device="cuda")
    raise torch.OutOfMemoryError("planted: no card whose memory could be filled")
