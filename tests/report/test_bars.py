"""Bars begin at 0 and end at their values, and their texts lie on nothing."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from distill.report import plot
from distill.report.drawing import Line, Sheet, Text
from distill.report.plot import Bars, BarSeries
from tests.report.reading import (
    HOSTILE,
    UNWRITABLE,
    box,
    require_legible,
    require_safe,
    require_same_in_both,
    texts,
    tiles,
)

NAMES = ("T-shirt/top", "Trouser", "Pullover")


def bars(*series: BarSeries, **more: object) -> Bars:
    return Bars("Title", "x", NAMES, series)._replace(**more)


def place_of(sheet: Sheet, first: tuple[str, float], second: tuple[str, float], x: float) -> float:
    """Where a value lies on a sheet, by the labels of two ticks."""
    (a, at_a), (b, at_b) = ((texts(sheet)[label].at[0], value) for label, value in (first, second))
    return a + (x - at_a) / (at_b - at_a) * (b - a)


def test_bars_go_from_0_to_their_values() -> None:
    sheet = plot.layout(bars(BarSeries("a", [0.9, 0.45, 0.6]), percent=True))
    ticks = (("0 %", 0.0), ("80 %", 0.8))
    found = tiles(sheet, "series-1")
    assert [box[0] for box in found] == pytest.approx([place_of(sheet, *ticks, 0)] * 3, abs=0.02)
    expected = [place_of(sheet, *ticks, value) for value in (0.9, 0.45, 0.6)]
    assert [box[2] for box in found] == pytest.approx(expected, abs=0.02)
    assert [box[1] for box in found] == sorted(box[1] for box in found)
    require_legible(sheet)
    require_same_in_both(sheet)


def test_bars_below_0_go_to_the_left() -> None:
    sheet = plot.layout(bars(BarSeries("a", [1.5, -2.0, 0.25])))
    zero = place_of(sheet, ("−2", -2), ("1", 1), 0)
    (up, down, small) = tiles(sheet, "series-1")
    assert (up[0], down[2], small[0]) == pytest.approx((zero, zero, zero), abs=0.02)
    assert zero - down[0] == pytest.approx(2 / 1.5 * (up[2] - zero), abs=0.05)
    assert {"+1.50", "−2.00", "+0.25"} <= set(texts(sheet))
    assert box(texts(sheet)["−2.00"]).right < down[0]
    require_legible(sheet)


def test_a_value_stands_beside_its_bar_and_its_interval() -> None:
    series = BarSeries("a", [0.9, 0.5, 0.6], [0.85, 0.4, None], [0.95, 0.55, None])
    sheet = plot.layout(bars(series, percent=True))
    whiskers = [
        shape.points
        for shape in sheet.shapes
        if isinstance(shape, Line)
        and shape.colour == "ink"
        and shape.points[0][1] == shape.points[1][1]
    ]
    ticks = (("0 %", 0.0), ("80 %", 0.8))
    expected = [[place_of(sheet, *ticks, x) for x in ends] for ends in ((0.85, 0.95), (0.4, 0.55))]
    assert [[a[0], b[0]] for a, b in whiskers] == [pytest.approx(e, abs=0.02) for e in expected]
    for text, (_, right), bar in zip(
        ("90.0 %", "50.0 %"), expected, tiles(sheet, "series-1"), strict=False
    ):
        assert right < box(texts(sheet)[text]).left < right + 8
        assert bar[1] < texts(sheet)[text].at[1] - 4 < bar[3]
    require_legible(sheet)


def test_every_series_has_a_bar_in_each_group_and_a_name_in_the_legend() -> None:
    names = ("teacher", "student", "alone")
    sheet = plot.layout(bars(*(BarSeries(n, [0.5, 0.6, 0.7]) for n in names), percent=True))
    assert set(names) <= set(texts(sheet))
    heights = [[box[1] for box in tiles(sheet, f"series-{i}")] for i in (1, 2, 3)]
    for group, name in enumerate(NAMES):
        assert heights[0][group] < heights[1][group] < heights[2][group]
        assert heights[1][group] < texts(sheet)[name].at[1] < heights[2][group]
    alone = plot.layout(bars(BarSeries("teacher", [0.5, 0.6, 0.7])))
    assert "teacher" not in texts(alone)
    require_legible(sheet)
    require_same_in_both(sheet)


def test_what_is_not_known_has_no_bar() -> None:
    sheet = plot.layout(bars(BarSeries("a", [0.5, None, 0.7]), percent=True))
    assert len(tiles(sheet, "series-1")) == 2
    assert "–" in texts(sheet)
    unknown = plot.layout(bars(BarSeries("a", [None] * 3)))
    assert not tiles(unknown, "series-1")


def test_texts_may_be_given() -> None:
    sheet = plot.layout(bars(BarSeries("a", [1, 2, 3], texts=["1 of 9", "2 of 9", "3 of 9"])))
    assert {"1 of 9", "2 of 9", "3 of 9"} <= set(texts(sheet))


@pytest.mark.parametrize("series", [1, 3, 6])
@pytest.mark.parametrize("groups", [1, 30])
def test_one_group_and_thirty_are_legible(series: int, groups: int) -> None:
    columns = [BarSeries(f"s{i}", [math.sin(i + k) for k in range(groups)]) for i in range(series)]
    drawn = Bars("Title", "x", [f"group_{k}_of_a_longer/name" for k in range(groups)], columns)
    sheet = plot.layout(drawn)
    require_legible(sheet)
    found = [box for i in range(series) for box in tiles(sheet, f"series-{i + 1}")]
    ends = sorted((box[1], box[3]) for box in found)
    assert len(ends) == series * groups
    assert all(a[1] < b[0] for a, b in pairwise(ends))
    values = [s for s in sheet.shapes if isinstance(s, Text) and s.anchor != "middle"]
    for text in (s for s in values if s.colour == "ink" and s.text[0] in "+−"):
        assert not [
            1 for box in found if box[1] < text.at[1] - 4 < box[3] and box[0] < text.at[0] < box[2]
        ]


finite = st.floats(-1e100, 1e100, allow_nan=False)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(finite, finite, finite), min_size=1, max_size=6), st.booleans())
@example([(0.0, 0.0, 5e-324)], False)
@example([(0.0, 5e-324, 0.0)], True)
def test_any_finite_values_are_within_the_sheet(
    rows: list[tuple[float, float, float]], percent: bool
) -> None:
    low, value, high = zip(*rows, strict=True)
    drawn = Bars(
        "Title", "x", [str(i) for i in range(len(rows))], [BarSeries("a", value, low, high)]
    )
    sheet = plot.layout(drawn._replace(percent=percent))
    for shape in sheet.shapes:
        if isinstance(shape, Line):
            assert all(0 <= x <= sheet.width and 0 <= y <= sheet.height for x, y in shape.points)
        if isinstance(shape, Text):
            assert box(shape).left >= 0
            assert box(shape).right <= sheet.width


@pytest.mark.parametrize("name", [*HOSTILE, *UNWRITABLE])
def test_any_name_can_be_drawn(name: str) -> None:
    series = BarSeries(name, [0.5, -0.6], texts=[name, name])
    drawn = Bars(name, name, [name, "b"], [series, BarSeries("other", [1, 2])])
    require_safe(plot.svg(drawn))
    sheet = plot.layout(drawn)
    for text in (s for s in sheet.shapes if isinstance(s, Text)):
        assert box(text).left >= 0
        assert box(text).right <= sheet.width
    assert tiles(sheet, "series-1")[0][2] - tiles(sheet, "series-1")[0][0] > 10
    plot.png(drawn)


def test_the_plot_speaks() -> None:
    said = plot.layout(bars(BarSeries("student", [0.9, 0.45, None]), percent=True)).description
    assert said == ("x, 3 groups. student: lowest 45.0 % (Trouser), highest 90.0 % (T-shirt/top).")


@pytest.mark.parametrize(
    ("drawn", "message"),
    [
        (bars(), "Title: no bars to draw"),
        (bars(BarSeries("a", []), names=()), "Title: no bars to draw"),
        (bars(BarSeries("a", [1, 2])), "a: 3 groups and 2 of another kind"),
        (bars(BarSeries("a", [1, 2, 3], texts=["1"])), "a: 3 groups and 1 of another kind"),
        (bars(BarSeries("a", [1, 2, 3], low=[0, 0, 0])), "a: an interval needs both ends"),
        (bars(BarSeries("a", [1, math.nan, 3])), "a: nan is not a finite number"),
        (bars(BarSeries("a", [1, 2, 3], [0, 0, 0], [1, 1, math.inf])), "a: inf is not a finite"),
        (bars(*[BarSeries("a", [1, 2, 3])] * 7), "Title: 3 groups of 7 bars are more than 30 of 6"),
        (bars(BarSeries("a", [1] * 31), names=["x"] * 31), "31 groups of 1 bars are more"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_words(drawn: Bars, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plot.layout(drawn)
