"""Part of the GPU check: images per second of generators and editors with random weights, batches that fit into memory, offload modes."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from gpu_part import Job, free_memory
from random_pipelines import random_weights, save_configs

from rpo.backends.diffusers.edit import EditorConfig
from rpo.backends.diffusers.generate import GeneratorConfig


def _rate(job: Job, call: Callable[[], Sequence[np.ndarray]], steps: int) -> dict[str, Any]:
    """Images per second of one call and the peak memory; a first call warms up."""
    call()
    if job.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    images = call()
    took = time.perf_counter() - began
    found: dict[str, Any] = {"images_per_s": len(images) / took, "steps": steps, "batch": len(images), "side": images[0].shape[0]}
    if job.device == "cuda":
        found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    if not all(image.dtype == np.uint8 and image.ndim == 3 for image in images):
        found["problem"] = f"images are {images[0].dtype} of shape {images[0].shape}"
    return found


def _sampled(job: Job, model: str, batch: int, steps: int, **settings: Any) -> dict[str, Any]:
    generator = GeneratorConfig(model=model, steps=steps, side=64 if job.smoke else None, **settings).build()
    return _rate(job, lambda: generator.generate([f"prompt {i}" for i in range(batch)], range(batch)), steps)


def _edited(job: Job, model: str, batch: int, steps: int, **settings: Any) -> dict[str, Any]:
    editor = EditorConfig(model=model, steps=steps, side=64 if job.smoke else None, **settings).build()
    images = list(np.random.default_rng(0).integers(0, 256, (batch, editor.side, editor.side, 3), dtype=np.uint8))
    return _rate(job, lambda: editor.edit(images, [f"make it {i}" for i in range(batch)], list(range(batch))), steps)


def _fitted(job: Job, model: str) -> dict[str, Any]:
    """A batch that is too large for the memory left on the card is halved until it fits."""
    generator = GeneratorConfig(model=model, steps=1, guidance=1.0, side=64 if job.smoke else 512).build()
    held = None
    if job.device == "cuda":
        free, _ = torch.cuda.mem_get_info()
        held = torch.empty(max(0, free - 4 * 2**30), dtype=torch.uint8, device="cuda")  # leaves about 4 GiB
    batch = 2 if job.smoke else 128
    images = generator.generate([f"prompt {i}" for i in range(batch)], range(batch))
    del held
    assert len(images) == batch
    return {"asked_at_once": batch, "fitted": generator.halving.most or batch}


def curation(job: Job) -> None:
    found: dict[str, Any] = {"rows": {}, "problems": []}
    small = job.smoke
    with random_weights():
        models = {name: str(save_configs(name, job.scratch / name, tiny=small)) for name in ("sd15", "sd15_editor", "sdxl_editor")}
        sizes = (2, 2, 1) if small else (16, 8, 4)
        measures: dict[str, Callable[[], dict[str, Any]]] = {
            "SD1.5 sampling, 512 px": lambda: _sampled(job, models["sd15"], sizes[0], 2 if small else 20),
            "SDXL editing, 1024 px": lambda: _edited(job, models["sdxl_editor"], sizes[2], 2 if small else 10),
            "SD1.5 editing, 512 px": lambda: _edited(job, models["sd15_editor"], sizes[1], 2 if small else 20),
            "SD1.5 sampling, batch fitted to 4 GiB": lambda: _fitted(job, models["sd15"]),
        }
        if job.device == "cuda":
            for mode in ("model", "sequential"):
                measures[f"SDXL editing, offload {mode}"] = lambda mode=mode: _edited(job, models["sdxl_editor"], 1, 3, offload=mode)
        for name, call in measures.items():
            try:
                found["rows"][name] = call()
            except Exception as error:  # one that fails leaves the others their turn
                found["problems"].append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
            if why := found["rows"].get(name, {}).get("problem"):
                found["problems"].append(f"{name}: {why}")
            free_memory()
            job.tell(found)
