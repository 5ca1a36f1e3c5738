"""A matrix as colours, and as numbers where there is room for them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from distill.report import axes, colours, drawing, sheet
from distill.report.drawing import Line, Shape, Sheet, Text, Tiles, fit, text_width
from distill.report.sheet import HALF, LETTERS, MARGIN, ROW, SAMPLE, TEXT, WIDTH

MOST = 100  # rows or columns
MOST_WRITTEN = (40, 25)  # rows and columns whose cells have texts
WIDEST = 880  # sheet; a page on a phone scrolls it
NAMES = 140.0  # widest name of a row
HIGHEST_NAMES = 110.0  # of columns, which read upwards where they have no room
CELL = (6.0, 60.0)  # narrowest and widest
HEIGHTS = (22.0, 34.0)  # of cells with texts
PADDING = 2.5  # on both sides of a text in a cell
GAP = 1.0  # of paper between cells that are wider than
GAP_FROM = 11.0
TOUCH = 1e-6  # units; cells that are no further apart are one
BAR = (3.0, 11.0)  # width and height of a step of the colours in the legend
END = 88.0  # widest text of an end of the legend
FRAME = 1.5  # around emphasised cells
DIGITS = (3, 2)  # of the largest value, the first that has room


class Heatmap(NamedTuple):
    """Values of rows and columns."""

    title: str
    x_label: str  # what the columns are
    y_label: str  # what the rows are
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float | None]]  # by row; None and NaN where there is none
    value_label: str = ""  # what the values are
    percent: bool = False  # values are fractions, shown in per cent
    diverging: bool = False  # two colours, for values above 0 and below it
    low: float | None = None  # value of the first colour; else the lowest value
    high: float | None = None  # of the last one; else the highest
    texts: Sequence[Sequence[str]] | None = None  # in the cells in place of the values
    emphasis: Sequence[tuple[int, int]] = ()  # row and column of cells with a frame


class _Matrix(NamedTuple):
    """The values, None where there is none, and what their colours are."""

    values: list[list[float | None]]
    scale: str  # its name
    low: float  # value of its first colour
    high: float

    def known(self) -> list[float]:
        """The values that there are."""
        return [value for row in self.values for value in row if value is not None]

    def colour(self, value: float) -> str:
        """Name of a value's colour."""
        return colours.step(self.scale, (value - self.low) / (self.high - self.low))


class _Grid(NamedTuple):
    """Where the cells are."""

    left: float
    top: float
    width: float  # of a cell
    height: float
    gap: float

    def box(self, row: int, column: int) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of a cell."""
        left, top = self.left + column * self.width, self.top + row * self.height
        half = self.gap / 2
        return left + half, top + half, left + self.width - half, top + self.height - half


def layout(heatmap: Heatmap) -> Sheet:
    """All shapes of a plot, in the order they are drawn.

    Raises:
        ValueError: If there is nothing to draw, or a value that has no place.
    """
    matrix = _matrix(heatmap)
    rows = [fit(name, width=NAMES, size=TEXT) for name in heatmap.rows]
    columns = [fit(name, width=HIGHEST_NAMES, size=TEXT) for name in heatmap.columns]
    left = MARGIN + 6 + max(text_width(name, TEXT) for name in rows)
    texts, cell = _texts(heatmap, matrix, left)
    width = math.ceil(max(WIDTH, left + cell * len(columns) + MARGIN))
    header, y = sheet.header(heatmap.title, (), heatmap.value_label, width=width)
    header += _legend(matrix, y + 4, percent=heatmap.percent)
    y += ROW + 8
    if label := fit(heatmap.y_label, width=width - 2 * MARGIN, size=TEXT):
        header.append(Text((MARGIN, y), label, "muted", TEXT))
        y += 11
    height = _height(cell, len(rows), written=bool(texts))
    grid = _Grid(left, y, cell, height, GAP if min(cell, height) >= GAP_FROM else 0.0)
    below, y = _column_names(columns, grid, y + grid.height * len(rows))
    if heatmap.x_label:
        y += ROW
        middle = left + cell * len(columns) / 2
        below.append(sheet.centred(heatmap.x_label, middle, y, width=width))
    shapes = (
        *header,
        *_row_names(rows, grid),
        *_cells(matrix, grid),
        *(_frame(grid.box(*cell)) for cell in heatmap.emphasis if grid.gap),
        *_written(texts, matrix, grid),
        *below,
    )
    title, said = drawing.plain(heatmap.title), _describe(heatmap, matrix)
    return Sheet(width, math.ceil(y + MARGIN), shapes, title, said)


def _matrix(heatmap: Heatmap) -> _Matrix:
    """The values and the ends of their colours."""
    title, rows, columns = heatmap.title, len(heatmap.rows), len(heatmap.columns)
    if min(rows, columns) == 0:
        raise ValueError(f"{title}: no cells to draw")
    if max(rows, columns) > MOST:
        raise ValueError(f"{title}: {rows} by {columns} cells, more than {MOST} by {MOST}")
    for table in (heatmap.values, heatmap.texts):
        if table is not None and [len(row) for row in table] != [columns] * rows:
            raise ValueError(f"{title}: not {columns} cells in each of {rows} rows")
    if not all(0 <= i < rows and 0 <= j < columns for i, j in heatmap.emphasis):
        raise ValueError(f"{title}: a frame around a cell that is not there")
    values = [[None if v is None or math.isnan(v) else v for v in row] for row in heatmap.values]
    known = [value for row in values for value in row if value is not None]
    if not known:
        raise ValueError(f"{title}: no values to draw")
    low = min(known) if heatmap.low is None else heatmap.low
    high = max(known) if heatmap.high is None else heatmap.high
    sheet.require_finite(title, (*known, low, high))
    if heatmap.diverging:
        reach = max(abs(low), abs(high)) or 1.0
        return _Matrix(values, "difference", -reach, reach)
    if low >= high:
        low, high = axes.span((low, high))
    return _Matrix(values, "amount", low, high)


def _texts(heatmap: Heatmap, matrix: _Matrix, left: float) -> tuple[list[list[str]], float]:
    """What is written in the cells, by row, and their width; nothing where there is no room."""
    rows, columns = len(heatmap.rows), len(heatmap.columns)
    narrow = min(max((WIDTH - MARGIN - left) / columns, CELL[0]), CELL[1])
    if rows > MOST_WRITTEN[0] or columns > MOST_WRITTEN[1]:
        return [], narrow
    choices = [_numbers(heatmap, matrix, digits) for digits in DIGITS]
    if heatmap.texts is not None:
        choices = [[[fit(text, width=WIDEST, size=TEXT) for text in row] for row in heatmap.texts]]
    for texts, widest in (*((texts, WIDTH) for texts in choices), (choices[-1], WIDEST)):
        needed = 2 * PADDING + max(text_width(text, TEXT) for row in texts for text in row)
        if left + needed * columns + MARGIN <= widest:
            return texts, max(narrow, needed)
    return [], narrow


def _numbers(heatmap: Heatmap, matrix: _Matrix, digits: int) -> list[list[str]]:
    """The values as texts; in per cent without the sign, which is in the legend."""
    step = axes.precision(matrix.known(), digits=digits, percent=heatmap.percent)

    def shown(value: float | None) -> str:
        if value is None:
            return ""
        sign = "+" if heatmap.diverging and value > 0 else ""
        return sign + axes.number(value, step=step, percent=heatmap.percent).removesuffix(" %")

    return [[shown(value) for value in row] for row in matrix.values]


def _height(width: float, rows: int, *, written: bool) -> float:
    """Of a cell."""
    if written:
        return min(max(width, HEIGHTS[0]), HEIGHTS[1])
    return min(width, max(CELL[0], 640 / rows))


def _legend(matrix: _Matrix, y: float, *, percent: bool) -> list[Shape]:
    """The colours with the values at their ends, on a baseline at `y`."""
    known, ends = matrix.known(), (matrix.low, matrix.high)
    step = axes.precision(ends, digits=DIGITS[-1], percent=percent)
    first, last = (axes.number(end, step=step, percent=percent) for end in ends)
    first = fit(f"≤ {first}" if min(known) < ends[0] else first, width=END, size=TEXT)
    last = fit(f"≥ {last}" if max(known) > ends[1] else last, width=END, size=TEXT)
    x, middle = MARGIN + text_width(first, TEXT) + 6, y - HALF
    shapes: list[Shape] = [Text((MARGIN, y), first, "muted", TEXT)]
    for i in range(colours.STEPS):
        box = (x, middle - BAR[1] / 2, x + BAR[0], middle + BAR[1] / 2)
        shapes.append(Tiles((box,), f"{matrix.scale}-{i}"))
        x += BAR[0]
    shapes.append(Text((x + 6, y), last, "muted", TEXT))
    if any(None in row for row in matrix.values):
        x += 6 + text_width(last, TEXT) + 16
        box = (x, middle - BAR[1] / 2, x + SAMPLE, middle + BAR[1] / 2)
        shapes += [_crossed(box), Text((x + SAMPLE + 6, y), "no value", "muted", TEXT)]
    return shapes


def _crossed(box: tuple[float, float, float, float]) -> Line:
    left, top, right, bottom = box
    return Line(((left, bottom), (right, top)), "muted", 0.75)


def _frame(box: tuple[float, float, float, float]) -> Line:
    left, top, right, bottom = box
    corners = ((left, top), (right, top), (right, bottom), (left, bottom))
    return Line((*corners, *corners[:2]), "ink", FRAME)


def _cells(matrix: _Matrix, grid: _Grid) -> Iterator[Shape]:
    """The cells, those of a colour together."""
    by_colour: dict[str, list[tuple[float, float, float, float]]] = {}
    for row, values in enumerate(matrix.values):
        for column, value in enumerate(values):
            box = grid.box(row, column)
            if value is None:
                if grid.gap:
                    yield _crossed(box)
                continue
            boxes = by_colour.setdefault(matrix.colour(value), [])
            if boxes and math.dist((boxes[-1][2], boxes[-1][1]), box[:2]) < TOUCH:
                box = (boxes.pop()[0], *box[1:])
            boxes.append(box)
    for name, boxes in by_colour.items():
        yield Tiles(tuple(boxes), name)


def _written(texts: Sequence[Sequence[str]], matrix: _Matrix, grid: _Grid) -> Iterator[Shape]:
    for row, line in enumerate(texts):
        for column, text in enumerate(line):
            value = matrix.values[row][column]
            if value is not None and text:
                left, top, right, bottom = grid.box(row, column)
                at = ((left + right) / 2, (top + bottom) / 2 + HALF)
                yield Text(at, text, colours.over(matrix.colour(value)), TEXT, "middle")


def _row_names(names: Sequence[str], grid: _Grid) -> Iterator[Shape]:
    for i in range(0, len(names), math.ceil(LETTERS / grid.height)):
        y = grid.top + grid.height * (i + 0.5) + HALF
        yield Text((grid.left - 6, y), names[i], "ink", TEXT, "end")


def _column_names(names: Sequence[str], grid: _Grid, bottom: float) -> tuple[list[Shape], float]:
    """Names below the columns, upwards if they are wide, and where they end."""
    upright = max(text_width(name, TEXT) for name in names) + 5 <= grid.width
    shapes: list[Shape] = []
    lowest = bottom + (ROW if upright else 0)
    for i in range(0, len(names), 1 if upright else math.ceil(LETTERS / grid.width)):
        x = grid.left + grid.width * (i + 0.5)
        if upright:
            shapes.append(Text((x, bottom + ROW - 3), names[i], "ink", TEXT, "middle"))
        else:
            at = (x + HALF, bottom + 5)
            shapes.append(Text(at, names[i], "ink", TEXT, "end", turned=True))
            lowest = max(lowest, bottom + 5 + text_width(names[i], TEXT))
    return shapes, lowest


def _describe(heatmap: Heatmap, matrix: _Matrix) -> str:
    """The matrix in words, for who cannot see it."""
    found = [
        (value, row, column)
        for row, values in zip(heatmap.rows, matrix.values, strict=True)
        for column, value in zip(heatmap.columns, values, strict=True)
        if value is not None
    ]
    (low, *at_low), (high, *at_high) = min(found), max(found)
    step = axes.precision((low, high), digits=DIGITS[0], percent=heatmap.percent)
    first, last = (axes.number(end, step=step, percent=heatmap.percent) for end in (low, high))
    of = f"{heatmap.value_label} by " if heatmap.value_label else ""
    return drawing.plain(
        f"{of}{heatmap.y_label} and {heatmap.x_label}: {len(heatmap.rows)} rows and "
        f"{len(heatmap.columns)} columns, lowest {first} ({', '.join(at_low)}), "
        f"highest {last} ({', '.join(at_high)})."
    )
