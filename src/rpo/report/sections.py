"""The page's numbers and figures: result, funnel, controls, training, time. Each builder takes plain values and may find nothing."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import numpy as np
from markupsafe import Markup

from rpo.data.formats.dropped import commonest, others
from rpo.evaluation.judges import DIVERSITY, DRIFT, FRECHET, is_compared, metric_of, value_of, verdict
from rpo.evaluation.tables import few_prompts, in_order, loss_sentence
from rpo.report.figures import Line, Points, Segment, bar, chart, interval
from rpo.report.format import MINUS, change, headline, label, number, p_value, percent, reason_words, span, value
from rpo.report.sampling import thin

POINTS_MAX = 300
ALREADY_RIGHT = "no_issue"
"""The reason of rows in which the critic found nothing to change: no fault of the run."""


@dataclass(frozen=True, kw_only=True)
class MetricLine:
    """One row of the table of metrics."""

    name: str
    base: str
    tuned: str
    difference: str
    ci95: str
    p: str
    """After Holm's correction over the metrics of this model."""
    win_rate: str
    n: int
    kind: str
    """"better", "worse" or "open"."""
    figure: Markup
    """The interval on an axis of its own; empty where there is none."""
    limit: str
    """The end of that axis."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """The headline and the table under it."""

    main: MetricLine
    unit: str
    """" points" for a fraction, else nothing."""
    sentence: str
    losses: str
    """Which other metrics got worse, or nothing."""
    bars: list[tuple[str, str, Markup]]
    """(which model, its figure, its bar); empty for a metric that is no fraction."""
    lines: list[MetricLine]
    notes: list[str]
    """What the numbers under the table mean."""


def nice_limit(reach: float) -> float:
    """The end of an axis that holds `reach`: 1, 2 or 5 times a power of ten."""
    if reach <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(reach))
    return next(step * power for step in (1, 2, 5, 10) if reach <= step * power * (1 + 1e-9))


def _metric_line(name: str, numbers: Mapping[str, Any], names: tuple[str, str]) -> MetricLine:
    labelled = "used_in_labelling" in numbers
    kind, ends = "open" if labelled else verdict(numbers), numbers["ci95"]
    drawn, limit = Markup(""), 0.0
    if ends is not None:
        limit = nice_limit(max(abs(end) for end in ends))
        drawn = interval(ends[0], numbers["difference"], ends[1], limit, kind, f"{label(name)}: difference {span(numbers)}")
    return MetricLine(
        name=label(name) + " †" * labelled,
        base=value(numbers, value_of(numbers, names[0], "base")),
        tuned=value(numbers, value_of(numbers, names[1], "tuned")),
        difference=change(numbers, numbers["difference"]),
        ci95=span(numbers),
        p=p_value(numbers),
        win_rate=percent(numbers["win_rate"]) if "win_rate" in numbers else "–",
        n=numbers["n"],
        kind=kind,
        figure=drawn,
        limit=f"{100 * limit:g}" if metric_of(numbers).kind == "fraction" else f"{limit:g}",
    )


def result(evaluation: Mapping[str, Mapping[str, Any]], main: str, names: tuple[str, str] = ("base", "tuned")) -> Result | None:
    """The section on the outcome, of the models `names`, with the headline `main`; `None` without an evaluation."""
    metrics = {name: evaluation[name] for name in in_order(evaluation, main) if is_compared(evaluation[name])}
    if not metrics:
        return None
    main = main if main in metrics else next(iter(metrics))
    lines = {name: _metric_line(name, numbers, names) for name, numbers in metrics.items()}
    bars, fraction = [], metric_of(metrics[main]).kind == "fraction"
    for name, side in zip(names, ("base", "tuned"), strict=True) if fraction else ():
        mean = value_of(metrics[main], name, side)
        bars.append((name, percent(mean), bar([Segment(share=mean, kind=side)], f"{name}: {percent(mean)}", height=14)))
    return Result(
        main=lines[main], unit=" points" if fraction else "", sentence=headline(main, metrics[main], names),
        losses=loss_sentence(metrics, main).replace("-", MINUS), bars=bars, lines=list(lines.values()), notes=_notes(evaluation, names),
    )  # fmt: skip


def _notes(evaluation: Mapping[str, Mapping[str, Any]], names: tuple[str, str]) -> list[str]:
    notes = ["Fractions in per cent, their differences in percentage points; other metrics in their own unit. Ties count as half a win."]
    notes += [
        "Each interval has an axis of its own, whose end is written beside it. p: signed-rank test over prompts, after Holm's correction"
    ]
    notes[-1] += " over the metrics of this model; colored where it is below 0.05 and the interval excludes zero."
    notes += [said for said in (few_prompts(evaluation.values()),) if said]
    if frechet := evaluation.get(FRECHET):
        sides = [value_of(frechet, name, role) for name, role in zip(names, ("base", "tuned"), strict=True)]
        a, b = (number(side, 1 if sides[0] >= 10 else 3) for side in sides)
        notes.append(f"Fréchet distance to reference images (lower is nearer){_judged(frechet)}: {a} for {names[0]}, {b} for {names[1]}.")
    if drift := evaluation.get(DRIFT):
        moved = number(value_of(drift, names[1], "tuned"), 2)
        notes.append(f"Drift, the distance of an image from {names[0]}'s of the same noise{_judged(drift)}: {moved} on average.")
    if diversity := evaluation.get(DIVERSITY):
        notes.append(f"Diversity: how far apart the images of one prompt lie{_judged(diversity)}.")
    if any("used_in_labelling" in numbers for numbers in evaluation.values()):
        notes.append("† chose the training pairs, or took part in making them: its gain is what was asked for, not evidence.")
    return notes


def _judged(numbers: Mapping[str, Any]) -> str:
    return f", on the features of {numbers['judge']}" if "judge" in numbers else ""


def facts(record: Mapping[str, Any], summary: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]) -> list[str]:
    """What was run: recipe, model, steps, date, version and commit, as far as the folder tells."""
    recipe: Mapping[str, Any] = record["recipe"] if isinstance(record.get("recipe"), dict) else {}
    trained, versions = summary.get("training", {}).get("model"), record.get("versions") or {}
    model = trained or (recipe.get("generator") or {}).get("model")
    last = next((line["step"] for line in reversed(steps) if "step" in line), None)
    date, commit = str(record.get("date", "")).partition("+")[0].replace("T", " "), record.get("git")
    found = [
        f"recipe {recipe['name']}" if recipe.get("name") else "",
        f"model {_short(model)}" if model else "",
        f"{last:,} training steps" if last is not None else "",
        f"{date} UTC" if date else "",
        f"rpo {versions['rpo']}" if versions.get("rpo") else "",
        f"commit {commit[:8]}" if commit else "",
    ]
    return [fact for fact in found if fact]


def _short(model: str) -> str:
    """A model of the Hub by its whole name, a folder by the last two parts of its path."""
    return "/".join(PurePath(model).parts[-2:]) if PurePath(model).is_absolute() else model


@dataclass(frozen=True, kw_only=True)
class FunnelLine:
    """One stage of the funnel."""

    stage: str
    rows_in: int
    kept: int
    dropped: int
    """Without the rows that were right already."""
    right: int
    """Rows in which the critic found nothing to change."""
    reasons: list[tuple[str, int]]
    others: int
    """Reasons not listed."""
    others_rows: int
    figure: Markup


def _segment_kind(reason: str, place: int) -> str:
    return "fine" if reason == ALREADY_RIGHT else "failed" if reason.startswith("error:") else f"dropped d{place % 3}"


def funnel(stages: Sequence[Mapping[str, Any]]) -> list[FunnelLine]:
    """Every stage as a bar of what the first stage began with."""
    whole = max((stage["rows_in"] for stage in stages), default=0) or 1
    lines = []
    for stage in stages:
        shown, rest = commonest(stage["dropped"])
        segments = [Segment(share=stage["kept"] / whole, kind="kept", title=f"kept {stage['kept']}")]
        segments += [
            Segment(share=count / whole, kind=_segment_kind(reason, i), title=f"{reason_words(reason)} {count}")
            for i, (reason, count) in enumerate(shown)
        ]
        segments += [Segment(share=sum(count for _, count in rest) / whole, kind="dropped d0", title=others(rest))] if rest else []
        said = f"{stage['stage']}: {stage['rows_in']} rows in, {stage['kept']} kept"
        right = stage["dropped"].get(ALREADY_RIGHT, 0)
        reasons, more = commonest({reason: many for reason, many in stage["dropped"].items() if reason != ALREADY_RIGHT})
        lines.append(
            FunnelLine(
                stage=stage["stage"], rows_in=stage["rows_in"], kept=stage["kept"],
                dropped=sum(stage["dropped"].values()) - right, right=right,
                reasons=[(reason_words(reason), count) for reason, count in reasons], others=len(more),
                others_rows=sum(count for _, count in more), figure=bar(segments, said),
            )
        )  # fmt: skip
    return lines


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
