"""Figures as inline SVG, without a plotting library. Colours are classes of the page's style, so they follow light and dark.

Text enters through `Markup.format`, which escapes it. Bars stretch to the width they are given; charts keep their shape.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

Points = Sequence[tuple[float, float]]

_WIDTH, _HEIGHT = 360, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 10, 26


def _join(parts: Sequence[Markup]) -> Markup:
    return Markup("").join(parts)


def _stretching(label: str, height: int, parts: Sequence[Markup]) -> Markup:
    opening = Markup(
        '<svg class="bar" role="img" aria-label="{}" viewBox="0 0 1000 {}" height="{}" width="100%" preserveAspectRatio="none">'
    )
    return opening.format(label, height, height) + _join(parts) + Markup("</svg>")


def _rect(x: float, width: float, y: float, height: float, kind: str, title: str = "") -> Markup:
    tip = Markup("<title>{}</title>").format(title) if title else Markup("")
    return Markup('<rect x="{:.1f}" y="{}" width="{:.1f}" height="{}" class="{}">{}</rect>').format(x, y, width, height, kind, tip)


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A stretch of a bar."""

    share: float
    """Of the whole width, 0 to 1."""
    kind: str
    """Class that colours it."""
    title: str = ""
    """Shown when pointed at."""


def bar(segments: Sequence[Segment], label: str, height: int = 18) -> Markup:
    """Segments side by side from the left; the rest of the width stays an empty track."""
    parts, x = [_rect(0, 1000, 0, height, "track")], 0.0
    for segment in segments:
        width = 1000 * min(max(segment.share, 0.0), 1.0)
        if width > 0:
            parts.append(_rect(x, max(width, 2.0), 0, height, segment.kind, segment.title))
        x += width
    return _stretching(label, height, parts)


def gauge(value: float, fine: tuple[float, float], label: str) -> Markup:
    """A mark at `value` on a track from 0 to 1, the stretch `fine` where it should be."""
    low, high = fine
    parts = [_rect(0, 1000, 7, 8, "track"), _rect(1000 * low, 1000 * (high - low), 7, 8, "fine")]
    parts.append(_rect(min(max(1000 * value - 3, 0), 994), 6, 0, 22, "mark"))
    return _stretching(label, 22, parts)


def interval(low: float, middle: float, high: float, limit: float, kind: str, label: str) -> Markup:
    """An interval and its middle on an axis from -limit to limit, with a line at zero."""

    def at(value: float) -> float:
        return 500 * (1 + min(max(value / limit, -1.0), 1.0))

    span = _rect(at(low), max(at(high) - at(low), 3.0), 7, 6, f"span {kind}")
    return _stretching(label, 20, [_rect(499, 2, 0, 20, "zero"), span, _rect(at(middle) - 3, 6, 3, 14, f"point {kind}")])


def ticks(low: float, high: float, most: int = 4) -> list[float]:
    """Round numbers that span the range: steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    rough = (high - low) / most
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _tick_label(value: float, step: float) -> str:
    if value == 0:
        return "0"
    if abs(value) >= 10_000 or step < 1e-4:
        digits = max(0, math.floor(math.log10(abs(value)) + 1e-9) - math.floor(math.log10(step) + 1e-9))
        return f"{value:.{digits}e}".replace("e-0", "e-").replace("e+0", "e").replace("-", "\N{MINUS SIGN}")
    return f"{value:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}".replace("-", "\N{MINUS SIGN}")


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve of a chart."""

    name: str
    kind: str
    """Class that colours it."""
    points: Points
    whiskers: Sequence[tuple[float, float, float]] = ()
    """(x, low, high) of intervals around the points."""


@dataclass(frozen=True)
class _Scale:
    x0: float
    x1: float
    y0: float
    y1: float

    def at(self, x: float, y: float) -> str:
        left = _LEFT + (x - self.x0) / (self.x1 - self.x0) * (_WIDTH - _LEFT - _RIGHT)
        top = _HEIGHT - _BOTTOM - (y - self.y0) / (self.y1 - self.y0) * (_HEIGHT - _TOP - _BOTTOM)
        return f"{left:.1f},{top:.1f}"


def _scale(points: Points, level: float | None) -> _Scale:
    xs, ys = [x for x, _ in points], [y for _, y in points] + ([] if level is None else [level])
    x0, x1, y0, y1 = min(xs), max(xs), min(ys), max(ys)
    room = 0.06 * (y1 - y0) if y1 - y0 > 1e-6 * max(abs(y0), abs(y1)) else abs(y0) * 0.1 or 1.0
    return _Scale(x0, x1 if x1 > x0 else x0 + 1, y0 - room, y1 + room)


def _axes(scale: _Scale) -> list[Markup]:
    parts = []
    values = ticks(scale.y0, scale.y1)
    step = values[1] - values[0] if len(values) > 1 else 1.0
    for y in values:
        left, top = scale.at(scale.x0, y).split(",")
        parts.append(Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(left, _WIDTH - _RIGHT, top, top))
        parts.append(
            Markup('<text class="tick" x="{}" y="{}" dy="4" text-anchor="end">{}</text>').format(_LEFT - 7, top, _tick_label(y, step))
        )
    steps = [x for x in ticks(scale.x0, scale.x1) if x == int(x)] or [scale.x0]
    for x in steps:
        left = scale.at(x, scale.y0).split(",")[0]
        anchor = "end" if float(left) > _WIDTH - _RIGHT - 12 else "middle"
        parts.append(Markup('<text class="tick" x="{}" y="{}" text-anchor="{}">{:.0f}</text>').format(left, _HEIGHT - 7, anchor, x))
    return parts


def chart(lines: Sequence[Line], label: str, *, band: tuple[Points, Points] | None = None, level: float | None = None) -> Markup:
    """Curves over whole numbers; `band` is (lower, upper) edge of a shaded stretch, `level` a dashed line to compare with."""
    every = [point for line in lines for point in line.points] + [point for edge in band or () for point in edge]
    every += [(x, end) for line in lines for x, *ends in line.whiskers for end in ends]
    scale = _scale(every, level)
    parts = _axes(scale)
    if band is not None:
        outline = [*band[0], *reversed(band[1])]
        parts.append(Markup('<polygon class="band" points="{}"/>').format(" ".join(scale.at(x, y) for x, y in outline)))
    if level is not None:
        (x1, y1), (x2, y2) = (scale.at(x, level).split(",") for x in (scale.x0, scale.x1))
        parts.append(Markup('<line class="level" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(x1, y1, x2, y2))
    for line in lines:
        for x, low, high in line.whiskers:
            (left, bottom), (_, top) = (scale.at(x, y).split(",") for y in (low, high))
            parts.append(Markup('<line class="curve {}" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(line.kind, left, left, bottom, top))
        where = " ".join(scale.at(x, y) for x, y in line.points)
        if len(line.points) == 1:
            parts.append(Markup('<circle class="dot {}" cx="{}" cy="{}" r="3"/>').format(line.kind, *where.split(",")))
        parts.append(Markup('<polyline class="curve {}" points="{}"/>').format(line.kind, where))
    opening = Markup('<svg class="chart" role="img" aria-label="{}" viewBox="0 0 {} {}">').format(label, _WIDTH, _HEIGHT)
    return opening + _join(parts) + Markup("</svg>")


BINS = 31


def histogram(values: Sequence[float], label: str, *, marks: Sequence[float] = ()) -> Markup:
    """How often values occur, about zero; the outer two of a hundred on either side are in the last bars. `marks` are dashed lines."""
    ordered = sorted(values)
    edge = len(ordered) // 50
    low, high = min(ordered[edge], 0.0, *marks), max(ordered[-1 - edge], 0.0, *marks)
    reach = 0.04 * (high - low) or 1.0
    low, high = low - reach, high + reach
    counts = [0] * BINS
    for value in values:
        counts[min(max(int((value - low) / (high - low) * BINS), 0), BINS - 1)] += 1
    scale = _Scale(low, high, 0, 1.05 * max(counts))
    width, step = (_WIDTH - _LEFT - _RIGHT) / BINS, (high - low) / BINS
    parts: list[Markup] = []
    for i, count in enumerate(counts):
        left, top = (float(part) for part in scale.at(low + step * i, count).split(","))
        kind = "kept" if low + step * i >= 0 else "lost" if low + step * (i + 1) <= 0 else "base"
        parts.append(_rect(left + 0.5, width - 1, top, _HEIGHT - _BOTTOM - top, kind, f"{count}"))
    for mark in (0.0, *marks):
        left = scale.at(mark, 0).split(",")[0]
        kind = "level" if mark else "grid"
        parts.append(Markup('<line class="{}" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(kind, left, left, _TOP, _HEIGHT - _BOTTOM))
    steps = ticks(low, high, 6)
    for x in steps:
        left = scale.at(x, 0).split(",")[0]
        parts.append(
            Markup('<text class="tick" x="{}" y="{}" text-anchor="middle">{}</text>').format(left, _HEIGHT - 7, _tick_label(x, step))
        )
    return (
        Markup('<svg class="chart" role="img" aria-label="{}" viewBox="0 0 {} {}">').format(label, _WIDTH, _HEIGHT)
        + _join(parts)
        + Markup("</svg>")
    )
