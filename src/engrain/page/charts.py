"""Plots as SVG: each mark has a tooltip, each plot a title and a description that says its numbers in words.

A series is told apart by colour, by the shape of its marks and, beyond the eighth, by its dashes. Colours are classes,
which the page's style gives a value for light and for dark.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby

import numpy as np

from engrain.page.axis import Axis, axis, finite, shares, written
from engrain.page.document import Distribution, Lines, Point


@dataclass(frozen=True)
class Frame:
    """Where a plot of lines has its axes, in the units of its own drawing."""

    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int


WHOLE = Frame(480, 300, 60, 466, 12, 254)
PANEL = Frame(250, 170, 44, 240, 10, 142)
TOGETHER = 4
"""As many series are told apart in one plot; more get a panel each."""
ROW, EDGE = 46, 8
"""Of a distribution: the height of a row, and where its axis begins."""
COLOURS = 8
DASHES = ("", "6 3", "2 3")
DOTS = 150
"""Single values shown in a row of a distribution: so many of them, evenly spaced by rank."""
_CORNERS = {1: (4, 45), 2: (4, 0), 3: (3, -90), 4: (3, 90), 5: (6, 0)}
"""Marks after the first, a circle: how many corners, and the angle of the first."""

Marks = Mapping[str, int]
"""The number of each series, the same in all plots of a page."""


def lines(plot: Lines, name: str, marks: Marks, only: str | None = None) -> str:
    """y against x. `name` is unique on the page. With `only` one series, a panel: the others are faint behind it."""
    frame = WHOLE if only is None else PANEL
    series = {
        one: sorted((point for point in points if math.isfinite(point.x)), key=lambda point: point.x)
        for one, points in plot.series.items()
    }
    every = [point for points in series.values() for point in points if _known(point)]
    across, up = _axes(plot, frame, every)
    most = max((point.count for point in every), default=0)
    parts = [_upright(plot, frame, up), _foot(plot, frame, across)]
    if plot.diagonal:
        parts.append(
            f'<line class="diagonal" x1="{frame.left}" y1="{frame.bottom}" x2="{frame.right}" y2="{frame.top}"/>'
        )
    if only is not None and not plot.diagonal:
        behind = (line for one in series if one != only for line in _stretches(series[one], across, up, 0))
        parts.append(f'<g class="behind">{"".join(behind)}</g>')
    shown = {one: points for one, points in series.items() if only in (None, one)}
    for place, (one, points) in enumerate(shown.items()):
        beside = (place - (len(shown) - 1) / 2) * min(12.0, 0.75 * _band(plot, frame) / len(shown))
        at = _Beside(across, beside if plot.labels else 0.0)
        inside = [*_bands(plot, points, at, up), *_stretches(points, at, up, marks[one])]
        inside += _points(plot, one, points, at, up, most, marks[one])
        parts.append(f'<g class="series {_colour(marks[one])}">{"".join(inside)}</g>')
    if not any(_known(point) for points in shown.values() for point in points):
        parts.append(_text((frame.left + frame.right) / 2, (frame.top + frame.bottom) / 2, "no data", "middle"))
    said = [f"{one}: {'; '.join(_said(plot, point) for point in points)}." for one, points in shown.items() if points]
    about = f"{plot.y} against {plot.x}. {' '.join(said) or 'No data.'}"
    return _svg(name, plot.title if only is None else f"{plot.title}, {only}", about, frame.width, frame.height, parts)


Scale = Callable[[float], float]


@dataclass(frozen=True)
class _Beside:
    """A scale, moved aside so that series with the same x do not cover one another."""

    scale: Scale
    beside: float

    def __call__(self, value: float) -> float:
        return self.scale(value) + self.beside


def _axes(plot: Lines, frame: Frame, points: Sequence[Point]) -> tuple[Axis, Axis]:
    values = finite(value for point in points for value in (point.mean, point.low, point.high))
    up = shares(frame.bottom, frame.top) if plot.shares else axis(values, frame.bottom, frame.top, zero=True)
    if plot.labels:
        half = _band(plot, frame) / 2
        places = tuple(float(place) for place in range(len(plot.labels)))
        last = max(1.0, places[-1])
        return Axis(0.0, last, frame.left + half, frame.left + half + 2 * half * last, places), up
    if plot.diagonal:
        return shares(frame.left, frame.right), up
    return axis([point.x for point in points], frame.left, frame.right), up


def _band(plot: Lines, frame: Frame) -> float:
    """The width of a category."""
    return (frame.right - frame.left) / max(1, len(plot.labels))


def _bands(plot: Lines, points: Sequence[Point], at: Scale, up: Scale) -> Iterator[str]:
    """Between the lower and upper bounds, where x is a number; elsewhere whiskers must do."""
    if plot.labels or plot.diagonal:
        return
    for stretch in _unbroken(points, _bounded):
        edge = [(at(point.x), up(_sure(point.high))) for point in stretch]
        edge += [(at(point.x), up(_sure(point.low))) for point in reversed(stretch)]
        yield f'<polygon class="band" points="{_path(edge)}"/>'


def _stretches(points: Sequence[Point], at: Scale, up: Scale, mark: int) -> Iterator[str]:
    """The line between gaps."""
    for stretch in _unbroken(points, _known):
        path = _path([(at(point.x), up(_sure(point.mean))) for point in stretch])
        yield f'<polyline class="line"{_dashes(mark)} points="{path}"/>'


def _points(
    plot: Lines, name: str, points: Sequence[Point], at: Scale, up: Scale, most: int, mark: int
) -> Iterator[str]:
    """Marks, larger where there is more behind them, with whiskers and tooltips."""
    for point in filter(_known, points):
        x, y = at(point.x), up(_sure(point.mean))
        size = 3.2 + 2.5 * math.sqrt(point.count / most) if most else 4.0
        whisker = ""
        if _bounded(point):
            low, high = up(_sure(point.low)), up(_sure(point.high))
            whisker = f'<path class="whisker" d="M{x - 3:.1f} {high:.1f}h6m-3 0V{low:.1f}m-3 0h6"/>'
        yield (
            f'<g class="point"><title>{escape(f"{name}, {_said(plot, point)}")}</title>{whisker}'
            f'<circle class="hit" cx="{x:.1f}" cy="{y:.1f}" r="9"/>{_mark(mark, x, y, size)}</g>'
        )


def distribution(plot: Distribution, name: str, marks: Marks) -> str:
    """A row for each series: its values, their quartiles in a box, and whiskers from the 5th to the 95th percentile."""
    rows = {one: sorted(finite(values)) for one, values in plot.series.items()}
    across = axis([value for values in rows.values() for value in values], EDGE, WHOLE.right, zero=True)
    foot = ROW * len(rows) + 6
    parts = [
        f'<line class="grid" x1="{x:.1f}" y1="0" x2="{x:.1f}" y2="{foot}"/>{_text(x, foot + 18, label, "middle")}'
        for x, label in ((across(tick), written(tick)) for tick in across.ticks)
    ]
    scale = f"{plot.unit}, logarithmic" if across.logarithmic else plot.unit
    parts.append(_text((EDGE + WHOLE.right) / 2, foot + 38, scale, "middle", "label"))
    said = []
    for place, (one, values) in enumerate(rows.items()):
        top = ROW * place
        if not values:
            parts.append(_text(EDGE, top + 14, f"{_short(one)}: n/a"))
            said.append(f"{one}: n/a.")
            continue
        p5, p25, p50, p75, p95 = np.percentile(values, [5, 25, 50, 75, 95])
        words = (
            f"{one}: median {written(p50)} {plot.unit}, middle half {written(p25)} to {written(p75)}, "
            f"5% to 95% {written(p5)} to {written(p95)}, {len(values):,} values"
        )
        said.append(words + ".")
        parts += [
            f'<g class="series {_colour(marks[one])}"><title>{escape(words)}</title>',
            f'<rect class="hit" x="0" y="{top}" width="{WHOLE.width}" height="{ROW}"/>',
            *_dots(values, across, top + 31),
            _box(across(p5), across(p25), across(p50), across(p75), across(p95), top + 31),
            _text(EDGE, top + 14, f"{_short(one)} (n = {len(values):,})"),
            _text(WHOLE.right, top + 14, f"median {written(p50)}", "end"),
            "</g>",
        ]
    return _svg(name, plot.title, " ".join(said), WHOLE.width, foot + 46, parts)


def swatch(mark: int) -> str:
    """A series in the legend."""
    inside = f'<line class="line"{_dashes(mark)} x1="0" y1="7" x2="28" y2="7"/>{_mark(mark, 14, 7, 4.5)}'
    return f'<svg class="swatch {_colour(mark)}" viewBox="0 0 28 14" aria-hidden="true">{inside}</svg>'


def diagonal_swatch() -> str:
    line = '<line class="diagonal" x1="0" y1="7" x2="28" y2="7"/>'
    return f'<svg class="swatch" viewBox="0 0 28 14" aria-hidden="true">{line}</svg>'


def _svg(name: str, title: str, about: str, width: float, height: float, parts: Sequence[str]) -> str:
    return (
        f'<svg class="plot" viewBox="0 0 {width} {height}" role="img" aria-labelledby="{name}-title {name}-desc">'
        f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-desc">{escape(about)}</desc>'
        f"{''.join(parts)}</svg>"
    )


def _upright(plot: Lines, frame: Frame, up: Axis) -> str:
    ticks = "".join(
        f'<line class="grid" x1="{frame.left}" y1="{up(tick):.1f}" x2="{frame.right}" y2="{up(tick):.1f}"/>'
        + _text(frame.left - 7, up(tick) + 4, f"{100 * tick:g}%" if plot.shares else written(tick), "end")
        for tick in up.ticks
    )
    if frame is PANEL:
        return ticks
    middle = (frame.top + frame.bottom) / 2
    words = escape(f"{plot.y} (logarithmic)" if up.logarithmic else plot.y)
    turned = f'transform="translate(11 {middle:g}) rotate(-90)"'
    return f'{ticks}<text class="label" text-anchor="middle" {turned}>{words}</text>'


def _foot(plot: Lines, frame: Frame, across: Axis) -> str:
    words = plot.labels or [f"{100 * tick:g}%" if plot.diagonal else written(tick) for tick in across.ticks]
    ticks = "".join(
        _text(across(tick), frame.bottom + 18, word, "middle") for tick, word in zip(across.ticks, words, strict=True)
    )
    line = f'<line class="axis" x1="{frame.left}" y1="{frame.bottom}" x2="{frame.right}" y2="{frame.bottom}"/>'
    if frame is PANEL:
        return line + ticks
    label = f"{plot.x} (logarithmic)" if across.logarithmic else plot.x
    return line + ticks + _text((frame.left + frame.right) / 2, frame.bottom + 38, label, "middle", "label")


def _dots(values: Sequence[float], across: Axis, middle: float) -> Iterator[str]:
    count = min(DOTS, len(values))
    for place in range(count):
        value = values[place * (len(values) - 1) // max(1, count - 1)]
        aside = ((place * 0.618) % 1 - 0.5) * 14  # spread evenly, the same every time
        yield f'<circle class="dot" cx="{across(value):.1f}" cy="{middle + aside:.1f}" r="1.6"/>'


def _box(p5: float, p25: float, p50: float, p75: float, p95: float, middle: float) -> str:
    return (
        f'<path class="whisker" d="M{p5:.1f} {middle}H{p25:.1f}M{p75:.1f} {middle}H{p95:.1f}"/>'
        f'<rect class="box" x="{p25:.1f}" y="{middle - 7}" width="{max(1.0, p75 - p25):.1f}" height="14" rx="2"/>'
        f'<path class="median" d="M{p50:.1f} {middle - 9}v18"/>'
    )


def _mark(mark: int, x: float, y: float, size: float) -> str:
    shape = mark % (len(_CORNERS) + 1)
    if shape == 0:
        return f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="{size:.1f}"/>'
    corners, first = _CORNERS[shape]
    angles = (math.radians(first + 360 * corner / corners) for corner in range(corners))
    points = [(x + 1.25 * size * math.cos(angle), y + 1.25 * size * math.sin(angle)) for angle in angles]
    return f'<polygon class="mark" points="{_path(points)}"/>'


def _text(x: float, y: float, words: str, anchor: str = "start", style: str = "tick") -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def _said(plot: Lines, point: Point) -> str:
    def words(value: float | None) -> str:
        return f"{100 * _sure(value):.1f}" if plot.shares else written(_sure(value))

    where = plot.labels[int(point.x)] if plot.labels else f"{100 * point.x:.1f}%" if plot.diagonal else written(point.x)
    if not _known(point):
        return f"{where}: n/a"
    around = f" [{words(point.low)}, {words(point.high)}]" if _bounded(point) else ""
    count = f", n = {point.count:,}" if point.count else ""
    return f"{where}: {words(point.mean)}{'%' if plot.shares else ''}{around}{count}"


def _unbroken(points: Sequence[Point], good: Callable[[Point], bool]) -> Iterator[list[Point]]:
    """Stretches of two points and more that are all good."""
    for known, some in groupby(points, good):
        stretch = list(some)
        if known and len(stretch) > 1:
            yield stretch


def _known(point: Point) -> bool:
    return len(finite((point.x, point.mean))) == 2


def _bounded(point: Point) -> bool:
    return _known(point) and len(finite((point.low, point.high))) == 2


def _sure(value: float | None) -> float:
    assert value is not None and math.isfinite(value), "what is missing is left out before it is drawn"
    return value


def _short(name: str) -> str:
    return name if len(name) <= 36 else f"{name[:35]}…"


def _path(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _dashes(mark: int) -> str:
    dashes = DASHES[mark // COLOURS % len(DASHES)]
    return f' stroke-dasharray="{dashes}"' if dashes else ""


def _colour(mark: int) -> str:
    return f"s{mark % COLOURS}"
