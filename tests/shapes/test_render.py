"""The renderer: areas and colours against closed forms, placement against the relation."""

import numpy as np
import pytest

from rpo.shapes.recognition import View
from rpo.shapes.render import BACKGROUND_RGB, COLOR_RGB, RADII, SIDE, Placed, place, place_after, render, revise
from rpo.shapes.scenes import BACKGROUNDS, COLORS, SIZES, Thing, random_change, random_scene, scenes

# Area for radius 1: circle, square of half side 0.88, regular triangle and five-pointed star in their circles of 1.22.
AREAS = {
    "circle": np.pi,
    "square": (2 * 0.88) ** 2,
    "triangle": 3 * np.sqrt(3) / 4 * 1.22**2,
    "star": 5 * 1.22 * 0.5 * np.sin(np.pi / 5),
}


@pytest.mark.parametrize("shape", AREAS)
@pytest.mark.parametrize("size", SIZES)
def test_area_is_that_of_the_shape(shape: str, size: str) -> None:
    image = render([([Placed(Thing(size, "red", shape), 32.3, 31.8)], "black")])[0].astype(float)
    coverage = (image[..., 0] - BACKGROUND_RGB[2, 0]) / (COLOR_RGB[0, 0] - BACKGROUND_RGB[2, 0])
    assert coverage.sum() == pytest.approx(AREAS[shape] * RADII[SIZES.index(size)] ** 2, rel=0.02)


def test_edges_are_smooth() -> None:
    image = render([([Placed(Thing("large", "red", "circle"), 32, 32)], "black")])[0][..., 0]
    assert ((image > 30) & (image < 200)).sum() > 20, "an edge has pixels between the two colours"


def test_colours_are_exact_inside_and_outside() -> None:
    for color, rgb in zip(COLORS, COLOR_RGB, strict=True):
        for background, behind in zip(BACKGROUNDS, BACKGROUND_RGB, strict=True):
            image = render([([Placed(Thing("large", color, "square"), 32, 32)], background)])[0]
            assert (image[32, 32] == rgb).all() and (image[2, 2] == behind).all()


def test_things_stand_in_their_relation_and_fit_the_picture() -> None:
    from rpo.shapes.recognition import Seen

    rng = np.random.default_rng(0)
    for _ in range(300):
        scene = random_scene(rng)
        placed = place(scene, rng)
        view = View(tuple(Seen(p.thing, p.x, p.y, 1.0) for p in placed), scene.background)
        assert view.scene() == scene.canonical() or view.scene().canonical() == scene.canonical()
        assert all(10 < p.x < SIDE - 10 and 10 < p.y < SIDE - 10 for p in placed)


def test_an_edit_leaves_the_rest_where_it_was() -> None:
    rng = np.random.default_rng(1)
    for _ in range(300):
        scene = random_scene(rng)
        placed = place(scene, rng)
        changed, origins = random_change(scene, rng)
        after = place_after(changed, origins, placed)
        if changed.relation == scene.relation:
            assert [(p.x, p.y) for p in after] == [(p.x, p.y) for p in placed]
        if changed.relation is None and scene.relation is not None:
            kept = placed[origins[0]]  # pyright: ignore[reportArgumentType]
            assert (after[0].x, after[0].y) == (kept.x, kept.y)


def test_a_twin_differs_in_one_thing_that_the_edits_leave_alone() -> None:
    rng, other = np.random.default_rng(5), 0
    source = scenes(rng, held_out=False, two_things=0.8)
    for _ in range(300):
        pair = revise(next(source), rng, int(rng.integers(3)))
        changes = []
        for mine, twin in zip((pair.before, pair.after), pair.twin, strict=True):
            assert mine[1] == twin[1] and [(p.x, p.y) for p in mine[0]] == [(p.x, p.y) for p in twin[0]]
            changes.append([(p.thing, q.thing) for p, q in zip(mine[0], twin[0], strict=True) if p.thing != q.thing])
        before, after = changes
        assert len(before) <= 1 and len(after) <= len(before)
        for thing, twin in (*before, *after):
            fields = [field for field in ("size", "color", "shape") if getattr(thing, field) != getattr(twin, field)]
            assert len(fields) == 1 and fields[0] != "size"
            assert getattr(twin, fields[0]) == getattr(before[0][1], fields[0])
        other += len(after)
    assert other > 150
