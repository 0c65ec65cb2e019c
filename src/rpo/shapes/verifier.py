"""The embedded world's verifier: reads the edited picture and tells whether what an instruction announced is there."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rpo.shapes.recognition import Recogniser, View
from rpo.shapes.scenes import INVERSE, SIZES, Scene, Thing


@dataclass(frozen=True, kw_only=True)
class ShapesVerifierConfig:
    """The embedded verifier."""

    model: str
    """Folder of a recogniser."""

    def models(self) -> tuple[str, ...]:
        return (self.model,)

    def build(self) -> "ShapesVerifier":
        return ShapesVerifier(Recogniser.load(Path(self.model)))


def _stands(scene: Scene | None, relation: str, phrase: str, other: bool) -> bool:
    """Whether the thing called `phrase` (or, with `other`, the one beside it) stands in `relation` to its neighbour."""
    if scene is None or scene.relation is None or phrase not in [thing.phrase for thing in scene.things]:
        return False
    first = (scene.things[0].phrase == phrase) != other
    return (scene.relation if first else INVERSE[scene.relation]) == relation


def seen_of(change: str, view: View) -> tuple[int, ...]:
    """What an announced change, in the words of `rpo.shapes.scenes.Edit.expected`, should raise: each of these counts."""
    things: list[Thing] = [seen.thing for seen in view.things]
    words = change.split()
    if words[-1] == "background":
        return (words[1] == view.background,)
    if words[0] == "no":
        return -sum(thing.phrase == " ".join(words[1:]) for thing in things), -len(things)
    if words[2:5] == ["instead", "of", "the"]:
        return sum(thing.shape == words[1] for thing in things), -sum(thing.shape == words[5] for thing in things)
    if words[0] == "the":
        shape, value = words[1], words[3]
        return (sum(thing.shape == shape and value == (thing.size if value in SIZES else thing.color) for thing in things),)
    if words[0] == "it":
        relation, phrase = change.removeprefix("it is ").split(" the ")
        return (_stands(view.scene(), relation, phrase, other=True),)
    phrase, relation = " ".join(words[1:4]), " ".join(words[4:-1])
    return _stands(view.scene(), relation, phrase, other=False), len(things)


class ShapesVerifier:
    """A `Verifier`: 1 where the second picture shows more of the change than the first, else 0."""

    def __init__(self, recogniser: Recogniser) -> None:
        self.recogniser = recogniser

    def verify(self, before: Sequence[np.ndarray], after: Sequence[np.ndarray], changes: Sequence[str]) -> list[float]:
        views = [self.recogniser.view(list(images)) for images in (before, after)]
        rows = zip(*views, changes, strict=True)
        return [float(all(a > b for a, b in zip(seen_of(change, now), seen_of(change, then), strict=True))) for then, now, change in rows]
