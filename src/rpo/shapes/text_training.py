"""A first lesson for the text encoders of the two diffusion models: which word says what of which thing.

A caption or an instruction is read by a few learned queries, one for each place of a picture or each change, as the cross-attention
of a UNet reads it. A text encoder that starts from here, and not from noise, saves the UNet most of its training.
"""

from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

from rpo.shapes.fit import fit
from rpo.shapes.render import RELATION_SLOTS, SLOTS
from rpo.shapes.scenes import (
    BACKGROUNDS,
    COLORS,
    RELATIONS,
    SHAPES,
    SIZES,
    Edit,
    Scene,
    Thing,
    caption,
    differences,
    join_instructions,
    random_change,
    random_scene,
)

_NOTHING = 0


def _codes(thing: Thing | None) -> list[int]:
    """Size, colour and shape, each from 1; 0 for nothing."""
    if thing is None:
        return [_NOTHING] * 3
    return [1 + SIZES.index(thing.size), 1 + COLORS.index(thing.color), 1 + SHAPES.index(thing.shape)]


def caption_lesson(rng: np.random.Generator) -> tuple[str, list[list[int]]]:
    """A caption, and for every slot of the picture what stands there, with the background as a fourth answer."""
    scene = random_scene(rng, two_things=0.75)
    slots = RELATION_SLOTS[scene.relation] if scene.relation else ("centre",)
    there: dict[str, Thing] = dict(zip(slots, scene.things, strict=True))
    return caption(scene), [[*_codes(there.get(slot)), BACKGROUNDS.index(scene.background)] for slot in SLOTS]


def _edit_codes(edit: Edit | None) -> list[int]:
    """What is done to what, and what comes of it: operation, target (size, colour, shape), new word, relation."""
    if edit is None:
        return [_NOTHING] * 6
    operations = ("add", "remove", "replace", "recolor", "move", "fix")
    words = edit.instruction.split()
    target = _codes(Thing(*edit.target.split())) if edit.target != "background" else [_NOTHING] * 3
    new = {word: i for i, word in enumerate((*SIZES, *COLORS, *SHAPES, *BACKGROUNDS), start=1)}
    relation = next((i for i, phrase in enumerate(RELATIONS, start=1) if phrase in edit.instruction), _NOTHING)
    return [1 + operations.index(edit.op), *target, new.get(words[-1], _NOTHING), relation]


def instruction_lesson(rng: np.random.Generator) -> tuple[str, list[list[int]]]:
    """One or two instructions, and what each of them asks for."""
    before = random_scene(rng, two_things=0.75)
    edits: list[Edit] = []
    while not 1 <= len(edits) <= 2:
        after: Scene = before
        for _ in range(rng.integers(1, 3)):
            after = random_change(after, rng)[0]
        edits = differences(before, after)
    return join_instructions([edit.instruction for edit in edits]), [_edit_codes(edits[i] if i < len(edits) else None) for i in range(2)]


class _Readers(nn.Module):
    """Learned queries that attend to the words; one linear answer per question."""

    def __init__(self, width: int, num_queries: int, answers: list[int]) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(num_queries, width) * 0.5)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.answers = nn.ModuleList([nn.Linear(width, count) for count in answers])

    def forward(self, words: torch.Tensor) -> list[torch.Tensor]:
        read = self.attention(self.queries.expand(len(words), -1, -1), words, words, need_weights=False)[0]
        return [answer(read) for answer in self.answers]


CAPTION_ANSWERS = [1 + len(SIZES), 1 + len(COLORS), 1 + len(SHAPES), len(BACKGROUNDS)]
INSTRUCTION_ANSWERS = [
    7,
    1 + len(SIZES),
    1 + len(COLORS),
    1 + len(SHAPES),
    1 + len(SIZES) + len(COLORS) + len(SHAPES) + len(BACKGROUNDS),
    5,
]


def teach_text(text: CLIPTextModel, words: CLIPTokenizer, *, seed: int, folder: Path, steps: int) -> None:
    """Trains `text` in place on endless captions and instructions."""
    lessons = ((caption_lesson, _Readers(text.config.hidden_size, len(SLOTS), CAPTION_ANSWERS)),
               (instruction_lesson, _Readers(text.config.hidden_size, 2, INSTRUCTION_ANSWERS)))  # fmt: skip

    def loss(step: int) -> torch.Tensor:
        rng = np.random.default_rng([seed, step])
        total = torch.zeros(())
        for lesson, readers in lessons:
            told = [lesson(rng) for _ in range(64)]
            tokens = words([said for said, _ in told], padding="max_length", return_tensors="pt").input_ids
            truth = torch.tensor([codes for _, codes in told])  # (b, queries, questions)
            for i, answer in enumerate(readers(text(tokens).last_hidden_state)):
                total = total + F.cross_entropy(answer.flatten(0, 1), truth[..., i].flatten())
        return total

    parts = {"text": text, "captions": lessons[0][1], "instructions": lessons[1][1]}
    fit("text", parts, loss, steps=steps, lr=1e-3, folder=folder, ema_decay=None)
