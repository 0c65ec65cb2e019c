"""Checks of an edit, votes above the noise floor, and who wins."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from rpo.curation.columns import cells, images
from rpo.curation.controls import biased, biases
from rpo.curation.image_metrics import artifact_pattern, visible_change
from rpo.curation.label_rules import Measured, measure, votes
from rpo.curation.registration import register
from rpo.curation.stages.check import CheckStage
from rpo.curation.stages.edit import EditStage
from rpo.curation.stages.label import LabelStage, scores_of
from rpo.data.images import recompressed
from rpo.data.pairs import split_of
from rpo.engine.stage import Batch


def textured(seed: int = 0, side: int = 64) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3)).astype(np.uint8)


def smooth(seed: int = 0, side: int = 128) -> np.ndarray:
    """Soft color patches with a little texture."""
    rng = np.random.default_rng(seed)
    rough = Image.fromarray(rng.integers(0, 256, (16, 16, 3)).astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    return np.clip(np.asarray(rough) + rng.normal(0, 3, (side, side, 3)), 0, 255).astype(np.uint8)


def test_what_nobody_sees_is_no_change() -> None:
    image = smooth()
    noisy = np.clip(image + np.random.default_rng(1).normal(0, 4, image.shape), 0, 255).astype(np.uint8)
    local, cast = image.copy(), np.clip(image + np.array([12, 0, 0]), 0, 255).astype(np.uint8)
    local[60:70, 60:70] = 255 - local[60:70, 60:70]
    assert visible_change(image, image) == 0 and visible_change(image, noisy) < 1
    assert visible_change(image, local) > 1 and visible_change(image, cast) > 1


@pytest.mark.parametrize(("rows", "columns"), [(0, 3), (2, 0), (-4, 5), (2, -2)])
def test_a_shift_is_measured(rows: int, columns: int) -> None:
    image = smooth()
    found = register(image, np.roll(image, (rows, columns), (0, 1)))
    assert found.shift_px == pytest.approx(np.hypot(rows, columns), abs=0.1)


def test_a_local_edit_is_no_shift() -> None:
    before = smooth()
    after = before.copy()
    after[20:60, 20:60] = smooth(5)[20:60, 20:60]
    assert register(before, after).shift_px == 0 and register(before, before).agreement == pytest.approx(1)


def test_a_mirror_image_and_a_blank_one() -> None:
    image = smooth()
    assert CheckStage().verdict(image, np.ascontiguousarray(image[:, ::-1]))["status"] == "drop:moved"
    assert CheckStage().verdict(image, np.zeros_like(image))["status"] == "drop:over_edit"


def test_a_thing_that_was_moved_far_is_no_drift() -> None:
    before, after = (np.full((64, 64, 3), 128, dtype=np.uint8) for _ in range(2))
    before[10:20, 10:20], after[40:50, 40:50] = 255, 255
    assert register(before, after).shift_px == 0


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (7, 300), (700, 20)])
def test_any_size_is_measured(size: tuple[int, int]) -> None:
    a, b = (np.random.default_rng(seed).integers(0, 256, (*size, 3)).astype(np.uint8) for seed in (0, 1))
    assert all(np.isfinite(value) for name, value in CheckStage().verdict(a, b).items() if name != "status")


def test_sizes_must_agree() -> None:
    with pytest.raises(ValueError, match="same size"):
        visible_change(textured(), textured(side=32))


def test_what_two_edits_have_in_common_is_a_pattern() -> None:
    rng = np.random.default_rng(3)
    before = [rng.integers(60, 200, (32, 32, 3)).astype(np.uint8) for _ in range(64)]
    mark = rng.integers(-3, 4, (32, 32, 3))
    after = [(image + mark).astype(np.uint8) for image in before]
    groups = {"instruction": [f"do {i}" for i in range(64)]}
    marked, clean = artifact_pattern(before, after, groups), artifact_pattern(before, before, groups)
    assert marked is not None and marked.low <= marked.levels <= marked.high and marked.levels == pytest.approx(2, abs=0.1)
    assert clean is not None and clean.high == 0
    assert artifact_pattern(before, after, {"instruction": ["brighter"] * 64}) is None, "what was asked for is no pattern"
    assert artifact_pattern(before[:63], after[:63], groups) is None, "too few rows"


def test_noise_floor_holds_about_nineteen_of_twenty() -> None:
    rng = np.random.default_rng(0)
    once = rng.normal(size=20_000)
    again = once + rng.normal(scale=0.3, size=20_000)
    floor = measure(once[:, None], again[:, None] + 5, once[:, None], once[:, None]).floors[0]  # a systematic shift is no noise
    assert floor == pytest.approx(1.96 * 0.3, rel=0.02)
    assert np.mean(np.abs(again - once) > floor) == pytest.approx(0.05, abs=0.005)


def test_the_noise_of_a_random_editor_counts_and_a_deterministic_one_adds_none() -> None:
    rng = np.random.default_rng(0)
    once = rng.normal(size=(20_000, 1))
    again, neutral = once + rng.normal(scale=0.1, size=once.shape), once + 7 + rng.normal(scale=0.4, size=once.shape)
    assert measure(once, again, neutral, once).floors[0] == pytest.approx(1.96 * 0.4, rel=0.02)
    assert measure(once, again, once, once).floors[0] == pytest.approx(1.96 * 0.1, rel=0.02)


def test_votes_and_shares() -> None:
    cast = votes(np.array([[2.0, -2.0], [0.5, 0.5], [2.0, 2.0]]), np.array([1.0, 1.0]))
    assert cast.tolist() == [[1, -1], [0, 0], [1, 1]]


def batch(edited: list[tuple[float, float]], neutral: tuple[float, float] = (0.0, 0.0)) -> Batch:
    """Scores by two rewards; re-encoding moves each by 0.1, so the floors are 0.196."""
    count = len(edited)
    columns: dict[str, list[object]] = {"id": [f"{i:016x}" for i in range(count)]}
    for k, reward in enumerate(("a", "b")):
        columns[f"{reward}_source"] = [0.1] * count
        columns[f"{reward}_original"] = [0.0] * count
        columns[f"{reward}_second"] = [0.1 * (-1) ** i for i in range(count)]
        columns[f"{reward}_neutral"] = [neutral[k]] * count
        columns[f"{reward}_edited"] = [scores[k] for scores in edited]
    return columns


def label(**settings: object) -> LabelStage:
    return LabelStage(**({"rewards": ("a", "b")} | settings))  # pyright: ignore[reportArgumentType]


def labelled(rows: Batch, **settings: object) -> Batch:
    """As the stage does once the noise floors of these rows are measured."""
    stage = label(**settings)
    measured = measure(*(scores_of(rows, stage.rewards, side) for side in ("original", "second", "neutral", stage.sides[1])))
    return replace(stage, measured=measured).build()(rows)


def test_an_edit_must_win_every_vote_above_the_floor() -> None:
    out = labelled(batch([(1.0, 1.0), (1.0, 0.1), (1.0, -1.0), (-1.0, -1.0)]))
    assert out["chosen_side"] == ["edited", None, None, "neutral"]
    assert out["rejected_side"] == ["neutral", None, None, "edited"]
    assert out["status"] == [None, "drop:low_margin", "drop:rewards_disagree", None]


def test_one_vote_can_be_enough_but_not_against_another() -> None:
    out = labelled(batch([(1.0, 0.1), (1.0, -1.0)]), votes_min=1)
    assert out["chosen_side"] == ["edited", None]


def test_lost_edits_can_be_left_out() -> None:
    out = labelled(batch([(-1.0, -1.0)]), keep_lost_edits=False)
    assert out["status"] == ["drop:edit_lost"]


def test_rejected_side_is_a_choice() -> None:
    scores = batch([(1.0, 1.0)] * 3, neutral=(2.0, 2.0))
    assert labelled(scores, rejected_side="neutral")["chosen_side"] == ["neutral"] * 3
    assert labelled(scores, rejected_side="original")["chosen_side"] == ["edited"] * 3


def test_controls_rules() -> None:
    rows = batch([(-1.0, -1.0)] * 200)
    assert set(labelled(rows, rule="trust_edit")["chosen_side"]) == {"edited"}
    drawn = labelled(rows, rule="random")["chosen_side"]
    assert drawn == labelled(rows, rule="random")["chosen_side"]
    assert 70 < drawn.count("edited") < 130, "a fair coin per row"


def scored(constant: float, rows: int = 50, seed: int = 0) -> dict[str, np.ndarray]:
    """One reward that adds a constant to every image that was encoded again, with noise of 1."""
    rng = np.random.default_rng(seed)
    source = rng.normal(50, 10, (rows, 1))
    original = source + constant + rng.normal(0, 1, (rows, 1))
    return {"source": source, "original": original, "neutral": original + rng.normal(0, 1, (rows, 1))}


@pytest.mark.parametrize("seed", range(20))
def test_a_constant_bias_is_caught_and_none_is_reported_without(seed: int) -> None:
    floors = Measured(floors=(1.96,), spreads=(10.0,), mean_floor=0.2)
    for constant, expected in ((10.0, True), (2.0, True), (-3.0, True), (0.0, False)):
        found = biases(scored(constant, seed=seed), ["a"], floors)
        assert found["roundtrip"] is not None and found["neutral"] is not None
        assert biased(found["roundtrip"]["a"]) is expected and not biased(found["neutral"]["a"])


def test_a_deterministic_editor_is_recognized() -> None:
    scores = scored(0.0)
    found = biases(scores | {"neutral": scores["original"]}, ["a"], Measured(floors=(1.0,), spreads=(1.0,), mean_floor=1.0))
    assert found["neutral"] is None and found["roundtrip"] is not None


def test_votes_min_is_checked() -> None:
    with pytest.raises(ValueError, match="votes_min"):
        label(votes_min=3)


def test_a_prompt_is_wholly_in_one_split() -> None:
    splits = [split_of(f"prompt {i}", 0.2) for i in range(2000)]
    assert 0.17 < splits.count("held_out") / 2000 < 0.23
    assert split_of("x", 0.0) == "train" and split_of("x", 1.0) == "held_out"


def test_a_label_reads_no_judge() -> None:
    """Only scores that the score stage made, of the rewards that are named, go into a label."""
    stage = label()
    sides = ("source", "original", "second", "neutral", "edited")
    assert set(stage.spec.inputs) == {"id", *(f"{reward}_{side}" for reward in ("a", "b") for side in sides)}
    assert json.dumps(sorted(stage.spec.outputs)).count("judge") == 0


class Encodes:
    """An editor whose autoencoder encodes to a distribution, or not."""

    def __init__(self, sampled: bool) -> None:
        if sampled:
            self.sampled_round_trip = lambda images, seeds: [image // 2 + seed % 2 for image, seed in zip(images, seeds, strict=True)]

    def models(self) -> tuple[str, ...]:
        return ()

    def build(self) -> "Encodes":
        return self

    def edit(self, images, instructions, seeds, *, guidance=None):
        return list(images)

    def round_trip(self, images):
        return [image // 2 for image in images]


@pytest.mark.parametrize("quality", [90, None])
@pytest.mark.parametrize("sampled", [True, False])
def test_the_second_encoding_samples_the_posterior_where_there_is_one(sampled: bool, quality: int | None) -> None:
    image = smooth()
    batch: Batch = {"source": cells([image] * 4), "instruction": ["a"] * 4, "seed": [1, 2, 3, 4]}
    made = EditStage(editor=Encodes(sampled), second_quality=quality).build()(batch)
    coded = image if quality is None else recompressed(image, quality)
    second = images(made["second"])
    assert {int((one.astype(int) - coded // 2).max()) for one in second} == ({0, 1} if sampled else {0})
    by = json.loads(made["edited_by"][0])["second"]
    assert ("JPEG 90" in by) == (quality is not None) and ("posterior" in by) == sampled
