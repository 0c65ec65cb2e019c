"""The page of a study: what each arm gains, over source images and over compute, and in which kind of error."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from rpo.core.parquet import write_text
from rpo.evaluation.judges import metric_of, verdict
from rpo.report.figures import Line, chart, interval
from rpo.report.format import change, label, signed, span, value
from rpo.report.page import template
from rpo.report.sections import nice_limit

STUDY_PAGE = "study.html"
_KINDS = ("tuned", "base", "lost", "d0", "d2", "mark")
"""Classes that colour the arms that are drawn as curves."""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """An effect in the metric's unit, with its interval drawn."""

    text: str
    ci95: str
    kind: str
    """"better", "worse" or "open"."""
    figure: Markup


def _drawn(effect: Mapping[str, Any] | None, how: Mapping[str, Any], limit: float, name: str) -> Drawn | None:
    if effect is None:
        return None
    told = {"kind": metric_of(how).kind, "better": metric_of(how).better, "ci95": effect["ci95"]}
    kind, between, figure = verdict(told), span(told), Markup("")
    if effect["ci95"] is not None:
        figure = interval(effect["ci95"][0], effect["mean"], effect["ci95"][1], limit, kind, f"{name}: {between}")
    return Drawn(text=change(told, effect["mean"]), ci95=between, kind=kind, figure=figure)


def _limit(effects: Sequence[Mapping[str, Any]]) -> float:
    return nice_limit(max((abs(end) for effect in effects for end in effect["ci95"] or ()), default=0.0))


@dataclass(frozen=True, kw_only=True)
class ArmLine:
    """One arm at the largest size."""

    name: str
    says: str
    over_base: Drawn | None
    over_first: Drawn | None
    beside: list[str]
    """Changes of the metrics that the study names beside the headline."""
    winner_drift: str
    pairs: str
    seeds: int
    alarms: int
    setting: str
    kinds: list[tuple[str, str]]
    """(change, verdict) of every other metric."""


def _core_minutes(about: Mapping[str, Any], arm: Mapping[str, Any], cell: Mapping[str, Any]) -> float:
    """Of making an arm's pairs from its source images, and of training on them."""
    shares = [about["curations"][name] for name in arm["pairs_from"]]
    curation = sum(told["core_seconds"] * cell["sources"] / len(shares) / told["sources"] for told in shares)
    return (curation + float(np.mean(cell["core_seconds"]))) / 60


def _curves(about: Mapping[str, Any], headline: str) -> list[tuple[str, Markup, list[tuple[str, str]]]]:
    """(title, figure, legend) of the arms that were trained at several sizes."""
    by_arm = {arm["name"]: [cell for cell in about["cells"] if cell["arm"] == arm["name"]] for arm in about["arms"]}
    several = [arm for arm in about["arms"] if len(by_arm[arm["name"]]) > 1][: len(_KINDS)]
    if not several:
        return []
    legend = [(kind, arm["name"]) for kind, arm in zip(_KINDS, several, strict=False)]
    fraction = metric_of(about["cells"][0]["metrics"][headline]).kind == "fraction"
    factor, unit = (100, ", %,") if fraction else (1, "")
    base = float(np.mean([cell["metrics"][headline]["base"] for cell in by_arm[several[0]["name"]]]))

    def lines(x_of: Any) -> list[Line]:
        drawn: list[Line] = []
        for kind, arm in zip(_KINDS, several, strict=False):
            cells = by_arm[arm["name"]]
            tuned = [cell["metrics"][headline] for cell in cells]
            points = [(x_of(arm, cell), factor * told["tuned"]) for cell, told in zip(cells, tuned, strict=True)]
            spread = [[factor * (told["base"] + end) for end in told["difference"]["ci95"] or ()] for told in tuned]
            whiskers = [(x, ends[0], ends[1]) for (x, _), ends in zip(points, spread, strict=True) if ends]
            drawn.append(Line(name=arm["name"], kind=kind, points=points, whiskers=whiskers))
        return drawn

    name = label(headline)
    by_sources = chart(lines(lambda arm, cell: cell["sources"]), f"{name} over source images", level=factor * base)
    by_minutes = chart(lines(lambda arm, cell: _core_minutes(about, arm, cell)), f"{name} over core-minutes", level=factor * base)
    return [
        (f"{name}{unit} over source images", by_sources, legend),
        (f"{name}{unit} over core-minutes of curation and training", by_minutes, legend),
    ]


def _arm_lines(about: Mapping[str, Any], headline: str, kinds: Sequence[str]) -> tuple[list[ArmLine], float, float]:
    """The arms at the largest size, and the ends of the two axes."""
    largest = max(cell["sources"] for cell in about["cells"])
    cells = [cell for cell in about["cells"] if cell["sources"] == largest]
    says = {arm["name"]: arm["says"] for arm in about["arms"]}
    base_limit = _limit([cell["metrics"][headline]["difference"] for cell in cells])
    first_limit = _limit([cell["over_first"] for cell in cells if cell["over_first"]])
    lines: list[ArmLine] = []
    for cell in cells:
        own = {kind: cell["metrics"][kind] | {"ci95": cell["metrics"][kind]["difference"]["ci95"]} for kind in kinds}
        how = cell["metrics"][headline]
        named = [cell["metrics"].get(name) for name in about.get("beside", ())]
        lines.append(
            ArmLine(
                name=cell["arm"],
                says=says[cell["arm"]],
                over_base=_drawn(how["difference"], how, base_limit, cell["arm"]),
                over_first=_drawn(cell["over_first"], how, first_limit, cell["arm"]),
                beside=["–" if told is None else change(told, told["difference"]["mean"]) for told in named],
                winner_drift="–" if cell["winner_drift"] is None else signed(cell["winner_drift"], 4),
                pairs=f"{np.mean(cell['pairs']):.0f}",
                seeds=len(cell["seeds"]),
                alarms=cell["alarms"],
                setting=cell["setting"],
                kinds=[(change(own[kind], own[kind]["difference"]["mean"]), verdict(own[kind])) for kind in kinds],
            )
        )
    return lines, base_limit, first_limit


def write_study_page(folder: Path, about: Mapping[str, Any]) -> Path:
    """Writes `study.html` from what `study.json` holds; returns its path."""
    headline = about["headline"]
    metrics, beside = about["cells"][0]["metrics"], about.get("beside", ())
    how = metrics[headline]
    factor = 100 if metric_of(how).kind == "fraction" else 1
    kinds = [name for name in metrics if name not in (headline, *beside) and metric_of(metrics[name]).bounded]
    lines, base_limit, first_limit = _arm_lines(about, headline, kinds)
    page = template("study.html.jinja").render(
        about=about,
        headline=label(headline),
        base=value(how, how["base"]),
        unit="in percentage points" if factor == 100 else "in its own unit",
        beside=[label(name) for name in beside],
        largest=max(cell["sources"] for cell in about["cells"]),
        first=about["arms"][0]["name"],
        curves=_curves(about, headline),
        lines=lines,
        kinds=[label(kind) for kind in kinds],
        limits=[f"{factor * limit:g}" for limit in (base_limit, first_limit)],
        searches=[arm for arm in about["arms"] if arm["search"]],
        points=lambda gain: change(how, gain),
    )
    write_text(folder / STUDY_PAGE, page)
    return folder / STUDY_PAGE
