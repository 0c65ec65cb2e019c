"""The page's numbers and figures: result, funnel, controls, training, time. Each builder takes plain values and may find nothing."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from rpo.report.choosing import thin
from rpo.report.figures import Line, Points, Segment, bar, chart, gauge, interval
from rpo.report.wording import headline, is_share, label, number, percent, reason_words, signed, verdict

MAIN_METRIC = "fully_correct"
FRECHET = "frechet"
REASONS_SHOWN = 6
POINTS_MAX = 300


@dataclass(frozen=True, kw_only=True)
class MetricLine:
    """One row of the table of metrics."""

    name: str
    base: str
    tuned: str
    difference: str
    ci95: str
    win_rate: str
    n: int
    kind: str
    """"better", "worse" or "open"."""
    figure: Markup
    """The interval on the table's common axis; empty for metrics that are no fractions."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """The headline and the table under it."""

    main: MetricLine
    sentence: str
    bars: list[tuple[str, str, Markup]]
    """(which model, its figure, its bar); empty for a metric that is no fraction."""
    lines: list[MetricLine]
    limit: str
    """The end of the table's common axis."""
    frechet: str
    """What became of the Fréchet distance, or nothing."""
    labelled: bool
    """Whether some of the lines, marked with a dagger, are rewards that chose the training pairs."""


def _metric_line(name: str, numbers: Mapping[str, Any], limit: float) -> MetricLine:
    share = is_share(numbers)
    low, high = numbers["ci95"]
    factor, digits = (100, 1) if share else (1, 3)
    value = percent if share else number
    labelled = "used_in_labelling" in numbers
    kind = "open" if labelled else verdict(numbers)
    span = f"{signed(factor * low, digits)} to {signed(factor * high, digits)}"
    drawn = interval(low, numbers["difference"], high, limit, kind, f"{label(name)}: difference {span}") if share else Markup("")
    return MetricLine(
        name=label(name) + " †" * labelled,
        base=value(numbers["base"]),
        tuned=value(numbers["tuned"]),
        difference=signed(factor * numbers["difference"], digits),
        ci95=span,
        win_rate=percent(numbers["win_rate"]) if "win_rate" in numbers else "–",
        n=numbers["n"],
        kind=kind,
        figure=drawn,
    )


def result(evaluation: Mapping[str, Mapping[str, Any]], names: tuple[str, str] = ("base", "tuned")) -> Result | None:
    """The section on the outcome, of the models `names`; `None` without an evaluation."""
    metrics = {name: numbers for name, numbers in evaluation.items() if "ci95" in numbers}
    if not metrics:
        return None
    reach = max((abs(end) for numbers in metrics.values() if is_share(numbers) for end in numbers["ci95"]), default=0.0)
    limit = next(step for step in (0.05, 0.1, 0.2, 0.3, 0.5, 1.0) if reach <= step)
    lines = {name: _metric_line(name, numbers, limit) for name, numbers in metrics.items()}
    main = MAIN_METRIC if MAIN_METRIC in metrics else next(iter(metrics))
    bars = []
    if is_share(metrics[main]):
        for name, side in zip(names, ("base", "tuned"), strict=True):
            text = percent(metrics[main][side])
            bars.append((name, text, bar([Segment(share=metrics[main][side], kind=side)], f"{name}: {text}", height=14)))
    distance, said = evaluation.get(FRECHET), ""
    if distance:
        digits = 1 if distance["base"] >= 10 else 3
        said = f"{number(distance['base'], digits)} for {names[0]}, {number(distance['tuned'], digits)} for {names[1]}"
    return Result(
        main=lines[main], sentence=headline(main, metrics[main], names), bars=bars, lines=list(lines.values()),
        limit=signed(100 * limit, 0), frechet=said, labelled=any("used_in_labelling" in numbers for numbers in metrics.values()),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class FunnelLine:
    """One stage of the funnel."""

    stage: str
    rows_in: int
    kept: int
    dropped: int
    reasons: list[tuple[str, int]]
    others: int
    """Reasons not listed."""
    others_rows: int
    figure: Markup


def funnel(stages: Sequence[Mapping[str, Any]]) -> list[FunnelLine]:
    """Every stage as a bar of what the first stage began with."""
    whole = max((stage["rows_in"] for stage in stages), default=0) or 1
    lines = []
    for stage in stages:
        reasons = sorted(stage["dropped"].items(), key=lambda item: (-item[1], item[0]))
        segments = [Segment(share=stage["kept"] / whole, kind="kept", title=f"kept {stage['kept']}")]
        segments += [
            Segment(share=count / whole, kind="failed" if reason.startswith("error:") else f"dropped d{i % 3}", title=f"{reason} {count}")
            for i, (reason, count) in enumerate(reasons)
        ]
        said = f"{stage['stage']}: {stage['rows_in']} rows in, {stage['kept']} kept"
        lines.append(
            FunnelLine(
                stage=stage["stage"], rows_in=stage["rows_in"], kept=stage["kept"], dropped=sum(stage["dropped"].values()),
                reasons=[(reason_words(reason), count) for reason, count in reasons[:REASONS_SHOWN]], others=len(reasons[REASONS_SHOWN:]),
                others_rows=sum(count for _, count in reasons[REASONS_SHOWN:]), figure=bar(segments, said),
            )
        )  # fmt: skip
    return lines


@dataclass(frozen=True, kw_only=True)
class Control:
    """A number that says whether the pairs may be trusted."""

    name: str
    value: str
    should: str
    meaning: str
    state: str
    """"fine", "watch" or "off"."""
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


_EXPECTED = (
    _Expected(
        ("controls", "roundtrip_win_rate"), "Round trip wins", (0.0, 0.55), (0.0, 0.6), "at most 55 %",
        "An image that only passed through the autoencoder, against its source. If it wins, scores reward the encoding, not the change.",
    ),
    _Expected(
        ("controls", "neutral_edit_win_rate"), "Neutral edit wins", (0.35, 0.6), (0.2, 0.7), "near 50 %",
        "The same editor told to keep everything. Far below, the editor harms what it touches; far above, scorers like its hand.",
    ),
    _Expected(
        ("controls", "fingerprint_auc"), "Fingerprint", (0.0, 0.8), (0.0, 0.95), "at most 0.80, best 0.50",
        "How well a small probe that never sees the prompt tells chosen from rejected (area under the curve). Near 1, tuning would "
        "learn the editor's hand instead of the content.", as_percent=False,
    ),
    _Expected(
        ("pairs", "judge_prefers_edit"), "Judge prefers the edit", (0.75, 1.0), (0.6, 1.0), "at least 75 %",
        "Among kept pairs, how often a judge that had no say in the labels agrees that the edit is better.",
    ),
)  # fmt: skip


def controls(summary: Mapping[str, Any]) -> list[Control]:
    """The controls that the run measured, each beside what it should be."""
    found = []
    for expected in _EXPECTED:
        value = summary.get(expected.where[0], {}).get(expected.where[1])
        if value is None or math.isnan(value):  # too few pairs to say anything
            continue
        state = "fine" if expected.fine[0] <= value <= expected.fine[1] else "off"
        if state == "off" and expected.watch[0] <= value <= expected.watch[1]:
            state = "watch"
        text = percent(value) if expected.as_percent else number(value, 2)
        drawn = gauge(value, expected.fine, f"{expected.name}: {text}, should be {expected.should}")
        found.append(Control(name=expected.name, value=text, should=expected.should, meaning=expected.meaning, state=state, figure=drawn))
    return found


@dataclass(frozen=True, kw_only=True)
class TrainingChart:
    """One figure of the training section."""

    title: str
    note: str
    legend: list[tuple[str, str]]
    """(class, name) of each curve, for more than one."""
    figure: Markup


def _points(steps: Sequence[Mapping[str, Any]], field: str) -> list[tuple[float, float]]:
    return [(float(line["step"]), float(line[field])) for line in steps if field in line and math.isfinite(line[field])]


def running_mean(points: Points) -> list[tuple[float, float]]:
    """Mean over a window of a twentieth of the curve, shorter at its beginning; short curves stay as they are."""
    window = len(points) // 20
    if window < 2:
        return list(points)
    values = np.array([y for _, y in points])
    sums = np.concatenate([[0.0], values.cumsum()])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    means = (sums[ends] - sums[starts]) / (ends - starts)
    return [(x, float(mean)) for (x, _), mean in zip(points, means, strict=True)]


def _curve(
    title: str, note: str, steps: Sequence[Mapping[str, Any]], fields: Mapping[str, tuple[str, str]], *,
    smooth: bool = True, band: tuple[Points, Points] | None = None, level: float | None = None,
) -> TrainingChart | None:  # fmt: skip
    """A chart of some fields ({field: (name, class)}), `smooth` by their running mean; `None` if none was logged."""
    lines = []
    for field, (name, kind) in fields.items():
        if points := _points(steps, field):
            lines.append(Line(name=name, kind=kind, points=thin(running_mean(points) if smooth else points, POINTS_MAX)))
    if not lines:
        return None
    legend = [(line.kind, line.name) for line in lines] if len(lines) > 1 else []
    return TrainingChart(title=title, note=note, legend=legend, figure=chart(lines, title, band=band, level=level))


def training(steps: Sequence[Mapping[str, Any]]) -> list[TrainingChart]:
    """The curves of the training, as far as they were logged."""
    steps = [line for line in steps if "step" in line]
    low, high = (thin(running_mean(_points(steps, f"margin_{edge}")), POINTS_MAX) for edge in ("p10", "p90"))
    charts = [
        _curve("Loss", "What is minimised.", steps, {"loss": ("loss", "tuned")}),
        _curve(
            "Error against the reference", "Below zero the model fits that side better than before. Chosen must not rise above zero.",
            steps, {"chosen_over_reference": ("chosen", "tuned"), "rejected_over_reference": ("rejected", "lost"),
                "held_out_chosen_over_reference": ("chosen, held out", "base")}, level=0.0,
        ),
        _curve(
            "Margin", "Median, and the middle 80 % of pairs. Above zero the chosen side is preferred.", steps,
            {"margin_p50": ("median", "tuned")}, band=(low, high) if low and high else None, level=0.0,
        ),
        _curve(
            "Accuracy on held-out pairs", "Share of unseen pairs whose chosen side is preferred, at fixed noise. Chance is 50 %.", steps,
            {"held_out_accuracy": ("accuracy", "tuned")}, smooth=False, level=0.5,
        ),
        _curve("Gradient norm", "Before clipping.", steps, {"gradient_norm": ("gradient norm", "base")}),
        _curve("Learning rate", "", steps, {"lr": ("learning rate", "base")}, smooth=False),
    ]  # fmt: skip
    return [found for found in charts if found is not None]


def alarm(steps: Sequence[Mapping[str, Any]]) -> str:
    """What the trainer's alarm said, or nothing if it kept silent."""
    rung = [line for line in steps if line.get("alarm")]
    if not rung:
        return ""
    why = dict.fromkeys(reason for line in rung for reason in line["alarm"].split("; "))
    return f"The alarm rang at {len(rung)} of {len(steps)} steps, first at {rung[0]['step']}: {'; '.join(why)}."


@dataclass(frozen=True, kw_only=True)
class TimeLine:
    """How long a part took."""

    name: str
    seconds: float
    figure: Markup


def times(seconds: Mapping[str, float]) -> list[TimeLine]:
    """Every stage as a bar of the longest."""
    longest = max(seconds.values(), default=0.0) or 1.0
    return [
        TimeLine(name=name, seconds=value, figure=bar([Segment(share=value / longest, kind="base")], f"{name}: {value:.1f} s", height=10))
        for name, value in seconds.items()
    ]
