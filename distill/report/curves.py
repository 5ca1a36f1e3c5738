"""Curves and clouds of points, with their intervals, levels and names."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from typing import NamedTuple

from distill.report import axes, drawing, sheet
from distill.report.axes import Frame
from distill.report.drawing import (
    EDGE,
    HALO,
    Area,
    Circle,
    Line,
    Point,
    Shape,
    Sheet,
    Text,
    fit,
    text_width,
)
from distill.report.labels import Box, place
from distill.report.sheet import HALF, LETTERS, MARGIN, ROW, SAMPLE, TEXT, WIDTH, colour

PLOT_HEIGHT = 216.0
MARKER = 4.0  # radius
BEST = 5.6  # radius of an emphasised marker
LABEL = 180.0  # widest label of a point
# Corners of the markers on a circle: how many, the angle of the first in turns, the radius that
# makes them look as large as the disc, which is the first. One fewer than there are colours, so
# that 30 series differ.
MARKERS = (None, (4, 0.125, 1.3), (3, 0.75, 1.45), (4, 0.0, 1.4), (3, 0.25, 1.45))
MOST_MARKERS = 30  # of a curve; with more points, every second one or fewer have a marker
DASHES = (5.0, 2.0, 9.0)  # of the levels, in turn


class Series(NamedTuple):
    """One curve or one cloud of points."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None  # ends of an interval at each point
    high: Sequence[float] | None = None
    joined: bool = True  # by a line, in the order given; the intervals are a band around it
    labels: Sequence[str] | None = None  # text beside each point, where there is room for it
    emphasis: Sequence[int] = ()  # points drawn large and filled, all others of the plot hollow
    frontier: bool = False  # steps along its Pareto frontier: the highest y up to each x


class Figure(NamedTuple):
    """Series on two axes."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    log_x: bool = False
    percent: bool = False  # y values are fractions, shown in per cent
    x_ticks: Sequence[float] | None = None  # else chosen
    levels: Sequence[tuple[str, float]] = ()  # named horizontal lines
    shaded: Sequence[tuple[float, float]] = ()  # spans of x with another background
    log_y: bool = False


def layout(figure: Figure) -> Sheet:
    """All lines, areas and texts of a plot, in the order they are drawn.

    Raises:
        ValueError: If a series has nothing to draw, or values that have no place.
    """
    _check(figure)
    entries = list(_entries(figure))
    header, top = sheet.header(figure.title, entries if len(entries) > 1 else (), figure.y_label)
    frame = _frame(figure, top)
    numbered = list(enumerate(figure.series))
    opacity = min(0.16, 0.5 / len(numbered))  # of bands: many of them make a cloud
    shapes = (
        *header,
        *_shaded(figure, frame),
        *sheet.across(frame),
        *sheet.down(frame),
        sheet.base(frame),
        *sheet.below(frame, figure.x_label),
        *_levels(figure, frame),
        *chain.from_iterable(_intervals(i, series, frame, opacity) for i, series in numbered),
        *(Line(points, colour(i), 2.0) for i, points in _joined(figure, frame)),
        *_markers(figure, frame),
        *_labels(figure, frame),
    )
    height = math.ceil(frame.bottom + 2 * ROW + MARGIN)
    return Sheet(WIDTH, height, shapes, drawing.plain(figure.title), _describe(figure))


def _frame(figure: Figure, top: float) -> Frame:
    every_x = [x for series in figure.series for x in series.x]
    every_y = [y for series in figure.series for y in _heights(series)]
    every_y += [level for _, level in figure.levels]
    x_axis = axes.roomy(every_x, log=figure.log_x, at=figure.x_ticks)
    if figure.log_y:
        y_axis = axes.roomy(every_y, log=True, percent=figure.percent)
    else:
        y_axis = axes.tick_to_tick(every_y, percent=figure.percent)
    left = MARGIN + 6 + max(text_width(text, TEXT) for _, text in y_axis.ticks)
    return Frame(left, WIDTH - 2 * MARGIN, top, top + PLOT_HEIGHT, x_axis, y_axis)


def _heights(series: Series) -> list[float]:
    """All y values of a series."""
    return [*series.y, *(series.low or ()), *(series.high or ())]


def _check(figure: Figure) -> None:
    if not figure.series:
        raise ValueError(f"{figure.title}: no series to draw")
    for series in figure.series:
        n = len(series.x)
        if n == 0:
            raise ValueError(f"{series.name}: no points to draw")
        if (series.low is None) != (series.high is None):
            raise ValueError(f"{series.name}: an interval needs both ends")
        for column in (series.y, series.low, series.high, series.labels):
            if column is not None and len(column) != n:
                raise ValueError(f"{series.name}: {n} x values and {len(column)} of another kind")
        if not all(0 <= i < n for i in series.emphasis):
            raise ValueError(f"{series.name}: emphasis on a point that is not there")
        _require_places(series.name, series.x, log=figure.log_x)
        _require_places(series.name, _heights(series), log=figure.log_y)
    for name, level in figure.levels:
        _require_places(name, (level,), log=figure.log_y)
    marked = [*chain.from_iterable(figure.shaded), *(figure.x_ticks or ())]
    _require_places(figure.title, marked, log=figure.log_x)


def _require_places(name: str, values: Sequence[float], *, log: bool) -> None:
    sheet.require_finite(name, values)
    for value in values:
        if log and value <= 0:
            raise ValueError(f"{name}: {value} has no place on a logarithmic axis")


def _describe(figure: Figure) -> str:
    """The figure in words, for who cannot see it."""

    def shown(value: float) -> str:
        return f"{100 * value:.4g} %" if figure.percent else f"{value:.4g}"

    sentences = [f"{figure.y_label} against {figure.x_label}."]
    for series in figure.series:
        points = sorted(zip(series.y, series.x, strict=True))
        (low, at_low), (high, at_high) = points[0], points[-1]
        sentences.append(
            f"{series.name}: {len(points)} points, lowest {shown(low)} at {at_low:g}, "
            f"highest {shown(high)} at {at_high:g}."
        )
    sentences += [f"{name}: {shown(level)}." for name, level in figure.levels]
    return drawing.plain(" ".join(sentences))


def _entries(figure: Figure) -> Iterator[sheet.Entry]:
    """The series and then the levels, as the legend shows them."""
    filled = not _has_emphasis(figure)
    for i, series in enumerate(figure.series):
        drawn = partial(sample, i, series.joined or series.frontier, filled)
        yield sheet.Entry(series.name, drawn)
    for i, (name, _) in enumerate(figure.levels):
        yield sheet.Entry(name, partial(_level_sample, i))


def _level_sample(i: int, at: Point) -> Iterator[Shape]:
    yield _level(i, at, (at[0] + SAMPLE, at[1]))


def sample(i: int, joined: bool, filled: bool, at: Point) -> Iterator[Shape]:
    """The i-th series as a legend shows it."""
    if joined:
        yield Line((at, (at[0] + SAMPLE, at[1])), colour(i), 2.0)
    yield marker(i, (at[0] + SAMPLE / 2, at[1]), MARKER, filled=filled)


def _has_emphasis(figure: Figure) -> bool:
    return any(series.emphasis for series in figure.series)


def _level(i: int, start: Point, end: Point) -> Line:
    return Line((start, end), "ink", 1.5, DASHES[i % len(DASHES)])


def marker(i: int, at: Point, radius: float, *, filled: bool) -> Shape:
    """The marker of the i-th series."""
    # A rim of paper keeps filled markers apart that lie on each other.
    fill, edge = (colour(i), "paper") if filled else ("paper", colour(i))
    radius += EDGE / 2 if filled else -EDGE / 2
    corners = MARKERS[i % len(MARKERS)]
    if corners is None:
        return Circle(at, radius, fill, edge)
    n, first, larger = corners
    angles = [2 * math.pi * (first + k / n) for k in range(n)]
    points = ((radius * larger * math.cos(a), radius * larger * math.sin(a)) for a in angles)
    return Area(tuple((at[0] + x, at[1] + y) for x, y in points), fill, edge)


def _shaded(figure: Figure, frame: Frame) -> Iterator[Shape]:
    for span in figure.shaded:
        a, b = (min(max(frame.x(end), frame.left), frame.right) for end in span)
        corners = ((a, frame.top), (b, frame.top), (b, frame.bottom), (a, frame.bottom))
        yield Area(corners, "shade")


def _joined(figure: Figure, frame: Frame) -> Iterator[tuple[int, tuple[Point, ...]]]:
    """The lines of the series, with the series' numbers."""
    for i, series in enumerate(figure.series):
        if series.joined:
            yield i, frame.points(series.x, series.y)
        if series.frontier:
            yield i, _steps(series, frame)


def _steps(series: Series, frame: Frame) -> tuple[Point, ...]:
    """The highest y up to each x, to the right end of the frame."""
    corners: list[Point] = []
    highest = -math.inf
    points = zip(series.x, series.y, strict=True)
    for x, y in sorted(points, key=lambda at: (at[0], -at[1])):
        if y > highest:
            at = (frame.x(x), frame.y(y))
            corners += [(at[0], corners[-1][1]), at] if corners else [at]
            highest = y
    return (*corners, (frame.right, corners[-1][1]))


def _levels(figure: Figure, frame: Frame) -> Iterator[Shape]:
    for i, (_, value) in enumerate(figure.levels):
        yield _level(i, (frame.left, frame.y(value)), (frame.right, frame.y(value)))


def _intervals(i: int, series: Series, frame: Frame, opacity: float) -> Iterator[Shape]:
    if series.low is None or series.high is None:
        return
    low, high = frame.points(series.x, series.low), frame.points(series.x, series.high)
    if series.joined and len(low) > 1:
        yield Area((*high, *reversed(low)), colour(i), opacity=opacity)
        return
    for a, b in zip(low, high, strict=True):
        yield Line((a, b), colour(i), 1.5)
        for x, y in (a, b):
            yield Line(((x - 3, y), (x + 3, y)), colour(i), 1.5)


def _markers(figure: Figure, frame: Frame) -> Iterator[Shape]:
    hollow = _has_emphasis(figure)
    for i, series in enumerate(figure.series):
        every = -(-len(series.x) // MOST_MARKERS) if series.joined else 1
        for k, at in enumerate(frame.points(series.x, series.y)):
            best = k in series.emphasis
            if k % every and not best:
                continue
            yield marker(i, at, BEST if best else MARKER, filled=best or not hollow)


def _labels(figure: Figure, frame: Frame) -> Iterator[Shape]:
    """Labels of points, those of emphasised ones placed first."""
    wanted: list[tuple[bool, Point, str]] = []
    taken: list[Box] = []
    lines: list[Sequence[Point]] = [points for _, points in _joined(figure, frame)]
    for series in figure.series:
        points = frame.points(series.x, series.y)
        taken += [Box(x - BEST, y - BEST, x + BEST, y + BEST) for x, y in points]
        for k, text in enumerate(series.labels or ()):
            if text := fit(text, width=LABEL, size=TEXT):
                wanted.append((k not in series.emphasis, points[k], text))
        if not series.joined and series.low is not None and series.high is not None:
            lines += zip(
                frame.points(series.x, series.low), frame.points(series.x, series.high), strict=True
            )
    lines += [
        ((frame.left, frame.y(level)), (frame.right, frame.y(level))) for _, level in figure.levels
    ]
    wanted.sort()
    spots = place(
        [point for _, point, _ in wanted],
        [(text_width(text, TEXT), LETTERS) for _, _, text in wanted],
        within=Box(frame.left, frame.top, WIDTH - MARGIN / 2, frame.bottom - HALO),
        radius=MARKER,
        taken=taken,
        lines=lines,
    )
    for spot, (_, _, text) in zip(spots, wanted, strict=True):
        if spot is None:
            continue
        if spot.leader:
            yield Line(spot.leader, "muted", 0.75)
        at = ((spot.box.left + spot.box.right) / 2, (spot.box.top + spot.box.bottom) / 2 + HALF)
        yield Text(at, text, "ink", TEXT, "middle", halo=True)
