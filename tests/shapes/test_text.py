"""What the text encoder is taught: the answers must be those of the pictures."""

import numpy as np

from rpo.shapes.render import SLOTS, place, revise
from rpo.shapes.scenes import BACKGROUNDS, COLORS, NEUTRAL_INSTRUCTION, SHAPES, SIZES, parse_caption, random_scene
from rpo.shapes.training.text import ANSWERS, caption_lesson, instruction_lesson, slot_codes

STAYS = [answers - 1 for answers in ANSWERS]


def test_slots_of_a_caption() -> None:
    scene = parse_caption("a large red star above a small blue circle on a black background")
    codes = dict(zip(SLOTS, slot_codes(place(scene, np.random.default_rng(0)), scene.background), strict=True))
    black = 1 + BACKGROUNDS.index("black")
    assert codes["top"] == [1 + SIZES.index("large"), 1 + COLORS.index("red"), 1 + SHAPES.index("star"), black]
    assert codes["bottom"] == [1 + SIZES.index("small"), 1 + COLORS.index("blue"), 1 + SHAPES.index("circle"), black]
    assert codes["left"] == codes["right"] == codes["centre"] == [0, 0, 0, black]


def test_a_caption_leaves_nothing_open() -> None:
    rng = np.random.default_rng(1)
    for _ in range(100):
        _, codes = caption_lesson(rng)
        assert all(answer != stays for slot in codes for answer, stays in zip(slot, STAYS, strict=True))


def test_an_instruction_speaks_of_what_it_changes_and_of_nothing_else() -> None:
    rng = np.random.default_rng(2)
    operations = set()
    for _ in range(300):
        text, codes = instruction_lesson(rng)
        open_slots = sum(slot[:3] == STAYS[:3] for slot in codes)
        behind = {slot[3] for slot in codes}
        assert len(behind) == 1 and (behind == {STAYS[3]}) == ("background" not in text)
        if text == NEUTRAL_INSTRUCTION:
            assert open_slots == len(SLOTS)
        elif {"add", "move"} & set(text.split()):
            assert open_slots == 0 and sum(slot[:3] != [0, 0, 0] for slot in codes) == 2
        elif "remove" in text.split():
            assert [0, 0, 0] in [slot[:3] for slot in codes]
        else:
            changed = {place for place in ("left", "right", "top", "bottom") if f"the {place} " in f"{text} "}
            assert open_slots >= len(SLOTS) - max(1, len(changed))
        operations |= set(text.split()) & {"add", "move", "remove", "turn", "make", "keep"}
    assert operations == {"add", "move", "remove", "turn", "make", "keep"}


def test_a_neutral_revision_changes_nothing() -> None:
    rng = np.random.default_rng(3)
    for _ in range(20):
        revision = revise(random_scene(rng), rng, 0)
        assert revision.before == revision.after and revision.instruction == NEUTRAL_INSTRUCTION
