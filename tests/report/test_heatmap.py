"""A heatmap has each value where its row and column say, in a colour that grows with it."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.report import colours, drawing, heatmap, plot
from distill.report.colours import COLOURS, STEPS
from distill.report.drawing import Line, Sheet, Text, Tiles
from distill.report.plot import Heatmap
from tests.report.reading import (
    HOSTILE,
    UNWRITABLE,
    all_tiles,
    box,
    pixels,
    require_legible,
    require_safe,
    require_same_in_both,
    rgb,
    texts,
    used_colours,
)


def heat(values: list[list[float | None]], **more: object) -> Heatmap:
    rows = [f"row {i}" for i in range(len(values))]
    columns = [f"column {j}" for j in range(len(values[0]))]
    return Heatmap("Title", "x", "y", rows, columns, values, "value")._replace(**more)


def square(n: int, seed: int = 0) -> list[list[float | None]]:
    draw = random.Random(seed)
    return [[draw.random() for _ in range(n)] for _ in range(n)]


def cells(sheet: Sheet, scale: str = "amount") -> list[tuple[float, float, float, float, int]]:
    """The rectangles below the legend, from the top and then from the left, with their step."""
    found = [
        (top, left, right, bottom, i)
        for name, boxes in all_tiles(sheet).items()
        for i in (int(name.removeprefix(scale + "-")),)
        for left, top, right, bottom in boxes
        if bottom - top != pytest.approx(heatmap.BAR[1], abs=0.02) or right - left > 3.1
    ]
    return [(left, top, right, bottom, i) for top, left, right, bottom, i in sorted(found)]


def test_a_cell_is_where_its_row_and_column_are_in_the_colour_of_its_value() -> None:
    sheet = plot.layout(heat([[0.0, 0.5, 1.0], [0.75, 0.25, 0.1]]))
    found = cells(sheet)
    assert [step for *_, step in found] == [0, 16, 32, 24, 8, 3]
    for i, (left, top, right, bottom, _) in enumerate(found):
        row, column = texts(sheet)[f"row {i // 3}"], texts(sheet)[f"column {i % 3}"]
        assert top < row.at[1] - 4 < bottom
        assert left < column.at[0] - (4 if column.turned else 0) < right
    for value, (left, top, right, bottom, _) in zip(
        ("0.000", "0.500", "1.000", "0.750", "0.250", "0.100"), found, strict=True
    ):
        (x, y) = texts(sheet)[value].at
        assert x == pytest.approx((left + right) / 2, abs=0.02)
        assert top < y - 4 < bottom
    require_legible(sheet)
    require_same_in_both(sheet)


def test_letters_stand_out_from_their_cell() -> None:
    sheet = plot.layout(heat([[i / 4 for i in range(5)]], percent=True))
    for text, step in (("0.0", 0), ("25.0", 8), ("50.0", 16), ("75.0", 24), ("100.0", 32)):
        assert texts(sheet)[text].colour == colours.over(f"amount-{step}")


def test_the_legend_goes_from_the_lowest_to_the_highest_value() -> None:
    sheet = plot.layout(heat([[0.2, 0.9]], percent=True))
    assert {"20 %", "90 %", "value"} <= set(texts(sheet))
    bar = [s for s in sheet.shapes if isinstance(s, Tiles)][:STEPS]
    assert [s.fill for s in bar] == [f"amount-{i}" for i in range(STEPS)]
    edges = [s.boxes[0] for s in bar]
    assert all(a[2] == pytest.approx(b[0]) for a, b in pairwise(edges))
    assert box(texts(sheet)["20 %"]).right < edges[0][0]
    assert edges[-1][2] < box(texts(sheet)["90 %"]).left
    given_ends = plot.layout(heat([[0.2, 0.9]], percent=True, low=0.0, high=1.0))
    assert {"0 %", "100 %"} <= set(texts(given_ends))
    beyond = plot.layout(heat([[0.2, 0.9]], percent=True, low=0.5, high=0.8))
    assert {"≤ 50 %", "≥ 80 %"} <= set(texts(beyond))
    assert [step for *_, step in cells(beyond)] == [0, STEPS - 1]


def test_differences_have_0_in_the_middle_and_a_sign() -> None:
    sheet = plot.layout(heat([[-1.0, 0.0, 2.0, 1.0]], diverging=True))
    assert [step for *_, step in cells(sheet, "difference")] == [8, 16, 32, 24]
    assert {"−1", "0", "+2", "+1", "−2", "2"} <= set(texts(sheet))
    for diverging, scale in ((True, "difference"), (False, "amount")):  # where all are equal
        alone = plot.layout(heat([[0.0]], diverging=diverging))
        assert [step for *_, step in cells(alone, scale)] == [16]


@pytest.mark.parametrize("missing", [None, math.nan])
def test_what_has_no_value_has_no_colour_and_is_crossed_out(missing: float | None) -> None:
    sheet = plot.layout(heat([[0.0, missing], [0.5, 1.0]]))
    assert len(cells(sheet)) == 3
    assert "no value" in texts(sheet)
    crosses = [s.points for s in sheet.shapes if isinstance(s, Line)]
    assert len(crosses) == 2  # one of them in the legend
    left, _, right, _, _ = cells(sheet)[2]  # below it
    (start, end) = crosses[1]
    assert (start[0], end[0]) == pytest.approx((left, right), abs=0.02)
    assert start[1] > end[1]
    assert "no value" not in texts(plot.layout(heat([[0.0]])))
    require_legible(sheet)


def test_frames_and_texts_may_be_given() -> None:
    given_texts = [["a", ""], ["c", "d"]]
    sheet = plot.layout(heat([[0.0, 0.1], [0.5, 1.0]], texts=given_texts, emphasis=[(1, 1)]))
    assert {"a", "c", "d"} <= set(texts(sheet))
    assert "0.500" not in texts(sheet)
    (frame,) = (s for s in sheet.shapes if isinstance(s, Line))
    left, top, right, bottom, _ = cells(sheet)[3]
    assert (left, top) == pytest.approx(frame.points[0], abs=0.02)
    assert (right, bottom) == pytest.approx(frame.points[2], abs=0.02)


@pytest.mark.parametrize("n", [1, 2, 5, 12, 25])
def test_up_to_25_columns_have_their_values_written(n: int) -> None:
    sheet = plot.layout(heat(square(n, n), percent=True))
    written = [s for s in sheet.shapes if isinstance(s, Text) and "-" in s.colour]
    assert len(written) == n * n
    assert sheet.width <= heatmap.WIDEST
    for (left, top, right, bottom, _), text in zip(cells(sheet), written, strict=True):
        where = box(text)
        assert left <= where.left
        assert where.right <= right
        assert top <= where.top
        assert where.bottom <= bottom
    require_legible(sheet)
    require_same_in_both(sheet)


@pytest.mark.parametrize(("rows", "columns"), [(26, 26), (100, 100), (100, 3), (3, 100), (19, 5)])
def test_any_shape_is_legible(rows: int, columns: int) -> None:
    values = [[math.sin(i * j) for j in range(columns)] for i in range(rows)]
    sheet = plot.layout(heat(values))
    written = [s for s in sheet.shapes if isinstance(s, Text) and "-" in s.colour]
    assert len(written) == (95 if rows == 19 else 0)
    require_legible(sheet)
    left, right = cells(sheet)[0][0], max(c[2] for c in cells(sheet))
    assert right <= sheet.width
    area = sum((c[2] - c[0]) * (c[3] - c[1]) for c in cells(sheet))
    bottom, top = max(c[3] for c in cells(sheet)), min(c[1] for c in cells(sheet))
    assert 0.85 < area / ((right - left) * (bottom - top)) < 1.001


def test_cells_that_touch_are_drawn_as_one() -> None:
    sheet = plot.layout(heat([[1.0] * 50 + [0.0] * 50] * 100))
    assert len(cells(sheet)) == 200
    assert len(drawing.svg(sheet)) < 30_000
    worst = plot.layout(heat(square(100)))
    assert len(drawing.svg(worst)) < 400_000
    image = pixels(drawing.png(sheet, scale=2))
    left, top, right, _, _ = cells(sheet)[0]
    row = image[round(2 * top) + 2, round(2 * left) : round(2 * right)]
    assert (row == rgb(f"amount-{STEPS - 1}")).all()


def test_every_colour_follows_the_page() -> None:
    svg = plot.svg(heat([[i / 40 for i in range(20)], [1 - i / 40 for i in range(20)]]))
    style = svg.partition("<style>")[2].partition("</style>")[0]
    names = {light: name for name, (light, _) in COLOURS.items()}
    assert len(set(used_colours(svg))) > 30
    for what, colour in set(used_colours(svg)):
        assert f'.plot [{what}="{colour}"]{{{what}:var(--{names[colour]})}}' in style
        assert f"--{names[colour]}:{COLOURS[names[colour]][1]}" in style


finite = st.floats(-1e100, 1e100, allow_nan=False)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.none(), finite), min_size=1, max_size=9), st.booleans(), st.booleans())
def test_any_finite_values_have_a_colour(
    values: list[float | None], percent: bool, diverging: bool
) -> None:
    drawn = heat([values], percent=percent, diverging=diverging)
    if all(value is None for value in values):
        with pytest.raises(ValueError, match="Title: no values to draw"):
            plot.layout(drawn)
        return
    sheet = plot.layout(drawn)
    assert len(cells(sheet, "difference" if diverging else "amount")) >= 1
    for text in (s for s in sheet.shapes if isinstance(s, Text)):
        assert box(text).left >= 0
        assert box(text).right <= sheet.width


@pytest.mark.parametrize("name", [*HOSTILE, *UNWRITABLE])
def test_any_name_can_be_drawn(name: str) -> None:
    drawn = Heatmap(name, name, name, [name] * 2, [name] * 2, [[0, 1], [2, None]], name)
    require_safe(plot.svg(drawn._replace(texts=[[name] * 2] * 2)))
    sheet = plot.layout(drawn)
    for text in (s for s in sheet.shapes if isinstance(s, Text)):
        assert box(text).left >= 0
        assert box(text).right <= sheet.width
    plot.png(drawn)


def test_the_plot_speaks() -> None:
    said = plot.layout(heat([[0.25, None], [0.5, 0.75]], percent=True)).description
    assert said == (
        "value by y and x: 2 rows and 2 columns, lowest 25.0 % (row 0, column 0), highest 75.0 % "
        "(row 1, column 1)."
    )


@pytest.mark.parametrize(
    ("drawn", "message"),
    [
        (heat([[None, math.nan]]), "Title: no values to draw"),
        (heat([[1.0]], rows=()), "Title: no cells to draw"),
        (heat([[]]), "Title: no cells to draw"),
        (heat([[1.0, 2.0]], rows=["a", "b"]), "Title: not 2 cells in each of 2 rows"),
        (heat([[1.0, 2.0], [3.0]]), "Title: not 2 cells in each of 2 rows"),
        (heat([[1.0, 2.0]], texts=[["a"]]), "Title: not 2 cells in each of 1 rows"),
        (heat([[1.0, math.inf]]), "Title: inf is not a finite number"),
        (heat([[1.0]], low=math.nan), "Title: nan is not a finite number"),
        (heat([[1.0]], emphasis=[(0, 1)]), "Title: a frame around a cell that is not there"),
        (heat([[1.0] * 101]), "Title: 1 by 101 cells, more than 100 by 100"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_words(drawn: Heatmap, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plot.layout(drawn)
