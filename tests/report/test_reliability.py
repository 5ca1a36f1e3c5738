"""A reliability diagram has accuracy over confidence, the gap between, and how many images."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from distill.report import plot
from distill.report.drawing import Area, Circle, Line, Sheet, Text
from distill.report.plot import Calibration, Reliability
from tests.report.reading import (
    HOSTILE,
    UNWRITABLE,
    require_legible,
    require_safe,
    require_same_in_both,
    texts,
    tiles,
)

EDGES = (0.0, 0.25, 0.5, 0.75, 1.0)
SURE = Calibration("a", EDGES, [0, 10, 30, 60], [None, 0.4, 0.6, 0.9], [None, 0.5, 0.5, 0.7])


def diagram(*networks: Calibration) -> Reliability:
    return Reliability("Title", networks)


def unit(sheet: Sheet) -> tuple[float, float, float, float]:
    """Where 0 and 1 are on the x axis and on the y axis of the diagram."""
    labels = [s for s in sheet.shapes if isinstance(s, Text) and s.text.endswith("0 %")]
    below = {s.text: s.at[0] for s in labels if s.anchor == "middle"}
    # The first ones are those of the diagram, the others of the numbers of images.
    beside = {s.text: s.at[1] - 0.35 * s.size for s in reversed(labels) if s.anchor == "end"}
    x0, x80 = below["0 %"], below["80 %"]
    return x0, x0 + (x80 - x0) / 0.8, beside["0 %"], beside["100 %"]


def test_bars_are_as_high_as_the_accuracy_and_as_wide_as_their_bin() -> None:
    sheet = plot.layout(diagram(SURE))
    x0, x1, y0, y1 = unit(sheet)
    found = tiles(sheet, "series-1")[:3]
    assert [box[1] for box in found] == pytest.approx(
        [y0 + a * (y1 - y0) for a in (0.5, 0.5, 0.7)], abs=0.05
    )
    assert [box[3] for box in found] == pytest.approx([y0] * 3, abs=0.05)
    for edge, box in zip((0.25, 0.5, 0.75), found, strict=True):
        assert box[0] - 0.5 == pytest.approx(x0 + edge * (x1 - x0), abs=0.05)
        assert box[2] + 0.5 == pytest.approx(x0 + (edge + 0.25) * (x1 - x0), abs=0.05)
    require_legible(sheet)


def test_the_gap_is_between_accuracy_and_mean_confidence() -> None:
    sheet = plot.layout(diagram(SURE))
    _, _, y0, y1 = unit(sheet)
    gaps = [s for s in sheet.shapes if isinstance(s, Area) and s.opacity < 1][1:]  # the legend's
    spans = [sorted({(y - y0) / (y1 - y0) for _, y in gap.points}) for gap in gaps]
    assert spans == [
        pytest.approx(pair, abs=0.002) for pair in ([0.4, 0.5], [0.5, 0.6], [0.7, 0.9])
    ]


def test_below_are_the_numbers_of_images() -> None:
    sheet = plot.layout(diagram(SURE))
    counts = tiles(sheet, "series-1")[3:]
    heights = [bottom - top for _, top, _, bottom in counts]
    assert [h / heights[-1] for h in heights] == pytest.approx([1 / 6, 1 / 2, 1], abs=0.002)
    assert {"images", "60", "0", "confidence", "accuracy"} <= set(texts(sheet))
    require_same_in_both(sheet)


def test_the_diagonal_goes_from_corner_to_corner() -> None:
    sheet = plot.layout(diagram(SURE))
    x0, x1, y0, y1 = unit(sheet)
    diagonal = [s.points for s in sheet.shapes if isinstance(s, Line) and s.dash][1]
    assert diagonal[0] == pytest.approx((x0, y0), abs=0.05)
    assert diagonal[1] == pytest.approx((x1, y1), abs=0.05)


def test_several_networks_are_lines_and_their_images_are_parts() -> None:
    other = Calibration("b", EDGES, [1, 1, 1, 1], [0.1, 0.3, 0.6, 0.8], [0.0, 0.5, 1.0, 1.0])
    sheet = plot.layout(diagram(SURE, other))
    x0, x1, y0, y1 = unit(sheet)
    lines = {
        s.colour: s.points
        for s in sheet.shapes
        if isinstance(s, Line) and len(s.points) < 5 and s.width == 2 and s.points[0][1] > 90
    }
    for colour, network in (("series-1", SURE), ("series-2", other)):
        expected = [
            (x0 + c * (x1 - x0), y0 + a * (y1 - y0))
            for c, a in zip(network.confidence, network.accuracy, strict=True)
            if c is not None and a is not None
        ]
        assert list(lines[colour]) == [pytest.approx(point, abs=0.05) for point in expected]
    steps = [s.points for s in sheet.shapes if isinstance(s, Line) and len(s.points) == 8]
    assert len(steps) == 2
    assert len({y for _, y in steps[1]}) == 1  # a quarter in each bin
    assert {"part of the images", "60.0 %", "a", "b", "calibrated"} <= set(texts(sheet))
    assert len([s for s in sheet.shapes if isinstance(s, Circle)]) == 4  # one in the legend
    require_legible(sheet)


@pytest.mark.parametrize("bins", [1, 15, 50])
def test_any_number_of_bins_can_be_drawn(bins: int) -> None:
    edges = [i / bins for i in range(bins)] + [1.0]
    middle = [(a + b) / 2 for a, b in pairwise(edges)]
    one = Calibration("a", edges, [123_456] * bins, middle, [1.0] * bins)
    sheet = plot.layout(diagram(one))
    assert len(tiles(sheet, "series-1")) == 2 * bins
    require_legible(sheet)
    require_legible(plot.layout(diagram(*[one._replace(name=f"network {i}") for i in range(6)])))


def test_means_of_empty_bins_may_be_nan() -> None:
    broken = SURE._replace(confidence=[math.nan, 0.4, 0.6, 0.9], accuracy=[math.nan, 0.5, 0.5, 0.7])
    assert plot.svg(diagram(broken)) == plot.svg(diagram(SURE))


def test_a_mean_may_be_rounded_above_1() -> None:
    plot.layout(diagram(SURE._replace(confidence=[None, 0.4, 0.6, 1.0 + 2e-16 * 2])))


@pytest.mark.parametrize("name", [*HOSTILE, *UNWRITABLE])
def test_any_name_can_be_drawn(name: str) -> None:
    drawn = Reliability(name, [SURE._replace(name=name), SURE])
    require_safe(plot.svg(drawn))
    plot.png(drawn)


def test_the_plot_speaks() -> None:
    assert plot.layout(diagram(SURE)).description == (
        "Accuracy by confidence. a: 3 of 4 bins have images; furthest off at a confidence of "
        "90.0%, where 70.0% are right."
    )


@pytest.mark.parametrize(
    ("drawn", "message"),
    [
        (diagram(), "Title: no networks to draw"),
        (diagram(SURE._replace(images=[0] * 4)), "a: no images to draw"),
        (diagram(SURE._replace(images=[0] * 3)), "a: 3 numbers of images and others of another"),
        (diagram(SURE._replace(edges=[0, 0.5, 0.4, 0.9, 1])), "a: the bins do not go from 0 to 1"),
        (diagram(SURE._replace(edges=[0, 0.2, 0.4, 0.6, 0.8])), "a: the bins do not go from 0 to"),
        (diagram(SURE._replace(accuracy=[None, 0.5, None, 0.7])), "a: 30 images of confidence 0.6"),
        (diagram(SURE._replace(confidence=[None, 0.5, 1.5, 0.7])), "a: 30 images of confidence 1"),
        (diagram(SURE._replace(images=[0, -1, 30, 60])), "a: -1 images of confidence 0.4"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_words(drawn: Reliability, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plot.layout(drawn)
