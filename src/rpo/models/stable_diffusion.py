"""The Stable Diffusion family: any `StableDiffusionPipeline` folder or hub id, tuned by LoRA or in full.

Only safetensors are read, and no code from a repository is ever run. What is saved loads with the pipeline's own
`load_lora_weights` (LoRA) or `from_pretrained` (full).
"""

import copy
import hashlib
import json
import shutil
import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from huggingface_hub.errors import HfHubHTTPError
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from rpo.arrays import Images, Latents, PromptEmbeds, Timesteps
from rpo.errors import RpoError
from rpo.models.denoiser import Component, NoiseSchedule, Posterior, network_inputs
from rpo.models.lora import TARGET_MODULES, Lora

_Model = TypeVar("_Model", bound=nn.Module)

LORA_FILE = "pytorch_lora_weights.safetensors"
"""Where `load_lora_weights` looks in a folder."""

_KOHYA_NAMES = {"lora_A": "lora_down", "lora_B": "lora_up"}
_KEPT_SUFFIXES = {".json", ".txt", ".safetensors", ".model"}
_LOADING_ERRORS = (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError)
"""What diffusers and transformers raise for a folder that is incomplete or damaged."""


class StableDiffusion:
    """A `Denoiser` over a UNet in memory and a pipeline folder from which the encoders are loaded when they are needed."""

    def __init__(self, *, folder: Path, unet: UNet2DConditionModel, schedule: NoiseSchedule, lora: Lora | None, dtype: torch.dtype) -> None:
        self._folder = folder
        self._unet = unet
        self._schedule = schedule
        self._lora = lora
        self._dtype = dtype
        self._vae: AutoencoderKL | None = None
        self._text: tuple[CLIPTokenizer, CLIPTextModel] | None = None

    @property
    def device(self) -> torch.device:
        return self._unet.device

    @property
    def schedule(self) -> NoiseSchedule:
        return self._schedule

    @property
    def digests(self) -> Mapping[Component, str]:
        return self._digests

    @cached_property
    def _digests(self) -> Mapping[Component, str]:
        return {
            "images": _digest(self._folder, "vae"),
            "prompts": _digest(self._folder, "text_encoder", "tokenizer"),
            "network": _digest(self._folder, "unet", "scheduler"),
        }

    @torch.no_grad()
    def encode_images(self, images: Images) -> Posterior:
        """In float32 whatever the network computes in. Raises `ValueError` for sides that the autoencoder cannot halve evenly."""
        if self._vae is None:
            self._vae = _load(AutoencoderKL, self._folder, "vae", torch.float32).to(self.device)
        vae = self._vae
        stride = 2 ** (len(vae.config.block_out_channels) - 1)
        if images.shape[1] % stride or images.shape[2] % stride:
            raise ValueError(f"image sides must be multiples of {stride}, got {images.shape[1]}x{images.shape[2]}; set a resolution")
        pixels = torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        posterior = vae.encode(network_inputs(pixels, self.device)).latent_dist
        shift, scale = vae.config.shift_factor or 0.0, vae.config.scaling_factor
        return Posterior(mean=(posterior.mean - shift) * scale, std=posterior.std * scale)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> PromptEmbeds:
        """Warns when a prompt is longer than the text encoder reads."""
        if self._text is None:
            tokenizer = CLIPTokenizer.from_pretrained(self._folder, subfolder="tokenizer")
            self._text = tokenizer, _load(CLIPTextModel, self._folder, "text_encoder", torch.float32).to(self.device)
        tokenizer, encoder = self._text
        distinct = list(dict.fromkeys(prompts))
        length = encoder.config.max_position_embeddings
        cut = sum(len(ids) > length for ids in tokenizer(distinct).input_ids)
        if cut:
            warnings.warn(f"{cut} of {len(distinct)} prompts are longer than the text encoder's {length} tokens and are cut", stacklevel=2)
        tokens = tokenizer(distinct, padding="max_length", max_length=length, truncation=True, return_tensors="pt").to(self.device)
        mask = tokens.attention_mask if getattr(encoder.config, "use_attention_mask", False) else None
        embeds = encoder(tokens.input_ids, attention_mask=mask).last_hidden_state
        row = {prompt: i for i, prompt in enumerate(distinct)}
        return embeds[[row[prompt] for prompt in prompts]]

    def free_encoders(self) -> None:
        self._vae = self._text = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def predict(self, x_t: Latents, t: Timesteps, prompt_embeds: PromptEmbeds) -> Latents:
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._dtype == torch.bfloat16):
            return self._unet(network_inputs(x_t, self.device), t, encoder_hidden_states=prompt_embeds).sample

    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self._unet.named_parameters() if parameter.requires_grad}

    @contextmanager
    def base_network(self) -> Generator[None, None, None]:
        if self._lora is None:
            raise RpoError("full tuning has no adapters to switch off; its reference is a `frozen_copy` from before the first step")
        self._unet.disable_adapters()
        try:
            yield
        finally:
            self._unet.enable_adapters()

    def frozen_copy(self) -> "StableDiffusion":
        unet = copy.deepcopy(self._unet).requires_grad_(False)
        return StableDiffusion(folder=self._folder, unet=unet, schedule=self._schedule, lora=self._lora, dtype=self._dtype)

    def save(self, folder: Path) -> None:
        """LoRA: `pytorch_lora_weights.safetensors`; full: a copy of the base pipeline folder with the tuned UNet."""
        if self._lora is None:
            self._save_pipeline(folder)
        else:
            self._save_lora(folder, self._lora)

    def _save_lora(self, folder: Path, lora: Lora) -> None:
        # The one layout that diffusers, ComfyUI and the kohya tools all read. Some of them ignore alpha, so the scale goes into B.
        layers: dict[str, torch.Tensor] = {}
        for name, tensor in get_peft_model_state_dict(self._unet).items():
            layer, matrix, _ = name.rsplit(".", 2)
            key = f"lora_unet_{layer.replace('.', '_')}"
            layers[f"{key}.{_KOHYA_NAMES[matrix]}.weight"] = (tensor * lora.scale if matrix == "lora_B" else tensor).cpu().contiguous()
            layers[f"{key}.alpha"] = torch.tensor(float(lora.rank))
        folder.mkdir(parents=True)
        save_file(layers, folder / LORA_FILE, metadata={"format": "pt"})

    def _save_pipeline(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        shutil.copyfile(self._folder / "model_index.json", folder / "model_index.json")
        for part in sorted(path for path in self._folder.iterdir() if path.is_dir() and path.name in _components(self._folder)):
            if part.name != "unet":
                shutil.copytree(part, folder / part.name, ignore=_unsafe_files)
        self._unet.to(memory_format=torch.contiguous_format)
        self._unet.save_pretrained(folder / "unet", safe_serialization=True)
        self._unet.to(memory_format=torch.channels_last)


def load_stable_diffusion(
    model: str, *, lora: Lora | None, dtype: torch.dtype, device: torch.device, seed: int, gradient_checkpointing: bool = False
) -> StableDiffusion:
    """The model in folder or hub id `model`, ready to train: float32 weights in full tuning and on the CPU, else frozen ones in `dtype`.

    `seed` decides the adapters' first values. Raises `RpoError` for a folder that is not a whole `StableDiffusionPipeline`.
    """
    folder = _resolve(model)
    schedule = _schedule(folder)
    # The CPU's kernels refuse weights and activations of two kinds, which autocast gives them, so there weights stay float32.
    unet = _load(UNet2DConditionModel, folder, "unet", dtype if lora is not None and device.type == "cuda" else torch.float32)
    # An addition of type "text" is pooled from the prompt's own embeddings; every other one needs inputs of its own.
    if unet.config.in_channels != unet.config.out_channels or unet.config.addition_embed_type not in (None, "text"):
        raise RpoError(f"{model}: its UNet takes more than a noisy latent, a timestep and a prompt; give a text-to-image model, no editor")
    unet.requires_grad_(lora is None)
    if lora is not None:
        _add_lora(unet, lora, seed)
    if gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    # eval: the family has no dropout worth training with, and the reference must compute what the policy computes.
    unet = unet.to(device=device).to(memory_format=torch.channels_last).eval()
    return StableDiffusion(folder=folder, unet=unet, schedule=schedule, lora=lora, dtype=dtype)


def _resolve(model: str) -> Path:
    """The folder of `model`, downloaded from the hub unless it is one already."""
    folder = Path(model)
    if not folder.is_dir():
        if folder.is_absolute() or model.count("/") != 1 or folder.suffix == ".safetensors":
            raise RpoError(f"model {model!r} is neither a folder nor a hub id (owner/name); give a StableDiffusionPipeline folder")
        try:
            folder = Path(StableDiffusionPipeline.download(model, use_safetensors=True))
        except (OSError, ValueError, HfHubHTTPError) as error:
            raise RpoError(f"model {model!r} is no folder here and could not be fetched from the hub: {error}") from error
    if not (folder / "model_index.json").is_file():
        raise RpoError(f"{folder} has no model_index.json; give the folder of a whole StableDiffusionPipeline")
    kind = _index(folder).get("_class_name")
    if kind != "StableDiffusionPipeline":
        raise RpoError(f"{folder} holds a {kind}; this part tunes StableDiffusionPipeline folders")
    return folder


def _index(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "model_index.json").read_text())


def _components(folder: Path) -> set[str]:
    return {name for name, value in _index(folder).items() if isinstance(value, list) and value[0] is not None}


def _load(kind: type[_Model], folder: Path, part: str, dtype: torch.dtype) -> _Model:
    """One component, from safetensors, with every one of its weights present."""
    try:
        model, report = kind.from_pretrained(
            folder, subfolder=part, use_safetensors=True, torch_dtype=dtype, local_files_only=True, output_loading_info=True
        )
    except _LOADING_ERRORS as error:
        raise _unloadable(folder / part, error) from error
    if missing := sorted(report["missing_keys"]):
        raise _unloadable(folder / part, f"{len(missing)} weights are missing, {missing[0]} among them")
    return model.requires_grad_(False).eval()


def _unloadable(path: Path, why: object) -> RpoError:
    return RpoError(f"{path} could not be loaded ({' '.join(str(why).split())[:300]}); restore or download it again")


def _schedule(folder: Path) -> NoiseSchedule:
    try:
        scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler", local_files_only=True)
    except _LOADING_ERRORS as error:
        raise _unloadable(folder / "scheduler", error) from error
    prediction = scheduler.config.prediction_type
    if prediction not in ("epsilon", "v_prediction"):
        raise RpoError(f"{folder}: prediction_type {prediction!r} is not supported, only 'epsilon' and 'v_prediction'")
    return NoiseSchedule(alphas_cumprod=scheduler.alphas_cumprod, prediction=prediction)


def _add_lora(unet: UNet2DConditionModel, lora: Lora, seed: int) -> None:
    names = [name for target in lora.targets for name in TARGET_MODULES[target]]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        alpha = lora.rank if lora.alpha is None else lora.alpha
        unet.add_adapter(LoraConfig(r=lora.rank, lora_alpha=alpha, init_lora_weights=True, target_modules=names))
    for parameter in unet.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    reached = {name for name, parameter in unet.named_parameters() if parameter.requires_grad}
    for target in lora.targets:
        if not any(f".{name}." in parameter for name in TARGET_MODULES[target] for parameter in reached):
            raise ValueError(f"LoRA target {target!r} reaches no layer of this UNet; leave it out of lora_targets")


def _digest(folder: Path, *parts: str) -> str:
    """Of the names and bytes of all configuration and weights of some components."""
    total = hashlib.sha256()
    for path in sorted(path for part in parts for path in (folder / part).rglob("*") if path.suffix in _KEPT_SUFFIXES):
        with path.open("rb") as file:
            total.update(f"{path.relative_to(folder)} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def _unsafe_files(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if Path(folder, name).is_file() and Path(name).suffix not in _KEPT_SUFFIXES]
