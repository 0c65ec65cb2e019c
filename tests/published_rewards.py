"""The authors' networks written anew from their papers, with their names for the weights: what a converted scorer is held against.

Nothing here uses transformers. Each `save_*` writes a checkpoint as it is published, and each `*_score` is the published formula.
"""

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

SIDE, PATCH = 32, 16
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def pixels(image: np.ndarray, side: int = SIDE) -> torch.Tensor:
    """Shortest side to `side`, bicubic; centre; standardised. (1, 3, side, side)"""
    picture = Image.fromarray(image)
    short = min(picture.size)
    wide, high = (max(side, round(length * side / short)) for length in picture.size)
    picture = picture.resize((wide, high), Image.Resampling.BICUBIC)
    left, top = (wide - side) // 2, (high - side) // 2
    array = np.asarray(picture.crop((left, top, left + side, top + side)), dtype=np.float64) / 255
    return torch.tensor((array - MEAN) / STD, dtype=torch.float32).permute(2, 0, 1)[None]


class _Block(nn.Module):
    """A transformer block of open_clip."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 2 * width), "c_proj": nn.Linear(2 * width, width)})

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x))))


class _Tower(nn.Module):
    def __init__(self, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList([_Block(width, heads) for _ in range(depth)])

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class _Visual(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, PATCH, PATCH, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn((SIDE // PATCH) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = _Tower(width, 2, 2)
        self.proj = nn.Parameter(torch.randn(width, out) / math.sqrt(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv1(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenClip(nn.Module):
    """CLIP as open_clip names it; HPS v2 (arXiv 2306.09341) is one, tuned."""

    def __init__(self, vocabulary: int, length: int, out: int = 24) -> None:
        super().__init__()
        width = 16
        self.visual = _Visual(32, out)
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.positional_embedding = nn.Parameter(torch.randn(length, width))
        self.transformer = _Tower(width, 2, 1)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, out) / math.sqrt(width))
        self.logit_scale = nn.Parameter(torch.tensor(2.5))

    def text(self, tokens: torch.Tensor, end: int) -> torch.Tensor:
        length = tokens.shape[1]
        mask = torch.full((length, length), -math.inf).triu(1)
        x = self.ln_final(self.transformer(self.token_embedding(tokens) + self.positional_embedding[:length], mask))
        place = (tokens == end).int().argmax(1)
        return x[torch.arange(len(x)), place] @ self.text_projection

    @torch.no_grad()
    def cosine(self, image: np.ndarray, tokens: torch.Tensor, end: int) -> float:
        return float(F.cosine_similarity(self.visual(pixels(image)), self.text(tokens, end)))


class _VitBlock(nn.Module):
    """BLIP's vision transformer, by timm's names."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 2 * width), "fc2": nn.Linear(2 * width, width)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.attn["qkv"](self.norm1(x)).chunk(3, -1)
        x = x + self.attn["proj"](attend(q, k, v))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None, width: int = 64) -> torch.Tensor:
    """Softmax attention with heads of 64; `mask` (b, tokens) is 0 where nobody looks."""
    split = [x.unflatten(-1, (-1, width)).transpose(1, 2) for x in (q, k, v)]
    scores = split[0] @ split[1].transpose(-1, -2) / math.sqrt(width)
    if mask is not None:
        scores = scores.masked_fill(mask[:, None, None] == 0, -math.inf)
    return (scores.softmax(-1) @ split[2]).transpose(1, 2).flatten(2)


class _Vit(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, (SIDE // PATCH) ** 2 + 1, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, PATCH, PATCH)})
        self.blocks = nn.ModuleList([_VitBlock(width) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed["proj"](x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def _dense(out: int, width: int) -> nn.ModuleDict:
    return nn.ModuleDict({"dense": nn.Linear(width, out), "LayerNorm": nn.LayerNorm(out, eps=1e-12)})


class _Attention(nn.Module):
    """BERT's attention with its output, onto itself or onto the picture."""

    def __init__(self, width: int, other: int) -> None:
        super().__init__()
        self.add_module("self", nn.ModuleDict({n: nn.Linear(w, width) for n, w in (("query", width), ("key", other), ("value", other))}))
        self.output = _dense(width, width)

    def forward(self, x: torch.Tensor, onto: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        own = self.get_submodule("self")
        seen = attend(own["query"](x), own["key"](onto), own["value"](onto), mask)
        return self.output["LayerNorm"](self.output["dense"](seen) + x)


class _BertLayer(nn.Module):
    def __init__(self, width: int, picture: int) -> None:
        super().__init__()
        self.attention, self.crossattention = _Attention(width, width), _Attention(width, picture)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, 2 * width)})
        self.output = _dense(width, 2 * width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor, picture: torch.Tensor) -> torch.Tensor:
        x = self.crossattention(self.attention(x, x, mask), picture, None)
        return self.output["LayerNorm"](self.output["dense"](F.gelu(self.intermediate["dense"](x))) + x)


class _Bert(nn.Module):
    def __init__(self, vocabulary: int, width: int, picture: int, depth: int) -> None:
        super().__init__()
        self.embeddings = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(vocabulary, width),
                "position_embeddings": nn.Embedding(64, width),
                "LayerNorm": nn.LayerNorm(width, eps=1e-12),
            }
        )
        self.embeddings.register_buffer("position_ids", torch.arange(64)[None])
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList([_BertLayer(width, picture) for _ in range(depth)])})

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor, picture: torch.Tensor) -> torch.Tensor:
        places = self.embeddings["position_embeddings"](torch.arange(tokens.shape[1]))
        x = self.embeddings["LayerNorm"](self.embeddings["word_embeddings"](tokens) + places)
        for layer in self.encoder["layer"]:
            x = layer(x, mask, picture)
        return x


def authors_head(width: int) -> nn.Sequential:
    """Linear layers with dropout between the first four, as the checkpoints count them: 0, 2, 4, 6, 7."""
    layers: list[nn.Module] = []
    for a, b, dropped in ((width, 1024, 1), (1024, 128, 1), (128, 64, 1), (64, 16, 0), (16, 1, 0)):
        layers += [nn.Linear(a, b), *([nn.Dropout()] if dropped else [])]
    return nn.Sequential(*layers)


class ImageReward(nn.Module):
    """ImageReward (arXiv 2304.05977), section 3."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.blip = nn.ModuleDict({"visual_encoder": _Vit(128, 2), "text_encoder": _Bert(vocabulary, 64, 128, 2)})
        self.mlp = nn.ModuleDict({"layers": authors_head(64)})

    @torch.no_grad()
    def score(self, image: np.ndarray, tokens: torch.Tensor, mask: torch.Tensor) -> float:
        self.eval()
        read = self.blip["text_encoder"](tokens, mask, self.blip["visual_encoder"](pixels(image)))
        return (float(self.mlp["layers"](read[:, 0])) - 0.16717362830052426) / 1.0333394966054072


def save(network: nn.Module, path: Path, wrapped: bool = False) -> Path:
    """A checkpoint; `wrapped` as training scripts leave it."""
    torch.save({"state_dict": network.state_dict()} if wrapped else network.state_dict(), path)
    return path
