"""What generators and editors share: how a diffusers pipeline is loaded, seeded, and kept within the memory there is."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from diffusers import DiffusionPipeline
from huggingface_hub.errors import HfHubHTTPError

from rpo.backends.diffusers.image_processor import PictureReader
from rpo.errors import RpoError
from rpo.models.pipeline_folder import LOADING_ERRORS, check_bounds, check_ranks

Offload = Literal["none", "model", "sequential"]
"""Where weights wait that are not at work: all on the device; whole networks in main memory; single layers there (slow, smallest)."""
Answer = TypeVar("Answer")
log = logging.getLogger(__name__)


def pick_device(device: str | None) -> str:
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def pick_dtype(device: str) -> torch.dtype:
    return torch.bfloat16 if device.startswith("cuda") else torch.float32


def pinned(model: str, revision: str | None) -> str:
    """How a configuration names a model of which it wants one commit, tag or branch."""
    return model if revision is None else f"{model}@{revision}"


def seeded(seeds: Sequence[int]) -> list[torch.Generator]:
    """One for each picture, on the CPU, so that neither batch nor device changes its noise."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def to_arrays(images: np.ndarray) -> list[np.ndarray]:
    """Pixels in 0..1, (b, h, w, 3), as images."""
    return list(np.round(images * 255).astype(np.uint8))


def _folder(model: str, revision: str | None) -> Path:
    """The local folder, or the snapshot of the commit that `revision` names on the hub."""
    return Path(model) if Path(model).is_dir() else Path(DiffusionPipeline.download(model, revision=revision, use_safetensors=True))


def load_pipeline(
    model: str,
    *,
    kind: Any = DiffusionPipeline,
    device: str | None = None,
    revision: str | None = None,
    offload: Offload = "none",
    **parts: Any,
) -> tuple[Any, str]:
    """(pipeline, what was loaded) from a folder or the hub: safetensors only, no remote code, no safety checker (it blanks images).

    What was loaded is the commit of a hub model, and the name of a folder. `kind` is the pipeline's class where it is another than the
    model's own; `parts` take the place of the pipeline's.
    """
    chosen = pick_device(device)
    if offload != "none" and chosen == "cpu":
        raise ValueError(f"offload={offload!r} moves weights between a GPU and main memory; on cpu leave it 'none'")
    if revision is not None and Path(model).is_dir():
        raise ValueError(f"revision {revision!r} belongs to a model of the hub; {model} is a folder, which counts by its content")
    try:
        check_bounds(folder := _folder(model, revision))
        config: Any = DiffusionPipeline.load_config(str(folder))
        if not isinstance(config.get("_class_name"), str):
            raise RpoError(f"{model!r} brings its own pipeline code, which is not run; give a pipeline of diffusers' own classes")
        given: dict[str, Any] = {name: None for name, part in config.items() if part == [None, None]}  # left out, such as SD3's T5
        if "safety_checker" in config:
            given |= {"safety_checker": None, "requires_safety_checker": False}
        readers = [name for name, part in config.items() if part == ["transformers", "Qwen2VLProcessor"]]
        given |= {name: PictureReader.load(folder / name) for name in readers} | parts
        pipeline = kind.from_pretrained(str(folder), use_safetensors=True, dtype=pick_dtype(chosen), **given)
    except (HfHubHTTPError, *LOADING_ERRORS) as error:
        reason = " ".join(str(error).split())[:300]
        raise RpoError(f"cannot load the model {model!r}: {reason}. Give a folder of a diffusers pipeline, or a hub id.") from error
    pipeline.set_progress_bar_config(disable=True)
    if chosen != "cpu" and hasattr(getattr(pipeline, "vae", None), "enable_slicing"):
        pipeline.vae.enable_slicing()  # a whole batch's pixels at once take more than all the rest
    if offload == "model":
        pipeline.enable_model_cpu_offload(device=chosen)
    elif offload == "sequential":
        pipeline.enable_sequential_cpu_offload(device=chosen)
    else:
        pipeline.to(chosen)
    return pipeline, folder.name


def load_lora(pipeline: Any, lora: str) -> None:
    """Adds a LoRA from safetensors, unfused: half precision would round off most of a small difference.

    Raises `RpoError` for a file that cannot be read, holds no layer of the pipeline's network, or values that are not finite.
    """
    try:
        for file in [Path(lora)] if Path(lora).is_file() else sorted(Path(lora).glob("*.safetensors")):
            check_ranks(file)
        pipeline.load_lora_weights(lora, use_safetensors=True)
    except (*LOADING_ERRORS, RpoError) as error:
        raise RpoError(f"cannot load the LoRA {lora!r}: {' '.join(str(error).split())[:300]}. Give a folder or file of a LoRA.") from error
    network = getattr(pipeline, "unet", None) or pipeline.transformer
    adapters = [weight for name, weight in network.named_parameters() if ".lora_" in name]
    if not adapters:
        raise RpoError(f"the LoRA {lora!r} holds no layer of {type(network).__name__}; it belongs to another model")
    if not all(weight.isfinite().all() for weight in adapters):
        raise RpoError(f"the LoRA {lora!r} holds values that are not finite; restore it, or tune anew")


class Halving:
    """Runs rows in batches as large as the memory bears: a batch that does not fit is halved, and its size is never tried again.

    `clear` frees what a call that failed has left on the device.
    """

    def __init__(self, clear: Callable[[], object] = lambda: None) -> None:
        self.most: int | None = None
        """Rows that fit at once; `None` while nothing has failed."""
        self._clear = clear

    def __call__(self, rows: int, run: Callable[[slice], Sequence[Answer]]) -> list[Answer]:
        """`run` over all rows, in order. Raises `RpoError` when not even one row fits."""
        done: list[Answer] = []
        again = False
        while len(done) < rows:
            size = min(rows - len(done), self.most or rows)
            part = self._attempt(slice(len(done), len(done) + size), run)
            if part is not None:
                done += part
                again = False
                continue
            self._clear()
            torch.cuda.empty_cache()
            if size > 1:
                self.most = size // 2
                log.warning("%d images at once do not fit into memory; going on with %d", size, self.most)
            elif not again:
                again = True  # another stage may have held the memory just then
            else:
                raise RpoError(
                    "one image at a time does not fit into memory; take --stage-by-stage, where one model is loaded at a time, a smaller "
                    "side, offload='model', or a smaller model"
                )
        return done

    def _attempt(self, part: slice, run: Callable[[slice], Sequence[Answer]]) -> Sequence[Answer] | None:
        """`None` when memory ran out; a function of its own, so that what the failed call held is free when it returns."""
        try:
            return run(part)
        except torch.OutOfMemoryError:
            return None
