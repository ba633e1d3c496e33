"""The page: one file of HTML with its style, its script and its plots inside.

Invariant: it asks the network for nothing, and its policy forbids it to. The only script that runs is ours, whatever a
report's words contain.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterator, Sequence
from hashlib import sha256
from html import escape
from itertools import groupby
from pathlib import Path

from engrain.page import charts
from engrain.page.axis import finite
from engrain.page.cells import interval, missing, number, numeric, shown
from engrain.page.document import Block, Distribution, Document, Lines, Notes, Table

_HERE = Path(__file__).parent


def html(report: Document) -> str:
    """The page of a report, whole."""
    style, script = ((_HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    ours = b64encode(sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{ours}'"
    title = escape(report.title)
    return (
        '<!doctype html>\n<html lang="en-GB">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{style}</style>\n</head>\n<body>\n<header><h1>{title}</h1>"
        '<button type="button" id="theme" aria-label="Switch between light and dark">◐</button></header>\n<main>\n'
        f'<p class="about">{escape(report.about)}</p>\n{"".join(_blocks(report.blocks))}</main>\n'
        f"<script>{script}</script>\n</body>\n</html>\n"
    )


def _blocks(blocks: Sequence[Block]) -> Iterator[str]:
    names = [name for block in blocks if isinstance(block, Lines | Distribution) for name in block.series]
    marks = {name: place for place, name in enumerate(dict.fromkeys(names))}
    for plots, some in groupby(enumerate(blocks), lambda one: isinstance(one[1], Lines | Distribution)):
        if plots:
            yield '<div class="plots">\n'
        for place, block in some:
            match block:
                case Table():
                    yield _table(block)
                case Notes():
                    yield _notes(block)
                case _:
                    yield _plot(block, f"plot-{place}", marks)
        if plots:
            yield "</div>\n"


def _notes(notes: Notes) -> str:
    if not notes.lines:
        return ""
    lines = "".join(f"<li>{escape(line)}</li>\n" for line in notes.lines)
    return f"<section><h2>{escape(notes.title)}</h2>\n<ul>\n{lines}</ul></section>\n"


def _plot(plot: Lines | Distribution, name: str, marks: charts.Marks) -> str:
    style, legend, drawn = "chart", "", ""
    if isinstance(plot, Distribution):
        drawn = charts.distribution(plot, name, marks)
    elif len(plot.series) <= charts.TOGETHER:
        entries = [(charts.swatch(marks[series]), series) for series in plot.series]
        entries += [(charts.diagonal_swatch(), "as sure as right")] if plot.diagonal else []
        legend = "".join(f"<li>{swatch}{escape(series)}</li>" for swatch, series in entries)
        drawn = charts.lines(plot, name, marks)
    else:
        style, drawn = "chart wide", _panels(plot, name, marks)
    return (
        f'<figure class="{style}"><figcaption><h2>{escape(plot.title)}</h2></figcaption>\n'
        + (f'<ul class="legend">{legend}</ul>\n' if legend else "")
        + drawn
        + (f"\n<p>{escape(plot.about)}</p>" if plot.about else "")
        + "</figure>\n"
    )


def _panels(plot: Lines, name: str, marks: charts.Marks) -> str:
    panels = "".join(
        f'<div><h3 class="legend">{charts.swatch(marks[series])}{escape(series)}</h3>'
        f"{charts.lines(plot, f'{name}-{place}', marks, only=series)}</div>\n"
        for place, series in enumerate(plot.series)
    )
    return f'<p>{escape(f"{plot.y}, upwards, against {plot.x}")}</p>\n<div class="panels">\n{panels}</div>'


def _table(table: Table) -> str:
    columns = list(zip(*table.rows, strict=True)) or [()] * len(table.headings)
    numbers = [numeric(column) for column in columns]
    scales = [_scale(column) for column in columns]
    heads = "".join(
        f'<th scope="col"{_number_class(right)} aria-sort="none"><button type="button">{escape(heading)}</button></th>'
        for heading, right in zip(table.headings, numbers, strict=True)
    )
    rows = "".join(
        f"<tr>{''.join(_cell(*one) for one in zip(row, numbers, scales, strict=True))}</tr>\n" for row in table.rows
    )
    caption = f"<figcaption><h2>{escape(table.caption)}</h2></figcaption>\n" if table.caption else ""
    label = escape(table.caption or "Table of results")
    return (
        f'<figure>{caption}<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table>\n'
        f"<thead><tr>{heads}</tr></thead>\n<tbody>\n{rows}</tbody></table></div></figure>\n"
    )


def _cell(cell: str, right: bool, scale: tuple[float, float] | None) -> str:
    value = number(cell) if right and not missing(cell) else None
    sort = " data-missing" if missing(cell) else "" if value is None else f' data-value="{value!r}"'
    bounds = interval(cell) if scale else None
    drawn = _interval(bounds, scale) if bounds and scale else ""
    return f"<td{_number_class(right)}{sort}>{escape(shown(cell))}{drawn}</td>"


def _number_class(right: bool) -> str:
    return ' class="number"' if right else ""


def _scale(column: Sequence[str]) -> tuple[float, float] | None:
    """Of the intervals of a column, with zero on it; None if there are none."""
    found = [bounds for cell in column if (bounds := interval(cell))]
    low, high = (min([0.0, *(one[1] for one in found)]), max([0.0, *(one[2] for one in found)]))
    return (low, high) if low < high and len(finite((low, high))) == 2 else None


def _interval(bounds: tuple[float, float, float], scale: tuple[float, float]) -> str:
    """A mean and its interval, drawn under the number on the scale of the column."""
    mean, low, high, zero = (100 * (value - scale[0]) / (scale[1] - scale[0]) for value in (*bounds, 0.0))
    at_zero = f'<path class="zero" d="M{zero:.1f} 0V8"/>' if scale[0] < 0 < scale[1] else ""
    return (
        '<svg class="interval" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">'
        f'<path class="rail" d="M0 4H100"/>{at_zero}<path class="span" d="M{low:.1f} 4H{max(high, low + 0.1):.1f}"/>'
        f'<path class="mean" d="M{mean:.1f} 0V8"/></svg>'
    )
