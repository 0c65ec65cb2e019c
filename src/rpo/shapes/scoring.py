"""The embedded world's second reward (a checklist) and its judge, each with a recogniser of its own."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from rpo.protocols import Metric
from rpo.shapes.recognition import GRID, Recogniser, View, decode, to_pixels
from rpo.shapes.scenes import BACKGROUNDS, COLORS, INVERSE, SHAPES, SIZES, Scene, Thing, best_matching, parse_caption

_LOWEST = 1e-6


@dataclass(frozen=True, kw_only=True)
class ChecklistScorerConfig:
    """How probable it is that every statement of the caption is true of the picture, after VQAScore (arXiv 2404.01291)."""

    model: str
    """Folder of a recogniser."""

    def models(self) -> tuple[str, ...]:
        return (self.model,)

    def build(self) -> "ChecklistScorer":
        return ChecklistScorer(Recogniser.load(Path(self.model)))


_ROW, _COLUMN = np.divmod(np.arange(GRID * GRID), GRID)


def _stands(relation: str) -> np.ndarray:
    """(64, 64) truth: cell i stands in `relation` to cell j, two cells apart or more."""
    dx, dy = _COLUMN[None] - _COLUMN[:, None], _ROW[None] - _ROW[:, None]
    along, across = {"left of": (dx, dy), "right of": (-dx, dy), "above": (dy, dx), "below": (-dy, dx)}[relation]
    return (along >= 2) & (along > np.abs(across))


_STANDS = {relation: _stands(relation) for relation in INVERSE}


def _near(cell: int) -> np.ndarray:
    return np.maximum(np.abs(_ROW - _ROW[cell]), np.abs(_COLUMN - _COLUMN[cell])) <= 1


class ChecklistScorer:
    """A `Scorer`: mean log-probability of the caption's statements, each thing at the cell where it fits best, and of nothing else."""

    def __init__(self, recogniser: Recogniser) -> None:
        self.recogniser = recogniser

    def _one(self, cells: dict[str, np.ndarray], background: np.ndarray, wanted: Scene) -> float:
        def fit(thing: Thing) -> np.ndarray:
            readings = (SIZES.index(thing.size), COLORS.index(thing.color), SHAPES.index(thing.shape))
            return cells["heat"][0] * cells["size"][readings[0]] * cells["color"][readings[1]] * cells["shape"][readings[2]]

        if wanted.relation is None:
            chosen = [int(fit(wanted.things[0]).argmax())]
            statements = [fit(wanted.things[0])[chosen[0]]]
        else:
            joint = np.outer(fit(wanted.things[0]), fit(wanted.things[1])) * _STANDS[wanted.relation]
            chosen = list(divmod(int(joint.argmax()), GRID * GRID))
            statements = [joint[chosen[0], chosen[1]]]
        others = ~np.any([_near(cell) for cell in chosen], axis=0)
        statements += [1 - cells["heat"][0][others].max(), background[BACKGROUNDS.index(wanted.background)]]
        return float(np.mean(np.log(np.clip(statements, _LOWEST, 1))))

    @torch.no_grad()
    def score(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[float]:
        out = self.recogniser(to_pixels(list(images)))
        maps = {"heat": out["heat"].sigmoid()} | {field: out[field].softmax(1) for field in ("size", "color", "shape")}
        arrays = {field: value.flatten(2).numpy() for field, value in maps.items()}
        backgrounds = out["background"].softmax(1).numpy()
        return [
            self._one({field: value[i] for field, value in arrays.items()}, backgrounds[i], parse_caption(prompt))
            for i, prompt in enumerate(prompts)
        ]


@dataclass(frozen=True, kw_only=True)
class ShapesJudgeConfig:
    """The judge: evaluation only. No labelling code may build it (a test holds that)."""

    model: str
    """Folder of a recogniser that grades quality."""

    def models(self) -> tuple[str, ...]:
        return (self.model,)

    def metrics(self) -> dict[str, Metric]:
        fully = Metric(kind="fraction", says="show everything their caption asks for")
        return {name: Metric(kind="fraction") for name in RIGHT} | {"fully_correct": fully, "quality": Metric()}

    def build(self) -> "ShapesJudge":
        return ShapesJudge(Recogniser.load(Path(self.model)))


RIGHT = ("fully_correct", "count", "background", "color", "shape", "size", "relation")
"""What `compare` tells of a picture."""


def compare(view: View, wanted: Scene) -> dict[str, float]:
    """What is right, as fractions: attributes over the wanted things, `fully_correct` when nothing at all is wrong."""
    things = tuple(seen.thing for seen in view.things)
    scene = view.scene()
    right = {"count": float(len(things) == len(wanted.things)), "background": float(view.background == wanted.background)}
    if scene is None:
        attributes = {"color": 0.0, "shape": 0.0, "size": 0.0}
        relation = 0.0
    else:
        seen, asked = scene.canonical(), wanted.canonical()
        pairs = best_matching(seen.things, asked.things, seen.relation == asked.relation)
        attributes = {
            field: sum(getattr(seen.things[i], field) == getattr(asked.things[j], field) for i, j in pairs) / len(asked.things)
            for field in ("color", "shape", "size")
        }
        relation = float(seen.relation == asked.relation and all(i == j for i, j in pairs))
    fully = float(scene is not None and scene.canonical() == wanted.canonical())
    return {"fully_correct": fully, **right, **attributes, "relation": relation}


class ShapesJudge:
    """A `Judge` of the embedded world."""

    def __init__(self, recogniser: Recogniser) -> None:
        if not recogniser.grades_quality:
            raise ValueError("the judge needs a recogniser that grades quality")
        self.recogniser = recogniser

    @torch.no_grad()
    def measure(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[dict[str, float]]:
        out = self.recogniser(to_pixels(list(images)))
        quality = out["quality"].clamp(0, 1).tolist()
        return [
            compare(view, parse_caption(prompt)) | {"quality": q} for view, prompt, q in zip(decode(out), prompts, quality, strict=True)
        ]

    @torch.no_grad()
    def features(self, images: Sequence[np.ndarray]) -> np.ndarray:
        return self.recogniser.pooled(to_pixels(list(images)))[1].numpy()
