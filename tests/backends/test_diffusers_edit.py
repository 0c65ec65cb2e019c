"""Every edit pipeline that diffusers has for us, as its real class with tiny random weights."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.longcat_image import pipeline_longcat_image_edit
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus

from rpo.backends.diffusers import edit as diffusers_editors
from rpo.backends.diffusers.edit import FAMILIES, DiffusersEditor, EditorConfig
from rpo.backends.diffusers.pipelines import Halving
from rpo.data.images import fit_square
from rpo.errors import RpoError
from rpo.protocols import SampledEditor
from tiny_diffusion import save_pipeline
from tiny_editors import EDITORS, save_editor

AREA = 1024 * 1024
SMALL = 64


@pytest.fixture(scope="module", autouse=True)
def small_work_area() -> Any:
    """Three pipelines always work at a megapixel; here at 64 x 64 pixels."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus, pipeline_longcat_image_edit):
            whole = module.calculate_dimensions
            patch.setattr(module, "calculate_dimensions", lambda area, ratio, whole=whole: whole(SMALL * SMALL, ratio))
        for name, family in FAMILIES.items():
            if family.work_side is not None:
                patch.setitem(diffusers_editors.FAMILIES, name, replace(family, work_side=SMALL))
        yield


@pytest.fixture(scope="module")
def editors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, DiffusersEditor]:
    folder = tmp_path_factory.mktemp("editors")
    built = {}
    for name in EDITORS:
        model = save_editor(name, folder / name / "pipeline")
        net = str(model.parent / "controlnet_ip2p") if "ControlNet" in name else None
        side = None if FAMILIES[name].side is None else SMALL
        built[name] = EditorConfig(model=str(model), controlnet=net, steps=2, side=side).build()
    return built


@pytest.fixture(params=EDITORS)
def editor(editors: dict[str, DiffusersEditor], request: pytest.FixtureRequest) -> DiffusersEditor:
    return editors[request.param]


def pictures(count: int, side: int = 48) -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    return [np.kron(rng.integers(0, 256, (6, 6, 3)), np.ones((side // 6, side // 6, 1))).astype(np.uint8) for _ in range(count)]


INSTRUCTIONS = ["make the circle red", "remove the square and make the background white", "turn it green"]
SEEDS = [5, 2**62 + 1, 7]


def test_a_batch_is_what_its_rows_are_alone(editor: DiffusersEditor) -> None:
    together = editor.edit(pictures(3), INSTRUCTIONS, SEEDS)
    alone = [editor.edit([image], [text], [seed])[0] for image, text, seed in zip(pictures(3), INSTRUCTIONS, SEEDS, strict=True)]
    for one, other in zip(together, alone, strict=True):
        assert one.shape == (editor.side, editor.side, 3) and one.dtype == np.uint8
        assert np.abs(one.astype(int) - other).max() <= 1, "float noise moves a level at most"


def test_the_rows_seed_decides(editor: DiffusersEditor) -> None:
    image, text = pictures(1), INSTRUCTIONS[:1]
    first = editor.edit(image, text, [1])[0]
    assert np.array_equal(first, editor.edit(image, text, [1])[0])
    assert not np.array_equal(first, editor.edit(image, text, [2])[0])


def test_it_looks_at_the_image_and_reads_the_instruction(editor: DiffusersEditor) -> None:
    one, other = pictures(2)
    before = editor.edit([one], ["make it red"], [1])[0]
    assert not np.array_equal(before, editor.edit([other], ["make it red"], [1])[0])
    assert not np.array_equal(before, editor.edit([one], ["remove the large blue square"], [1], guidance=9.0)[0])


@pytest.mark.parametrize("size", [(1, 1), (4000, 3000)])
def test_any_size_comes_back_as_the_editors_own(editor: DiffusersEditor, size: tuple[int, int]) -> None:
    image = np.full((*size, 3), 90, dtype=np.uint8)
    assert editor.edit([image], ["make it red"], [1])[0].shape == (editor.side, editor.side, 3)
    assert editor.round_trip([image])[0].shape == (editor.side, editor.side, 3)


def test_a_long_instruction_and_an_empty_batch(editor: DiffusersEditor) -> None:
    long = " ".join(["make the circle red and"] * 400)
    assert editor.edit(pictures(1), [long], [1])[0].shape == (editor.side, editor.side, 3)
    assert editor.edit([], [], []) == [] and editor.round_trip([]) == []


def test_the_round_trip_is_the_autoencoder_alone(editor: DiffusersEditor) -> None:
    """No seed, no instruction; a batch is what its rows are alone; the picture depends on the source."""
    together = editor.round_trip(pictures(2))
    assert np.abs(together[1].astype(int) - editor.round_trip(pictures(2)[1:])[0]).max() <= 1
    assert not np.array_equal(together[0], together[1])


def test_guidance_of_a_call_takes_the_place_of_the_configured_one(editors: dict[str, DiffusersEditor]) -> None:
    editor = editors["StableDiffusionInstructPix2PixPipeline"]
    image, text = pictures(1), INSTRUCTIONS[:1]
    own = editor.edit(image, text, [1])[0]
    assert np.array_equal(own, editor.edit(image, text, [1], guidance=7.5)[0])
    assert not np.array_equal(own, editor.edit(image, text, [1], guidance=2.0)[0])


def test_a_batch_that_does_not_fit_is_halved_once(editors: dict[str, DiffusersEditor], monkeypatch: pytest.MonkeyPatch) -> None:
    editor = editors["StableDiffusionInstructPix2PixPipeline"]
    small, sizes = EditorConfig(model=editor.config.model, steps=2).build(), []
    pipeline = small.pipeline

    def cramped(prompt: list[str], **arguments: Any) -> Any:
        sizes.append(len(prompt))
        if len(prompt) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return pipeline(prompt=prompt, **arguments)

    monkeypatch.setattr(small, "pipeline", cramped)
    images, texts, seeds = pictures(5), [*INSTRUCTIONS, *INSTRUCTIONS[:2]], [1, 2, 3, 4, 5]
    edited = small.edit(images, texts, seeds)
    assert sizes == [5, 2, 2, 1] and small.edit(images, texts, seeds) is not None and sizes[4:] == [2, 2, 1], "remembered"
    expected = editor.edit(images, texts, seeds)
    assert all(np.abs(a.astype(int) - b).max() <= 1 for a, b in zip(edited, expected, strict=True))


def test_what_never_fits_is_told(editors: dict[str, DiffusersEditor], monkeypatch: pytest.MonkeyPatch) -> None:
    small = EditorConfig(model=editors["StableDiffusionInstructPix2PixPipeline"].config.model, steps=2).build()

    def full(**arguments: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(small, "pipeline", full)
    with pytest.raises(RpoError, match="offload"):
        small.edit(pictures(2), INSTRUCTIONS[:2], SEEDS[:2])


def test_memory_that_another_stage_held_for_a_moment_ends_nothing() -> None:
    cleared: list[str] = []
    halving, left = Halving(lambda: cleared.append("hooks")), [True]

    def run(part: slice) -> list[int]:
        if left.pop() if left else False:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return list(range(part.start, part.stop))

    assert halving(1, run) == [0] and cleared == ["hooks"] and halving.most is None


def test_an_editor_whose_layers_cannot_wait_elsewhere_is_refused(
    editors: dict[str, DiffusersEditor], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = editors["LongCatImageEditPipeline"].pipeline
    monkeypatch.setattr("rpo.backends.diffusers.edit.load_pipeline", lambda *given, **settings: (pipeline, "longcat"))
    with pytest.raises(RpoError, match="cannot run with offload='sequential'"):
        EditorConfig(model="longcat", offload="sequential").build()


def test_what_is_no_editor_is_told(tmp_path: Path) -> None:
    with pytest.raises(RpoError, match="editors are StableDiffusionInstructPix2PixPipeline"):
        EditorConfig(model=str(save_pipeline(tmp_path / "sd"))).build()
    with pytest.raises(RpoError, match="cannot load"):
        EditorConfig(model=str(tmp_path)).build()


def test_settings_that_cannot_be(editors: dict[str, DiffusersEditor], tmp_path: Path) -> None:
    model = editors["FluxKontextPipeline"].config.model
    for wrong, word in (
        ({"side": 100}, "multiple of 32"),
        ({"offload": "model", "device": "cpu"}, "offload"),
        ({"revision": "abc"}, "revision"),
        ({"steps": 0}, "steps"),
        ({"controlnet_revision": "abc"}, "controlnet"),
    ):
        with pytest.raises(ValueError, match=word):
            EditorConfig(**({"model": model} | wrong)).build()  # pyright: ignore[reportArgumentType]


def test_code_that_a_model_brings_is_not_run(tmp_path: Path) -> None:
    folder = save_pipeline(tmp_path / "sd")
    index = (folder / "model_index.json").read_text()
    (folder / "pipeline.py").write_text("raise SystemExit('run')")
    (folder / "model_index.json").write_text(index.replace('"StableDiffusionPipeline"', '["pipeline", "Mine"]'))
    with pytest.raises(RpoError, match="brings its own pipeline code"):
        EditorConfig(model=str(folder)).build()


def test_weights_in_pickles_are_not_read(tmp_path: Path) -> None:
    folder = save_pipeline(tmp_path / "sd")
    torch.save({}, folder / "unet" / "diffusion_pytorch_model.bin")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(RpoError, match="cannot load"):
        EditorConfig(model=str(folder)).build()


def test_the_source_is_fitted_as_the_round_trip_is(editors: dict[str, DiffusersEditor]) -> None:
    """Both sides of a pair pass the same resize: an image already fitted gives the same."""
    editor = editors["FluxKontextPipeline"]
    wide = np.random.default_rng(0).integers(0, 256, (96, 200, 3)).astype(np.uint8)
    fitted = fit_square(wide, SMALL)
    assert np.array_equal(editor.round_trip([wide])[0], editor.round_trip([fitted])[0])
    assert np.array_equal(editor.edit([wide], ["x"], [1])[0], editor.edit([fitted], ["x"], [1])[0])


def test_images_of_several_shapes_come_back_in_the_nearest_sizes(editor: DiffusersEditor) -> None:
    """In one batch; each as it is alone."""
    config = replace(editor.config, side=96, fit="nearest")
    nearest, (first, second) = config.build(), pictures(2)
    images = [first, np.tile(first, (1, 2, 1)), np.tile(second, (2, 1, 1)), second]
    sizes = [(96, 96), (64, 128), (128, 64), (96, 96)]
    assert [config.frame().size(image) for image in images] == sizes
    together = nearest.edit(images, [INSTRUCTIONS[0]] * 4, [1, 2, 3, 4])
    assert [image.shape[:2] for image in together] == [image.shape[:2] for image in nearest.round_trip(images)] == sizes
    alone = nearest.edit(images[2:3], INSTRUCTIONS[:1], [3])[0]
    assert np.abs(alone.astype(int) - together[2]).max() <= 1


def test_a_sample_of_the_posterior_is_an_encoding_of_its_own(editor: DiffusersEditor) -> None:
    images, once = pictures(3), editor.round_trip(pictures(3))
    sampled = editor.sampled_round_trip(images, SEEDS)
    assert isinstance(editor, SampledEditor) and all(not np.array_equal(a, b) for a, b in zip(once, sampled, strict=True))
    for row in range(3):
        alone = editor.sampled_round_trip(images[row : row + 1], SEEDS[row : row + 1])[0]
        assert np.abs(alone.astype(int) - sampled[row]).max() <= 1, "the row's seed decides"
    assert not np.array_equal(sampled[0], editor.sampled_round_trip(images, SEEDS[::-1])[0])
