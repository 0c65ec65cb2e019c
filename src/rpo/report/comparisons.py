"""All compared models at a glance: who wins how often, and on which kinds of prompts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from rpo.report.figures import Line, Segment, bar, chart, interval
from rpo.report.sections import MAIN_METRIC
from rpo.report.wording import is_share, label, number, percent, signed

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


def forest(comparisons: Comparisons) -> list[tuple[str, list[WinLine]]]:
    """(model, its win rates against the first model with their intervals), rewards that chose training pairs last, with a dagger."""
    found: list[tuple[str, list[WinLine]]] = []
    for model, metrics in comparisons.items():
        compared = {name: told for name, told in metrics.items() if "win_ci95" in told}
        lines = [_win_line(name, compared[name]) for name in sorted(compared, key=lambda name: "used_in_labelling" in compared[name])]
        if lines:
            found.append((model, lines))
    return found


def _win_line(name: str, told: Mapping[str, Any]) -> WinLine:
    low, high = told["win_ci95"]
    labelled = "used_in_labelling" in told
    kind = "open" if labelled or low <= 0.5 <= high else "better" if low > 0.5 else "worse"
    span = f"{percent(low, 0)} to {percent(high, 0)}"
    return WinLine(
        metric=label(name) + " †" * labelled,
        win_rate=percent(told["win_rate"], 0),
        ci95=span,
        kind=kind,
        figure=interval(low - 0.5, told["win_rate"] - 0.5, high - 0.5, 0.5, kind, f"{label(name)}: wins {span}"),
        n=told["n"],
    )


@dataclass(frozen=True, kw_only=True)
class KindLine:
    """One kind of prompt, both models."""

    name: str
    n: int
    bars: list[tuple[str, str, Markup]]
    """(model's name, its figure, its bar)."""


def by_kind(metrics: Mapping[str, Mapping[str, Any]], names: tuple[str, str]) -> list[KindLine]:
    """The main metric by kind of prompt; empty where kinds are unknown or the metric is no fraction."""
    main = MAIN_METRIC if MAIN_METRIC in metrics else next(iter(metrics), "")
    kinds = metrics.get(main, {}).get("categories", {})
    if not all(is_share(told) for told in kinds.values()):
        return []
    lines: list[KindLine] = []
    for name, told in kinds.items():
        sides = [(shown, told[side], side) for shown, side in zip(names, ("base", "tuned"), strict=True)]
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
    if not told:
        return [], Markup("")
    lines = [
        RoundLine(
            number=line["round"],
            sources=line["sources"],
            pairs=line["pairs"],
            validation=signed(100 * line["validation_gain"]),
            test=signed(100 * line[main]["difference"]),
            ci95="{} to {}".format(*(signed(100 * end) for end in line[main]["ci95"])),
            drift="–" if line["drift"] is None else number(line["drift"], 2),
            diversity="–" if line["diversity"] is None else number(line["diversity"]["tuned"], 2),
        )
        for line in told
    ]
    base = 100 * told[0][main]["base"]
    points = [(0.0, base)] + [(line["round"], 100 * line[main]["tuned"]) for line in told]
    whiskers = [(line["round"], *(base + 100 * end for end in line[main]["ci95"])) for line in told]
    drawn = chart([Line(name=label(main), kind="tuned", points=points, whiskers=whiskers)], f"{label(main)} over rounds", level=base)
    return lines, drawn
