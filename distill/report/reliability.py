"""Accuracy by confidence, and how many images have which.

Guo, Pleiss, Sun, Weinberger: On Calibration of Modern Neural Networks, 2017, arXiv:1706.04599.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

from distill.report import axes, curves, drawing, sheet
from distill.report.axes import Axis, Frame
from distill.report.drawing import Area, Line, Point, Shape, Sheet, Text, Tiles, text_width
from distill.report.sheet import MARGIN, ROW, SAMPLE, TEXT, WIDTH, colour

HEIGHT = 240.0  # of the diagram
COUNTS = 64.0  # height of the numbers of images
BETWEEN = 40.0  # the two
DIGITS = 3
ROUNDING = 1e-6  # by which a mean of ones may be more than 1
DASH = 5.0  # of the diagonal
GAP = 0.35  # opacity of what is between accuracy and confidence


class Calibration(NamedTuple):
    """What one network says, by bin of confidence."""

    name: str
    edges: Sequence[float]  # of the bins, from 0 to 1: one more than bins
    images: Sequence[int]  # in each bin
    confidence: Sequence[float | None]  # their means; None or NaN where there is no image
    accuracy: Sequence[float | None]


class Reliability(NamedTuple):
    """A reliability diagram: bars of one network, lines of several."""

    title: str
    networks: Sequence[Calibration]


class _Bin(NamedTuple):
    """One that has images."""

    low: float
    high: float
    images: int
    confidence: float
    accuracy: float


def layout(reliability: Reliability) -> Sheet:
    """All shapes of the diagram, and below it the numbers of images, in the order they are drawn.

    Raises:
        ValueError: If there is no network or no image, or a value that has no place.
    """
    if not reliability.networks:
        raise ValueError(f"{reliability.title}: no networks to draw")
    every = [_bins(network) for network in reliability.networks]
    one = len(every) == 1
    counts = _counts(reliability.networks)
    header, top = sheet.header(reliability.title, list(_entries(reliability)), "accuracy")
    unit = axes.tick_to_tick([0.0, 1.0], percent=True)
    amounts = _amounts(counts, percent=not one)
    ticks = [text for _, text in (*unit.ticks, *amounts.ticks)]
    left, right = MARGIN + 6 + max(text_width(text, TEXT) for text in ticks), WIDTH - 2 * MARGIN
    frame = Frame(left, right, top, top + HEIGHT, unit, unit)
    start = frame.bottom + BETWEEN
    lower = Frame(left, right, start, start + COUNTS, unit, amounts)
    label = "images" if one else "part of the images"
    shapes = (
        *header,
        *(shape for each in (frame, lower) for shape in (*sheet.across(each), *sheet.down(each))),
        *(_accuracies(every[0], frame) if one else ()),
        _diagonal((frame.left, frame.bottom), (frame.right, frame.top)),
        *(() if one else _curves(every, frame)),
        sheet.base(frame),
        *_histograms(reliability.networks, counts, lower),
        sheet.base(lower),
        Text((MARGIN, start - 14), label, "muted", TEXT),
        *sheet.below(lower, "confidence"),
    )
    height = math.ceil(lower.bottom + 2 * ROW + MARGIN)
    title = drawing.plain(reliability.title)
    return Sheet(WIDTH, height, shapes, title, _describe(reliability, every))


def _bins(network: Calibration) -> list[_Bin]:
    """The bins that have images."""
    name, bins = network.name, len(network.images)
    lengths = (len(network.edges) - 1, len(network.confidence), len(network.accuracy))
    if lengths != (bins, bins, bins):
        raise ValueError(f"{name}: {bins} numbers of images and others of another kind")
    edges = list(network.edges)
    if edges[:1] != [0.0] or edges[-1:] != [1.0] or any(a >= b for a, b in pairwise(edges)):
        raise ValueError(f"{name}: the bins do not go from 0 to 1")
    found = []
    for i, images in enumerate(network.images):
        confidence, accuracy = (
            math.nan if mean is None else mean
            for mean in (network.confidence[i], network.accuracy[i])
        )
        in_range = all(0 <= mean <= 1 + ROUNDING for mean in (confidence, accuracy))
        if images < 0 or (images and not in_range):
            raise ValueError(
                f"{name}: {images} images of confidence {confidence}, accuracy {accuracy}"
            )
        if images:
            found.append(_Bin(edges[i], edges[i + 1], images, confidence, accuracy))
    if not found:
        raise ValueError(f"{name}: no images to draw")
    return found


def _counts(networks: Sequence[Calibration]) -> list[list[float]]:
    """Images by bin; of several networks, which may have other numbers, as parts of all."""
    if len(networks) == 1:
        return [[float(n) for n in networks[0].images]]
    return [[n / sum(network.images) for n in network.images] for network in networks]


def _amounts(counts: Sequence[Sequence[float]], *, percent: bool) -> Axis:
    """From none to the most."""
    most = max(map(max, counts))
    step = axes.precision([most], digits=DIGITS, percent=percent)
    top = axes.number(most, step=step, percent=percent)
    return Axis(0.0, most, ((0.0, "0 %" if percent else "0"), (most, top)))


def _entries(reliability: Reliability) -> Iterator[sheet.Entry]:
    if len(reliability.networks) == 1:
        yield sheet.Entry("accuracy", _accuracy_sample, sheet.SWATCH)
        yield sheet.Entry("gap to the confidence", _gap_sample, sheet.SWATCH)
    else:
        for i, network in enumerate(reliability.networks):
            yield sheet.Entry(network.name, partial(curves.sample, i, True, True))
    yield sheet.Entry("calibrated", _diagonal_sample)


def _accuracy_sample(at: Point) -> Iterator[Shape]:
    yield sheet.swatch(colour(0), at)


def _gap_sample(at: Point) -> Iterator[Shape]:
    yield sheet.swatch(colour(1), at, opacity=GAP)


def _diagonal_sample(at: Point) -> Iterator[Shape]:
    yield _diagonal(at, (at[0] + SAMPLE, at[1]))


def _diagonal(start: Point, end: Point) -> Line:
    return Line((start, end), "ink", 1.5, DASH)


def _accuracies(bins: Sequence[_Bin], frame: Frame) -> Iterator[Shape]:
    """Bars up to the accuracy, and what lies between it and the mean confidence."""
    spans = [(frame.x(one.low) + 0.5, frame.x(one.high) - 0.5) for one in bins]
    tops = [frame.y(one.accuracy) for one in bins]
    boxes = ((a, top, b, frame.bottom) for (a, b), top in zip(spans, tops, strict=True))
    yield Tiles(tuple(boxes), colour(0))
    for (a, b), top, one in zip(spans, tops, bins, strict=True):
        sure = frame.y(one.confidence)
        yield Area(((a, top), (b, top), (b, sure), (a, sure)), colour(1), opacity=GAP)


def _curves(every: Sequence[Sequence[_Bin]], frame: Frame) -> Iterator[Shape]:
    """Accuracy over mean confidence."""
    lines = [
        frame.points([one.confidence for one in bins], [one.accuracy for one in bins])
        for bins in every
    ]
    for i, points in enumerate(lines):
        yield Line(points, colour(i), 2.0)
    for i, points in enumerate(lines):
        for at in points:
            yield curves.marker(i, at, curves.MARKER, filled=True)


def _histograms(
    networks: Sequence[Calibration], counts: Sequence[Sequence[float]], frame: Frame
) -> Iterator[Shape]:
    for i, (network, amounts) in enumerate(zip(networks, counts, strict=True)):
        xs, ys = [frame.x(edge) for edge in network.edges], [frame.y(n) for n in amounts]
        steps = list(zip(pairwise(xs), ys, strict=True))
        if len(networks) == 1:
            boxes = ((a + 0.5, y, b - 0.5, frame.bottom) for (a, b), y in steps if y < frame.bottom)
            yield Tiles(tuple(boxes), colour(i))
        else:
            yield Line(tuple((x, y) for span, y in steps for x in span), colour(i), 1.5)


def _describe(reliability: Reliability, every: Sequence[Sequence[_Bin]]) -> str:
    """The diagram in words, for who cannot see it."""
    sentences = ["Accuracy by confidence."]
    for network, bins in zip(reliability.networks, every, strict=True):
        widest = max(bins, key=lambda one: abs(one.accuracy - one.confidence))
        sentences.append(
            f"{network.name}: {len(bins)} of {len(network.images)} bins have images; furthest off "
            f"at a confidence of {widest.confidence:.1%}, where {widest.accuracy:.1%} are right."
        )
    return drawing.plain(" ".join(sentences))
