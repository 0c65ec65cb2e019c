"""LoRA files: names checked by the inverse mappings that diffusers has for LoRAs and for original checkpoints."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel, ZImageTransformer2DModel
from diffusers.loaders.single_file_utils import (
    convert_flux_transformer_checkpoint_to_diffusers,
    convert_ldm_unet_checkpoint,
    convert_sd3_transformer_checkpoint_to_diffusers,
)
from safetensors.torch import load_file, save_file
from torch import nn

from rpo.backends.diffusers.pipelines import load_lora, load_pipeline
from rpo.cli import main
from rpo.errors import RpoError
from rpo.models.diffusers_denoiser import load_denoiser
from rpo.models.lora import TRANSFORMER_LAYERS, UNET_LAYERS, Lora, LoraTarget
from rpo.models.lora_layouts import LORA_FILE, Adapter, file_weights, read_lora
from tiny_families import disturb, picture, pipeline_of, save_family

SDXL: dict[str, Any] = {
    "block_out_channels": (8, 16, 32),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "layers_per_block": 2,
    "cross_attention_dim": 8,
    "attention_head_dim": (1, 1, 1),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 56,
    "use_linear_projection": True,
    "norm_num_groups": 4,
}
"""SDXL's depth and layers at small widths."""


def adapters(network: nn.Module, layers: dict[LoraTarget, tuple[str, ...]], *targets: LoraTarget, rank: int = 2) -> dict[str, Adapter]:
    """Random updates of every layer that the targets reach."""
    ends = tuple(f".{end}" for target in targets for end in layers[target])
    made: dict[str, Adapter] = {}
    for path, layer in network.named_modules():
        if f".{path}".endswith(ends) and isinstance(layer, nn.Linear | nn.Conv2d):
            outputs, inputs, *kernel = layer.weight.shape
            ones = [1] * len(kernel)
            made[path] = Adapter(torch.randn(rank, inputs, *kernel), torch.randn(outputs, rank, *ones))
    return made


class Zeros(dict[str, Any]):
    """An original checkpoint in which every key that is not there is a small tensor of zeros."""

    def pop(self, key: str, *default: Any) -> Any:
        return super().pop(key, torch.zeros(6, 1))

    def get(self, key: str, *default: Any) -> Any:
        return super().get(key, torch.zeros(6, 1))


def dotted(weights: dict[str, torch.Tensor], names: list[str]) -> dict[str, str]:
    """Key of a layer in the file -> that of `names` which it spells with underscores."""
    by_flat = {name.replace(".", "_"): name for name in names}
    assert len(by_flat) == len(names)
    keys = {key.removesuffix(".alpha") for key in weights if key.endswith(".alpha")}
    return {key: by_flat[key.removeprefix("lora_unet_")] for key in keys}


def test_sdxl_has_the_names_of_its_original_checkpoint() -> None:
    unet = UNet2DConditionModel(**SDXL)
    counts = {"attention": 560, "feed_forward": 140, "convolution": 67}
    for target, count in counts.items():
        assert len(adapters(unet, dict(UNET_LAYERS), target)) == count  # type: ignore[arg-type]
    layers = adapters(unet, dict(UNET_LAYERS), "attention", "feed_forward", "convolution")
    weights = file_weights(layers, unet)
    # diffusers' converter of whole checkpoints, given every layer's B as its weight under the name that we wrote, must find our layer.
    checkpoint: dict[str, torch.Tensor] = {}
    for key, value in weights.items():
        if key.endswith(".lora_up.weight"):
            checkpoint[_undo(key.removesuffix(".lora_up.weight"))] = value
    # the converter counts the blocks by their keys
    for block in range(9):
        checkpoint.setdefault(f"model.diffusion_model.input_blocks.{block}.0.x.weight", torch.zeros(1))
    found = convert_ldm_unet_checkpoint(checkpoint, {**SDXL, "addition_embed_type": None})
    for path, adapter in layers.items():
        assert torch.equal(found[f"{path}.weight"], adapter.up), path


_WORDS = ("input_blocks", "middle_block", "output_blocks", "in_layers", "out_layers", "skip_connection", "transformer_blocks")
_WORDS += ("proj_in", "proj_out", "to_q", "to_k", "to_v", "to_out")


def _undo(key: str) -> str:
    """The original checkpoint's key of a layer whose dots became underscores; its words are known."""
    name = key.removeprefix("lora_unet_")
    for word in _WORDS:
        name = name.replace(word, word.replace("_", "~"))
    return f"model.diffusion_model.{name.replace('_', '.').replace('~', '_')}.weight"


@pytest.mark.parametrize("dual", [(), (0,)])
def test_sd3_for_kohya_is_the_original_checkpoints(dual: tuple[int, ...]) -> None:
    network = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=8,
        caption_projection_dim=16, pooled_projection_dim=8, out_channels=4, pos_embed_max_size=8, dual_attention_layers=dual,
    )  # fmt: skip
    layers = adapters(network, dict(TRANSFORMER_LAYERS), "attention", "feed_forward")
    weights = file_weights(layers, network, "kohya")
    blocks = [f"joint_blocks.{i}.{side}_block." for i in range(2) for side in ("x", "context")]
    names = [block + end for block in blocks for end in ("attn.qkv", "attn.proj", "attn2.qkv", "attn2.proj", "mlp.fc1", "mlp.fc2")]
    checkpoint = Zeros({f"{name}.weight": _update(weights, key) for key, name in dotted(weights, names).items()})
    checkpoint |= {"context_embedder.weight": torch.zeros(16, 8)}
    found = convert_sd3_transformer_checkpoint_to_diffusers(checkpoint)
    for path, adapter in layers.items():
        assert torch.allclose(found[f"{path}.weight"], adapter.up @ adapter.down, atol=1e-5), path


@pytest.mark.parametrize("targets", [("attention",), ("feed_forward",), ("attention", "feed_forward")], ids=" ".join)
def test_flux_for_kohya_is_the_original_checkpoints(targets: tuple[LoraTarget, ...]) -> None:
    """Each choice of targets, also those that tune a part of a layer that the original checkpoint has in one piece."""
    with torch.device("meta"):
        network = FluxTransformer2DModel(num_layers=1, num_single_layers=1)
    layers = adapters(network, dict(TRANSFORMER_LAYERS), *targets)
    weights = file_weights(layers, network, "kohya")
    double = [f"double_blocks.0.{side}_{end}" for side in ("img", "txt") for end in ("attn.qkv", "attn.proj", "mlp.0", "mlp.2")]
    key_of = dotted(weights, [*double, "single_blocks.0.linear1", "single_blocks.0.linear2"])
    # The rows of B are those of the weight, so B alone shows which rows went where.
    checkpoint = Zeros({f"{name}.weight": weights[f"{key}.lora_up.weight"] for key, name in key_of.items()})
    checkpoint |= {f"{name}.bias": torch.zeros(21504) for name in ("single_blocks.0.linear1",)}
    checkpoint.setdefault("double_blocks.0.img_attn.qkv.weight", torch.zeros(3 * 3072, 1))
    checkpoint.setdefault("single_blocks.0.linear1.weight", torch.zeros(21504, 1))
    found = convert_flux_transformer_checkpoint_to_diffusers(checkpoint)
    by_name = {name: key for key, name in key_of.items()}
    for path, adapter in layers.items():
        original = _flux_original(path)
        assert torch.allclose(
            found[f"{path}.weight"] @ weights[f"{by_name[original]}.lora_down.weight"], adapter.up @ adapter.down, atol=1e-3
        ), path


def _flux_original(path: str) -> str:
    if path.startswith("single"):
        return "single_blocks.0.linear1"
    side = "txt" if "add_" in path or "ff_context" in path else "img"
    end = {"proj": "mlp.0", "2": "mlp.2", "0": "attn.proj", "to_add_out": "attn.proj"}.get(path.rsplit(".", 1)[1], "attn.qkv")
    return f"double_blocks.0.{side}_{end}"


def _update(weights: dict[str, torch.Tensor], key: str) -> torch.Tensor:
    up, down = weights[f"{key}.lora_up.weight"], weights[f"{key}.lora_down.weight"]
    assert float(weights[f"{key}.alpha"]) == len(down)
    return up @ down


def test_a_layer_that_kohya_lacks_is_named() -> None:
    network = FluxTransformer2DModel(num_layers=1, num_single_layers=1, num_attention_heads=1, attention_head_dim=8, in_channels=4,
                                     joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4))  # fmt: skip
    one = {"context_embedder": Adapter(torch.zeros(1, 8), torch.zeros(8, 1))}
    with pytest.raises(RpoError, match="context_embedder"):
        file_weights(one, network, "kohya")
    with torch.device("meta"), pytest.raises(RpoError, match="ZImageTransformer2DModel"):
        file_weights({}, ZImageTransformer2DModel(n_layers=1, n_refiner_layers=1), "kohya")


@pytest.mark.parametrize("name", ["stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3", "flux"])
def test_every_file_that_diffusers_reads_gives_the_same_picture(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A trained LoRA, exported by the command for each tool; SD3's and FLUX's files for kohya are checked by their names above."""
    model = tmp_path / "model"
    save_family(name, model)
    device = torch.device("cpu")
    denoiser = load_denoiser(str(model), lora=Lora(rank=4, alpha=2.0), dtype=torch.float32, device=device, seed=0)
    disturb(denoiser)
    run = tmp_path / "run"
    denoiser.save(run / "train" / "weights", denoiser.trainable())
    (run / "train" / "config.json").write_text(f'{{"model": "{model}"}}')
    pipeline = pipeline_of(model)
    base = picture(pipeline)
    pipeline.load_lora_weights(run / "train" / "weights")
    tuned = picture(pipeline)
    assert np.abs(tuned - base).max() > 0.01
    for layout in ("diffusers", "comfyui", "kohya"):
        assert main(["export-lora", str(run), "--for", layout]) == 0
        file = run / f"lora-{layout}.safetensors"
        if layout == "kohya" and name in ("stable_diffusion_3", "flux"):
            assert all(key.startswith("lora_unet_") for key in load_file(file))
            continue
        other = pipeline_of(model)
        other.load_lora_weights(file)
        assert np.array_equal(picture(other), tuned)
    assert main(["export-lora", str(run), "--for", "kohya"]) == 2 and "--overwrite" in capsys.readouterr().err


def test_sdxl_files_of_the_version_before_are_read(tmp_path: Path) -> None:
    unet = UNet2DConditionModel(**SDXL)
    layers = adapters(unet, dict(UNET_LAYERS), "attention", "convolution")
    old: dict[str, torch.Tensor] = {}
    for path, (down, up) in layers.items():
        key = f"lora_unet_{path.replace('.', '_')}"
        old |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(1.0)}
    save_file(old, tmp_path / LORA_FILE)
    found = read_lora(tmp_path / LORA_FILE, unet)
    assert found.keys() == layers.keys()
    for path, adapter in layers.items():
        assert torch.equal(found[path].down, adapter.down) and torch.allclose(found[path].up, adapter.up / 2)


def test_files_that_are_no_lora_of_the_model(tmp_path: Path) -> None:
    unet = UNet2DConditionModel(**SDXL)
    file = tmp_path / LORA_FILE
    file.write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    with pytest.raises(RpoError, match=r"cannot be read|no LoRA"):
        read_lora(file, unet)
    save_file({"lora_unet_nothing.lora_down.weight": torch.zeros(1, 1), "lora_unet_nothing.lora_up.weight": torch.zeros(1, 1)}, file)
    with pytest.raises(RpoError, match="no layer of this UNet2DConditionModel"):
        read_lora(file, unet)


@pytest.mark.parametrize("damage", ["nan", "none", "other", "cut", "pickle"])
def test_a_lora_that_cannot_be_used_is_refused(damage: str, tmp_path: Path) -> None:
    model = save_family("stable_diffusion", tmp_path / "model")
    denoiser = load_denoiser(str(model), lora=Lora(rank=2), dtype=torch.float32, device=torch.device("cpu"), seed=0)
    denoiser.save(tmp_path / "lora", denoiser.trainable())
    file = tmp_path / "lora" / LORA_FILE
    weights = load_file(file)
    if damage == "nan":
        save_file(weights | {name: tensor * float("nan") for name, tensor in weights.items() if "lora_up" in name}, file)
    elif damage == "none":
        save_file({}, file)
    elif damage == "other":
        save_file({f"lora_unet_{number}_x.lora_down.weight": torch.zeros(1, 1) for number in range(2)}, file)
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-10])
    else:
        file.unlink()
        torch.save(weights, tmp_path / "lora" / "pytorch_lora_weights.bin")
    with pytest.raises(RpoError, match="LoRA"):
        load_lora(load_pipeline(str(model), device="cpu")[0], str(tmp_path / "lora"))
