"""Which classes are taken for which: all of them, or where there are many the worst pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from distill.report import bars, heatmap
from distill.report.bars import Bars, BarSeries
from distill.report.drawing import Sheet
from distill.report.heatmap import Heatmap

MOST_CLASSES = 25  # of a matrix; of more the pairs are drawn
MOST_PAIRS = 15


class Confusion(NamedTuple):
    """How many images of each class are taken for which class."""

    title: str
    classes: Sequence[str]
    counts: Sequence[Sequence[int]]  # by label; in each row by what was predicted


class Pair(NamedTuple):
    """Images of one class that are taken for another."""

    label: str
    predicted: str
    images: int
    labelled: int  # images of the label in all


def layout(confusion: Confusion) -> Sheet:
    """All shapes of the matrix, or of bars of the worst pairs, in the order they are drawn.

    Raises:
        ValueError: If there is nothing to draw, or the counts are not a square of the classes.
    """
    return _matrix(confusion) if len(confusion.classes) <= MOST_CLASSES else _bars(confusion)


def pairs(confusion: Confusion, *, most: int = MOST_PAIRS) -> list[Pair]:
    """The pairs of label and prediction with most images, the first ones first; right ones apart.

    Of equally many images, the pair with the larger share of its label's first.
    """
    classes = confusion.classes
    found = [
        Pair(classes[i], classes[j], count, sum(row))
        for i, row in enumerate(confusion.counts)
        for j, count in enumerate(row)
        if i != j and count > 0
    ]
    return sorted(found, key=lambda pair: (-pair.images, pair.labelled))[:most]


def _check(confusion: Confusion) -> None:
    classes = len(confusion.classes)
    if [len(row) for row in confusion.counts] != [classes] * classes:
        raise ValueError(f"{confusion.title}: not {classes} counts in each of {classes} rows")
    if any(count < 0 for row in confusion.counts for count in row):
        raise ValueError(f"{confusion.title}: a negative number of images")
    if not any(map(any, confusion.counts)):
        raise ValueError(f"{confusion.title}: no images to draw")


def _matrix(confusion: Confusion) -> Sheet:
    _check(confusion)
    classes = confusion.classes
    shares = [[n / sum(row) if any(row) else None for n in row] for row in confusion.counts]
    return heatmap.layout(
        Heatmap(
            title=confusion.title,
            x_label="predicted",
            y_label="label",
            rows=classes,
            columns=classes,
            values=shares,
            value_label="images; the colour is their part of the label's",
            percent=True,
            low=0.0,
            high=1.0,
            texts=[[str(n) if n else "" for n in row] for row in confusion.counts],
            emphasis=[(i, i) for i in range(len(classes))],
        )
    )


def _bars(confusion: Confusion) -> Sheet:
    _check(confusion)
    found = pairs(confusion) or [Pair("any class", "another", 0, sum(map(sum, confusion.counts)))]
    return bars.layout(
        Bars(
            title=confusion.title,
            x_label="part of the label's images",
            names=[f"{pair.label} → {pair.predicted}" for pair in found],
            series=[
                BarSeries(
                    "label → predicted",
                    [pair.images / pair.labelled for pair in found],
                    texts=[f"{pair.images:,} of {pair.labelled:,}" for pair in found],
                )
            ],
            percent=True,
        )
    )
