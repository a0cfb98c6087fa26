"""Line charts as SVG that stands in a page: its colours are the page's, so that it has a dark form.

The page defines the classes `axis`, `grid`, `line`, `dots`, and `line-0` to `line-3` with `dots-0`
to `dots-3`. A chart's words are its title, its axes, a legend, and a description for those who
can't see it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 480, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 76, 14, 48, 42
# a line has no more points than a screen has columns for
_MOST_POINTS = 400
# lines differ without colours too
_DASHES = ("", "7 3", "2 3", "9 3 2 3")

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """A line of a chart, or dots: finite points (x, y), in the order of x."""

    name: str
    points: Sequence[Point]
    dots: bool = False


def running_mean(points: Sequence[Point], window: int) -> list[Point]:
    """At each x the mean of the last `window` values, of fewer at the beginning."""
    totals = [0.0]
    for _, y in points:
        totals.append(totals[-1] + y)
    starts = [max(0, i + 1 - window) for i in range(len(points))]
    return [
        (x, (totals[i + 1] - totals[start]) / (i + 1 - start))
        for i, ((x, _), start) in enumerate(zip(points, starts, strict=True))
    ]


def line_chart(name: str, title: str, series: Sequence[Series], *, x: str, y: str) -> str:
    """The chart's SVG; "" where no series has a point.

    Args:
        name: a word that no other chart of the page has, for its ids.
        x, y: the axes' labels. The y axis begins at zero, and it ends a little above what lines
            reach, and above all but the highest fiftieth of the values, so that one step in
            hundreds does not flatten the others; dots that are higher lie at its end.
    """
    series = [each for each in series if each.points]
    if not series:
        return ""
    xs = [px for each in series for px, _ in each.points]
    ys = sorted(py for each in series for _, py in each.points)
    lines = [py for each in series if not each.dots for _, py in each.points]
    top = max(1.1 * ys[int(0.98 * (len(ys) - 1))], 1.05 * max(lines, default=0.0)) or 1.0
    frame = _Frame(min(xs), max(xs), top)
    described = "; ".join(map(_description, series))
    parts = [
        f'<svg role="img" viewBox="0 0 {WIDTH} {HEIGHT}" aria-labelledby="{name}-t {name}-d">',
        f'<title id="{name}-t">{escape(title)}</title>',
        f'<desc id="{name}-d">{escape(described)}</desc>',
        *_axes(frame, x, y),
    ]
    number = 0
    for place, each in enumerate(series):
        pen = _DOTS if each.dots else _Pen(number)
        number += not each.dots
        parts += [_drawn(frame, each, pen), *_legend(each, pen, place)]
    return "\n".join([*parts, "</svg>"])


class _Pen:
    """How a series is drawn: the line with that number, each in a colour and dashes of its own."""

    def __init__(self, number: int | None) -> None:
        self.number = number

    def line(self, path: str) -> str:
        assert self.number is not None
        dashes = _DASHES[self.number % len(_DASHES)]
        kind = self.number % len(_DASHES)
        return f'<path class="line line-{kind}" stroke-dasharray="{dashes}" d="{path}"/>'

    def circles(self, places: Iterable[Point], radius: float) -> str:
        kind = "dots" if self.number is None else f"dots dots-{self.number % len(_DASHES)}"
        drawn = (f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}"/>' for x, y in places)
        return f'<g class="{kind}">{"".join(drawn)}</g>'


_DOTS = _Pen(None)


@dataclass(frozen=True)
class _Frame:
    """What of the data a chart shows: x from `first` to `last`, y from 0 to `top`."""

    first: float
    last: float
    top: float

    def at(self, point: Point) -> tuple[float, float]:
        """A point's place in the picture; one above the top lies on the top."""
        width, height = WIDTH - _LEFT - _RIGHT, HEIGHT - _TOP - _BOTTOM
        part = (point[0] - self.first) / (self.last - self.first) if self.last > self.first else 0.5
        return _LEFT + part * width, _TOP + (1 - min(point[1] / self.top, 1.0)) * height


def _description(series: Series) -> str:
    (first, begin), (last, end) = series.points[0], series.points[-1]
    lowest = min(series.points, key=lambda point: point[1])
    return (
        f"{series.name}: {begin:.3g} at {first:g}, {end:.3g} at {last:g}, lowest {lowest[1]:.3g} "
        f"at {lowest[0]:g}"
    )


def _axes(frame: _Frame, x: str, y: str) -> list[str]:
    right, bottom = WIDTH - _RIGHT, HEIGHT - _BOTTOM
    parts = []
    for value in _ticks(0.0, frame.top):
        _, py = frame.at((frame.first, value))
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{py:.1f}" y2="{py:.1f}"/>')
        parts.append(_text(_LEFT - 6, py + 4, f"{value:.3g}", "end"))
    for value in _ticks(frame.first, frame.last, whole=True):
        px, _ = frame.at((value, 0.0))
        parts.append(_text(px, bottom + 16, f"{value:g}", "middle"))
    parts.append(f'<path class="axis" d="M{_LEFT} {_TOP}V{bottom}H{right}"/>')
    parts.append(_text((_LEFT + right) / 2, HEIGHT - 6, x, "middle"))
    middle = (_TOP + bottom) / 2
    turned = f'transform="rotate(-90 12 {middle:g})"'
    parts.append(_text(12, middle, y, "middle", turned))
    return parts


def _ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Round numbers from low to high, about five of them."""
    if high <= low:
        return [low]
    rough = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    step = unit * next(factor for factor in (1, 2, 5, 10) if factor * unit >= rough)
    step = max(1.0, step) if whole else step
    count = int((high - math.ceil(low / step) * step) / step + 1e-9) + 1
    return [(math.ceil(low / step) + i) * step for i in range(count)]


def _drawn(frame: _Frame, series: Series, pen: _Pen) -> str:
    places = [frame.at(point) for point in _thinned(series.points)]
    if series.dots or len(places) == 1:
        return pen.circles(places, 1.6 if series.dots else 3)
    return pen.line("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places))


def _thinned(points: Sequence[Point]) -> Iterable[Point]:
    """At most _MOST_POINTS of the points, with the lowest and the highest of those left out."""
    size = math.ceil(2 * len(points) / _MOST_POINTS)
    if size <= 2:
        return points
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    ends = ({min(g, key=_value), max(g, key=_value)} for g in groups)
    return [point for group in ends for point in sorted(group)]


def _value(point: Point) -> float:
    return point[1]


def _legend(series: Series, pen: _Pen, place: int) -> list[str]:
    """A name above the plot, two in a row; there is room for four."""
    if place > 3:
        return []
    x, y = _LEFT + place % 2 * 205, 14 + place // 2 * 18
    name = series.name if len(series.name) <= 26 else series.name[:25] + "…"
    sign = pen.circles([(x + 9, y - 4)], 3) if series.dots else pen.line(f"M{x} {y - 4}h18")
    return [sign, _text(x + 24, y, name, "start")]


def _text(x: float, y: float, text: str, anchor: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {more}>{escape(text)}</text>'
