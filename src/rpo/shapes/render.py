"""The embedded world's pictures: an anti-aliased renderer that draws a whole batch at once.

Shapes are exact signed distances in pixels, covered linearly over one pixel at the edge. Coordinates are (x, y), y down.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from rpo.shapes.scenes import BACKGROUNDS, COLORS, SHAPES, SIZES, Edit, Scene, Thing, is_held_out, join_instructions, random_edits

SIDE = 64
RADII = np.array([7.0, 12.0], dtype=np.float32)
"""Radius in pixels of a small and of a large thing."""
COLOR_RGB = np.array([(200, 20, 45), (255, 165, 30), (25, 135, 60), (70, 215, 235), (35, 70, 215), (250, 120, 215)], dtype=np.float32)
"""Three dark colours and three bright ones between them: what is halfway between two of them is never a third. With yellow and purple
instead, a model that could not decide between red and yellow painted orange, and one between red and blue purple."""
BACKGROUND_RGB = np.array([(245, 245, 245), (128, 128, 128), (16, 16, 16)], dtype=np.float32)


@dataclass(frozen=True)
class Placed:
    """A thing and where its centre is, in pixels."""

    thing: Thing
    x: float
    y: float


def _regular(corners: int, radius: float) -> np.ndarray:
    angles = -np.pi / 2 + 2 * np.pi * np.arange(corners) / corners
    return radius * np.stack([np.cos(angles), np.sin(angles)], -1)


def _star() -> np.ndarray:
    outer, inner = _regular(5, 1.22), -_regular(5, 0.5)
    return np.stack([outer, np.roll(inner, -3, axis=0)], 1).reshape(10, 2)


# Corners of each polygon for radius 1, sized so that the four shapes cover similar areas.
_POLYGONS = {
    "square": 0.88 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)], dtype=np.float64),
    "triangle": _regular(3, 1.22) + np.array([0.0, 0.16]),
    "star": _star(),
}


def _polygon_distance(points: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Signed distance (negative inside) of points (..., 2) to a closed polygon whose corners (n, ..., 2) broadcast to them."""
    nearest = np.full(points.shape[:-1], np.inf, dtype=np.float32)
    inside = np.zeros(points.shape[:-1], dtype=bool)
    for a, b in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        edge, to_point = b - a, points - a
        along = np.clip((to_point * edge).sum(-1) / (edge * edge).sum(-1), 0, 1)
        away = to_point - along[..., None] * edge
        nearest = np.minimum(nearest, (away * away).sum(-1))
        above_a, above_b = points[..., 1] >= a[..., 1], points[..., 1] >= b[..., 1]
        left = edge[..., 0] * to_point[..., 1] - edge[..., 1] * to_point[..., 0] > 0
        inside ^= (above_a & ~above_b & ~left) | (~above_a & above_b & left)
    return np.where(inside, -1.0, 1.0).astype(np.float32) * np.sqrt(nearest)


_AXIS = np.arange(SIDE, dtype=np.float32) + 0.5
_PIXELS = np.stack(np.meshgrid(_AXIS, _AXIS), -1)  # (SIDE, SIDE, 2) as (x, y)


def _coverage(placed: list[Placed]) -> np.ndarray:
    """How much of each pixel each thing covers, (n, SIDE, SIDE) in 0..1."""
    coverage = np.empty((len(placed), SIDE, SIDE), dtype=np.float32)
    for shape in SHAPES:
        chosen = [i for i, p in enumerate(placed) if p.thing.shape == shape]
        if not chosen:
            continue
        centres = np.array([(placed[i].x, placed[i].y) for i in chosen], dtype=np.float32)[:, None, None]
        radii = RADII[[SIZES.index(placed[i].thing.size) for i in chosen]][:, None, None]
        points = _PIXELS[None] - centres
        if shape == "circle":
            distance = np.sqrt((points * points).sum(-1)) - radii
        else:
            corners = _POLYGONS[shape].astype(np.float32)[:, None, None, None] * radii[None, ..., None]
            distance = _polygon_distance(points, corners)
        coverage[chosen] = np.clip(0.5 - distance, 0, 1)
    return coverage


def render(pictures: list[tuple[list[Placed], str]]) -> np.ndarray:
    """Draws (things in painting order, background) pairs; (n, SIDE, SIDE, 3) uint8."""
    canvas = np.stack([np.broadcast_to(BACKGROUND_RGB[BACKGROUNDS.index(b)], (SIDE, SIDE, 3)) for _, b in pictures]).copy()
    flat = [thing for things, _ in pictures for thing in things]
    coverage = _coverage(flat)
    k = 0
    for i, (things, _) in enumerate(pictures):
        for placed in things:
            alpha = coverage[k][..., None]
            canvas[i] += alpha * (COLOR_RGB[COLORS.index(placed.thing.color)] - canvas[i])
            k += 1
    return np.round(canvas).astype(np.uint8)


SLOTS = {"left": (17.0, 32.0), "right": (47.0, 32.0), "top": (32.0, 17.0), "bottom": (32.0, 47.0), "centre": (32.0, 32.0)}
RELATION_SLOTS = {"left of": ("left", "right"), "right of": ("right", "left"), "above": ("top", "bottom"), "below": ("bottom", "top")}


SHIFTS = ((-0.75, -0.75), (0.75, 0.75))
"""A whole picture stands a little up and left, or a little down and right."""


def stand(there: Mapping[str, Thing], shift: tuple[float, float]) -> list[Placed]:
    """Things in slots, the whole picture shifted."""
    return [Placed(thing, SLOTS[slot][0] + shift[0], SLOTS[slot][1] + shift[1]) for slot, thing in there.items()]


def nearest_slot(x: float, y: float) -> str:
    return min(SLOTS, key=lambda slot: (SLOTS[slot][0] - x) ** 2 + (SLOTS[slot][1] - y) ** 2)


def standing(placed: list[Placed]) -> dict[str, Thing]:
    """What stands in which slot."""
    return {nearest_slot(p.x, p.y): p.thing for p in placed}


def slots_of(scene: Scene) -> dict[str, Thing]:
    """Where the things of a scene stand; a single one stands in the middle."""
    slots = RELATION_SLOTS[scene.relation] if scene.relation else ("centre",)
    return dict(zip(slots, scene.things, strict=True))


def place(scene: Scene, rng: np.random.Generator) -> list[Placed]:
    """Puts the things of a scene where they stand in their relation, in one of the shifts."""
    return stand(slots_of(scene), SHIFTS[rng.integers(len(SHIFTS))])


def place_after(scene: Scene, origins: tuple[int | None, ...], before: list[Placed]) -> list[Placed]:
    """Places an edited scene so that what is not asked to move stays where it was.

    `origins[i]` is the index in `before` of what became `scene.things[i]`, `None` for a thing that was added.
    """
    first = before[0]
    middle = SLOTS[nearest_slot(first.x, first.y)]
    shift = (first.x - middle[0], first.y - middle[1])
    if scene.relation is None and origins[0] is not None:
        kept = before[origins[0]]
        return stand({nearest_slot(kept.x, kept.y): scene.things[0]}, shift)
    return stand(slots_of(scene), shift)


@dataclass(frozen=True)
class Revision:
    """A picture before and after edits, each as things in painting order and background, as `render` takes them."""

    before: tuple[list[Placed], str]
    after: tuple[list[Placed], str]
    edits: list[Edit]
    twin: tuple[tuple[list[Placed], str], tuple[list[Placed], str]]
    """The same two pictures with another colour or shape of a thing, before and after alike, in something that the edits leave alone."""

    @property
    def instruction(self) -> str:
        return join_instructions([edit.instruction for edit in self.edits])


def revise(before: Scene, rng: np.random.Generator, count: int) -> Revision:
    """Places a scene and makes `count` random edits to it, 0 for none."""
    placed = place(before, rng)
    after, origins, edits = random_edits(before, rng, count) if count else (before, tuple(range(len(before.things))), [])
    placed_after = place_after(after, origins, placed) if count else placed
    scenes = (before, after) if (twins := _twins(before, after, origins, rng)) is None else twins
    twin = tuple(
        ([replace(p, thing=thing) for p, thing in zip(there, scene.things, strict=True)], scene.background)
        for there, scene in zip((placed, placed_after), scenes, strict=True)
    )
    return Revision((placed, before.background), (placed_after, after.background), edits, (twin[0], twin[1]))


def _twins(before: Scene, after: Scene, origins: tuple[int | None, ...], rng: np.random.Generator) -> tuple[Scene, Scene] | None:
    """None when the drawn change belongs to what is kept for evaluation, or the edits touch everything."""
    heirs = {i: [j for j, origin in enumerate(origins) if origin == i] for i in range(len(before.things))}
    choices = [
        (i, field, value)
        for i, thing in enumerate(before.things)
        for field, values in (("color", COLORS), ("shape", SHAPES))
        if all(getattr(after.things[j], field) == getattr(thing, field) for j in heirs[i])
        for value in values
        if value != getattr(thing, field)
    ]
    if not choices:
        return None
    i, field, value = choices[rng.integers(len(choices))]

    def changed(scene: Scene, rows: list[int]) -> Scene:
        things = [replace(thing, **{field: value}) if row in rows else thing for row, thing in enumerate(scene.things)]
        return replace(scene, things=tuple(things))

    twins = changed(before, [i]), changed(after, heirs[i])
    return None if any(is_held_out(scene) for scene in twins) else twins


def render_scene(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """One picture of a scene, (SIDE, SIDE, 3) uint8."""
    return render([(place(scene, rng), scene.background)])[0]
