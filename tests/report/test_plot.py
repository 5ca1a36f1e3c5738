"""Plots are where their values say, readable whatever the names, and the same in both forms."""

from __future__ import annotations

import math
import random
import re
from itertools import combinations, pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.report import axes, curves, drawing, plot
from distill.report.colours import COLOURS
from distill.report.drawing import SCALE, Area, Line, Sheet, Text
from distill.report.labels import Box, place
from distill.report.plot import Figure, Series
from distill.report.sheet import MARGIN, SERIES, TEXT, WIDTH
from tests.report.reading import (
    HEAD,
    HOSTILE,
    UNWRITABLE,
    box,
    elements,
    pixels,
    require_safe,
    rgb,
    texts,
    used_colours,
)


def figure(*series: Series, **more: object) -> Figure:
    return Figure(title="Title", x_label="x", y_label="y", series=series)._replace(**more)


def curve(name: str = "a", **more: object) -> Series:
    return Series(name, [1.0, 2.0, 4.0], [0.2, 0.5, 0.4])._replace(**more)


def circles(drawn: Figure) -> list[tuple[float, float]]:
    """Centres of the first series' markers, as the SVG has them; for figures without a legend."""
    found = elements(plot.svg(drawn), "circle")
    return [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in found]


def height_of(sheet: Sheet, first: tuple[str, float], second: tuple[str, float], y: float) -> float:
    """Where a value lies on a sheet, by the labels of two ticks."""
    (a, at_a), (b, at_b) = ((texts(sheet)[label].at[1], value) for label, value in (first, second))
    middle = 0.35 * TEXT  # of the digits, above their baseline
    return a + (y - at_a) / (at_b - at_a) * (b - a) - middle


def test_png_is_1600_wide_on_white_with_every_series() -> None:
    names = [f"series {i}" for i in range(6)]
    drawn = figure(*(curve(n, y=[i, i + 1, i + 2]) for i, n in enumerate(names)))
    image = pixels(plot.png(drawn))
    assert image.shape[1] == 1600
    assert image.shape[0] == SCALE * plot.layout(drawn).height
    assert (image[0, 0] == 255).all()
    for colour in SERIES:
        assert (image == rgb(colour)).all(axis=2).sum() > 500


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0, 6, [0, 1, 2, 3, 4, 5, 6]),
        (-3, 31, [0, 10, 20, 30]),
        (0.7255, 0.7542, [0.73, 0.735, 0.74, 0.745, 0.75]),
        (1e-7, 5e-7, [1e-7, 2e-7, 3e-7, 4e-7, 5e-7]),
    ],
)
def test_ticks_are_1_2_or_5_times_a_power_of_ten(
    low: float, high: float, expected: list[float]
) -> None:
    found, step = axes.ticks(low, high)
    assert found == pytest.approx(expected)
    assert step == pytest.approx(expected[1] - expected[0])


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (450, 55_000, [500, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4]),
        (1, 1000, [1, 3, 10, 30, 100, 300, 1000]),
        (1, 1e6, [10**i for i in range(7)]),
        (1e-9, 1e9, [1e-9, 1e-6, 1e-3, 1, 1e3, 1e6, 1e9]),
        (3, 4, [3, 3.2, 3.4, 3.6, 3.8, 4]),
    ],
)
def test_logarithmic_ticks(low: float, high: float, expected: list[float]) -> None:
    found = axes.log_ticks(low, high)
    if len(expected) == 6:  # the case of the linear axis: any even steps
        assert len({round(b - a, 9) for a, b in pairwise(found)}) == 1
        assert found[0] >= low
        assert found[-1] <= high
    else:
        assert found == pytest.approx(expected)


@pytest.mark.parametrize(
    ("value", "step", "label"),
    [
        (0.25, 0.05, "0.25"),
        (0.5, 0.05, "0.50"),
        (0.0, 0.2, "0.0"),
        (-2, 1, "−2"),
        (500, None, "500"),
        (1000, None, "1k"),
        (10_000, None, "10k"),
        (1e6, None, "1M"),
        (2.5e9, None, "2.5G"),
        (1000, 500, "1k"),
        (1500, 500, "1.5k"),
        (10_050, 50, "10.05k"),
        (2e-7, None, "2e−07"),
    ],
)
def test_labels_of_ticks(value: float, step: float | None, label: str) -> None:
    assert axes.number(value, step=step) == label


@pytest.mark.parametrize(
    ("values", "digits", "percent", "label"),
    [
        ([0.9734, -0.2], 3, False, "0.973"),
        ([1.0, 0.97341], 2, False, "1.00"),
        ([12.34, 1.0], 3, False, "12.3"),
        ([1234.5, 1.0], 3, False, "1.23k"),
        ([1234.0, 1.0], 3, False, "1.234k"),
        ([37.0, 1.0], 3, False, "37"),
        ([0.0], 3, False, "0.000"),
        ([0.9734, 0.1], 3, True, "97.3 %"),
        ([0.9734, 0.1], 2, True, "97 %"),
    ],
)
def test_values_have_the_digits_that_the_largest_one_needs(
    values: list[float], digits: int, percent: bool, label: str
) -> None:
    step = axes.precision(values, digits=digits, percent=percent)
    assert axes.number(values[0], step=step, percent=percent) == label


def test_a_marker_is_where_its_values_are_on_the_ticks() -> None:
    drawn = figure(curve(x=[0.0, 3.0, 7.0], y=[10.0, 55.0, 40.0], joined=False))
    sheet, image = plot.layout(drawn), pixels(plot.png(drawn))
    labels = texts(sheet)
    x0, x6 = labels["0"].at[0], labels["6"].at[0]
    for (cx, cy), x, y in zip(circles(drawn), (0, 3, 7), (10, 55, 40), strict=True):
        assert cx == pytest.approx(x0 + x / 6 * (x6 - x0), abs=0.02)
        assert cy == pytest.approx(height_of(sheet, ("20", 20), ("50", 50), y), abs=0.02)
        assert tuple(image[round(cy * SCALE), round(cx * SCALE)]) == rgb("series-1")


def test_equal_ratios_are_equal_distances_on_a_logarithmic_axis() -> None:
    series = Series("a", [10, 100, 1000], [1, 2, 3])
    x = [c[0] for c in circles(figure(series, log_x=True))]
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.02)
    straight = [c[0] for c in circles(figure(series))]
    assert straight[2] - straight[1] == pytest.approx(10 * (straight[1] - straight[0]), abs=0.2)


def test_a_joined_series_has_a_band_from_low_to_high() -> None:
    drawn = figure(Series("a", [0, 1], [2, 3], low=[1.5, 2.5], high=[2.5, 5.0]))
    sheet = plot.layout(drawn)
    (band,) = (shape for shape in sheet.shapes if isinstance(shape, Area))
    expected = [height_of(sheet, ("2", 2), ("4", 4), y) for y in (2.5, 5.0, 2.5, 1.5)]
    assert [y for _, y in band.points] == pytest.approx(expected, abs=0.02)
    assert band.opacity < 0.3
    x = [c[0] for c in circles(drawn)]
    assert [p[0] for p in band.points] == pytest.approx([x[0], x[1], x[1], x[0]], abs=0.02)


@pytest.mark.parametrize("count", [1, 2])
def test_points_have_whiskers_from_low_to_high(count: int) -> None:
    series = Series(
        "a",
        [0, 1][:count],
        [2, 3][:count],
        [1.5, 2.5][:count],
        [2.5, 5.0][:count],
        joined=count < 2,
    )
    sheet = plot.layout(figure(series))
    upright = [
        shape.points
        for shape in sheet.shapes
        if isinstance(shape, Line)
        and shape.colour == "series-1"
        and len(shape.points) == 2
        and shape.points[0][0] == shape.points[1][0]
    ]
    ticks = (("2.0", 2), ("2.4", 2.4)) if count == 1 else (("2", 2), ("4", 4))
    expected = [[height_of(sheet, *ticks, y) for y in ends] for ends in ((1.5, 2.5), (2.5, 5.0))]
    assert len(upright) == count
    for (a, b), ends in zip(upright, expected, strict=False):
        assert [a[1], b[1]] == pytest.approx(ends, abs=0.02)


def test_levels_and_shaded_spans_are_where_their_values_are() -> None:
    drawn = figure(curve(x=[0, 20, 40], y=[1, 2, 3]), levels=[("Teacher", 8)], shaded=[(10, 90)])
    sheet = plot.layout(drawn)
    (level,) = (s for s in sheet.shapes if isinstance(s, Line) and s.dash and s.points[1][0] > 200)
    expected = height_of(sheet, ("2", 2), ("4", 4), 8)
    assert expected > MARGIN
    assert level.points[0][1] == pytest.approx(expected, abs=0.02)
    (shade,) = (s for s in sheet.shapes if isinstance(s, Area) and s.fill == "shade")
    left, right = min(x for x, _ in shade.points), max(x for x, _ in shade.points)
    assert left == pytest.approx(texts(sheet)["10"].at[0])
    assert right == level.points[1][0]  # cut where the frame ends


def test_percent_labels_fractions_and_stays_below_100() -> None:
    labels = texts(plot.layout(figure(curve(y=[0.9, 0.95, 1.0]), percent=True)))
    assert {"90 %", "100 %"} <= set(labels)
    assert not {"102 %", "105 %", "110 %"} & set(labels)
    alone = texts(plot.layout(figure(curve(y=[1.0] * 3), percent=True)))
    shown = [float(text.removesuffix(" %")) for text in alone if text.endswith(" %")]
    assert max(shown) == 100


def test_the_best_is_larger_and_filled_and_the_others_hollow() -> None:
    drawn = figure(curve(emphasis=[1]))
    found = elements(plot.svg(drawn), "circle")
    assert [c.attrib["fill"] == COLOURS["series-1"][0] for c in found] == [False, True, False]
    both = elements(plot.svg(figure(curve(emphasis=[1]), curve("b"))), "polygon")
    assert {shape.attrib["fill"] for shape in both} == {COLOURS["paper"][0]}
    every = elements(plot.svg(figure(curve())), "circle")
    assert all(c.attrib["fill"] == COLOURS["series-1"][0] for c in every)
    assert float(found[1].attrib["r"]) > 1.2 * float(every[1].attrib["r"])


@pytest.mark.parametrize(
    ("x", "y"),
    [
        ([3.0], [5.0]),
        ([3.0, 3.0], [5.0, 5.0]),
        ([0.0], [0.0]),
        ([1.0, 2.0], [0.7, 0.7 + 1e-15]),
        ([1e9, 1e9 + 1], [-1e12, 1e12]),
    ],
)
@pytest.mark.parametrize("log_x", [False, True])
def test_few_and_equal_values_have_a_place(x: list[float], y: list[float], log_x: bool) -> None:
    if log_x and min(x) <= 0:
        x = [v + 1 for v in x]
    drawn = figure(Series("a", x, y), log_x=log_x)
    sheet = plot.layout(drawn)
    assert len(circles(drawn)) == len(x)
    assert all(0 < cx < WIDTH and 0 < cy < sheet.height for cx, cy in circles(drawn))
    assert len({shape.text for shape in sheet.shapes if isinstance(shape, Text)}) > 4


finite = st.floats(-1e100, 1e100, allow_nan=False)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(finite, finite), min_size=1, max_size=8), st.booleans(), st.booleans())
def test_any_finite_values_are_within_the_frame(
    points: list[tuple[float, float]], log_x: bool, percent: bool
) -> None:
    x = [abs(a) + 1e-100 if log_x else a for a, _ in points]
    drawn = figure(Series("a", x, [b for _, b in points]), log_x=log_x, percent=percent)
    sheet = plot.layout(drawn)
    for cx, cy in circles(drawn):
        assert 0 <= cx <= WIDTH
        assert sheet.height - 300 <= cy <= sheet.height


def test_equal_ratios_are_equal_distances_on_a_logarithmic_y_axis() -> None:
    drawn = figure(Series("a", [0, 1, 2], [0.01, 1, 100]), log_y=True, levels=[("level", 10)])
    y = [c[1] for c in circles(drawn)[1:]]  # the first one is in the legend
    assert y[0] - y[1] == pytest.approx(y[1] - y[2], abs=0.02)
    sheet = plot.layout(drawn)
    level = max(
        (s for s in sheet.shapes if isinstance(s, Line) and s.dash), key=lambda s: s.points[1][0]
    )
    assert level.points[0][1] == pytest.approx((y[1] + y[2]) / 2, abs=0.02)
    labels = texts(sheet)
    for label, where in (("0.01", y[0]), ("1", y[1]), ("100", y[2])):
        heights = [s.at[1] for s in sheet.shapes if isinstance(s, Text) and s.text == label]
        assert any(abs(h - 0.35 * TEXT - where) < 0.05 for h in heights), (label, labels)


def test_a_frontier_goes_in_steps_along_what_nothing_beats() -> None:
    x, y = [4.0, 1.0, 2.0, 3.0, 3.0, 6.0], [0.5, 0.2, 0.6, 0.55, 0.9, 0.9]
    drawn = figure(Series("a", x, y, joined=False, frontier=True))
    sheet, at = plot.layout(drawn), circles(drawn)
    (steps,) = (s for s in sheet.shapes if isinstance(s, Line) and s.colour == "series-1")
    first, second, third = at[1], at[2], at[4]
    right = max(s.points[1][0] for s in sheet.shapes if isinstance(s, Line))
    expected = [first, (second[0], first[1]), second, (third[0], second[1]), third]
    assert list(steps.points) == [
        pytest.approx(point, abs=0.02) for point in (*expected, (right, third[1]))
    ]
    alone = plot.layout(figure(Series("a", [1.0], [2.0], joined=False, frontier=True)))
    assert len([s for s in alone.shapes if isinstance(s, Line) and s.colour == "series-1"]) == 1


def test_long_curves_are_not_hidden_by_their_markers() -> None:
    many = Series("a", range(300), range(300), emphasis=[7])
    found = circles(figure(many))
    assert 20 <= len(found) <= 32
    assert len(circles(figure(many._replace(joined=False)))) == 300
    curve = max(
        (s for s in plot.layout(figure(many)).shapes if isinstance(s, Line)),
        key=lambda s: len(s.points),
    )
    assert len(curve.points) == 300


# What is refused


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("field", ["x", "y", "low", "high"])
def test_a_series_with_a_value_that_is_not_finite_is_refused_by_name(
    field: str, value: float
) -> None:
    series = curve("the culprit", low=[0.1] * 3, high=[0.6] * 3)
    broken = series._replace(**{field: [0.5, value, 0.5]})
    with pytest.raises(ValueError, match=f"the culprit: {value} is not a finite number"):
        plot.svg(figure(curve(), broken))
    with pytest.raises(ValueError, match="the culprit"):
        plot.png(figure(curve(), broken))


@pytest.mark.parametrize(
    ("drawn", "message"),
    [
        (figure(), "Title: no series"),
        (figure(curve(x=[], y=[])), "a: no points"),
        (figure(curve(x=[1, 2])), "a: 2 x values and 3 of another kind"),
        (figure(curve(labels=["one"])), "a: 3 x values and 1 of another kind"),
        (figure(curve(low=[0, 0, 0])), "a: an interval needs both ends"),
        (figure(curve(emphasis=[3])), "a: emphasis on a point that is not there"),
        (figure(curve(x=[0, 1, 2]), log_x=True), "a: 0 has no place on a logarithmic axis"),
        (figure(curve(y=[0, 1, 2]), log_y=True), "a: 0 has no place on a logarithmic axis"),
        (figure(curve(), log_y=True, levels=[("t", -1)]), "t: -1 has no place on a logarithmic"),
        (figure(curve(), levels=[("Teacher", math.nan)]), "Teacher: nan is not a finite"),
        (figure(curve(), shaded=[(1, math.inf)]), "Title: inf is not a finite"),
        (figure(curve(), log_x=True, x_ticks=[0, 1]), "Title: 0 has no place"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_words(drawn: Figure, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plot.layout(drawn)


# Text


@pytest.mark.parametrize("name", [*HOSTILE, *UNWRITABLE])
def test_any_name_can_be_drawn(name: str) -> None:
    drawn = Figure(
        title=name,
        x_label=name,
        y_label=name,
        series=[curve(name, labels=[name, "b", name]), curve(name)],
        levels=[(name, 0.3)],
    )
    svg = plot.svg(drawn)
    require_safe(svg)
    for text in (s for s in plot.layout(drawn).shapes if isinstance(s, Text)):
        assert "\n" not in text.text
        assert box(text).left >= 0
        assert box(text).right <= WIDTH
    assert len(pixels(plot.png(drawn))) > 800


def test_a_long_name_ends_with_an_ellipsis_and_the_whole_is_in_the_title() -> None:
    title = "A long title of many words " * 10
    drawn = figure(curve("y" * 200), curve(), title=title)
    shown = [s.text for s in plot.layout(drawn).shapes if isinstance(s, Text)]
    assert [text for text in shown if re.fullmatch("y+…", text)]
    (first, second), texts_ = [t for t in shown if "long title" in t], " ".join(shown)
    assert second.endswith("…")
    assert not first.endswith("…")
    assert title not in texts_
    assert title in [e.text for e in elements(plot.svg(drawn), "title")]


def crowd(count: int, seed: int) -> Figure:
    draw = random.Random(seed)
    x, y = ([draw.gauss(0, 1) for _ in range(count)] for _ in range(2))
    names = [f"timm/model_{i}" + "_long" * (i % 3) for i in range(count)]
    return figure(Series("a", x, y, joined=False, labels=names, emphasis=[count - 1, count - 2]))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("count", [2, 12, 40])
def test_labels_of_points_lie_on_nothing_and_within_the_picture(count: int, seed: int) -> None:
    drawn = crowd(count, seed)
    sheet = plot.layout(drawn)
    named = [s for s in sheet.shapes if isinstance(s, Text)]
    labels = [box(s) for s in named if "model" in s.text]
    assert len(labels) >= {2: 2, 12: 9, 40: 7}[count]
    assert not [1 for a, b in combinations(map(box, named), 2) if a.touches(b)]
    r = curves.MARKER - 0.1
    markers = [Box(x - r, y - r, x + r, y + r) for x, y in circles(drawn)]
    assert not [1 for label in labels for marker in markers if label.touches(marker)]
    frame = [s.points for s in sheet.shapes if isinstance(s, Line) and s.colour == "grid"]
    bottom = max(y for points in frame for _, y in points)
    leaders = [s.points for s in sheet.shapes if isinstance(s, Line) and s.width < 1]
    assert leaders or count < 40
    for start, end in leaders:
        own = min(circles(drawn), key=lambda centre: math.dist(centre, start))
        others = [marker for marker in markers if not marker.holds(own)]
        assert not any(thing.is_crossed(start, end) for thing in (*labels, *others))
    for label in labels:
        assert label.left >= 0
        assert label.right <= WIDTH
        assert label.bottom <= bottom


def test_the_best_get_the_room_that_there_is() -> None:
    crowded = crowd(40, 0)
    (cloud,) = crowded.series
    without = texts(plot.layout(figure(cloud._replace(emphasis=[]))))
    left_out = [i for i, name in enumerate(cloud.labels or ()) if name not in without]
    assert len(left_out) > 10
    found = [
        (cloud.labels or ())[i] in texts(plot.layout(figure(cloud._replace(emphasis=[i]))))
        for i in left_out
    ]
    assert sum(found) > len(found) / 2  # the others are within a ring of markers


def test_a_label_goes_where_no_line_is() -> None:
    places = {"taken": [], "within": Box(-500, -500, 500, 500), "radius": 3.0}
    (free,) = place([(0, 0)], [(50, 10)], lines=[], **places)
    assert free
    assert free.box.left > 0
    assert free.leader is None
    (moved,) = place([(0, 0)], [(50, 10)], lines=[[(0, 0), (100, 0)]], **places)
    assert moved
    assert moved.box.right < 0
    # A ring of marks around the point, too near for a name and open for its leader.
    turns = [2 * math.pi * (k + 0.5) / 16 for k in range(16)]
    ring = [(11 * math.cos(a), 11 * math.sin(a)) for a in turns]
    walls = [Box(x - 1, y - 1, x + 1, y + 1) for x, y in ring]
    (far,) = place([(0, 0)], [(50, 10)], lines=[], **{**places, "taken": walls})
    assert far
    assert far.leader
    assert math.hypot(*far.leader[0]) == pytest.approx(5)
    assert not any(wall.is_crossed(*far.leader) for wall in walls)
    (none,) = place([(0, 0)], [(50, 10)], lines=[], **{**places, "taken": [Box(-99, -99, 99, 99)]})
    assert none is None


@pytest.mark.parametrize(
    ("start", "end", "crossed"),
    [
        ((-5, 5), (15, 5), True),
        ((5, 5), (6, 6), True),
        ((-5, -5), (15, 15), True),
        ((-5, 11), (15, 11), False),
        ((11, -5), (11, 15), False),
        ((-5, 5), (-1, 5), False),
        ((-6, 4), (4, 16), False),
    ],
)
def test_a_box_knows_what_crosses_it(
    start: tuple[float, float], end: tuple[float, float], crossed: bool
) -> None:
    assert Box(0, 0, 10, 10).is_crossed(start, end) is crossed


def test_the_legend_is_above_the_data_and_wraps() -> None:
    names = [f"a method with a long name, {i}" for i in range(9)]
    drawn = figure(*(curve(n) for n in names), levels=[("Teacher", 0.9)])
    sheet = plot.layout(drawn)
    legend = [texts(sheet)[name] for name in (*names, "Teacher")]
    top = min(
        y for s in sheet.shapes if isinstance(s, Line) and s.colour == "grid" for _, y in s.points
    )
    assert max(text.at[1] for text in legend) < top
    assert len({text.at[1] for text in legend}) > 3
    every = [box(s) for s in sheet.shapes if isinstance(s, Text)]
    assert not [1 for a, b in combinations(every, 2) if a.touches(b)]
    assert sheet.height > plot.layout(figure(curve())).height


def test_one_series_alone_needs_no_legend() -> None:
    assert "a" not in texts(plot.layout(figure(curve("a"))))
    assert "a" in texts(plot.layout(figure(curve("a"), curve("b"))))


def test_a_wide_label_of_the_last_tick_is_within_the_picture() -> None:
    sheet = plot.layout(figure(Series("a", [1_000_000, 1_000_097], [1, 2])))
    (last,) = (text for label, text in texts(sheet).items() if label == "1.0001M")
    assert last.at[0] > WIDTH - drawing.text_width(last.text, last.size)
    assert box(last).right <= WIDTH


def test_labels_of_crowded_ticks_are_thinned() -> None:
    every = [1000 + 7 * i for i in range(60)]
    sheet = plot.layout(figure(Series("a", every, every), x_ticks=every))
    below = [s for s in sheet.shapes if isinstance(s, Text) and s.text.endswith("k")]
    bottom = [s for s in below if s.anchor == "middle"]
    assert 3 < len(bottom) < 20
    assert not [1 for a, b in combinations(map(box, bottom), 2) if a.touches(b)]
    upright = [s for s in sheet.shapes if isinstance(s, Line) and s.points[0][0] == s.points[-1][0]]
    assert len(upright) == 60


# Light and dark


def test_every_colour_follows_the_page() -> None:
    drawn = figure(
        *(curve(str(i), labels=["p", "q", "r"], emphasis=[i % 3]) for i in range(6)),
        levels=[("Teacher", 0.6)],
        shaded=[(1, 2)],
    )
    svg = plot.svg(drawn)
    (style,) = (e.text or "" for e in elements(svg, "style"))
    light, _, dark = style.partition("@media screen and (prefers-color-scheme:dark){")
    used = set(used_colours(svg))
    assert len(used) > 10
    for what, colour in used:
        rule = re.search(rf'\[{what}="{colour}"\]{{{what}:var\((--[\w-]+)\)}}', style)
        assert rule, (what, colour)
        assert f"{rule[1]}:{colour}" in light
        assert re.search(rf"{rule[1]}:#[0-9a-f]{{6}}", dark)
        assert f"{rule[1]}:{colour}" not in dark


def test_the_svg_stands_alone_and_speaks() -> None:
    svg = plot.svg(figure(curve("Student"), levels=[("Teacher", 0.9)], percent=True))
    root = ElementTree.fromstring(svg)
    assert root.attrib["role"] == "img"
    assert root.attrib["width"] == "100%"
    assert root.attrib["viewBox"].startswith("0 0 400 ")
    assert [e.text for e in root.iter(HEAD + "title")] == ["Title"]
    (said,) = (e.text for e in root.iter(HEAD + "desc"))
    assert said == (
        "y against x. Student: 3 points, lowest 20 % at 1, highest 50 % at 2. Teacher: 90 %."
    )
    assert svg.count("http") == 1
    assert not re.search(r"url\(|href|@import|<script|<image", svg)


def test_text_is_legible_on_a_phone() -> None:
    sizes = {s.size for s in plot.layout(crowd(3, 0)).shapes if isinstance(s, Text)}
    assert min(sizes) * 336 / WIDTH >= 11
