"""The world's language: captions and scenes are inverses, edits lead where they say."""

import numpy as np
import pytest

from fake_recipe import obey
from rpo.shapes.scenes import (
    INVERSE,
    NEUTRAL_INSTRUCTION,
    VOCABULARY,
    Scene,
    Thing,
    caption,
    differences,
    is_held_out,
    join_instructions,
    parse_caption,
    random_change,
    random_edits,
    random_scene,
)

RED_STAR, BLUE_CIRCLE = Thing("large", "red", "star"), Thing("small", "blue", "circle")


def many(count: int = 500):
    rng = np.random.default_rng(0)
    return [random_scene(rng) for _ in range(count)]


def test_caption_and_parse_are_inverses() -> None:
    for scene in many():
        assert parse_caption(caption(scene)) == scene


def test_spelling_is_lenient_but_words_are_not() -> None:
    scene = parse_caption("  A large RED star left of an small blue circle on a gray background. ")
    assert scene == Scene((RED_STAR, BLUE_CIRCLE), "left of", "gray")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a large red cat on a gray background", "'cat'"),
        ("a large red star on a purple background", "'purple'"),
        ("a red star on a gray background", "order"),
        ("a large red star", "order"),
        ("", "order"),
        ("a large red star left of a large red star on a gray background", "must differ"),
    ],
)
def test_what_is_not_understood_is_named(text: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        parse_caption(text)


def test_turning_a_relation_round_changes_nothing() -> None:
    for relation, inverse in INVERSE.items():
        a = Scene((RED_STAR, BLUE_CIRCLE), relation, "gray")
        b = Scene((BLUE_CIRCLE, RED_STAR), inverse, "gray")
        assert a.canonical() == b.canonical() and is_held_out(a) == is_held_out(b) and differences(a, b) == []


def test_a_tenth_is_held_out() -> None:
    assert 0.06 < np.mean([is_held_out(scene) for scene in many(4000)]) < 0.14


def test_no_difference_no_edit() -> None:
    for scene in many(100):
        assert differences(scene, scene) == []
    assert join_instructions([]) == NEUTRAL_INSTRUCTION


def test_one_change_is_one_instruction_that_leads_there() -> None:
    rng = np.random.default_rng(1)
    for scene in many():
        changed, _ = random_change(scene, rng)
        edits = differences(scene, changed)
        assert len(edits) == 1, (caption(scene), caption(changed), edits)
        assert obey(scene, edits[0].instruction).canonical() == changed.canonical()


@pytest.mark.parametrize("count", [1, 2])
def test_random_edits_say_what_leads_there(count: int) -> None:
    rng = np.random.default_rng(4)
    for scene in many(200):
        after, origins, edits = random_edits(scene, rng, count)
        assert len(edits) == count and len(origins) == len(after.things)
        assert is_held_out(scene) or not is_held_out(after), "no picture of the held-out scenes may reach a training set"
        for edit in edits:
            kept = {scene.things[origin].phrase for origin in origins if origin is not None}
            assert edit.op != "remove" or edit.target not in kept
        if count == 1:
            assert obey(scene, edits[0].instruction).canonical() == after.canonical()
        else:
            assert edits == differences(scene, after)


def test_instructions_say_where_a_thing_stands() -> None:
    seen = Scene((RED_STAR, BLUE_CIRCLE), "below", "gray")
    wanted = Scene((Thing("large", "green", "star"),), None, "white")
    assert [edit.instruction for edit in differences(seen, wanted)] == [
        "remove the small blue circle at the top",
        "make the large red star at the bottom green",
        "make the background white",
    ]


def test_every_word_of_every_text_is_known() -> None:
    rng = np.random.default_rng(2)
    known = set(VOCABULARY)
    for scene in many(300):
        texts = [caption(scene), *(edit.instruction for edit in differences(scene, random_scene(rng)))]
        assert all(word in known for text in texts for word in text.split())


def test_random_change_says_where_things_came_from() -> None:
    rng = np.random.default_rng(3)
    for scene in many(300):
        changed, origins = random_change(scene, rng)
        assert len(origins) == len(changed.things)
        for thing, origin in zip(changed.things, origins, strict=True):
            same = 0 if origin is None else sum(getattr(thing, f) == getattr(scene.things[origin], f) for f in ("size", "color", "shape"))
            assert origin is None or same >= 2
