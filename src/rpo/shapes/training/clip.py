"""Training of the CLIP scorer: contrastive, with hard negatives that differ from the caption in one thing."""

from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

from rpo.shapes import networks
from rpo.shapes.recognition import CELL_FIELDS
from rpo.shapes.render import SIDE, place
from rpo.shapes.scenes import BACKGROUNDS, caption, random_change, scenes
from rpo.shapes.training.fit import fit
from rpo.shapes.training.recognizer import degrade, label, recogniser_loss


def clip_model(words: CLIPTokenizer) -> CLIPModel:
    text: CLIPTextConfig = networks.text_config(words, layers=3)
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=8,
        projection_dim=128,
    )
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=128))


class _PatchReadings(nn.Module):
    """What each patch holds, read from the vision tower while it trains: without it a patch transformer learns shapes very slowly."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cells = nn.Linear(width, sum(CELL_FIELDS.values()))
        self.background = nn.Linear(width, len(BACKGROUNDS))

    def forward(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        patches = self.cells(tokens[:, 1:]).transpose(1, 2).unflatten(2, (8, 8))
        out = dict(zip(CELL_FIELDS, patches.split(list(CELL_FIELDS.values()), 1), strict=True))
        out["background"] = self.background(tokens[:, 0])
        return out


def train_clip(
    *, seed: int, folder: Path, steps: int, pictures: int = 24_000, batch: int = 64, begin_from: Path | None = None
) -> tuple[CLIPModel, CLIPTokenizer]:
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    words = networks.tokenizer()
    model, readings = clip_model(words), _PatchReadings(128)
    if begin_from:
        networks.begin(model, begin_from / "clip", begin_from / "clip")
    source = scenes(rng, held_out=False)
    shown = [next(source) for _ in range(pictures)]
    data = label([(place(scene, rng), scene.background) for scene in shown])

    def loss(step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        own = np.random.default_rng([seed, step])
        chosen = torch.randint(pictures, (batch,), generator=generator)
        clean = torch.from_numpy(data.images[chosen.numpy()]).permute(0, 3, 1, 2).float() / 127.5 - 1
        pixels = degrade(clean, torch.rand(batch, generator=generator) * 0.7, generator)
        told = [shown[i] for i in chosen.tolist()]
        texts = [caption(scene if own.random() < 0.5 else scene.canonical()) for scene in told]
        texts += [caption(random_change(scene, own)[0]) for scene in told]
        tokens = words(texts, padding="max_length", return_tensors="pt").input_ids
        seen = model.vision_model(pixel_values=pixels)
        image = F.normalize(model.visual_projection(seen.pooler_output), dim=-1)
        text = F.normalize(model.text_projection(model.text_model(input_ids=tokens).pooler_output), dim=-1)
        logits = model.logit_scale.exp().clamp(max=100) * image @ text.T  # (batch, 2 batch): own captions, then hard negatives
        target = torch.arange(batch)
        same = [[a.canonical() == b.canonical() and i != j for j, b in enumerate(told)] for i, a in enumerate(told)]
        logits[:, :batch] = logits[:, :batch].masked_fill(torch.tensor(same), -torch.inf)
        own_pair = torch.stack([logits.diagonal(), logits[:, batch:].diagonal()], 1)
        contrast = F.cross_entropy(logits, target) + F.cross_entropy(logits[:, :batch].T, target)
        hard = F.cross_entropy(own_pair, torch.zeros(batch, dtype=torch.long))
        return contrast + hard + recogniser_loss(readings(seen.last_hidden_state), data.things[chosen], data.background[chosen])

    fit("clip", {"model": model, "readings": readings}, loss, steps=steps, lr=1e-3, folder=folder)
    return model, words
