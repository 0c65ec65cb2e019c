"""A CLIP folder as it is published, small, and with random weights."""

import json
from pathlib import Path

from transformers import CLIPConfig, CLIPModel

from published_rewards import MEAN, PATCH, SIDE, STD
from rpo.shapes.networks import tokenizer


def clip_folder(folder: Path) -> Path:
    """Model, tokenizer, preprocessing."""
    words = tokenizer()
    shape = {"num_attention_heads": 2, "hidden_act": "gelu"}
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": len(words)}
    text |= {"max_position_embeddings": words.model_max_length, "bos_token_id": words.bos_token_id}
    text |= {"eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "image_size": SIDE, "patch_size": PATCH}
    CLIPModel(CLIPConfig(text_config=text | shape, vision_config=vision | shape, projection_dim=24)).save_pretrained(folder)
    words.save_pretrained(folder)
    told = {"crop_size": {"height": SIDE, "width": SIDE}, "image_mean": MEAN, "image_std": STD}
    (folder / "preprocessor_config.json").write_text(json.dumps(told))
    return folder
