"""Names of LoRA weights in files, as diffusers, ComfyUI and the kohya scripts read them.

UNets: one spelling serves all three tools, `lora_unet_` with underscores; SDXL's layers take the names of its original
checkpoint, the only ones that all kohya scripts know. Transformers: diffusers' own names, which ComfyUI reads too; the
kohya scripts know the original checkpoint's names only, in which query, key and value (and FLUX's `proj_mlp`) are one layer.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from rpo.errors import RpoError
from rpo.models.lora import LoraLayout

LORA_FILE = "pytorch_lora_weights.safetensors"
"""The file name that `load_lora_weights` looks for in a folder."""


class Adapter(NamedTuple):
    """One layer's low-rank update `up @ down`, scale included."""

    down: Tensor
    """(rank, inputs), or a convolution's kernel with `rank` outputs; A in peft's names."""
    up: Tensor
    """(outputs, rank), or a 1x1 convolution's kernel; B in peft's names."""


_RESNET = {"conv1": "in_layers.2", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
_SDXL_BLOCK = re.compile(r"(down_blocks|mid_block|up_blocks)\.(?:(\d+)\.)?(resnets|attentions)\.(\d+)\.(.+)")

_FLUX = {
    "transformer_blocks": (
        "double_blocks",
        {
            "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
            "img_attn.proj": ("attn.to_out.0",),
            "img_mlp.0": ("ff.net.0.proj",),
            "img_mlp.2": ("ff.net.2",),
            "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
            "txt_attn.proj": ("attn.to_add_out",),
            "txt_mlp.0": ("ff_context.net.0.proj",),
            "txt_mlp.2": ("ff_context.net.2",),
        },
    ),
    "single_transformer_blocks": ("single_blocks", {"linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")}),
}
_SD3 = {
    "transformer_blocks": (
        "joint_blocks",
        {
            "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
            "x_block.attn.proj": ("attn.to_out.0",),
            "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
            "x_block.attn2.proj": ("attn2.to_out.0",),
            "x_block.mlp.fc1": ("ff.net.0.proj",),
            "x_block.mlp.fc2": ("ff.net.2",),
            "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
            "context_block.attn.proj": ("attn.to_add_out",),
            "context_block.mlp.fc1": ("ff_context.net.0.proj",),
            "context_block.mlp.fc2": ("ff_context.net.2",),
        },
    )
}
_ORIGINAL = {"FluxTransformer2DModel": _FLUX, "SD3Transformer2DModel": _SD3}
"""Class of a transformer -> its blocks -> (the original checkpoint's name of them, its layers -> ours, in order of their rows)."""


def file_weights(layers: Mapping[str, Adapter], network: nn.Module, layout: LoraLayout = "diffusers") -> dict[str, Tensor]:
    """Tensors of a LoRA file in `layout`; `layers` by their module path in `network`, the diffusers network that they belong to.

    Scales are part of `up`, and `alpha`, where it is written, is the rank: readers that ignore it get the same image.
    Raises `RpoError` if the tools of the layout cannot load the network's class at all.
    """
    kind = type(network).__name__.removeprefix("FSDP")  # the prefix of a network that is sharded
    if kind.startswith("UNet"):
        return _kohya({_unet_name(path, network): adapter for path, adapter in layers.items()})
    if layout == "kohya":
        if kind not in _ORIGINAL:
            raise RpoError(f"the kohya scripts do not know {kind}; write the LoRA for diffusers or comfyui")
        return _kohya(_fused(layers, network, _ORIGINAL[kind]))
    weights: dict[str, Tensor] = {}
    for path, adapter in layers.items():
        weights[f"transformer.{path}.lora_A.weight"] = adapter.down
        weights[f"transformer.{path}.lora_B.weight"] = adapter.up
    return weights


def read_lora(file: Path, network: nn.Module) -> dict[str, Adapter]:
    """The layers of a LoRA file that this package wrote, by module path in `network`. Raises `RpoError` for any other file."""
    try:
        weights = load_file(file)
    except (OSError, SafetensorError) as error:
        raise RpoError(f"{file} cannot be read as a LoRA ({error}); give the weights of a LoRA run") from error
    paths: dict[str, str] = {}
    for path, _ in network.named_modules():
        paths[f"transformer.{path}"] = path
        paths[f"lora_unet_{path.replace('.', '_')}"] = path  # SDXL as versions before 0.2 wrote it
        if type(network).__name__.removeprefix("FSDP").startswith("UNet"):
            paths[f"lora_unet_{_unet_name(path, network).replace('.', '_')}"] = path
    layers: dict[str, Adapter] = {}
    for down_name, up_name in (("lora_A", "lora_B"), ("lora_down", "lora_up")):
        for key in [name for name in weights if name.endswith(f".{down_name}.weight")]:
            name = key.removesuffix(f".{down_name}.weight")
            up = weights.get(f"{name}.{up_name}.weight")
            if name not in paths or up is None:
                raise RpoError(f"{file} holds {key}, which is no layer of this {type(network).__name__}; give the run's own base model")
            down = weights[key]
            alpha = weights.get(f"{name}.alpha")
            layers[paths[name]] = Adapter(down, up if alpha is None else up * (alpha.to(up) / down.shape[0]))
    if not layers:
        raise RpoError(f"{file} holds no LoRA layers")
    return layers


def _kohya(layers: Mapping[str, Adapter]) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for name, (down, up) in layers.items():
        key = f"lora_unet_{name.replace('.', '_')}"
        weights |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(float(down.shape[0]))}
    return weights


def _unet_name(path: str, network: nn.Module) -> str:
    """The layer's name in the file: SDXL's of its original checkpoint, other UNets' of diffusers."""
    config = getattr(network, "config", None)
    match = _SDXL_BLOCK.fullmatch(path)
    if match is None or config is None or config.addition_embed_type != "text_time":
        return path
    part, block, kind, index, rest = match[1], int(match[2] or 0), match[3], int(match[4]), match[5]
    rest = _RESNET.get(rest, rest) if kind == "resnets" else rest
    if part == "mid_block":
        return f"middle_block.{2 * index if kind == 'resnets' else 1}.{rest}"
    inner = 0 if kind == "resnets" else 1
    row = block * (config.layers_per_block + 1) + index
    return f"input_blocks.{row + 1}.{inner}.{rest}" if part == "down_blocks" else f"output_blocks.{row}.{inner}.{rest}"


def _fused(
    layers: Mapping[str, Adapter], network: nn.Module, blocks: Mapping[str, tuple[str, Mapping[str, Sequence[str]]]]
) -> dict[str, Adapter]:
    """The same updates on the original checkpoint's layers; several of ours that are one there become one of their ranks' sum."""
    fused: dict[str, Adapter] = {}
    left = set(layers)
    for ours, (theirs, names) in blocks.items():
        for index in range(len(network.get_submodule(ours))):  # pyright: ignore[reportArgumentType]  (a ModuleList)
            for name, ends in names.items():
                paths = [f"{ours}.{index}.{end}" for end in ends]
                if left.isdisjoint(paths):
                    continue
                left.difference_update(paths)
                fused[f"{theirs}.{index}.{name}"] = _stacked([(layers.get(path), _outputs(network, path)) for path in paths])
    if left:
        raise RpoError(f"the kohya scripts have no layer for {sorted(left)[0]} and {len(left) - 1} others of this LoRA")
    return fused


def _outputs(network: nn.Module, path: str) -> int:
    layer = network.get_submodule(path)
    assert isinstance(layer, nn.Linear), path
    return layer.out_features


def _stacked(parts: Sequence[tuple[Adapter | None, int]]) -> Adapter:
    """One update whose rows are those of the parts, in order; rows of a part without an adapter stay as they are."""
    present = [adapter for adapter, _ in parts if adapter is not None]
    down = torch.cat([adapter.down for adapter in present])
    up = present[0].up.new_zeros(sum(outputs for _, outputs in parts), len(down))
    row = column = 0
    for adapter, outputs in parts:
        if adapter is not None:
            rank = len(adapter.down)
            up[row : row + outputs, column : column + rank] = adapter.up
            column += rank
        row += outputs
    return Adapter(down, up)
