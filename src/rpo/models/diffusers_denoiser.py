"""Any family of diffusers pipelines as a `Denoiser`, from a folder or hub id, tuned by LoRA or in full.

Only safetensors are read, and no code from a repository is ever run. What is saved loads with the pipeline's own
`load_lora_weights` (LoRA) or `from_pretrained` (full).
"""

import copy
import gc
import shutil
import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from rpo.arrays import Conditions, Images, Latents, Timesteps
from rpo.errors import RpoError
from rpo.models.denoiser import Component, Float32Attention, FlowSchedule, NoiseSchedule, Posterior, memory_format, network_inputs
from rpo.models.family import FAMILIES, Family, family_of
from rpo.models.lora import Lora
from rpo.models.lora_layouts import LORA_FILE, Adapter, file_weights
from rpo.models.pipeline_folder import (
    components,
    digest,
    flow_schedule,
    load_part,
    noise_schedule,
    read_index,
    resolve,
    text_pipeline,
    unsafe_files,
)

_PIXELS_AT_ONCE = 2**23
"""That an autoencoder is given: its first layers hold some hundreds of numbers for each."""


class DiffusersDenoiser:
    """A `Denoiser` over a network in memory and a pipeline folder from which the encoders are loaded when they are needed."""

    def __init__(
        self,
        *,
        family: Family,
        folder: Path,
        network: Any,
        schedule: NoiseSchedule | FlowSchedule,
        lora: Lora | None,
        dtype: torch.dtype,
        compile: bool = False,
    ) -> None:
        self._family = family
        self._folder = folder
        self._network = network
        self._device: torch.device = network.device
        self._compiled = compile
        if compile:
            network.compile()
        self._schedule = schedule
        self._lora = lora
        self._adapters: list[Any] = [module for module in network.modules() if isinstance(module, BaseTunerLayer)]
        self._dtype = dtype
        self._vae: AutoencoderKL | None = None
        self._text: Any = None
        """The family's pipeline with nothing but its text encoders."""

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def schedule(self) -> NoiseSchedule | FlowSchedule:
        return self._schedule

    @property
    def digests(self) -> Mapping[Component, str]:
        return self._digests

    @cached_property
    def _digests(self) -> Mapping[Component, str]:
        texts = [name for name in components(self._folder) if name.startswith(("text_encoder", "tokenizer"))]
        shifted = isinstance(self._schedule, FlowSchedule) and self._schedule.shift is not None
        return {
            "images": digest(self._folder, "vae"),
            "prompts": f"{digest(self._folder, *sorted(texts))} {read_index(self._folder).get('force_zeros_for_empty_prompt')}",
            "network": digest(self._folder, self._family.part, "scheduler") + " shifted by resolution" * shifted,
        }

    @torch.no_grad()
    def encode_images(self, images: Images) -> Posterior:
        """In float32 whatever the network computes in. Raises `ValueError` for sides that autoencoder and network cannot divide evenly."""
        if self._vae is None:
            self._vae = load_part(AutoencoderKL, self._folder, "vae", torch.float32).to(self.device)
            self._vae.to(memory_format=torch.channels_last)  # without gradients twice as fast on CPUs as well
        vae = self._vae
        if getattr(vae.config, "latents_mean", None) is not None:
            raise RpoError(f"{self._folder}: its autoencoder scales every channel of the latents by itself, which is not supported")
        stride = 2 ** (len(vae.config.block_out_channels) - 1) * self._family.patch
        if images.shape[1] % stride or images.shape[2] % stride:
            raise ValueError(f"image sides must be multiples of {stride}, got {images.shape[1]}x{images.shape[2]}; set a resolution")
        shift, scale = vae.config.shift_factor or 0.0, vae.config.scaling_factor
        parts: list[Posterior] = []
        for few in torch.from_numpy(images).split(max(1, _PIXELS_AT_ONCE // (images.shape[1] * images.shape[2]))):
            pixels = few.to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
            posterior = vae.encode(pixels.contiguous(memory_format=torch.channels_last)).latent_dist
            parts.append(Posterior(mean=(posterior.mean - shift) * scale, std=posterior.std * scale))
        return Posterior(*(torch.cat(side) for side in zip(*parts, strict=True)))

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditions:
        """Warns when a prompt is longer than the text encoder reads."""
        if self._text is None:
            self._text = text_pipeline(self._family, self._folder, self.device)
        distinct = list(dict.fromkeys(prompts))
        tokenizer, length = self._family.reads(self._text)
        cut = sum(len(ids) > length for ids in tokenizer(distinct).input_ids)
        if cut:
            warnings.warn(f"{cut} of {len(distinct)} prompts are longer than the text encoder's {length} tokens and are cut", stacklevel=2)
        row = {prompt: i for i, prompt in enumerate(distinct)}
        rows = [row[prompt] for prompt in prompts]
        return {name: values[rows] for name, values in self._family.encode(self._text, distinct).items()}

    def free_encoders(self) -> None:
        self._vae = self._text = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def predict(self, x_t: Latents, t: Timesteps, conditions: Conditions) -> Latents:
        level = self._schedule.levels(t, x_t) if isinstance(self._schedule, FlowSchedule) else t
        x_t = network_inputs(x_t, self.device)
        half = self._dtype != torch.float32
        # Checkpointing runs layers again in the backward pass, where this context is closed, and compares.
        whole = half and self.device.type == "cpu" and not self._compiled and not self._network.is_gradient_checkpointing
        attention = Float32Attention() if whole else nullcontext()
        with torch.autocast(self.device.type, dtype=self._dtype, enabled=half), attention:
            try:
                return self._family.predict(self._network, x_t, level, conditions)
            except TorchDynamoException as error:
                if not self._compiled:
                    raise
                why = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
                warnings.warn(f"the network cannot be compiled here and runs as it is, more slowly: {why[:300]}", stacklevel=2)
                self._compiled, self._network._compiled_call_impl = False, None
                return self._family.predict(self._network, x_t, level, conditions)

    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self._network.named_parameters() if parameter.requires_grad}

    @contextmanager
    def base_network(self) -> Generator[None, None, None]:
        if self._lora is None:
            raise RpoError("full tuning has no adapters to switch off; its reference is a `frozen_copy` from before the first step")
        self._switch_adapters(off=True)
        try:
            yield
        finally:
            self._switch_adapters(off=False)

    def _switch_adapters(self, *, off: bool) -> None:
        # peft's own switch walks the whole network and turns each weight's requires_grad as well, twice in every step.
        for layer in self._adapters:
            layer._disable_adapters = off

    def frozen_copy(self) -> "DiffusersDenoiser":
        """Layers that autocast computes in half precision keep their weights in it: the same bits as the policy's, in half the memory."""
        own = {} if self._lora is not None or self._dtype == torch.float32 else _multiplied(self._network)
        copies: dict[int, Any] = {
            id(weight): nn.Parameter(weight.detach().to(self._dtype, copy=True), requires_grad=False) for weight in own.values()
        }
        return DiffusersDenoiser(
            family=self._family,
            folder=self._folder,
            network=copy.deepcopy(self._network, copies).requires_grad_(False),
            schedule=self._schedule,
            lora=self._lora,
            dtype=self._dtype,
            compile=self._compiled,
        )

    def move(self, device: torch.device) -> None:
        if device != self._network.device:
            self._network.to(device)

    def shard(self, over: DeviceMesh) -> None:
        self._network.to(memory_format=torch.contiguous_format)  # FSDP takes no other
        for module in (*self._blocks(), self._network):
            part = fully_shard(module, mesh=over)
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)  # gloo knows no other

    def _blocks(self) -> list[nn.Module]:
        """The layers that hold most of the network and must stay whole, as diffusers names them; inner ones before those around them."""
        return [module for module in self._network.modules() if type(module).__name__ in self._network._no_split_modules][::-1]

    def save(self, folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
        """LoRA: `pytorch_lora_weights.safetensors`; full: a copy of the base pipeline folder with the tuned network."""
        if self._lora is None:
            self._save_pipeline(folder, weights)
        else:
            self._save_lora(folder, weights, self._lora)

    def _save_lora(self, folder: Path, weights: Mapping[str, torch.Tensor], lora: Lora) -> None:
        matrices: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in get_peft_model_state_dict(self._network, state_dict=dict(weights)).items():
            path, matrix, _ = name.rsplit(".", 2)
            matrices.setdefault(path, {})[matrix] = (tensor * lora.scale if matrix == "lora_B" else tensor).cpu().contiguous()
        layers = {path: Adapter(down=pair["lora_A"], up=pair["lora_B"]) for path, pair in matrices.items()}
        folder.mkdir(parents=True, exist_ok=True)
        save_file(file_weights(layers, self._network), folder / LORA_FILE, metadata={"format": "pt"})

    def _save_pipeline(self, folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self._folder / "model_index.json", folder / "model_index.json")
        for part in sorted(path for path in self._folder.iterdir() if path.is_dir() and path.name in components(self._folder)):
            if part.name != self._family.part:
                shutil.copytree(part, folder / part.name, ignore=unsafe_files)
        with torch.device("meta"):
            tuned: Any = self._family.network.from_config(self._network.config)  # pyright: ignore[reportAttributeAccessIssue]
        kept = {name: value.cpu() for name, value in self._network.named_buffers() if name in tuned.state_dict()}
        tuned.load_state_dict({name: value.detach().cpu().contiguous() for name, value in {**kept, **weights}.items()}, assign=True)
        tuned.save_pretrained(folder / self._family.part, safe_serialization=True)


def load_denoiser(
    model: str,
    *,
    lora: Lora | None,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    gradient_checkpointing: bool = False,
    compile: bool = False,
    bytes_per_weight: float = 4.0,
) -> DiffusersDenoiser:
    """The model in folder or hub id `model`, ready to train: float32 weights in full tuning and on the CPU, else frozen ones in `dtype`.

    `seed` decides the adapters' first values; `bytes_per_weight` is what a trained weight will take, its gradient and optimiser included.
    Raises `RpoError` for a folder that is not a whole pipeline of a known family, and for a device that is too small for it.
    """
    # The CPU's kernels refuse weights and activations of two kinds, which autocast gives them, so there weights stay float32.
    folder, family, schedule, network = _network(model, dtype if lora is not None and device.type == "cuda" else torch.float32, device)
    network.requires_grad_(lora is None)
    if lora is not None:
        _add_lora(network, family, lora, seed)
    if gradient_checkpointing:
        network.enable_gradient_checkpointing()
    _refuse_too_little_memory(model, network, device, bytes_per_weight)
    network = _placed(network, device)
    return DiffusersDenoiser(family=family, folder=folder, network=network, schedule=schedule, lora=lora, dtype=dtype, compile=compile)


def load_reference(model: str, *, beside: Lora | None, dtype: torch.dtype, device: torch.device) -> DiffusersDenoiser:
    """A frozen network in the precision of the policy that it stands beside: of one with the adapters `beside`, or tuned in full (None).

    Raises `RpoError` as `load_denoiser` does.
    """
    half = beside is not None and device.type == "cuda"
    folder, family, schedule, network = _network(model, dtype if half else torch.float32, device)
    if beside is None and dtype != torch.float32:
        for weight in _multiplied(network).values():
            weight.data = weight.data.to(dtype)
    _refuse_too_little_memory(model, network, device, 0.0)
    network = _placed(network, device)
    return DiffusersDenoiser(family=family, folder=folder, network=network, schedule=schedule, lora=None, dtype=dtype)


def _network(model: str, dtype: torch.dtype, device: torch.device) -> tuple[Path, Family, NoiseSchedule | FlowSchedule, Any]:
    """(folder, family, noise levels, network without gradients, on the CPU) of the model in folder or hub id `model`."""
    folder = resolve(model)
    family = _family_in(folder)
    schedule = flow_schedule(folder, device, family.patch) if family.flow else noise_schedule(folder)
    network: Any = load_part(family.network, folder, family.part, dtype)
    if why := family.refuses(network.config):
        raise RpoError(f"{model}: {why}; give a text-to-image model")
    return folder, family, schedule, network


def _placed(network: Any, device: torch.device) -> Any:
    """On the device, in its memory layout, in evaluation mode: no family has dropout worth training with, and the reference must compute
    what the policy computes."""
    return network.to(device=device).to(memory_format=memory_format(device)).eval()


def _multiplied(network: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that autocast rounds to half precision wherever they are used: those of linear layers and convolutions."""
    layers = [
        (name, module) for name, module in network.named_modules() if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))
    ]
    return {f"{name}.{key}": weight for name, module in layers for key, weight in module.named_parameters(recurse=False)}


def empty_network(model: str) -> nn.Module:
    """The network of the pipeline `model` without memory for its weights (on the meta device), for the names and shapes of its layers."""
    folder = resolve(model)
    family = _family_in(folder)
    kind: Any = family.network
    with torch.device("meta"):
        return kind.from_config(kind.load_config(folder, subfolder=family.part, local_files_only=True))


def _family_in(folder: Path) -> Family:
    name = str(read_index(folder).get("_class_name"))
    family = family_of(name)
    if family is None:
        raise RpoError(f"{folder} holds a {name}; what can be tuned is {', '.join(FAMILIES)}")
    return family


def _refuse_too_little_memory(model: str, network: nn.Module, device: torch.device, bytes_per_weight: float) -> None:
    if device.type != "cuda":
        return
    gc.collect()  # networks of earlier stages may hang in reference cycles
    torch.cuda.empty_cache()  # what this process holds back for itself counts as used
    sizes = (weight.numel() * (bytes_per_weight if weight.requires_grad else weight.element_size()) for weight in network.parameters())
    need, free = sum(sizes) / 2**30, torch.cuda.mem_get_info(device)[0] / 2**30
    if need > free:
        raise RpoError(
            f"tuning {model} takes {need:.1f} GiB before any activation, and {device} has {free:.1f} GiB free; "
            "use a LoRA (--train.lora-rank), --train.optimizer adafactor, or --train.shard on more GPUs"
        )


def _add_lora(network: Any, family: Family, lora: Lora, seed: int) -> None:
    layers = [name for name, _ in network.named_modules()]
    names = {target: family.layers.get(target, ()) for target in lora.targets}
    for target, ends in names.items():
        if not any(f".{layer}".endswith(tuple(f".{end}" for end in ends)) for layer in layers):
            raise ValueError(f"LoRA target {target!r} reaches no layer of this {type(network).__name__}; leave it out of lora_targets")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        alpha = lora.rank if lora.alpha is None else lora.alpha
        targets = [name for target in names for name in names[target]]
        network.add_adapter(LoraConfig(r=lora.rank, lora_alpha=alpha, init_lora_weights=True, target_modules=targets))
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
