import base64

import numpy as np
import pytest
from markupsafe import Markup

from rpo.data.images import decode_image, encode_png
from rpo.evaluation.judges import verdict
from rpo.report.controls import controls
from rpo.report.figures import Line, Segment, bar, chart, gauge, interval, ticks
from rpo.report.format import count, duration, headline, number, percent, reason_words, signed
from rpo.report.sampling import by_hash, quotas, thin
from rpo.report.sections import funnel, nice_limit, result, running_mean, training
from rpo.report.thumbnails import thumbnail

FRACTION = {"kind": "fraction", "says": "show everything their caption asks for"}
BETTER = FRACTION | {
    "base": 0.47,
    "tuned": 0.625,
    "difference": 0.155,
    "ci95": [0.067, 0.238],
    "win_rate": 0.58,
    "n": 120,
    "detectable": 0.12,
}


def test_headline_says_what_the_interval_allows() -> None:
    assert headline("right", BETTER).startswith("Of 100 images, 62 now show everything") and "above zero" in headline("x", BETTER)
    assert headline("fully_correct", BETTER | {"says": ""}).startswith("Fully correct is 62.5\u202f% after tuning"), "no name is special"
    named = {name: value for name, value in BETTER.items() if name not in ("base", "tuned")} | {"a": 0.47, "b": 0.625}
    assert headline("right", named, ("a", "b")).startswith("Of 100 images of b, 62 show everything their caption asks for; of a's, 47.")
    open_ = BETTER | {"ci95": [-0.02, 0.2]}
    assert verdict(open_) == "open" and "includes zero" in headline("fully_correct", open_) and "12.0 points" in headline("q", open_)
    assert "worse" in headline("fully_correct", BETTER | {"ci95": [-0.2, -0.1]})
    assert verdict(BETTER | {"ci95": [0.0, 0.1]}) == "open"  # an interval that touches zero includes it
    assert "cannot tell" in headline("cosine", {"base": 0.3, "tuned": 0.31, "ci95": [-0.1, 0.1], "n": 1, "detectable": None})
    cosine = headline("cosine", {"base": 0.146, "tuned": 0.151, "ci95": [0.001, 0.01], "n": 90, "detectable": 0.1})
    assert "0.151" in cosine and "%" not in cosine, "a cosine is a score although it lies between 0 and 1"
    lower = BETTER | {"kind": "distance", "better": "lower"}
    assert "it is worse" in headline("distance", lower) and verdict(lower) == "worse"
    assert "too few for an interval" in headline("right", BETTER | {"ci95": None, "n": 2})
    assert "not evidence" in headline("right", BETTER | {"used_in_labelling": True})
    assert "points" not in headline("reward", {"base": -1.2, "tuned": 3.0, "ci95": [-1, 2], "n": 9, "detectable": 2.0})


@pytest.mark.parametrize(("said", "meant"), [
    (number(-1234.5, 1), "−1,234.5"), (number(0.00001), "1.0e−05"), (number(0), "0.000"),
    (signed(0.04), "0.0"), (signed(-0.04), "0.0"), (signed(2.25), "+2.2"), (signed(-3.0), "−3.0"), (percent(0.5), "50.0\u202f%"),
    (duration(0.44), "0.4 s"), (duration(48.2), "48 s"), (duration(200), "3 min 20 s"), (duration(59.7), "1 min 00 s"),
    (duration(7500), "2 h 05 min"),
    (reason_words("low_margin"), "low margin"), (reason_words("error:critique:no_JSON"), "error in critique: no_JSON"),
])  # fmt: skip
def test_numbers_are_written_for_people(said: str, meant: str) -> None:
    assert said == meant


def test_quotas_are_proportional_and_leave_no_outcome_out() -> None:
    assert quotas({"won": 79, "lost": 42, "tie": 119}, 24) == {"won": 8, "lost": 4, "tie": 12}
    rare = quotas({"won": 990, "lost": 2, "tie": 8, "none": 0}, 24)
    assert rare["lost"] == rare["tie"] == 1 and rare["none"] == 0 and sum(rare.values()) == 24
    assert quotas({"won": 3, "lost": 1}, 24) == {"won": 3, "lost": 1}
    assert quotas({"a": 5, "b": 5, "c": 5}, 0) == {"a": 0, "b": 0, "c": 0}


def test_choice_depends_on_the_keys_and_not_on_the_order() -> None:
    names = [f"id{i}" for i in range(100)]
    assert by_hash(names, str, 5) == by_hash(names[::-1], str, 5) != names[:5]


def test_thinning_keeps_both_ends() -> None:
    assert thin(range(1000), 4) == [0, 333, 666, 999] and thin([1, 2], 4) == [1, 2]


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0.47, 0.71) == pytest.approx([0.5, 0.6, 0.7])
    assert ticks(-0.005, 0.01) == pytest.approx([-0.005, 0, 0.005, 0.01])
    assert ticks(3, 3) == [3]


def test_bars_show_shares_and_escape_what_they_say() -> None:
    drawn = bar([Segment(share=0.25, kind="kept", title="<b>"), Segment(share=0.5, kind="dropped")], 'said "so" <i>')
    assert 'x="0.0" y="0" width="250.0"' in drawn and 'x="250.0" y="0" width="500.0"' in drawn
    assert "<b>" not in drawn and "<i>" not in drawn and "&lt;b&gt;" in drawn and isinstance(drawn, Markup)


def test_marks_stay_on_their_axis() -> None:
    assert 'x="994.0"' in gauge(1.0, (0, 0.5), "") and 'x="0.0" y="0" width="6.0"' in gauge(-3, (0, 0.5), "")
    assert 'x="747.0" y="3"' in interval(0.2, 0.25, 0.3, 0.5, "better", "")


def test_chart_survives_flat_lines_and_single_points() -> None:
    flat = chart([Line(name="lr", kind="base", points=[(1, 1e-4), (2, 1e-4 + 1e-20)])], "rate")
    assert "1.00e\u22124" in flat and "nan" not in flat
    assert "<circle" in chart([Line(name="a", kind="base", points=[(7, 0.0)])], "one", level=0.5)
    assert "<polygon" in chart([Line(name="m", kind="tuned", points=[(0, 1), (9, 2)])], "m", band=([(0, 0), (9, 1)], [(0, 2), (9, 3)]))


def test_running_mean_of_a_long_curve_is_smooth_and_keeps_its_level() -> None:
    zigzag = [(float(i), float(i % 2)) for i in range(400)]
    assert all(0.4 <= y <= 0.6 for _, y in running_mean(zigzag)[20:]) and len(running_mean(zigzag)) == 400
    assert running_mean(zigzag[:10]) == zigzag[:10]


def test_training_draws_what_was_logged_and_no_more() -> None:
    titles = [drawn.title for drawn in training([{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.9, "held_out_accuracy": 0.5}])]
    assert titles == ["Loss", "Accuracy on held-out pairs"] and training([]) == []


def test_many_reasons_are_summed_up() -> None:
    [line] = funnel([{"stage": "critique", "rows_in": 100, "kept": 10, "dropped": {f"error:critique:{i}": 9 for i in range(10)}}])
    assert len(line.reasons) == 6 and (line.others, line.others_rows, line.dropped) == (4, 36, 90)
    assert funnel([{"stage": "s", "rows_in": 0, "kept": 0, "dropped": {}}])[0].kept == 0


@pytest.mark.parametrize(("value", "state"), [(0.5, "fine"), (0.85, "fine"), (0.86, "watch"), (0.96, "off")])
def test_fingerprint_states_follow_the_trainers_limits(value: float, state: str) -> None:
    [control] = controls({"controls": {"fingerprint_auc": value, "roundtrip": None, "leakage": None}})
    assert control.state == state


def test_the_result_follows_the_headline_and_the_declared_kinds() -> None:
    reward = {"base": -1.0, "tuned": 3.0, "difference": 4.0, "ci95": [3.0, 5.0], "win_rate": 0.7, "n": 5, "p_holm": 0.01}
    cosine = reward | {"base": 0.146, "tuned": 0.151, "difference": 0.005, "ci95": [0.001, 0.009], "kind": "score"}
    frechet = {"base": 1.0, "tuned": 2.0, "difference": 1.0, "n": 5}
    outcome = result({"clip": cosine, "reward": reward, "right": reward | BETTER, "frechet": frechet}, "reward")
    assert outcome is not None and outcome.main.name == "Reward" and not outcome.bars and outcome.main.figure, "scores have intervals too"
    assert [line.name for line in outcome.lines] == ["Reward", "Clip", "Right"] and outcome.lines[0].limit == "5"
    assert (outcome.lines[1].base, outcome.lines[1].limit) == ("0.146", "0.01") and outcome.lines[2].limit == "50"
    assert [line.p for line in outcome.lines] == ["0.01", "0.01", "0.01"] and outcome.losses == ""
    assert result({}, "x") is None and result({"frechet": frechet}, "frechet") is None


def test_a_loss_beside_the_headline_is_said_under_it() -> None:
    gain = BETTER | {"p_holm": 0.001}
    fell = {
        "base": 0.9,
        "tuned": 0.8,
        "difference": -0.1,
        "ci95": [-0.2, -0.05],
        "win_rate": 0.2,
        "n": 120,
        "p_holm": 0.002,
        "kind": "score",
    }
    outcome = result({"right": gain, "quality": fell}, "right")
    assert outcome is not None
    assert outcome.losses == (
        "But it got worse elsewhere: quality fell by 0.100 (95 % [−0.200, −0.050], p 0.002 after Holm; better in 20 of 100 images)."
    )
    fine = result({"right": gain, "quality": fell | {"ci95": [-0.2, 0.01]}}, "right")
    farther = result({"right": gain, "far": BETTER | {"kind": "distance", "better": "lower"}}, "right")
    assert fine is not None and fine.losses == "" and farther is not None and "far rose by 0.155" in farther.losses


def test_color_needs_the_interval_and_holm() -> None:
    assert verdict(BETTER) == "better" and verdict(BETTER | {"p_holm": 0.04}) == "better" and verdict(BETTER | {"p_holm": 0.11}) == "open"


@pytest.mark.parametrize(("reach", "limit"), [(0.54, 1.0), (0.05, 0.05), (0.0021, 0.005), (3.0, 5.0), (0.0, 1.0), (12.0, 20.0)])
def test_an_axis_ends_at_a_round_number_beyond_its_interval(reach: float, limit: float) -> None:
    assert nice_limit(reach) == pytest.approx(limit)


def test_one_of_a_thing_is_singular() -> None:
    assert [count(n, "image pair") for n in (1, 2, 1200)] == ["1 image pair", "2 image pairs", "1,200 image pairs"]


def test_rows_that_were_right_already_are_no_loss() -> None:
    [line] = funnel([{"stage": "critique", "rows_in": 10, "kept": 3, "dropped": {"no_issue": 5, "error:critique:x": 2}}])
    assert (line.right, line.dropped, line.reasons) == (5, 2, [("error in critique: x", 2)])
    assert 'class="fine"' in line.figure and line.figure.count("failed") == 1


def test_no_control_that_cannot_fail_is_shown() -> None:
    shown = controls({"controls": {"roundtrip_win_rate": 0.5, "neutral_edit_win_rate": 0.5, "fingerprint_auc": 0.5}})
    assert [control.name for control in shown] == ["Leakage, single images"]


@pytest.mark.parametrize(("low", "high", "state"), [(-0.1, 0.2, "fine"), (-0.1, 0.4, "watch"), (0.3, 0.5, "off"), (-0.6, -0.3, "off")])
def test_a_bias_is_judged_by_its_interval(low: float, high: float, state: str) -> None:
    bias = {
        "rows": 50,
        "sign_rate": 0.6,
        "sign_low": 0.5,
        "sign_high": 0.7,
        "shift": (low + high) / 2,
        "shift_low": low,
        "shift_high": high,
    }
    [control] = controls({"controls": {"roundtrip": {"clip": bias}}})
    assert control.state == state and control.name == "Round trip, Clip"


def test_small_pictures_stay_as_they_are_and_large_ones_shrink() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    small = thumbnail(encode_png(pixels))
    assert small.pixelated and np.array_equal(decode_image(base64.b64decode(small.uri.split(",")[1])), pixels)
    large = thumbnail(encode_png(np.repeat(np.repeat(pixels, 12, axis=0), 16, axis=1)))
    assert not large.pixelated and (large.width, large.height) == (256, 192) and large.uri.startswith("data:image/webp;base64,")
