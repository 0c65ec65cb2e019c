"""From what is seen to a critique, and from its words to instructions."""

import numpy as np
import pytest

from rpo.data.schema import Critique
from rpo.shapes.critic import MistakenCritic, RandomInstructorConfig, ShapesInstructor, ShapesInstructorConfig, critique_view
from rpo.shapes.recognition import Seen, View
from rpo.shapes.render import place
from rpo.shapes.scenes import Scene, Thing, caption, differences, parse_caption, random_change, random_scene

WANTED = parse_caption("a large red star left of a small blue circle on a gray background")


def view_of(scene: Scene) -> View:
    placed = place(scene, np.random.default_rng(0))
    return View(tuple(Seen(p.thing, p.x, p.y, 1.0) for p in placed), scene.background)


def instructions(critique: Critique, prompt: str = caption(WANTED), most: int = 2) -> list[str]:
    answer = ShapesInstructor(ShapesInstructorConfig(max_instructions=most)).instruct([prompt], [critique])[0]
    return [instruction.instruction for instruction in answer.instructions]


def test_a_right_picture_has_no_issue() -> None:
    critique = critique_view(view_of(WANTED), WANTED)
    assert critique.no_issue and critique.overall == 5 and not critique.issues
    assert instructions(critique) == []


def test_each_fault_is_an_issue_with_its_place_and_its_instruction() -> None:
    seen = parse_caption("a large red star left of a small green circle on a gray background")
    critique = critique_view(view_of(seen), WANTED)
    assert len(critique.issues) == 1 and critique.issues[0].aspect == "attribute_binding"
    left, top, right, bottom = critique.issues[0].region
    assert 0.5 < left < right <= 1 and 0.3 < top < bottom < 0.7, "the circle stands on the right"
    assert critique.keep == ("the large red star",)
    assert instructions(critique) == ["make the small green circle on the right blue"]


def test_instructions_come_from_the_words_alone() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        wanted = random_scene(rng)
        seen = random_change(random_change(wanted, rng)[0], rng)[0]
        critique = Critique.model_validate_json(critique_view(view_of(seen), wanted).model_dump_json())
        expected = [edit.instruction for edit in differences(view_of(seen).scene(), wanted)]
        assert instructions(critique, caption(wanted)) == expected[:2]
        assert instructions(critique, caption(wanted), most=1) == expected[:1]


@pytest.mark.parametrize("count", [0, 3])
def test_another_number_of_things_cannot_be_edited(count: int) -> None:
    thing = Thing("small", "red", "star")
    view = View(tuple(Seen(thing, 10.0 + 20 * i, 32.0, 1.0) for i in range(count)), "gray")
    critique = critique_view(view, WANTED)
    assert not critique.issues[0].fixable_by_edit and instructions(critique) == []


def test_two_equal_things_cannot_be_told_apart() -> None:
    thing = Thing("small", "red", "star")
    critique = critique_view(View((Seen(thing, 17, 32, 1.0), Seen(thing, 47, 32, 1.0)), "gray"), WANTED)
    assert "equal" in critique.issues[0].evidence and instructions(critique) == []


def test_max_instructions_is_checked() -> None:
    with pytest.raises(ValueError, match="max_instructions"):
        ShapesInstructorConfig(max_instructions=4)


def as_asked(images: list[np.ndarray]) -> list[View]:
    return [view_of(WANTED) for _ in images]


def test_a_mistaken_critic_misreads_its_share_and_always_the_same() -> None:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (8, 8, 3)).astype(np.uint8) for _ in range(400)]
    answers = {rate: MistakenCritic(as_asked, rate).critique(images, [caption(WANTED)] * 400) for rate in (0.0, 0.3)}
    assert all(answer.no_issue for answer in answers[0.0])
    assert sum(not answer.no_issue for answer in answers[0.3]) == pytest.approx(120, abs=30)
    assert MistakenCritic(as_asked, 0.3).critique(images[::-1], [caption(WANTED)] * 400) == answers[0.3][::-1]


def test_random_instructions_are_as_many_and_are_not_the_critique_s() -> None:
    seen = parse_caption("a small green star left of a small blue circle on a gray background")
    critiques = [critique_view(view_of(scene), WANTED) for scene in (seen, WANTED)]
    asked, none = RandomInstructorConfig().build().instruct([caption(WANTED)] * 2, critiques)
    assert len(asked.instructions) == 2 and none.instructions == ()
    assert [each.instruction for each in asked.instructions] != instructions(critiques[0])
    again = RandomInstructorConfig().build().instruct([caption(WANTED)], critiques[:1])[0]
    assert again == asked
