"""A confusion matrix shows counts, coloured by their part of the label; many classes, the pairs."""

from __future__ import annotations

import pytest

from distill.report import confusion, plot
from distill.report.colours import STEPS
from distill.report.confusion import Pair
from distill.report.drawing import Line, Text
from distill.report.plot import Confusion
from tests.report.reading import (
    HOSTILE,
    UNWRITABLE,
    all_tiles,
    require_legible,
    require_safe,
    require_same_in_both,
    texts,
    tiles,
)


def confused(classes: int, wrong: dict[tuple[int, int], int], each: int = 100) -> Confusion:
    """All images are right but those."""
    counts = [[each if i == j else 0 for j in range(classes)] for i in range(classes)]
    for (i, j), n in wrong.items():
        counts[i][i] -= n
        counts[i][j] += n
    return Confusion("Title", [f"class {i}" for i in range(classes)], counts)


def test_the_matrix_shows_counts_and_colours_their_part_of_the_label() -> None:
    drawn = Confusion("Title", ["cat", "dog"], [[30, 10], [0, 5]])
    sheet = plot.layout(drawn)
    assert {"30", "10", "5", "cat", "dog", "label", "predicted", "0 %", "100 %"} <= set(
        texts(sheet)
    )
    wide = {
        name: [box for box in boxes if box[2] - box[0] > 20]
        for name, boxes in all_tiles(sheet).items()
    }
    cells = [(box[1], box[0], name) for name, boxes in wide.items() for box in boxes]
    steps = [f"amount-{round(part * (STEPS - 1))}" for part in (0.75, 0.25, 0, 1)]
    assert [name for *_, name in sorted(cells)] == steps
    require_legible(sheet)
    require_same_in_both(sheet)


def test_the_diagonal_has_a_frame() -> None:
    sheet = plot.layout(confused(10, {(0, 3): 7}, each=1000))
    frames = [s.points[0] for s in sheet.shapes if isinstance(s, Line)]
    assert len(frames) == 10
    assert frames == sorted(frames)
    assert len({round(x - y, 3) for x, y in frames} | {0}) <= 12
    require_legible(sheet)


def test_a_class_without_images_has_no_colour() -> None:
    sheet = plot.layout(Confusion("Title", ["a", "b"], [[1, 1], [0, 0]]))
    assert "no value" in texts(sheet)


def test_25_classes_are_a_matrix_and_26_are_pairs() -> None:
    wrong = {(i, i + 1): 3 + i for i in range(20)}
    matrix, pairs = (plot.layout(confused(n, wrong)) for n in (25, 26))
    assert "predicted" in texts(matrix)
    assert "class 19 → class 20" not in texts(matrix)
    names = [s.text for s in pairs.shapes if isinstance(s, Text) and "→" in s.text]
    assert names == [f"class {i} → class {i + 1}" for i in range(19, 4, -1)]
    assert "22 of 100" in texts(pairs)
    lengths = [right - left for left, _, right, _ in tiles(pairs, "series-1")]
    assert [n / lengths[0] for n in lengths] == pytest.approx(
        [n / 22 for n in range(22, 7, -1)], abs=0.01
    )
    for sheet in (matrix, pairs):
        require_legible(sheet)
        require_same_in_both(sheet)


def test_pairs_are_those_with_most_images_and_of_equals_the_larger_part() -> None:
    drawn = Confusion("Title", ["a", "b", "c"], [[90, 10, 0], [5, 5, 10], [0, 12, 8]])
    assert confusion.pairs(drawn) == [
        Pair("c", "b", 12, 20),
        Pair("b", "c", 10, 20),
        Pair("a", "b", 10, 100),
        Pair("b", "a", 5, 20),
    ]
    assert confusion.pairs(drawn, most=1) == [Pair("c", "b", 12, 20)]
    assert confusion.pairs(confused(3, {})) == []


def test_many_classes_without_a_confusion_can_be_drawn() -> None:
    sheet = plot.layout(confused(300, {}, each=2))
    assert "0 of 600" in texts(sheet)
    require_legible(sheet)


@pytest.mark.parametrize("classes", [2, 30])
@pytest.mark.parametrize("name", [*HOSTILE, *UNWRITABLE])
def test_any_name_can_be_drawn(name: str, classes: int) -> None:
    drawn = confused(classes, {(0, 1): 1})._replace(title=name, classes=[name] * classes)
    require_safe(plot.svg(drawn))


@pytest.mark.parametrize(
    ("drawn", "message"),
    [
        (Confusion("Title", [], []), "Title: no images to draw"),
        (Confusion("Title", ["a"], [[0]]), "Title: no images to draw"),
        (Confusion("Title", ["a", "b"], [[1, 2]]), "Title: not 2 counts in each of 2 rows"),
        (Confusion("Title", ["a", "b"], [[1, 2], [3]]), "Title: not 2 counts in each of 2 rows"),
        (Confusion("Title", ["a", "b"], [[1, -2], [3, 4]]), "Title: a negative number of images"),
        (Confusion("Title", ["a"] * 30, [[0] * 30] * 30), "Title: no images to draw"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_words(drawn: Confusion, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plot.layout(drawn)
