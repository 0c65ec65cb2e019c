"""All compared models at a glance: who wins how often, and on which kinds of prompts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from rpo.evaluation.judges import SIGNIFICANT, is_compared, metric_of, value_of
from rpo.evaluation.tables import in_order
from rpo.report.figures import Line, Segment, bar, chart, interval
from rpo.report.format import change, label, number, percent, span

Comparisons = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Model -> metric -> its numbers, as in `summary.json`."""


@dataclass(frozen=True, kw_only=True)
class WinLine:
    """How often a model wins on one metric."""

    metric: str
    win_rate: str
    ci95: str
    kind: str
    """"better", "worse" or "open"."""
    figure: Markup
    n: int


def forest(comparisons: Comparisons, main: str) -> list[tuple[str, list[WinLine]]]:
    """(model, its win rates against the first model with their intervals): the headline first, rewards that labelled last, daggered."""
    found: list[tuple[str, list[WinLine]]] = []
    for model, metrics in comparisons.items():
        lines = [_win_line(name, metrics[name]) for name in in_order(metrics, main) if is_compared(metrics[name])]
        if lines:
            found.append((model, lines))
    return found


def _win_line(name: str, told: Mapping[str, Any]) -> WinLine:
    labelled, ends = "used_in_labelling" in told, told["win_ci95"]
    kind, drawn, between = "open", Markup(""), "–"
    if ends is not None:
        low, high = ends
        kind = "open" if labelled or low <= 0.5 <= high or told.get("p_holm", 0) >= SIGNIFICANT else "better" if low > 0.5 else "worse"
        between = f"{percent(low, 0)} to {percent(high, 0)}"
        drawn = interval(low - 0.5, told["win_rate"] - 0.5, high - 0.5, 0.5, kind, f"{label(name)}: wins {between}")
    return WinLine(
        metric=label(name) + " †" * labelled, win_rate=percent(told["win_rate"], 0), ci95=between, kind=kind, figure=drawn, n=told["n"]
    )


@dataclass(frozen=True, kw_only=True)
class KindLine:
    """One kind of prompt, both models."""

    name: str
    n: int
    bars: list[tuple[str, str, Markup]]
    """(model's name, its figure, its bar)."""


def by_kind(metrics: Mapping[str, Mapping[str, Any]], main: str, names: tuple[str, str]) -> list[KindLine]:
    """The headline by kind of prompt; empty where kinds are unknown or the metric is no fraction."""
    kinds = metrics.get(main, {}).get("categories", {})
    if metric_of(metrics.get(main, {})).kind != "fraction":
        return []
    lines: list[KindLine] = []
    for name, told in kinds.items():
        sides = [(shown, value_of(told, shown, side), side) for shown, side in zip(names, ("base", "tuned"), strict=True)]
        bars = [(shown, percent(v, 0), bar([Segment(share=v, kind=side)], f"{shown}: {number(v)}", height=9)) for shown, v, side in sides]
        lines.append(KindLine(name=name, n=told["n"], bars=bars))
    return lines


@dataclass(frozen=True, kw_only=True)
class RoundLine:
    """One round of several."""

    number: int
    sources: int
    pairs: int
    validation: str
    test: str
    ci95: str
    drift: str
    diversity: str


def rounds(told: Sequence[Mapping[str, Any]], main: str) -> tuple[list[RoundLine], Markup]:
    """A line for each round, and the test's figure over them; both empty for a run of one round."""
    if not told or main not in told[0]:
        return [], Markup("")
    lines = [
        RoundLine(
            number=line["round"],
            sources=line["sources"],
            pairs=line["pairs"],
            validation=change(line[main], line["validation_gain"]),
            test=change(line[main], line[main]["difference"]),
            ci95=span(line[main]),
            drift="–" if line["drift"] is None else number(line["drift"], 2),
            diversity="–" if line["diversity"] is None else number(line["diversity"]["tuned"], 2),
        )
        for line in told
    ]
    factor = 100 if metric_of(told[0][main]).kind == "fraction" else 1
    base = factor * told[0][main]["base"]
    points = [(0.0, base)] + [(line["round"], factor * line[main]["tuned"]) for line in told]
    whiskers = [(line["round"], *(base + factor * end for end in line[main]["ci95"])) for line in told if line[main]["ci95"]]
    drawn = chart([Line(name=label(main), kind="tuned", points=points, whiskers=whiskers)], f"{label(main)} over rounds", level=base)
    return lines, drawn
