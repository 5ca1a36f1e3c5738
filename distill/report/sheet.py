"""What all plots have in common: their units, the title, the legend and the lines of the grid."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from distill.report.axes import Frame
from distill.report.drawing import Area, Line, Point, Shape, Text, fit, text_width, wrap

# Units. A page on a phone of 360 px shows the width on 336 px and more, so the text of 13.5 units
# on 11.3 px; the text of a paper's column has the same part of its width.
WIDTH = 400
MARGIN = 8.0
TEXT = 13.5
LETTERS = 1.15 * TEXT  # height of the highest and the lowest together
TITLE = 15.0
ROW = 19.0  # from one line of text to the next
HALF = 0.35 * TEXT  # from a text's baseline to the middle of its letters
SAMPLE = 24.0  # of a line in the legend
SWATCH = 11.0  # of an area
SERIES = tuple(f"series-{i}" for i in range(1, 7))


class Entry(NamedTuple):
    """A line of the legend."""

    name: str
    drawn: Callable[[Point], Iterable[Shape]]  # what it looks like, from this point to the right
    width: float = SAMPLE  # of that


def colour(i: int) -> str:
    """Of the i-th series."""
    return SERIES[i % len(SERIES)]


def header(
    title: str, entries: Sequence[Entry], label: str, *, width: float = WIDTH
) -> tuple[list[Shape], float]:
    """Title, legend and what the values are, and where the plot begins below them."""
    room, y = width - 2 * MARGIN, MARGIN + TITLE - 3
    shapes: list[Shape] = []
    for line in wrap(title, width=room, size=TITLE):
        shapes.append(Text((MARGIN, y), line, "ink", TITLE, bold=True))
        y += ROW
    y += 4
    x = MARGIN
    for name, drawn, wide in entries:
        text = fit(name, width=room - wide - 6, size=TEXT)
        needed = wide + 6 + text_width(text, TEXT)
        if x > MARGIN and x + needed > width - MARGIN:
            x, y = MARGIN, y + ROW
        shapes += [*drawn((x, y - HALF)), Text((x + wide + 6, y), text, "ink", TEXT)]
        x += needed + 14
    if entries:
        y += ROW + 5
    if label := fit(label, width=room, size=TEXT):
        shapes.append(Text((MARGIN, y), label, "muted", TEXT))
        y += 14
    return shapes, y


def across(frame: Frame) -> Iterator[Shape]:
    """The ticks of the y axis: a line across the frame and a label on the left."""
    for value, text in frame.y_axis.ticks:
        y = frame.y(value)
        yield Line(((frame.left, y), (frame.right, y)), "grid", 1.0)
        yield Text((frame.left - 6, y + HALF), text, "muted", TEXT, "end")


def down(frame: Frame) -> Iterator[Shape]:
    """A line down the frame at each tick of the x axis."""
    for value, _ in frame.x_axis.ticks:
        yield Line(((frame.x(value), frame.top), (frame.x(value), frame.bottom)), "grid", 1.0)


def base(frame: Frame) -> Line:
    """The line at the bottom of a frame."""
    return Line(((frame.left, frame.bottom), (frame.right, frame.bottom)), "muted", 1.0)


def below(frame: Frame, label: str) -> Iterator[Shape]:
    """The labels of the x axis's ticks, where there is room, and what it shows."""
    free = 0.0  # where the next label may begin
    for value, text in frame.x_axis.ticks:
        half = text_width(text, TEXT) / 2
        middle = min(frame.x(value), WIDTH - 2 - half)
        if middle - half >= free:
            yield Text((middle, frame.bottom + ROW - 1), text, "muted", TEXT, "middle")
            free = middle + half + 5
    yield centred(label, (frame.left + frame.right) / 2, frame.bottom + 2 * ROW)


def centred(text: str, middle: float, y: float, *, width: float = WIDTH) -> Text:
    """What an axis shows, about the middle of it and within the sheet."""
    text = fit(text, width=width - 2 * MARGIN, size=TEXT)
    room = MARGIN + text_width(text, TEXT) / 2
    return Text((min(max(middle, room), width - room), y), text, "muted", TEXT, "middle")


def swatch(fill: str, at: Point, *, opacity: float = 1.0) -> Area:
    """A square of a colour, as a legend shows it."""
    x, y = at[0], at[1] - SWATCH / 2
    corners = ((x, y), (x + SWATCH, y), (x + SWATCH, y + SWATCH), (x, y + SWATCH))
    return Area(corners, fill, opacity=opacity)


def require_finite(name: str, values: Iterable[float]) -> None:
    """Refuse values that have no place.

    Raises:
        ValueError: If one is not a finite number.
    """
    for value in values:
        if not math.isfinite(value):
            raise ValueError(f"{name}: {value} is not a finite number")
