"""What the embedded models can do, measured by the judge: the figures of the weights' card.

`rpo shapes measure` prints them; the bars they must meet are beside them.
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from rpo.shapes.recognition import View, to_pixels
from rpo.shapes.render import place, render
from rpo.shapes.scenes import (
    NEUTRAL_INSTRUCTION,
    Scene,
    best_matching,
    caption,
    join_instructions,
    random_edits,
    scenes,
)
from rpo.shapes.training.recognizer import degrade

BATCH = 50


@runtime_checkable
class Viewer(Protocol):
    """Anything that reads pictures back into scenes."""

    def view(self, images: list[np.ndarray]) -> list[View]: ...


def held_out_scenes(count: int, seed: int) -> list[Scene]:
    """`count` different scenes that no model was trained on."""
    source, found = scenes(np.random.default_rng(seed), held_out=True), {}
    while len(found) < count:
        scene = next(source)
        found.setdefault(scene.canonical(), scene)
    return list(found.values())


def _same(view: View, wanted: Scene) -> bool:
    seen = view.scene()
    return seen is not None and seen.canonical() == wanted.canonical()


def renders(count: int, seed: int) -> tuple[list[np.ndarray], list[Scene]]:
    rng = np.random.default_rng(seed)
    shown = held_out_scenes(count, seed)
    return list(render([(place(scene, rng), scene.background) for scene in shown])), shown


def recogniser_accuracy(recogniser: Viewer, count: int = 1000, seed: int = 101, strength: float = 0.5) -> float:
    """Share of held-out renders read without any mistake, under blur, warp and noise up to `strength`."""
    images, shown = renders(count, seed)
    generator = torch.Generator().manual_seed(seed)
    pixels = degrade(to_pixels(images), torch.full((count,), strength), generator)
    noisy = list(((pixels + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy())
    return float(np.mean([_same(view, scene) for view, scene in zip(recogniser.view(noisy), shown, strict=True)]))


def round_trip_accuracy(editor: Any, recogniser: Viewer, count: int = 500, seed: int = 102) -> float:
    """Share of held-out renders still read without any mistake after the autoencoder."""
    return _read_as(editor, recogniser, *renders(count, seed))


def round_trip_unchanged(editor: Any, judge: Viewer, images: list[np.ndarray]) -> float:
    """Share of a model's own samples that are read alike before and after the autoencoder: what no editor behind it can exceed by much."""
    seen = [(image, view.scene()) for image, view in zip(images, judge.view(images), strict=True)]
    readable = [(image, scene) for image, scene in seen if scene]
    return _read_as(editor, judge, [image for image, _ in readable], [scene for _, scene in readable]) if readable else 0.0


def _read_as(editor: Any, recogniser: Viewer, images: list[np.ndarray], shown: Sequence[Scene]) -> float:
    """Share of images that are read as `shown` after the editor's autoencoder."""
    passed = [image for i in range(0, len(images), BATCH) for image in editor.round_trip(images[i : i + BATCH])]
    return float(np.mean([_same(view, scene) for view, scene in zip(recogniser.view(passed), shown, strict=True)]))


def sample(generator: Any, shown: Sequence[Scene], seed: int) -> list[np.ndarray]:
    images: list[np.ndarray] = []
    for i in range(0, len(shown), BATCH):
        part = shown[i : i + BATCH]
        images += generator.generate([caption(scene) for scene in part], [seed * 100_000 + i + j for j in range(len(part))])
    return images


def _facts(seen: Scene, wanted: Scene) -> dict[Any, bool]:
    """Every statement about `wanted` and whether `seen` bears it out; things by their place in `wanted`."""
    facts: dict[Any, bool] = {
        "count": len(seen.things) == len(wanted.things),
        "background": seen.background == wanted.background,
        "relation": True,
    }
    told = seen.canonical()
    asked = wanted.canonical()
    pairs = best_matching(told.things, asked.things, told.relation == asked.relation)
    facts["relation"] = told.relation == asked.relation and all(i == j for i, j in pairs) if asked.relation else True
    order = [wanted.things.index(thing) for thing in asked.things]
    for i, j in pairs:
        for field in ("size", "color", "shape"):
            facts[order[j], field] = getattr(told.things[i], field) == getattr(asked.things[j], field)
    return facts


def _changed(before: Scene, after: Scene, origins: tuple[int | None, ...]) -> set[Any]:
    changed: set[Any] = set()
    if len(before.things) != len(after.things):
        changed |= {"count", "relation"}
    if before.background != after.background:
        changed.add("background")
    if before.relation != after.relation:
        changed.add("relation")
    for j, origin in enumerate(origins):
        for field in ("size", "color", "shape"):
            if origin is None or getattr(before.things[origin], field) != getattr(after.things[j], field):
                changed.add((j, field))
    return changed


def editor_figures(editor: Any, judge: Viewer, images: list[np.ndarray], seed: int = 103) -> dict[str, float]:
    """On a model's own samples: how often one and two instructions are followed, the rest is left, and a neutral one changes nothing."""
    rng = np.random.default_rng(seed)
    seen = [view.scene() for view in judge.view(images)]
    readable = [(image, scene) for image, scene in zip(images, seen, strict=True) if scene and len(set(scene.things)) == len(scene.things)]
    tasks = []
    for k, (image, scene) in enumerate(readable):
        after, origins, edits = random_edits(scene, rng, 1 + k % 2)
        tasks.append((image, scene, after, origins, join_instructions([edit.instruction for edit in edits]), len(edits)))
    edited: list[np.ndarray] = []
    neutral: list[np.ndarray] = []
    for i in range(0, len(tasks), BATCH):
        part = tasks[i : i + BATCH]
        seeds = [seed * 100_000 + i + j for j in range(len(part))]
        edited += editor.edit([task[0] for task in part], [task[4] for task in part], seeds)
        neutral += editor.edit([task[0] for task in part], [NEUTRAL_INSTRUCTION] * len(part), seeds)
    followed: dict[int, list[bool]] = {1: [], 2: []}
    left: list[bool] = []
    for view, (_, before, after, origins, _, count) in zip(judge.view(edited), tasks, strict=True):
        shown, changed = view.scene(), _changed(before, after, origins)
        facts = _facts(shown, after) if shown else {}
        followed[count].append(bool(facts) and all(facts.get(key, False) for key in changed))
        left.append(bool(facts) and all(truth for key, truth in facts.items() if key not in changed))
    same = [_same(view, task[1]) for view, task in zip(judge.view(neutral), tasks, strict=True)]
    return {
        "single_followed": _share(followed[1]),
        "double_followed": _share(followed[2]),
        "rest_left_alone": _share(left),
        "neutral_unchanged": _share(same),
        "n": float(len(tasks)),
    }


def _share(truths: list[bool]) -> float:
    """0 where there was nothing to judge: samples that nobody can read are no success."""
    return sum(truths) / len(truths) if truths else 0.0
