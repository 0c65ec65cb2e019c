"""The program that measures the editor, held against editors whose quality is known."""

from collections.abc import Sequence

import numpy as np

from fake_recipe import obey, paint, read
from rpo.shapes.measure import editor_figures, round_trip_unchanged
from rpo.shapes.recognition import Seen, View
from rpo.shapes.render import place
from rpo.shapes.scenes import Scene, random_scene


class Oracle:
    """Sees every scene as it was painted."""

    def view(self, images: Sequence[np.ndarray]) -> list[View]:
        views = []
        for image in images:
            scene = read(image)
            placed = place(scene, np.random.default_rng(0))
            views.append(View(tuple(Seen(p.thing, p.x, p.y, 1.0) for p in placed), scene.background))
        return views


class Editor:
    """Carries out a single instruction exactly, and does nothing on two; a careless one repaints the background as well."""

    def __init__(self, careless: bool = False) -> None:
        self.careless = careless

    def edit(self, images: Sequence[np.ndarray], instructions: Sequence[str], seeds: Sequence[int]) -> list[np.ndarray]:
        return [self._one(image, instruction) for image, instruction in zip(images, instructions, strict=True)]

    def _one(self, image: np.ndarray, instruction: str) -> np.ndarray:
        scene = read(image)
        if not instruction.startswith("keep") and " and " not in instruction:
            scene = obey(scene, instruction)
        if self.careless:
            scene = Scene(scene.things, scene.relation, {"white": "gray", "gray": "black", "black": "white"}[scene.background])
        return paint(scene, 0)


def images(count: int = 80) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [paint(random_scene(rng), i) for i in range(count)]


def test_an_exact_editor_of_single_instructions() -> None:
    found = editor_figures(Editor(), Oracle(), images())
    assert found["single_followed"] == 1.0
    assert found["double_followed"] == 0.0
    assert found["rest_left_alone"] > 0.95, "two equal changes left undone can be read as an exchange"
    assert found["neutral_unchanged"] == 1.0


def test_a_careless_editor_leaves_nothing_alone() -> None:
    found = editor_figures(Editor(careless=True), Oracle(), images())
    assert found["neutral_unchanged"] == 0.0
    assert found["rest_left_alone"] < 0.3, "only where the background was to change anyway"


def test_what_the_autoencoder_alone_changes() -> None:
    class EveryFourth(Editor):
        def round_trip(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
            """Spoils the background of every fourth picture."""
            return [Editor(careless=i % 4 == 0)._one(image, "keep") for i, image in enumerate(images)]

    assert round_trip_unchanged(EveryFourth(), Oracle(), images(40)) == 0.75
    assert round_trip_unchanged(EveryFourth(), Oracle(), []) == 0.0
