"""Editors with a planted fault, on the embedded world: each is caught by the check meant for it, and good edits pass that check.

The pictures are renders before and after one edit, both through the embedded editor's autoencoder, as sides of pairs are.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from PIL import Image

from rpo.backends.diffusers.edit import EditorConfig
from rpo.backends.scorers.clip import ClipScorerConfig
from rpo.curation.columns import cells
from rpo.curation.controls import biased, biases
from rpo.curation.image_metrics import Pattern, artifact_pattern
from rpo.curation.label_rules import measure
from rpo.curation.stages.check import CheckStage
from rpo.curation.stages.verify import VerifyStage
from rpo.data.images import recompressed
from rpo.data.schema import Instruction, Instructions
from rpo.engine.stage import Batch
from rpo.shapes.render import Placed, render, revise
from rpo.shapes.scenes import Scene, caption, scenes
from rpo.shapes.scoring import ChecklistScorerConfig
from rpo.shapes.verifier import ShapesVerifierConfig
from rpo.shapes.weights import EDITOR_SAMPLER, weights_folder

ROWS = 128
CAUGHT_MIN, FALSE_ALARMS_MAX = 0.95, 0.05


@dataclass(frozen=True)
class World:
    scenes: list[Scene]
    source: list[np.ndarray]
    original: list[np.ndarray]
    edited: list[np.ndarray]
    instructions: list[str]
    prompts: list[str]


@pytest.fixture(scope="module")
def world() -> World:
    rng = np.random.default_rng(11)
    source = scenes(rng, held_out=False)
    drawn = [next(source) for _ in range(ROWS)]
    revisions = [revise(scene, rng, 1) for scene in drawn]
    before, after = ([*render([getattr(revision, side) for revision in revisions])] for side in ("before", "after"))
    round_trip = EditorConfig(model=str(weights_folder() / "editor"), **EDITOR_SAMPLER).build().round_trip
    told = [
        Instructions(
            instructions=tuple(
                Instruction(op=e.op, target=e.target, instruction=e.instruction, addresses=(0,), expected_visible_change=e.expected)
                for e in revision.edits
            )
        ).model_dump_json()
        for revision in revisions
    ]
    prompts = [caption(next(source)) for _ in range(ROWS)]
    return World(drawn, before, round_trip(before), round_trip(after), told, prompts)


def moved(image: np.ndarray, row: int) -> np.ndarray:
    """By three pixels to one of four sides; what comes in repeats the edge."""
    down, across = ((3, 0), (-3, 0), (0, 3), (0, -3))[row % 4]
    padded = np.pad(image, ((3, 3), (3, 3), (0, 0)), mode="edge")
    return padded[3 - down : 67 - down, 3 - across : 67 - across]


def nothing(world: World) -> list[np.ndarray]:
    """Gives the source back, with the noise of one more encoding."""
    noise = np.random.default_rng(1).integers(-4, 5, (ROWS, 64, 64, 3))
    return [np.clip(image + n, 0, 255).astype(np.uint8) for image, n in zip(world.original, noise, strict=True)]


def shifts(world: World) -> list[np.ndarray]:
    return [moved(image, row) for row, image in enumerate(world.original)]


def zooms(world: World) -> list[np.ndarray]:
    return [np.array(Image.fromarray(i).resize((64, 64), Image.Resampling.BICUBIC, box=(2.4, 2.4, 61.6, 61.6))) for i in world.original]


def repaints(world: World) -> list[np.ndarray]:
    """Paints something of its own over everything."""
    rough = np.random.default_rng(2).integers(0, 256, (ROWS, 8, 8, 3)).astype(np.uint8)
    return [np.array(Image.fromarray(image).resize((64, 64), Image.Resampling.BICUBIC)) for image in rough]


def leaves_a_pattern(world: World) -> list[np.ndarray]:
    """Carries out the edit, and adds the same faint noise of up to three levels to everything."""
    pattern = np.random.default_rng(3).integers(-3, 4, (64, 64, 3))
    return [np.clip(image.astype(int) + pattern, 0, 255).astype(np.uint8) for image in world.edited]


def fallen(stage: CheckStage | VerifyStage, world: World, edited: list[np.ndarray], reason: str) -> float:
    """Share of rows that fall for `reason`; shards of 32."""
    call, statuses = stage.build(), []
    for start in range(0, ROWS, 32):
        rows = slice(start, start + 32)
        batch: Batch = {
            "original": cells(world.original[rows]), "edited": cells(edited[rows]), "instructions": world.instructions[rows],
        }  # fmt: skip
        statuses += list(call({name: batch[name] for name in stage.spec.inputs})["status"])
    return statuses.count(f"drop:{reason}") / ROWS


WEIGHTS = weights_folder()
CHECK = CheckStage()
FAULTS: dict[str, tuple[Callable[[World], list[np.ndarray]], CheckStage, str]] = {
    "changes nothing": (nothing, CHECK, "no_op"),
    "changes nothing, by a perceptual distance": (
        nothing, CheckStage(change_min=0.0, embedder=ClipScorerConfig(model=str(WEIGHTS / "clip")), distance_min=0.015), "no_op",
    ),
    "shifts by three pixels": (shifts, CHECK, "moved"),
    "repaints everything": (repaints, CHECK, "over_edit"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_caught_and_good_edits_pass(world: World, name: str) -> None:
    editor, stage, reason = FAULTS[name]
    assert fallen(stage, world, editor(world), reason) >= CAUGHT_MIN
    # After a change of its shape or background nothing of a lone flat thing need be in place: the recipe turns that check off.
    assert fallen(stage, world, world.edited, reason) <= (0.12 if reason == "over_edit" else FALSE_ALARMS_MAX)


def pattern(world: World, edited: list[np.ndarray]) -> Pattern:
    found = artifact_pattern(world.original, edited, {"instruction": world.instructions, "prompt": world.prompts})
    assert found is not None
    return found


def test_a_faint_pattern_is_measured_over_the_run_and_good_edits_have_none(world: World) -> None:
    assert pattern(world, leaves_a_pattern(world)).low > 1.0
    assert pattern(world, world.edited).high < 1.0


def another(scene: Scene, told: str) -> tuple[list[Placed], str]:
    """The scene after some other edit than the one that was told."""
    rng = np.random.default_rng(len(told))
    while True:
        revision = revise(scene, rng, 1)
        if revision.edits[0].expected not in told:
            return revision.after


def test_who_follows_another_instruction_is_caught(world: World) -> None:
    stage = VerifyStage(verifier=ShapesVerifierConfig(model=str(WEIGHTS / "critic")))
    other = [*render([another(scene, told) for scene, told in zip(world.scenes, world.instructions, strict=True)])]
    assert fallen(stage, world, other, "not_followed") >= CAUGHT_MIN
    assert fallen(stage, world, world.edited, "not_followed") <= FALSE_ALARMS_MAX


def test_a_zoom_is_seen(world: World) -> None:
    """By eight per cent. Things stand near the centre in this world, where zooming moves little: the check is held to nine in ten."""
    assert fallen(CHECK, world, zooms(world), "moved") >= 0.9
    assert fallen(CHECK, world, world.edited, "moved") <= FALSE_ALARMS_MAX


class PlantedBias:
    """A reward that gives the same number to every image, and `bias` more to those that passed the editor's autoencoder."""

    def __init__(self, re_encoded: list[np.ndarray], bias: float) -> None:
        self._known, self._bias = {image.tobytes() for image in re_encoded}, bias

    def score(self, images: list[np.ndarray], prompts: list[str]) -> list[float]:
        jitter = np.random.default_rng(len(self._known)).normal(size=len(images))
        return [self._bias * (image.tobytes() in self._known) + float(off) for image, off in zip(images, jitter, strict=True)]


def test_re_encoding_biases_no_reward_and_one_that_likes_it_is_caught(world: World) -> None:
    """A floor measured on the very differences that it is held against would hide any constant: it comes from a second encoding."""
    round_trip = EditorConfig(model=str(WEIGHTS / "editor"), **EDITOR_SAMPLER).build().round_trip
    second = round_trip([recompressed(image) for image in world.source])
    sides = {"source": world.source, "original": world.original, "second": second}
    names = ["clip", "checklist", "raises", "lowers", "even"]
    clip, checklist = ClipScorerConfig(model=str(WEIGHTS / "clip")), ChecklistScorerConfig(model=str(WEIGHTS / "checklist"))
    planted = [PlantedBias([*world.original, *second], bias) for bias in (3.0, -3.0, 0.0)]
    rewards = [clip.build(), checklist.build(), *planted]
    scores = {name: np.array([reward.score(images, world.prompts) for reward in rewards]).T for name, images in sides.items()}
    measured = measure(scores["original"], scores["second"], scores["original"], scores["original"])
    assert all(0 < floor < spread for floor, spread in zip(measured.floors[:2], measured.spreads[:2], strict=True))
    found = biases(scores | {"neutral": scores["original"]}, names, measured)
    assert found["neutral"] is None and found["roundtrip"] is not None
    assert {name for name in names if biased(found["roundtrip"][name])} == {"raises", "lowers"}, found
    assert found["roundtrip"]["raises"]["sign_low"] > 0.5 > found["roundtrip"]["lowers"]["sign_high"]
