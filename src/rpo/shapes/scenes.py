"""The embedded world's language: scenes, captions, and the edits that lead from one scene to another.

A scene is one or two coloured shapes on a plain background. Everything here is exact and has no image in it:
`caption` and `parse_caption` are inverses, `differences` lists what separates two scenes, and an `Edit` has one wording.
"""

import hashlib
import re
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

SIZES = ("small", "large")
COLORS = ("red", "orange", "green", "cyan", "blue", "pink")
SHAPES = ("circle", "square", "triangle", "star")
RELATIONS = ("left of", "right of", "above", "below")
BACKGROUNDS = ("white", "gray", "black")
PLACES = {"left of": (" on the left", " on the right"), "above": (" at the top", " at the bottom"), None: ("", "")}
"""How the things of a canonical scene are told apart by where they stand; a single thing needs no place."""
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
NEUTRAL_INSTRUCTION = "keep everything as it is"


@dataclass(frozen=True, order=True)
class Thing:
    """One object of a scene."""

    size: str
    color: str
    shape: str

    @property
    def phrase(self) -> str:
        return f"{self.size} {self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """What a picture shows: `things[0]` stands in `relation` to `things[1]`; one thing has no relation."""

    things: tuple[Thing, ...]
    relation: str | None
    background: str

    def __post_init__(self) -> None:
        if len(self.things) not in (1, 2):
            raise ValueError(f"a scene has one or two things, got {len(self.things)}")
        if (self.relation is None) != (len(self.things) == 1):
            raise ValueError("a scene of two things needs a relation, a scene of one has none")

    def canonical(self) -> "Scene":
        """The same picture, told in one way: `right of` and `below` are turned round."""
        if self.relation in ("right of", "below"):
            return Scene(self.things[::-1], INVERSE[self.relation], self.background)
        return self


def caption(scene: Scene) -> str:
    first = f"a {scene.things[0].phrase}"
    rest = f" {scene.relation} a {scene.things[1].phrase}" if scene.relation else ""
    return f"{first}{rest} on a {scene.background} background"


_THING = rf"an? (?P<size{{n}}>{'|'.join(SIZES)}) (?P<color{{n}}>{'|'.join(COLORS)}) (?P<shape{{n}}>{'|'.join(SHAPES)})"
_CAPTION = re.compile(
    _THING.format(n=1)
    + rf"(?: (?P<relation>{'|'.join(RELATIONS)}) {_THING.format(n=2)})?"
    + rf" on an? (?P<background>{'|'.join(BACKGROUNDS)}) background"
)
_KNOWN_WORDS = {*SIZES, *COLORS, *SHAPES, *BACKGROUNDS, "a", "an", "left", "right", "of", "above", "below", "on", "background"}
GRAMMAR = (
    "'a SIZE COLOR SHAPE [RELATION a SIZE COLOR SHAPE] on a BACKGROUND background', with "
    f"SIZE {'|'.join(SIZES)}, COLOR {'|'.join(COLORS)}, SHAPE {'|'.join(SHAPES)}, "
    f"RELATION {'|'.join(RELATIONS)}, BACKGROUND {'|'.join(BACKGROUNDS)}"
)


def parse_caption(text: str) -> Scene:
    """The scene a caption describes. Raises `ValueError` that names the word not understood, or the missing part."""
    words = " ".join(text.lower().split()).rstrip(".")
    match = _CAPTION.fullmatch(words)
    if match is None:
        unknown = next((word for word in words.split() if word not in _KNOWN_WORDS), None)
        why = f"does not know the word {unknown!r}" if unknown else "knows the words but not their order"
        raise ValueError(f"caption {text!r}: the world {why}. It understands {GRAMMAR}.")
    part = match.groupdict()
    things = [Thing(part["size1"], part["color1"], part["shape1"])]
    if part["relation"]:
        things.append(Thing(part["size2"], part["color2"], part["shape2"]))
        if things[0] == things[1]:
            raise ValueError(f"caption {text!r}: both things are a {things[0].phrase}; they must differ to be told apart")
    return Scene(tuple(things), part["relation"], part["background"])


def is_held_out(scene: Scene) -> bool:
    """True for the tenth of all scenes that no model is trained on and no pair is made from."""
    digest = hashlib.sha256(caption(scene.canonical()).encode()).digest()
    return digest[0] % 10 == 0


def random_thing(rng: np.random.Generator) -> Thing:
    return Thing(SIZES[rng.integers(2)], COLORS[rng.integers(6)], SHAPES[rng.integers(4)])


def random_scene(rng: np.random.Generator, two_things: float = 0.7) -> Scene:
    """Any scene, two things with probability `two_things`."""
    background = BACKGROUNDS[rng.integers(3)]
    first = random_thing(rng)
    if rng.random() >= two_things:
        return Scene((first,), None, background)
    second = random_thing(rng)
    while second == first:
        second = random_thing(rng)
    return Scene((first, second), RELATIONS[rng.integers(4)], background)


def scenes(rng: np.random.Generator, held_out: bool, two_things: float = 0.7):
    """Endless random scenes from one side of the split."""
    while True:
        scene = random_scene(rng, two_things)
        if is_held_out(scene) == held_out:
            yield scene


Operation = Literal["add", "remove", "replace", "recolor", "move", "fix"]


@dataclass(frozen=True)
class Edit:
    """One atomic change; things are named as they are in the *source*, so several edits hold at once."""

    op: Operation
    instruction: str
    """The imperative the editor reads."""
    target: str
    """Phrase of the thing (or "background") that changes."""
    aspect: str
    """Aspect of the critique it addresses."""
    expected: str
    """What a viewer sees once it is done."""


def _change(thing: Thing, place: str, wanted: Thing) -> list[Edit]:
    """Edits that turn one thing into another, in place."""
    edits = []
    the = f"the {thing.phrase}{place}"
    if thing.shape != wanted.shape:
        edits.append(
            Edit(
                "replace", f"turn {the} into a {wanted.shape}", thing.phrase, "alignment", f"a {wanted.shape} instead of the {thing.shape}"
            )
        )
    if thing.color != wanted.color:
        edits.append(
            Edit("recolor", f"make {the} {wanted.color}", thing.phrase, "attribute_binding", f"the {thing.shape} is {wanted.color}")
        )
    if thing.size != wanted.size:
        edits.append(Edit("fix", f"make {the} {wanted.size}", thing.phrase, "attribute_binding", f"the {thing.shape} is {wanted.size}"))
    return edits


def _distance(a: Thing, b: Thing) -> int:
    return (a.size != b.size) + (a.color != b.color) + (a.shape != b.shape)


def best_matching(seen: tuple[Thing, ...], wanted: tuple[Thing, ...], same_order: bool) -> list[tuple[int, int]]:
    """Which seen thing becomes which wanted one: fewest changed attributes, ties to the order of the scene."""
    if len(seen) == 1 or len(wanted) == 1:
        pairs = [(i, j) for i in range(len(seen)) for j in range(len(wanted))]
        return [min(pairs, key=lambda p: (_distance(seen[p[0]], wanted[p[1]]), p))]
    straight = _distance(seen[0], wanted[0]) + _distance(seen[1], wanted[1])
    crossed = _distance(seen[0], wanted[1]) + _distance(seen[1], wanted[0])
    # Crossing means that the things must also change places, which counts as one more change.
    if (same_order and crossed + 1 < straight) or (not same_order and crossed < straight):
        return [(0, 1), (1, 0)]
    return [(0, 0), (1, 1)]


def differences(seen: Scene, wanted: Scene) -> list[Edit]:
    """The edits that lead from `seen` to `wanted`, most severe first; empty when they show the same."""
    seen, wanted = seen.canonical(), wanted.canonical()
    same_order = seen.relation == wanted.relation
    matching = best_matching(seen.things, wanted.things, same_order)
    edits: list[Edit] = []
    places = PLACES[seen.relation]
    for i, thing in enumerate(seen.things):
        if i not in {pair[0] for pair in matching}:
            edits.append(Edit("remove", f"remove the {thing.phrase}{places[i]}", thing.phrase, "count", f"no {thing.phrase}"))
    kept = {j: seen.things[i] for i, j in matching}
    for j, thing in enumerate(wanted.things):
        if j not in kept:
            assert wanted.relation is not None
            relation = wanted.relation if j == 0 else INVERSE[wanted.relation]
            anchor = kept[1 - j].phrase
            edits.append(
                Edit("add", f"add a {thing.phrase} {relation} the {anchor}", thing.phrase, "count", f"a {thing.phrase} {relation} it")
            )
    for i, j in matching:
        edits.extend(_change(seen.things[i], places[i], wanted.things[j]))
    if wanted.relation and len(seen.things) == 2:
        target_relation = wanted.relation if (0, 0) in matching else INVERSE[wanted.relation]
        if seen.relation != target_relation:
            first, second = (thing.phrase for thing in seen.things)
            edits.append(
                Edit("move", f"move the {first} {target_relation} the {second}", first, "spatial", f"it is {target_relation} the {second}")
            )
    if seen.background != wanted.background:
        edits.append(
            Edit("recolor", f"make the background {wanted.background}", "background", "alignment", f"a {wanted.background} background")
        )
    return edits


def join_instructions(instructions: list[str]) -> str:
    return " and ".join(instructions) if instructions else NEUTRAL_INSTRUCTION


def random_change(scene: Scene, rng: np.random.Generator) -> tuple[Scene, tuple[int | None, ...]]:
    """One random atomic change of any kind, and for each thing of the result its index in `scene` (`None`: added)."""
    kind = rng.choice(["color", "shape", "size", "background", "relation", "count"], p=[0.25, 0.22, 0.18, 0.1, 0.13, 0.12])
    things = list(scene.things)
    same = tuple(range(len(things)))
    i = int(rng.integers(len(things)))
    if kind == "background":
        return replace(scene, background=str(rng.choice([b for b in BACKGROUNDS if b != scene.background]))), same
    if kind == "relation":
        if scene.relation is None:
            return random_change(scene, rng)
        return replace(scene, relation=str(rng.choice([r for r in RELATIONS if r != scene.relation]))), same
    if kind == "count":
        if len(things) == 2:
            return Scene((things[i],), None, scene.background), (i,)
        added = random_thing(rng)
        if added == things[0]:
            return random_change(scene, rng)
        return Scene((things[0], added), RELATIONS[rng.integers(4)], scene.background), (0, None)
    field, values = {"color": ("color", COLORS), "shape": ("shape", SHAPES)}.get(str(kind), ("size", SIZES))
    things[i] = replace(things[i], **{field: str(rng.choice([v for v in values if v != getattr(things[i], field)]))})
    if len(things) == 2 and things[0] == things[1]:
        return random_change(scene, rng)
    return replace(scene, things=tuple(things)), same


def random_edits(scene: Scene, rng: np.random.Generator, count: int) -> tuple[Scene, tuple[int | None, ...], list[Edit]]:
    """`count` random changes that take as many edits to say: the scene they lead to, where its things came from, and the edits.

    They never lead from the training side of the split to the held-out one.
    """
    while True:
        after, origins = scene, tuple(range(len(scene.things)))
        for _ in range(count):
            after, step = random_change(after, rng)
            origins = tuple(None if i is None else origins[i] for i in step)
        edits = differences(scene, after)
        removed = next((edit.target for edit in edits if edit.op == "remove"), None)
        kept = {scene.things[origin].phrase for origin in origins if origin is not None}
        leaks = is_held_out(after) and not is_held_out(scene)
        if len(edits) == count and origins[0] is not None and removed not in kept and not leaks:
            return after, origins, edits


VOCABULARY = sorted(
    {word for phrase in RELATIONS for word in phrase.split()}
    | {*SIZES, *COLORS, *SHAPES, *BACKGROUNDS}
    | set("a an the on at top bottom background make turn into move add remove and keep everything as it is".split())
)
"""Every word of captions and instructions."""
