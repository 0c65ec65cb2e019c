"""Published reward checkpoints, once, into folders of safetensors.

    python -m rpo.backends.scorers.convert image_reward ImageReward.pt --base bert-base-uncased --out image_reward
    python -m rpo.backends.scorers.convert hps HPS_v2.1_compressed.pt --base laion/CLIP-ViT-H-14-laion2B-s32B-b79K --out hps_v2.1
    python -m rpo.backends.scorers.convert aesthetic sac+logos+ava1-l14-linearMSE.pth --out aesthetic

Checkpoints are read with `weights_only=True`, so a file can bring numbers and nothing that is run. A checkpoint that is not what its name
says is refused: every weight of the network must be there, in its shape.
"""

import argparse
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, CLIPConfig, CLIPModel

from rpo.backends.scorers.aesthetic import HEAD
from rpo.backends.scorers.image_reward import ImageRewardNetwork
from rpo.backends.scorers.towers import linear_head, model_folder
from rpo.errors import RpoError

Weights = dict[str, torch.Tensor]
HEAD_WIDTH = 64
"""Of one attention head, in both halves of BLIP."""


def _read(checkpoint: Path) -> Weights:
    try:
        loaded: Any = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds; all mean that the file is no checkpoint of weights
        raise RpoError(f"{checkpoint} cannot be read as weights ({type(error).__name__}: {error})") from error
    weights = loaded.get("state_dict", loaded) if isinstance(loaded, Mapping) else {}
    if not weights or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise RpoError(f"{checkpoint} holds no weights by name")
    return {str(name): value.float().contiguous() for name, value in weights.items()}


def _renamed(weights: Weights, rules: Mapping[str, str]) -> Weights:
    """Weights whose name matches a rule (regular expression -> new name), under it; what matches none falls."""
    found: Weights = {}
    for name, value in weights.items():
        for pattern, new in rules.items():
            if match := re.fullmatch(pattern, name):
                found[match.expand(new)] = value
                break
    return found


def _loaded(network: Any, weights: Weights, what: str) -> Any:
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise RpoError(f"this is no checkpoint of {what}: {error}") from error
    return network


def _head_rules(prefix: str) -> dict[str, str]:
    """The five linear layers stand between dropouts in the authors' head."""
    return {rf"{prefix}layers\.{place}\.(weight|bias)": rf"head.{i}.\1" for i, place in enumerate((0, 2, 4, 6, 7))}


_BLIP = {
    r"blip\.visual_encoder\.cls_token": "vision.embeddings.class_embedding",
    r"blip\.visual_encoder\.pos_embed": "vision.embeddings.position_embedding",
    r"blip\.visual_encoder\.patch_embed\.proj\.(\w+)": r"vision.embeddings.patch_embedding.\1",
    r"blip\.visual_encoder\.norm\.(\w+)": r"vision.post_layernorm.\1",
    r"blip\.visual_encoder\.blocks\.(\d+)\.norm([12])\.(\w+)": r"vision.encoder.layers.\1.layer_norm\2.\3",
    r"blip\.visual_encoder\.blocks\.(\d+)\.attn\.qkv\.(\w+)": r"vision.encoder.layers.\1.self_attn.qkv.\2",
    r"blip\.visual_encoder\.blocks\.(\d+)\.attn\.proj\.(\w+)": r"vision.encoder.layers.\1.self_attn.projection.\2",
    r"blip\.visual_encoder\.blocks\.(\d+)\.(mlp\.fc[12]\.\w+)": r"vision.encoder.layers.\1.\2",
    r"blip\.text_encoder\.((?:embeddings|encoder)\..*(?:weight|bias))": r"text.\1",
} | _head_rules(r"mlp\.")


def _blip_config(weights: Weights) -> dict[str, Any]:
    """Widths and depths, from the shapes."""
    needed = ("vision.embeddings.patch_embedding.weight", "text.embeddings.word_embeddings.weight")
    if missing := [name for name in needed if name not in weights]:
        raise RpoError(f"this is no checkpoint of ImageReward: it has no {missing[0]}")

    def depth(pattern: str) -> int:
        return 1 + max(int(match[1]) for name in weights if (match := re.match(pattern, name)))

    wide, _, patch, _ = weights["vision.embeddings.patch_embedding.weight"].shape
    vocabulary, width = weights["text.embeddings.word_embeddings.weight"].shape
    places = weights["vision.embeddings.position_embedding"].shape[1] - 1
    vision = {
        "hidden_size": wide,
        "intermediate_size": weights["vision.encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": depth(r"vision\.encoder\.layers\.(\d+)"),
        "num_attention_heads": wide // HEAD_WIDTH,
        "image_size": patch * math.isqrt(places),
        "patch_size": patch,
        "layer_norm_eps": 1e-6,
    }
    text = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "encoder_hidden_size": wide,
        "intermediate_size": weights["text.encoder.layer.0.intermediate.dense.weight"].shape[0],
        "num_hidden_layers": depth(r"text\.encoder\.layer\.(\d+)"),
        "num_attention_heads": width // HEAD_WIDTH,
        "max_position_embeddings": weights["text.embeddings.position_embeddings.weight"].shape[0],
        "bos_token_id": None,
        "sep_token_id": None,
        "pad_token_id": 0,
    }
    return {"vision": vision, "text": text}


def convert_image_reward(checkpoint: Path, base: str, out: Path) -> Path:
    """`base`: hub id or folder of BERT's tokenizer (`bert-base-uncased`)."""
    weights = _renamed(_read(checkpoint), _BLIP)
    config = _blip_config(weights)
    network = _loaded(ImageRewardNetwork(**config), weights, "ImageReward")
    out.mkdir(parents=True, exist_ok=True)
    AutoTokenizer.from_pretrained(model_folder(base, files=("*.json", "*.txt"))).save_pretrained(out)
    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return out


def _layers(old: str, new: str) -> dict[str, str]:
    """One tower's transformer, from open_clip's names to transformers'."""
    block, layer = rf"{old}transformer\.resblocks\.(\d+)\.", rf"{new}encoder.layers.\1."
    return {
        rf"{block}ln_([12])\.(\w+)": rf"{layer}layer_norm\2.\3",
        rf"{block}attn\.(in_proj)_(weight|bias)": rf"{layer}self_attn.\2.\3",
        rf"{block}attn\.out_proj\.(\w+)": rf"{layer}self_attn.out_proj.\2",
        rf"{block}mlp\.c_fc\.(\w+)": rf"{layer}mlp.fc1.\2",
        rf"{block}mlp\.c_proj\.(\w+)": rf"{layer}mlp.fc2.\2",
    }


_OPEN_CLIP = {
    r"logit_scale": "logit_scale",
    r"token_embedding\.weight": "text_model.embeddings.token_embedding.weight",
    r"positional_embedding": "text_model.embeddings.position_embedding.weight",
    r"ln_final\.(\w+)": r"text_model.final_layer_norm.\1",
    r"text_projection": "text_projection.weight",
    r"visual\.class_embedding": "vision_model.embeddings.class_embedding",
    r"visual\.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    r"visual\.conv1\.weight": "vision_model.embeddings.patch_embedding.weight",
    r"visual\.ln_pre\.(\w+)": r"vision_model.pre_layrnorm.\1",
    r"visual\.ln_post\.(\w+)": r"vision_model.post_layernorm.\1",
    r"visual\.proj": "visual_projection.weight",
} | _layers("", "text_model.") | _layers(r"visual\.", "vision_model.")  # fmt: skip


def convert_hps(checkpoint: Path, base: str, out: Path) -> Path:
    """`base`: hub id or folder of the CLIP whose sizes, tokenizer and preprocessing HPS has (ViT-H of LAION)."""
    folder = model_folder(base, files=("*.json", "*.txt"))
    weights: Weights = {}
    for name, value in _renamed(_read(checkpoint), _OPEN_CLIP).items():
        if ".in_proj." in name:  # query, key and value in one
            thirds = zip("qkv", value.chunk(3), strict=True)
            weights |= {name.replace("in_proj", f"{part}_proj"): third.contiguous() for part, third in thirds}
        else:
            weights[name] = value.T.contiguous() if name.endswith("_projection.weight") else value
    model = _loaded(CLIPModel(CLIPConfig.from_pretrained(folder)), weights, "HPS v2")
    model.save_pretrained(out, safe_serialization=True)
    AutoTokenizer.from_pretrained(folder).save_pretrained(out)
    (out / "preprocessor_config.json").write_text((folder / "preprocessor_config.json").read_text())
    return out


def convert_aesthetic(checkpoint: Path, base: str, out: Path) -> Path:
    """The head alone; `base` is not read."""
    weights = _renamed(_read(checkpoint), _head_rules(""))
    plain = {name.removeprefix("head."): value for name, value in weights.items()}
    width = plain["0.weight"].shape[1] if "0.weight" in plain else 1
    _loaded(linear_head(width), plain, "LAION's aesthetic predictor")
    out.mkdir(parents=True, exist_ok=True)
    save_file(plain, out / HEAD)
    return out


CONVERTERS: dict[str, tuple[Callable[[Path, str, Path], Path], str]] = {
    "image_reward": (convert_image_reward, "bert-base-uncased"),
    "hps": (convert_hps, "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
    "aesthetic": (convert_aesthetic, ""),
}
"""By name: the converter, and the base it takes when none is given."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=CONVERTERS)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--base", help="hub id or folder that the tokenizer, and for hps the sizes, are taken from")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    options = parser.parse_args()
    convert, base = CONVERTERS[options.kind]
    print(convert(options.checkpoint, options.base or base, options.out))


if __name__ == "__main__":
    main()
