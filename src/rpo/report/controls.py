"""Controls of a curation, each beside what is expected of it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from rpo.curation.controls import BIAS_MAX, PATTERN_LEVELS_MAX, biased
from rpo.report.figures import gauge
from rpo.report.format import label, number, percent, signed


@dataclass(frozen=True, kw_only=True)
class Control:
    """A number that says whether the pairs may be trusted."""

    name: str
    value: str
    should: str
    meaning: str
    state: str
    """"fine", "watch" or "off"."""
    words: str
    """The state in words."""
    figure: Markup


@dataclass(frozen=True)
class _Expected:
    where: tuple[str, str]
    name: str
    fine: tuple[float, float]
    watch: tuple[float, float]
    should: str
    meaning: str
    as_percent: bool = True


_STATES = {"fine": "within", "watch": "just outside", "off": "outside"}
_EXPECTED = (
    _Expected(
        ("controls", "fingerprint_auc"), "Leakage, single images", (0.0, 0.85), (0.0, 0.9), "at most 0.85, best 0.50",
        "How well a small probe that never sees the prompt tells chosen from rejected images (area under the curve, always learned from "
        "16 pairs). Near 1, training would learn an artifact instead of the content.", as_percent=False,
    ),
    _Expected(
        ("leakage", "paired"), "Leakage, sides of a pair", (0.0, 0.85), (0.0, 0.9), "at most 0.85, best 0.50",
        "The same from the difference of the two sides, which is what training sees: the share of pairs whose sides are told apart.",
        as_percent=False,
    ),
    _Expected(
        ("pairs", "judge_prefers_edit"), "Judge prefers the edit", (0.75, 1.0), (0.6, 1.0), "at least 75 %",
        "Among kept pairs, how often a judge that had no say in the labels agrees that the edit is better.",
    ),
)  # fmt: skip


def controls(summary: Mapping[str, Any]) -> list[Control]:
    """The controls that the run measured, each beside what it should be."""
    told: Mapping[str, Any] = summary.get("controls", {})
    known = {**summary, "leakage": told.get("leakage") or {}}
    found = [*_biases(told), *_patterns(told)]
    for expected in _EXPECTED:
        measured = known.get(expected.where[0], {}).get(expected.where[1])
        if measured is None or math.isnan(measured):  # too few pairs to say anything
            continue
        state = "fine" if expected.fine[0] <= measured <= expected.fine[1] else "off"
        if state == "off" and expected.watch[0] <= measured <= expected.watch[1]:
            state = "watch"
        text = percent(measured) if expected.as_percent else number(measured, 2)
        drawn = gauge(measured, expected.fine, f"{expected.name}: {text}, expected {expected.should}")
        told = {"name": expected.name, "value": text, "should": expected.should, "meaning": expected.meaning}
        found.append(Control(**told, state=state, words=_STATES[state], figure=drawn))
    return found


_BIASES = {
    "roundtrip": (
        "Round trip", "Score of the source after the editor's autoencoder less that of the source. Beyond the limit the reward sees the "
        "encoding; both sides of a pair pass it, so labels do not.",
    ),
    "neutral": (
        "Neutral edit", "Score of an edit that was asked to change nothing less that of the source after the round trip. Far below 0 the "
        "editor harms what it touches; far above, the reward likes its hand.",
    ),
}  # fmt: skip


def _biases(measured: Mapping[str, Any]) -> list[Control]:
    """A line per control and reward: its mean shift in noise floors, drawn as the share of rows in which the score rises."""
    found = []
    for control, (name, meaning) in _BIASES.items():
        for reward, bias in (measured.get(control) or {}).items():
            low, high = bias["shift_low"], bias["shift_high"]
            state = "off" if biased(bias) else "fine" if max(abs(low), abs(high)) <= BIAS_MAX else "watch"
            text = f"{signed(bias['shift'], 2)} floors ({signed(low, 2)} to {signed(high, 2)}), raised in {percent(bias['sign_rate'], 0)}"
            drawn = gauge(bias["sign_rate"], (0.35, 0.65), f"{name}, {label(reward)}: {text}")
            should = f"within ±{BIAS_MAX} noise floors"
            of = f"{name}, {label(reward)}"
            state_words = _STATES[state]
            found.append(Control(name=of, value=text, should=should, meaning=meaning, state=state, words=state_words, figure=drawn))
    return found


def _patterns(measured: Mapping[str, Any]) -> list[Control]:
    found = []
    for side, pattern in (measured.get("pattern") or {}).items():
        if pattern is None:
            continue
        limit, name = PATTERN_LEVELS_MAX, "Artifact pattern of edits" if side == "edited" else "Artifact pattern of neutral edits"
        state = "off" if pattern["low"] > limit else "fine" if pattern["high"] <= limit else "watch"
        text = f"{number(pattern['levels'], 2)} levels ({number(pattern['low'], 2)} to {number(pattern['high'], 2)})"
        drawn = gauge(min(pattern["levels"] / (2 * limit), 1.0), (0.0, 0.5), f"{name}: {text}")
        meaning = f"What two edits with different instructions have in common, from {pattern['rows']} rows. Above the limit the editor "
        found.append(
            Control(
                name=name, value=text, should=f"at most {limit:g} of 255", meaning=meaning + "leaves its mark on every image.",
                state=state, words=_STATES[state], figure=drawn,
            )
        )  # fmt: skip
    return found
