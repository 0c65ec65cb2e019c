"""One geometry: critic, editor, scorer and trainer see the same frame of an image of any size."""

import io
from dataclasses import dataclass, field

import numpy as np
import pytest
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit import calculate_dimensions
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rpo.curation.columns import cells, images
from rpo.curation.stages.critique import CritiqueStage
from rpo.curation.stages.edit import EditStage
from rpo.curation.stages.score import ScoreStage
from rpo.curation.stages.source import SourceStage
from rpo.data.images import Frame, FrameFit, decode_image, encode_png, fit_square, framed_cells, image_cell, nearest_sizes
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


@pytest.mark.parametrize("fit", ["square", "letterbox", "nearest"])
@settings(max_examples=15, deadline=None)
@given(height=st.integers(1, 300), width=st.integers(1, 300))
def test_every_model_sees_the_same_frame(fit: FrameFit, height: int, width: int) -> None:
    side = 160 if fit == "nearest" else SIDE
    model, frame = Sees(picture(height, width)), Frame(side=side, fit=fit)
    batch = {"prompt": ["a"], "seed": [1], "instruction": ["b"], "id": ["0"]}
    made = SourceStage(generator=model, frame=frame).build()(batch)
    batch |= {name: list(column) for name, column in made.items() if name != "status"}
    CritiqueStage(critic=model).build()(batch)
    batch |= EditStage(editor=model).build()(batch)
    ScoreStage(rewards=(("r", model),), sides=("source", "original", "edited")).build()(batch)
    expected = frame.fitted(model.image)
    assert len(model.seen) == 6 and all(np.array_equal(seen, expected) for seen in model.seen)
    assert frame.fitted(expected) is expected, "what is in the frame stays as it is"
    if fit != "nearest":
        assert np.array_equal(fit_square(expected, side), expected), "the trainer's own fit leaves it alone"
    [brought], cut = framed_cells([image_cell(encode_png(model.image))], frame)
    assert np.array_equal(images([brought])[0], expected) and cut == made["cut"][0]


MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16")


@settings(max_examples=40, deadline=None)
@given(
    mode=st.sampled_from(MODES), height=st.integers(16, 200), width=st.integers(16, 200), turned=st.sampled_from([1, 3, 6, 8]),
    fit=st.sampled_from(["square", "letterbox", "nearest"]),
)  # fmt: skip
def test_files_of_any_mode_and_both_images_of_a_pair_come_into_one_frame(
    mode: str, height: int, width: int, turned: int, fit: FrameFit
) -> None:
    """Both are fitted as the first, which is measured as it is seen: upright, on white."""
    image = Image.fromarray(picture(height, width))
    image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257) if mode == "I;16" else image.convert(mode)
    out, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = turned
    image.save(out, "JPEG" if mode == "CMYK" else "PNG", exif=exif)
    frame, upright = Frame(side=96, fit=fit), decode_image(out.getvalue())
    assert upright.shape[:2] == ((width, height) if turned in (6, 8) else (height, width))
    (source, other), cut = framed_cells([image_cell(out.getvalue()), image_cell(encode_png(picture(40, 70)))], frame)
    shown, beside = images([source, other])
    assert np.array_equal(shown, frame.fitted(upright)) and beside.shape == shown.shape == (*frame.size(upright), 3)
    assert 0 <= cut < 1 and (cut == 0 or fit != "letterbox")


def test_nearest_sizes_are_those_of_editors() -> None:
    """Multiples of 32 of about a megapixel, up to 2:1, that the rule of Qwen's pipelines gives back."""
    sizes = nearest_sizes(1024)
    assert (1024, 1024) in sizes and (832, 1248) in sizes and (1472, 736) not in sizes and len(sizes) > 10
    for height, width in sizes:
        assert calculate_dimensions(1024 * 1024, width / height)[:2] == (width, height)
        assert abs(height * width / 1024**2 - 1) < 0.03 and (width, height) in sizes


@pytest.mark.parametrize(
    ("shape", "size", "cut"), [((300, 400), (896, 1184), 0.01), ((400, 300), (1184, 896), 0.01), ((20, 400), (736, 1440), 0.91)]
)
def test_the_nearest_size_cuts_little(shape: tuple[int, int], size: tuple[int, int], cut: float) -> None:
    frame, image = Frame(side=1024, fit="nearest"), picture(*shape)
    assert frame.size(image) == size and frame.cut(image) == pytest.approx(cut, abs=0.01)
    assert frame.cut(image) <= Frame(side=1024).cut(image)


def test_what_is_cut_off_is_measured() -> None:
    wide = picture(20, 80)
    assert Frame(side=SIDE).cut(wide) == pytest.approx(0.75) and Frame(side=SIDE, fit="letterbox").cut(wide) == 0
    whole = Frame(side=80, fit="letterbox").fitted(wide)
    assert np.array_equal(whole[30:50], wide) and (whole[:30] == 255).all() and (whole[50:] == 255).all()


def test_an_image_that_fits_keeps_its_bytes() -> None:
    cell = cells([picture(SIDE, SIDE)])[0]
    assert framed_cells([cell], Frame(side=SIDE))[0][0] is cell  # pyright: ignore[reportArgumentType]
