"""Bars in groups, from 0 to values that are written beside them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

from distill.report import axes, drawing, sheet
from distill.report.axes import Frame
from distill.report.drawing import Line, Point, Shape, Sheet, Text, Tiles, fit, text_width, wrap
from distill.report.sheet import HALF, MARGIN, ROW, TEXT, WIDTH, colour

MOST_GROUPS = 30
MOST_SERIES = len(sheet.SERIES)
PITCH = 16.0  # from one bar of a group to the next; the letters beside them are as high
BAR = 11.0
GAP = 8.0  # between groups
NAMES = 150.0  # widest name of a group
VALUE = 130.0  # widest text of a value
DIGITS = 3
UNKNOWN = "–"


class BarSeries(NamedTuple):
    """One bar in each group."""

    name: str
    values: Sequence[float | None]  # by group; None where there is none
    low: Sequence[float | None] | None = None  # ends of an interval of each value
    high: Sequence[float | None] | None = None
    texts: Sequence[str] | None = None  # written in place of the values


class Bars(NamedTuple):
    """Values of several groups, a bar for each series in each group."""

    title: str
    x_label: str  # what the values are
    names: Sequence[str]  # of the groups
    series: Sequence[BarSeries]
    percent: bool = False  # values are fractions, shown in per cent


class _Bar(NamedTuple):
    """Where a bar is from the top, and what it shows; `low` and `high` hold its interval."""

    series: int
    middle: float
    value: float | None
    low: float
    high: float
    text: str


def layout(bars: Bars) -> Sheet:
    """All shapes of a plot, in the order they are drawn.

    Raises:
        ValueError: If there is nothing to draw, or a value that has no place.
    """
    _check(bars)
    entries = list(_entries(bars))
    header, top = sheet.header(bars.title, entries if len(entries) > 1 else (), "")
    top -= ROW / 2  # to the middle of the line that stands there in other plots
    names: list[Shape] = []
    placed: list[_Bar] = []
    lines = [wrap(name, width=NAMES, size=TEXT) for name in bars.names]
    left = MARGIN + 8 + max(text_width(line, TEXT) for name in lines for line in (*name, ""))
    y = top + GAP / 2
    for group, name in enumerate(lines):
        height = PITCH * max(len(bars.series), len(name))
        middle = y + height / 2
        for i, line in enumerate(name):
            at = (left - 8, middle + PITCH * (i - (len(name) - 1) / 2) + HALF)
            names.append(Text(at, line, "ink", TEXT, "end"))
        first = middle - PITCH * (len(bars.series) - 1) / 2
        placed += [_bar(bars, i, group, first + PITCH * i) for i in range(len(bars.series))]
        y += height + GAP
    frame = _frame(bars, placed, left, (top, y - GAP / 2))
    zero = frame.x(0)
    shapes = (
        *header,
        *sheet.down(frame),
        *names,
        *(_tiles(i, placed, frame) for i in range(len(bars.series))),
        Line(((zero, frame.top), (zero, frame.bottom)), "muted", 1.0),
        *(shape for bar in placed for shape in _value(bar, frame)),
        *sheet.below(frame, bars.x_label),
    )
    height = math.ceil(frame.bottom + 2 * ROW + MARGIN)
    return Sheet(WIDTH, height, shapes, drawing.plain(bars.title), _describe(bars))


def _check(bars: Bars) -> None:
    groups, series = len(bars.names), len(bars.series)
    if not groups or not series:
        raise ValueError(f"{bars.title}: no bars to draw")
    if groups > MOST_GROUPS or series > MOST_SERIES:
        raise ValueError(
            f"{bars.title}: {groups} groups of {series} bars are more than {MOST_GROUPS} of "
            f"{MOST_SERIES}"
        )
    for one in bars.series:
        if (one.low is None) != (one.high is None):
            raise ValueError(f"{one.name}: an interval needs both ends")
        for column in (one.values, one.low, one.high, one.texts):
            if column is not None and len(column) != groups:
                raise ValueError(f"{one.name}: {groups} groups and {len(column)} of another kind")
        for numbers in (one.values, one.low or (), one.high or ()):
            sheet.require_finite(one.name, (value for value in numbers if value is not None))


def _bar(bars: Bars, i: int, group: int, middle: float) -> _Bar:
    series = bars.series[i]
    value = series.values[group]
    ends = [0.0 if value is None else value]
    ends += [c[group] or 0.0 for c in (series.low, series.high) if c and c[group] is not None]
    text = UNKNOWN if value is None else _shown(bars, value)
    if series.texts is not None:
        text = series.texts[group]
    width = VALUE / 2 if min(_known(bars), default=0.0) < 0 else VALUE  # on each side
    return _Bar(i, middle, value, min(ends), max(ends), fit(text, width=width, size=TEXT))


def _known(bars: Bars) -> list[float]:
    return [value for series in bars.series for value in series.values if value is not None]


def _shown(bars: Bars, value: float) -> str:
    """A value as text; with its sign where there are negative ones."""
    known = _known(bars)
    step = axes.precision(known, digits=DIGITS, percent=bars.percent)
    sign = "+" if value > 0 and min(known) < 0 else ""
    return sign + axes.number(value, step=step, percent=bars.percent)


def _frame(bars: Bars, placed: Sequence[_Bar], left: float, span: tuple[float, float]) -> Frame:
    """Between the names and the right end, with room for the texts beside the bars."""
    ends = [0.0, *(end for bar in placed for end in (bar.low, bar.high))]
    x_axis = axes.tick_to_tick(ends, percent=bars.percent)
    left += max((4 + text_width(bar.text, TEXT) for bar in placed if _negative(bar)), default=0.0)
    right = WIDTH - 2 * MARGIN
    for bar in placed:
        if not _negative(bar):
            room = WIDTH - MARGIN - 4 - text_width(bar.text, TEXT) - left
            right = min(right, left + room / max(x_axis.part(bar.high), 1e-9))
    return Frame(left, right, *span, x_axis, axes.Axis(0, 1, ()))


def _negative(bar: _Bar) -> bool:
    return bar.value is not None and bar.value < 0


def _entries(bars: Bars) -> Iterator[sheet.Entry]:
    for i, series in enumerate(bars.series):
        yield sheet.Entry(series.name, partial(_sample, i), sheet.SWATCH)


def _sample(i: int, at: Point) -> Iterator[Shape]:
    yield sheet.swatch(colour(i), at)


def _tiles(i: int, placed: Sequence[_Bar], frame: Frame) -> Tiles:
    """The bars of a series."""
    zero, boxes = frame.x(0), []
    for bar in placed:
        if bar.series == i and bar.value is not None:
            a, b = sorted((zero, frame.x(bar.value)))
            boxes.append((a, bar.middle - BAR / 2, b, bar.middle + BAR / 2))
    return Tiles(tuple(boxes), colour(i))


def _value(bar: _Bar, frame: Frame) -> Iterator[Shape]:
    """The interval of a bar and its text."""
    low, high, y = frame.x(bar.low), frame.x(bar.high), bar.middle
    value = frame.x(bar.value or 0.0)
    if bar.value is not None and (bar.low, bar.high) != (bar.value, bar.value):
        yield Line(((low, y), (high, y)), "ink", 1.25)
        for x in (low, high):
            yield Line(((x, y - 3), (x, y + 3)), "ink", 1.25)
    if _negative(bar):
        yield Text((min(low, value) - 4, y + HALF), bar.text, "ink", TEXT, "end")
    else:
        yield Text((max(high, value) + 4, y + HALF), bar.text, "ink", TEXT)


def _describe(bars: Bars) -> str:
    """The plot in words, for who cannot see it."""
    sentences = [f"{bars.x_label}, {len(bars.names)} groups."]
    for series in bars.series:
        pairs = zip(series.values, bars.names, strict=True)
        known = [(value, name) for value, name in pairs if value is not None]
        if known:
            (low, at_low), (high, at_high) = min(known), max(known)
            sentences.append(
                f"{series.name}: lowest {_shown(bars, low)} ({at_low}), "
                f"highest {_shown(bars, high)} ({at_high})."
            )
    return drawing.plain(" ".join(sentences))
