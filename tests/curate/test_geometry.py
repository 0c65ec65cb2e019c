"""One geometry: critic, editor, scorer and trainer see the same frame of an image of any size."""

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rpo.curate.columns import cells, images
from rpo.curate.stages import CritiqueStage, EditStage, ScoreStage, SourceStage
from rpo.data.images import Frame, FrameFit, encode_png, fit_square, framed_cells, image_cell
from rpo.data.schema import Critique

SIDE = 24


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3)).astype(np.uint8)


@dataclass(frozen=True)
class Sees:
    """Stands for every model, and keeps the images that it is given."""

    image: np.ndarray
    seen: list[np.ndarray] = field(default_factory=list)

    def models(self) -> tuple[str, ...]:
        return ()

    def build(self) -> "Sees":
        return self

    def generate(self, prompts, seeds):
        return [self.image for _ in prompts]

    def critique(self, images, prompts):
        self.seen.extend(images)
        return [Critique(reasoning="", aspects=(), issues=(), keep=(), overall=3, no_issue=True) for _ in images]

    def edit(self, images, instructions, seeds, *, guidance=None):
        self.seen.extend(images)
        return list(images)

    def round_trip(self, images):
        return list(images)

    def score(self, images, prompts):
        self.seen.extend(images)
        return [0.0] * len(images)


@pytest.mark.parametrize("fit", ["square", "letterbox"])
@settings(max_examples=15, deadline=None)
@given(height=st.integers(1, 90), width=st.integers(1, 90))
def test_every_model_sees_the_same_frame(fit: FrameFit, height: int, width: int) -> None:
    model, frame = Sees(picture(height, width)), Frame(side=SIDE, fit=fit)
    batch = {"prompt": ["a"], "seed": [1], "instruction": ["b"], "id": ["0"]}
    made = SourceStage(generator=model, frame=frame).build()(batch)
    batch |= {name: list(column) for name, column in made.items() if name != "status"}
    CritiqueStage(critic=model).build()(batch)
    batch |= EditStage(editor=model).build()(batch)
    ScoreStage(rewards=(("r", model),), sides=("source", "original", "edited")).build()(batch)
    expected = frame.fitted(model.image)
    assert len(model.seen) == 6 and all(np.array_equal(seen, expected) for seen in model.seen)
    assert np.array_equal(fit_square(expected, SIDE), expected), "the trainer's own fit leaves it alone"
    [brought], cut = framed_cells([image_cell(encode_png(model.image))], frame)
    assert np.array_equal(images([brought])[0], expected) and cut == made["cut"][0]


def test_what_is_cut_off_is_measured() -> None:
    wide = picture(20, 80)
    assert Frame(side=SIDE).cut(wide) == pytest.approx(0.75) and Frame(side=SIDE, fit="letterbox").cut(wide) == 0
    whole = Frame(side=80, fit="letterbox").fitted(wide)
    assert np.array_equal(whole[30:50], wide) and (whole[:30] == 255).all() and (whole[50:] == 255).all()


def test_an_image_that_fits_keeps_its_bytes() -> None:
    cell = cells([picture(SIDE, SIDE)])[0]
    assert framed_cells([cell], Frame(side=SIDE))[0][0] is cell  # pyright: ignore[reportArgumentType]
