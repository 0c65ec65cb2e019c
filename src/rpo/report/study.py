"""The page of a study: what each arm gains, over source images and over compute, and in which kind of error."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from rpo.data.shards import write_text
from rpo.report.figures import Line, chart, interval
from rpo.report.page import template
from rpo.report.wording import label, percent, signed, verdict

STUDY_PAGE = "study.html"
_KINDS = ("tuned", "base", "lost", "d0", "d2", "mark")
"""Classes that colour the arms that are drawn as curves."""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """An effect in points, with its interval drawn."""

    text: str
    ci95: str
    kind: str
    """"better", "worse" or "open"."""
    figure: Markup


def _drawn(effect: Mapping[str, Any] | None, limit: float, name: str) -> Drawn | None:
    if effect is None:
        return None
    low, high = effect["ci95"]
    kind = verdict(effect)
    span = f"{signed(100 * low)} to {signed(100 * high)}"
    figure = interval(low, effect["mean"], high, limit, kind, f"{name}: {span} points")
    return Drawn(text=signed(100 * effect["mean"]), ci95=span, kind=kind, figure=figure)


def _limit(effects: Sequence[Mapping[str, Any]]) -> float:
    reach = max((abs(end) for effect in effects for end in effect["ci95"]), default=0.0)
    return next((step for step in (0.05, 0.1, 0.2, 0.3, 0.5) if reach <= step), 1.0)


@dataclass(frozen=True, kw_only=True)
class ArmLine:
    """One arm at the largest size."""

    name: str
    says: str
    over_base: Drawn | None
    over_first: Drawn | None
    quality: str
    winner_drift: str
    pairs: str
    seeds: int
    alarms: int
    setting: str
    kinds: list[tuple[str, str]]
    """(change in points, verdict) of every kind of error."""


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
    base = float(np.mean([cell["metrics"][headline]["base"] for cell in by_arm[several[0]["name"]]]))

    def lines(x_of: Any) -> list[Line]:
        drawn: list[Line] = []
        for kind, arm in zip(_KINDS, several, strict=False):
            cells = by_arm[arm["name"]]
            tuned = [cell["metrics"][headline] for cell in cells]
            points = [(x_of(arm, cell), 100 * told["tuned"]) for cell, told in zip(cells, tuned, strict=True)]
            spread = [[100 * (told["base"] + end) for end in told["difference"]["ci95"]] for told in tuned]
            whiskers = [(x, low, high) for (x, _), (low, high) in zip(points, spread, strict=True)]
            drawn.append(Line(name=arm["name"], kind=kind, points=points, whiskers=whiskers))
        return drawn

    name = label(headline)
    by_sources = chart(lines(lambda arm, cell: cell["sources"]), f"{name} over source images", level=100 * base)
    by_minutes = chart(lines(lambda arm, cell: _core_minutes(about, arm, cell)), f"{name} over core-minutes", level=100 * base)
    return [
        (f"{name}, %, over source images", by_sources, legend),
        (f"{name}, %, over core-minutes of curation and training", by_minutes, legend),
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
        effects = {kind: cell["metrics"][kind]["difference"] for kind in kinds}
        quality = cell["metrics"].get("quality")
        lines.append(
            ArmLine(
                name=cell["arm"],
                says=says[cell["arm"]],
                over_base=_drawn(cell["metrics"][headline]["difference"], base_limit, cell["arm"]),
                over_first=_drawn(cell["over_first"], first_limit, cell["arm"]),
                quality=signed(quality["difference"]["mean"], 3) if quality else "–",
                winner_drift="–" if cell["winner_drift"] is None else signed(cell["winner_drift"], 4),
                pairs=f"{np.mean(cell['pairs']):.0f}",
                seeds=len(cell["seeds"]),
                alarms=cell["alarms"],
                setting=cell["setting"],
                kinds=[(signed(100 * effects[kind]["mean"]), verdict(effects[kind])) for kind in kinds],
            )
        )
    return lines, base_limit, first_limit


def write_study_page(folder: Path, about: Mapping[str, Any]) -> Path:
    """Writes `study.html` from what `study.json` holds; returns its path."""
    headline = about["headline"]
    metrics = about["cells"][0]["metrics"]
    kinds = [name for name in metrics if name not in (headline, "quality") and 0 <= metrics[name]["base"] <= 1]
    lines, base_limit, first_limit = _arm_lines(about, headline, kinds)
    page = template("study.html.jinja").render(
        about=about,
        headline=label(headline),
        base=percent(about["cells"][0]["metrics"][headline]["base"]),
        largest=max(cell["sources"] for cell in about["cells"]),
        first=about["arms"][0]["name"],
        curves=_curves(about, headline),
        lines=lines,
        kinds=[label(kind) for kind in kinds],
        limits=[signed(100 * limit, 0) for limit in (base_limit, first_limit)],
        searches=[arm for arm in about["arms"] if arm["search"]],
        points=lambda value: signed(100 * value),
    )
    write_text(folder / STUDY_PAGE, page)
    return folder / STUDY_PAGE
