"""The folder of a diffusers pipeline, a stranger's: its index, its components from safetensors, its noise schedule.

No code from a repository is ever run. Whatever is missing, damaged or hostile is an `RpoError` that names the file.
"""

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import transformers
from diffusers import DDPMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError, safe_open
from torch import nn

from rpo.errors import RpoError
from rpo.models.denoiser import FlowSchedule, NoiseSchedule, ResolutionShift
from rpo.models.family import Family

_Model = TypeVar("_Model", bound=nn.Module)

LOADING_ERRORS = (
    OSError,
    SafetensorError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    RuntimeError,
)
"""What diffusers and transformers raise for a folder that is incomplete, damaged or hostile."""
KEPT_SUFFIXES = {".json", ".txt", ".safetensors", ".model", ".jinja"}
"""Files of a pipeline that are read and copied."""
_INDEX_BYTES_MAX = 2**20
_BYTES_MAX = {"config": 2**20, "index of weights": 2**25, "tokenizer": 2**27}
"""Of a JSON or text file by its kind; the largest published tokenizer has 33 MB."""
_TOKENIZER_FILE = re.compile(r"(tokenizer|vocab|merges|added_tokens|special_tokens|spiece|sentencepiece).*", re.IGNORECASE)
_DEPTH = re.compile(r"(layers?|blocks?|depths?)$|layers_per_block$")
_LAYERS_MAX = 1000
"""Layers that a configuration may ask for; published networks have fewer than 200."""
_ADDED_TOKENS_MAX = 50_000
_RANK_MAX = 4096
"""Of a LoRA."""
_DOWN, _UP = re.compile(r"lora_A|lora_down|lora\.down"), re.compile(r"lora_B|lora_up|lora\.up")


def resolve(model: str) -> Path:
    """The folder of `model`, downloaded from the hub unless it is one already: owner/name, or owner/name@revision for one commit,
    tag or branch."""
    folder = Path(model)
    if not folder.is_dir():
        name, at, revision = model.partition("@")
        if folder.is_absolute() or name.count("/") != 1 or folder.suffix == ".safetensors" or (at and not revision):
            raise RpoError(
                f"model {model!r} is neither a folder nor a hub id (owner/name or owner/name@revision); "
                "give the folder of a diffusers pipeline"
            )
        try:
            folder = Path(DiffusionPipeline.download(name, revision=revision or None, use_safetensors=True))
        except (OSError, ValueError, HfHubHTTPError) as error:
            raise RpoError(f"model {model!r} is no folder here and could not be fetched from the hub: {error}") from error
    if not (folder / "model_index.json").is_file():
        raise RpoError(f"{folder} has no model_index.json; give the folder of a whole diffusers pipeline")
    check_bounds(folder)
    return folder


def check_bounds(folder: Path) -> None:
    """Raises `RpoError` for a model folder whose configuration would keep a library busy for hours or fill the memory.

    Reads the JSON and text files of the folder and of its parts, each within a limit.
    """
    for path in sorted(path for place in ("*", "*/*") for path in folder.glob(place) if path.suffix in (".json", ".txt", ".jinja")):
        of_tokenizer = _TOKENIZER_FILE.fullmatch(path.name) is not None
        kind = "tokenizer" if of_tokenizer else "index of weights" if path.name.endswith(".index.json") else "config"
        try:
            if not path.is_file():  # a folder, or a pipe that would never end
                raise ValueError("it is no regular file")
            if (size := path.stat().st_size) > _BYTES_MAX[kind]:
                raise ValueError(f"{size:,} bytes are too many for a file of its kind")
            if of_tokenizer and path.suffix == ".json":
                _check_tokens(path)
            elif kind == "config" and path.suffix == ".json":
                _check_depth(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, RecursionError) as error:
            raise unloadable(path, error) from error


def _check_tokens(path: Path) -> None:
    """Added tokens are added one by one, each in a time that grows with their number."""
    content = path.read_bytes()
    added = content.count(b":") if path.name.startswith("added_tokens") else content.count(b'"lstrip"')
    if added > _ADDED_TOKENS_MAX:
        raise ValueError(f"{added:,} added tokens are too many, at most {_ADDED_TOKENS_MAX:,} are read")


def _check_depth(value: object, name: str = "") -> None:
    """Counts of layers, wherever they stand in a configuration."""
    if isinstance(value, dict):
        for key, item in cast("dict[str, object]", value).items():
            _check_depth(item, key)
    elif isinstance(value, list):
        for item in cast("list[object]", value):
            _check_depth(item, name)
        numbers = [item for item in cast("list[object]", value) if isinstance(item, int | float)]
        _check_depth(len(numbers) and sum(numbers), name)
    elif isinstance(value, int | float) and value > _LAYERS_MAX and _DEPTH.search(name):
        raise ValueError(f"{name} is {value:.6g}, at most {_LAYERS_MAX} are built")


def check_ranks(file: Path) -> None:
    """Raises `RpoError` for a LoRA file whose adapters are wider than any that is tuned."""
    try:
        with safe_open(file, "pt") as tensors:
            shapes = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    except LOADING_ERRORS as error:
        raise unloadable(file, error) from error
    for name, shape in shapes.items():
        rank = shape[0] if _DOWN.search(name) and shape else shape[1] if _UP.search(name) and len(shape) > 1 else 0
        if rank > _RANK_MAX:
            raise unloadable(file, f"{name} has rank {rank:,}, at most {_RANK_MAX:,} are read")


def commit_of(model: str) -> str | None:
    """The commit of a hub model, which is downloaded if it is not here yet; None for a folder, which counts by its content."""
    return None if Path(model).is_dir() else resolve(model).name


def read_index(folder: Path) -> dict[str, Any]:
    """`model_index.json`. Raises `RpoError` for what is no JSON object of a usual size."""
    file = folder / "model_index.json"
    try:
        if file.stat().st_size > _INDEX_BYTES_MAX:
            raise ValueError(f"{file.stat().st_size:,} bytes are too many for an index")
        index = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(index, dict):
            raise ValueError(f"a JSON object was expected, not {type(index).__name__}")
    except (OSError, ValueError, RecursionError) as error:
        raise unloadable(file, error) from error
    return index


def components(folder: Path) -> dict[str, str]:
    """Names of the parts that the folder's pipeline has, and the classes that load them."""
    parts = {name: value for name, value in read_index(folder).items() if isinstance(value, list)}
    return {name: value[1] for name, value in parts.items() if len(value) == 2 and all(isinstance(word, str) for word in value)}


def load_part(kind: type[_Model], folder: Path, part: str, dtype: torch.dtype) -> _Model:
    """One component, from safetensors, with every one of its weights present."""
    files = [path.name for path in (folder / part).glob("*.safetensors")]
    if files and all(".fp16" in name for name in files):
        raise RpoError(f"{folder / part} has its weights as variant 'fp16' only; load the pipeline with that variant and save it without")
    try:
        model, report = kind.from_pretrained(  # pyright: ignore[reportAttributeAccessIssue]  (diffusers' and transformers' alike)
            folder, subfolder=part, use_safetensors=True, torch_dtype=dtype, local_files_only=True, output_loading_info=True
        )
    except LOADING_ERRORS as error:
        raise unloadable(folder / part, error) from error
    if missing := sorted(report["missing_keys"]):
        raise unloadable(folder / part, f"{len(missing)} weights are missing, {missing[0]} among them")
    return model.requires_grad_(False).eval()


def text_pipeline(family: Family, folder: Path, device: torch.device) -> Any:
    """The pipeline with its text encoders alone, so that prompts are encoded as it encodes them."""
    names = components(folder)
    parts: dict[str, Any] = {
        name: load_part(_text_encoder(kind, folder / name), folder, name, torch.float32).to(device)
        for name, kind in names.items()
        if name.startswith("text_encoder")
    }
    parts |= {name: None for name in ("vae", family.part, "safety_checker", "feature_extractor", "image_encoder") if name in names}
    parts |= {name: None for name, value in read_index(folder).items() if isinstance(value, list) and name not in names}
    try:
        return family.pipeline.from_pretrained(folder, local_files_only=True, use_safetensors=True, **parts)
    except LOADING_ERRORS as error:
        raise unloadable(folder, error) from error


def _text_encoder(kind: str, part: Path) -> type[transformers.PreTrainedModel]:
    """A model class of transformers by its name, which comes from the folder's index."""
    found = getattr(transformers, kind, None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise unloadable(part, f"{kind!r} is no model class of transformers")
    return found


def unloadable(path: Path, why: object) -> RpoError:
    return RpoError(f"{path} could not be loaded ({' '.join(str(why).split())[:300]}); restore or download it again")


def _scheduler(kind: Any, folder: Path, *needed: str) -> Any:
    """The folder's noise levels, read by `kind`, which would fill in whatever of the `needed` settings the folder's own class lacks."""
    try:
        told = kind.load_config(folder, subfolder="scheduler", local_files_only=True)
        scheduler = kind.from_config(told)
    except LOADING_ERRORS as error:
        raise unloadable(folder / "scheduler", error) from error
    if missing := [name for name in needed if told.get(name) is None]:
        raise RpoError(f"{folder}: models of its scheduler, {told.get('_class_name')}, cannot be tuned (it says no {missing[0]})")
    return scheduler


def noise_schedule(folder: Path) -> NoiseSchedule:
    scheduler = _scheduler(DDPMScheduler, folder, "beta_start", "beta_end")
    prediction = scheduler.config.prediction_type
    if prediction not in ("epsilon", "v_prediction"):
        raise RpoError(f"{folder}: prediction_type {prediction!r} is not supported, only 'epsilon' and 'v_prediction'")
    return NoiseSchedule(alphas_cumprod=scheduler.alphas_cumprod, prediction=prediction)


def flow_schedule(folder: Path, device: torch.device, patch: int) -> FlowSchedule:
    """The scheduler's own table, its static shift included, or its shift by resolution, which its pipeline samples with."""
    scheduler = _scheduler(FlowMatchEulerDiscreteScheduler, folder, "shift")
    of, shift = scheduler.config, None
    if of.use_dynamic_shifting:
        tokens, shifts = (of.base_image_seq_len, of.max_image_seq_len), (of.base_shift, of.max_shift)
        numbers = all(isinstance(value, int | float) and math.isfinite(value) for value in (*tokens, *shifts))
        if not numbers or tokens[0] == tokens[1]:
            raise unloadable(folder / "scheduler", f"a shift from {shifts[0]} at {tokens[0]} tokens to {shifts[1]} at {tokens[1]}")
        shift = ResolutionShift(
            base_tokens=tokens[0], max_tokens=tokens[1], base_shift=shifts[0], max_shift=shifts[1], kind=of.time_shift_type, patch=patch
        )
    return FlowSchedule(sigmas=scheduler.sigmas.flip(0).to(device, torch.float32), shift=shift)


def digest(folder: Path, *parts: str) -> str:
    """Of the names and bytes of all configuration and weights of some components."""
    total = hashlib.sha256()
    for path in sorted(path for part in parts for path in (folder / part).rglob("*") if path.suffix in KEPT_SUFFIXES):
        with path.open("rb") as file:
            total.update(f"{path.relative_to(folder)} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def unsafe_files(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if Path(folder, name).is_file() and Path(name).suffix not in KEPT_SUFFIXES]
