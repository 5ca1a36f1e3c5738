"""Plots of a few series: one layout, as SVG for pages and as PNG for papers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import NamedTuple

from distill.report import axes, drawing
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

# Units. A page on a phone of 360 px shows the width on 336 px and more, so the text of 13.5 units
# on 11.3 px; the text of a paper's column has the same part of its width.
WIDTH = 400
MARGIN = 8.0
PLOT_HEIGHT = 216.0
TEXT = 13.5
LETTERS = 1.15 * TEXT  # height of the highest and the lowest together
TITLE = 15.0
ROW = 19.0  # from one line of text to the next
HALF = 0.35 * TEXT  # from a text's baseline to the middle of its letters
SAMPLE = 24.0  # of a series in the legend
MARKER = 4.0  # radius
BEST = 5.6  # radius of an emphasised marker
LABEL = 180.0  # widest label of a point
COLOURS = tuple(f"series-{i}" for i in range(1, 7))
# Corners of the markers on a circle: how many, the angle of the first in turns, the radius that
# makes them look as large as the disc, which is the first. One fewer than there are colours, so
# that 30 series differ.
MARKERS = (None, (4, 0.125, 1.3), (3, 0.75, 1.45), (4, 0.0, 1.4), (3, 0.25, 1.45))
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


class Figure(NamedTuple):
    """What a plot shows."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    log_x: bool = False
    percent: bool = False  # y values are fractions, shown in per cent
    x_ticks: Sequence[float] | None = None  # else chosen
    levels: Sequence[tuple[str, float]] = ()  # named horizontal lines
    shaded: Sequence[tuple[float, float]] = ()  # spans of x with another background


def svg(figure: Figure) -> str:
    """The plot as SVG: whole as a file and within a page, light or dark as its reader is.

    Raises:
        ValueError: If a series has nothing to draw, or values that have no place.
    """
    return drawing.svg(layout(figure))


def png(figure: Figure) -> bytes:
    """The same plot as PNG, 1600 pixels wide on white.

    Raises:
        ValueError: If a series has nothing to draw, or values that have no place.
    """
    return drawing.png(layout(figure))


def layout(figure: Figure) -> Sheet:
    """All lines, areas and texts of a plot, in the order they are drawn.

    Raises:
        ValueError: If a series has nothing to draw, or values that have no place.
    """
    _check(figure)
    header, top = _header(figure)
    every_x = [x for series in figure.series for x in series.x]
    every_y = [y for series in figure.series for y in _heights(series)]
    every_y += [level for _, level in figure.levels]
    x_axis = axes.x_axis(every_x, log=figure.log_x, at=figure.x_ticks)
    y_axis = axes.y_axis(every_y, percent=figure.percent)
    left = MARGIN + 6 + max(text_width(text, TEXT) for _, text in y_axis.ticks)
    frame = axes.Frame(left, WIDTH - 2 * MARGIN, top, top + PLOT_HEIGHT, x_axis, y_axis)
    numbered = list(enumerate(figure.series))
    opacity = min(0.16, 0.5 / len(numbered))  # of bands: many of them make a cloud
    shapes = (
        *header,
        *_shaded(figure, frame),
        *_grid(figure, frame),
        *_levels(figure, frame),
        *chain.from_iterable(_intervals(i, series, frame, opacity) for i, series in numbered),
        *(
            Line(frame.points(series.x, series.y), _colour(i), 2.0)
            for i, series in numbered
            if series.joined
        ),
        *_markers(figure, frame),
        *_labels(figure, frame),
    )
    height = math.ceil(frame.bottom + 2 * ROW + MARGIN)
    return Sheet(WIDTH, height, shapes, drawing.plain(figure.title), _describe(figure))


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
        _require_places(series.name, x=series.x, y=_heights(series), log_x=figure.log_x)
    for name, level in figure.levels:
        _require_places(name, x=(), y=(level,), log_x=figure.log_x)
    marked = [*chain.from_iterable(figure.shaded), *(figure.x_ticks or ())]
    _require_places(figure.title, x=marked, y=(), log_x=figure.log_x)


def _require_places(name: str, *, x: Sequence[float], y: Sequence[float], log_x: bool) -> None:
    for value in (*x, *y):
        if not math.isfinite(value):
            raise ValueError(f"{name}: {value} is not a finite number")
    for value in x:
        if log_x and value <= 0:
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


def _header(figure: Figure) -> tuple[list[Shape], float]:
    """Title, legend and the name of the y axis, and where the frame begins below them."""
    width, y = WIDTH - 2 * MARGIN, MARGIN + TITLE - 3
    shapes: list[Shape] = []
    for line in _two_lines(figure.title, width=width):
        shapes.append(Text((MARGIN, y), line, "ink", TITLE, bold=True))
        y += ROW
    y += 4
    names = [series.name for series in figure.series] + [name for name, _ in figure.levels]
    if len(names) > 1:
        x = MARGIN
        for i, name in enumerate(names):
            text = fit(name, width=width - SAMPLE - 6, size=TEXT)
            needed = SAMPLE + 6 + text_width(text, TEXT)
            if x > MARGIN and x + needed > WIDTH - MARGIN:
                x, y = MARGIN, y + ROW
            shapes += _sample(figure, i, (x, y - HALF))
            shapes.append(Text((x + SAMPLE + 6, y), text, "ink", TEXT))
            x += needed + 14
        y += ROW + 5
    shapes.append(Text((MARGIN, y), fit(figure.y_label, width=width, size=TEXT), "muted", TEXT))
    return shapes, y + 14


def _two_lines(text: str, *, width: float) -> list[str]:
    """The text on one line or two, the second one cut where it is too long."""
    words = fit(text, width=2 * width, size=TITLE).split()
    fitting = (n for n in range(len(words), 0, -1) if _title_width(words[:n]) <= width)
    n = next(fitting, 1)
    return [fit(" ".join(line), width=width, size=TITLE) for line in (words[:n], words[n:]) if line]


def _title_width(words: Sequence[str]) -> float:
    return text_width(" ".join(words), TITLE)


def _sample(figure: Figure, i: int, at: Point) -> Iterator[Shape]:
    """The i-th of the series and then of the levels as the legend shows it."""
    (x, y), level = at, i - len(figure.series)
    if level >= 0:
        yield _level(level, at, (x + SAMPLE, y))
        return
    series = figure.series[i]
    if series.joined:
        yield Line((at, (x + SAMPLE, y)), _colour(i), 2.0)
    yield _marker(i, (x + SAMPLE / 2, y), MARKER, filled=not _has_emphasis(figure))


def _has_emphasis(figure: Figure) -> bool:
    return any(series.emphasis for series in figure.series)


def _colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]


def _level(i: int, start: Point, end: Point) -> Line:
    return Line((start, end), "ink", 1.5, DASHES[i % len(DASHES)])


def _marker(i: int, at: Point, radius: float, *, filled: bool) -> Shape:
    """The marker of the i-th series."""
    # A rim of paper keeps filled markers apart that lie on each other.
    fill, edge = (_colour(i), "paper") if filled else ("paper", _colour(i))
    radius += EDGE / 2 if filled else -EDGE / 2
    corners = MARKERS[i % len(MARKERS)]
    if corners is None:
        return Circle(at, radius, fill, edge)
    n, first, larger = corners
    angles = [2 * math.pi * (first + k / n) for k in range(n)]
    points = ((radius * larger * math.cos(a), radius * larger * math.sin(a)) for a in angles)
    return Area(tuple((at[0] + x, at[1] + y) for x, y in points), fill, edge)


def _shaded(figure: Figure, frame: axes.Frame) -> Iterator[Shape]:
    for span in figure.shaded:
        a, b = (min(max(frame.x(end), frame.left), frame.right) for end in span)
        corners = ((a, frame.top), (b, frame.top), (b, frame.bottom), (a, frame.bottom))
        yield Area(corners, "shade")


def _grid(figure: Figure, frame: axes.Frame) -> Iterator[Shape]:
    for value, text in frame.y_axis.ticks:
        y = frame.y(value)
        yield Line(((frame.left, y), (frame.right, y)), "grid", 1.0)
        yield Text((frame.left - 6, y + HALF), text, "muted", TEXT, "end")
    free = 0.0  # where the next label may begin
    for value, text in frame.x_axis.ticks:
        x, half = frame.x(value), text_width(text, TEXT) / 2
        yield Line(((x, frame.top), (x, frame.bottom)), "grid", 1.0)
        middle = min(x, WIDTH - 2 - half)
        if middle - half >= free:
            yield Text((middle, frame.bottom + ROW - 2), text, "muted", TEXT, "middle")
            free = middle + half + 5
    yield Line(((frame.left, frame.bottom), (frame.right, frame.bottom)), "muted", 1.0)
    label = fit(figure.x_label, width=frame.right - frame.left, size=TEXT)
    middle = (frame.left + frame.right) / 2
    yield Text((middle, frame.bottom + 2 * ROW), label, "muted", TEXT, "middle")


def _levels(figure: Figure, frame: axes.Frame) -> Iterator[Shape]:
    for i, (_, value) in enumerate(figure.levels):
        yield _level(i, (frame.left, frame.y(value)), (frame.right, frame.y(value)))


def _intervals(i: int, series: Series, frame: axes.Frame, opacity: float) -> Iterator[Shape]:
    if series.low is None or series.high is None:
        return
    low, high = frame.points(series.x, series.low), frame.points(series.x, series.high)
    if series.joined and len(low) > 1:
        yield Area((*high, *reversed(low)), _colour(i), opacity=opacity)
        return
    for a, b in zip(low, high, strict=True):
        yield Line((a, b), _colour(i), 1.5)
        for x, y in (a, b):
            yield Line(((x - 3, y), (x + 3, y)), _colour(i), 1.5)


def _markers(figure: Figure, frame: axes.Frame) -> Iterator[Shape]:
    hollow = _has_emphasis(figure)
    for i, series in enumerate(figure.series):
        for k, at in enumerate(frame.points(series.x, series.y)):
            best = k in series.emphasis
            yield _marker(i, at, BEST if best else MARKER, filled=best or not hollow)


def _labels(figure: Figure, frame: axes.Frame) -> Iterator[Shape]:
    """Labels of points, those of emphasised ones placed first."""
    wanted: list[tuple[bool, Point, str]] = []
    taken: list[Box] = []
    lines: list[Sequence[Point]] = []
    for series in figure.series:
        points = frame.points(series.x, series.y)
        taken += [Box(x - BEST, y - BEST, x + BEST, y + BEST) for x, y in points]
        if series.joined:
            lines.append(points)
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
