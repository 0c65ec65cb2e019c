"""A first lesson for the text encoder of the two diffusion models: what the words say of each place of the picture.

A caption says what stands in every slot; an instruction says it of the slots it changes, and of the others that they stay. Both are
read by the same few learned queries, one for each slot, as the cross-attention of a UNet reads them. A text encoder that starts from
here, and not from noise, saves the UNet most of its training.
"""

from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

from rpo.shapes.render import SLOTS, Placed, place, revise, standing
from rpo.shapes.scenes import BACKGROUNDS, COLORS, SHAPES, SIZES, caption, scenes
from rpo.shapes.training.fit import fit

_QUESTIONS = (SIZES, COLORS, SHAPES, BACKGROUNDS)
ANSWERS = [2 + len(values) for values in _QUESTIONS]
"""Answers to each question of a slot (size, colour, shape, background): nothing, one of the values, or that it stays as it is."""
_STAYS = [answers - 1 for answers in ANSWERS]


def slot_codes(placed: list[Placed], background: str) -> list[list[int]]:
    """The answers for every slot of a picture."""
    there, behind = standing(placed), 1 + BACKGROUNDS.index(background)
    codes = []
    for slot in SLOTS:
        thing = there.get(slot)
        read = [1 + SIZES.index(thing.size), 1 + COLORS.index(thing.color), 1 + SHAPES.index(thing.shape)] if thing else [0, 0, 0]
        codes.append([*read, behind])
    return codes


def caption_lesson(rng: np.random.Generator) -> tuple[str, list[list[int]]]:
    """A caption and what it says of every slot."""
    scene = next(scenes(rng, held_out=False, two_things=0.75))
    return caption(scene), slot_codes(place(scene, rng), scene.background)


def instruction_lesson(rng: np.random.Generator) -> tuple[str, list[list[int]]]:
    """None, one or two instructions and what they say of every slot; one that moves or adds a thing says it of all slots."""
    revision = revise(next(scenes(rng, held_out=False, two_things=0.75)), rng, rng.choice(3, p=[0.1, 0.4, 0.5]))
    was, is_now = (np.array(slot_codes(*picture)) for picture in (revision.before, revision.after))
    told = is_now.copy()
    if not any(edit.op in ("add", "move") for edit in revision.edits):
        same = (was[:, :3] == is_now[:, :3]).all(1)
        told[same, :3] = _STAYS[:3]
    if revision.before[1] == revision.after[1]:
        told[:, 3] = _STAYS[3]
    return revision.instruction, told.tolist()


class _Readers(nn.Module):
    """Learned queries that attend to the words; one linear answer per question."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(len(SLOTS), width) * 0.5)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.answers = nn.ModuleList([nn.Linear(width, count) for count in ANSWERS])

    def forward(self, words: torch.Tensor) -> list[torch.Tensor]:
        read = self.attention(self.queries.expand(len(words), -1, -1), words, words, need_weights=False)[0]
        return [answer(read) for answer in self.answers]


def teach_text(text: CLIPTextModel, words: CLIPTokenizer, *, seed: int, folder: Path, steps: int) -> None:
    """Trains `text` in place on endless captions and instructions."""
    readers = _Readers(text.config.hidden_size)

    def loss(step: int) -> torch.Tensor:
        rng = np.random.default_rng([seed, step])
        told = [lesson(rng) for lesson in (caption_lesson, instruction_lesson) for _ in range(64)]
        tokens = words([said for said, _ in told], padding="max_length", return_tensors="pt").input_ids
        truth = torch.tensor([codes for _, codes in told])  # (b, slots, questions)
        answers = readers(text(tokens).last_hidden_state)
        return torch.stack([F.cross_entropy(a.flatten(0, 1), truth[..., i].flatten()) for i, a in enumerate(answers)]).sum()

    fit("text", {"text": text, "readers": readers}, loss, steps=steps, lr=1e-3, folder=folder, ema_decay=None)
