"""Names beside points, none on another and none out of the picture."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from distill.report.drawing import Point

# Where a name may lie: beside the point, then aslant, then between the two.
SIDES = (
    *((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (1, 1), (-1, -1), (-1, 1)),
    *((1, -0.5), (1, 0.5), (-1, -0.5), (-1, 0.5), (0.5, -1), (0.5, 1), (-0.5, -1), (-0.5, 1)),
)
# Units from the rim of the marker; from the second on with a line to it.
DISTANCES = (4.0, 16.0, 30.0, 46.0, 64.0, 84.0)

Segment = tuple[Point, Point]


class Box(NamedTuple):
    """A rectangle, in units from the top left."""

    left: float
    top: float
    right: float
    bottom: float

    def touches(self, other: Box) -> bool:
        """Whether the two have a part in common."""
        return (
            self.left < other.right
            and other.left < self.right
            and self.top < other.bottom
            and other.top < self.bottom
        )

    def holds(self, point: Point) -> bool:
        """Whether a point is inside."""
        return self.left <= point[0] <= self.right and self.top <= point[1] <= self.bottom

    def is_crossed(self, start: Point, end: Point) -> bool:
        """Whether a part of a segment is inside (Liang and Barsky's clipping)."""
        enter, leave = 0.0, 1.0
        for low, high, a, b in (
            (self.left, self.right, start[0], end[0]),
            (self.top, self.bottom, start[1], end[1]),
        ):
            if a == b:
                if not low < a < high:
                    return False
                continue
            first, last = sorted(((low - a) / (b - a), (high - a) / (b - a)))
            enter, leave = max(enter, first), min(leave, last)
        return enter < leave


class Spot(NamedTuple):
    """The place of a name."""

    box: Box
    leader: Segment | None  # from the marker to a name further away


def place(
    points: Sequence[Point],
    sizes: Sequence[tuple[float, float]],
    *,
    within: Box,
    radius: float,
    taken: Sequence[Box],
    lines: Sequence[Sequence[Point]],
) -> list[Spot | None]:
    """A place for a name beside each of some points, the first ones first.

    Greedy: each takes the free place that is near and that few lines cross.

    Args:
        points: What is named.
        sizes: Width and height of each name.
        within: Where names may lie; they are narrower than this.
        radius: Of the points' markers.
        taken: Where no name may lie, such as on markers.
        lines: What names had better not lie on.

    Returns:
        The places; None for a name that finds no free one.
    """
    busy, leaders = list(taken), list[Segment]()
    segments = [pair for line in lines for pair in pairwise(line)]
    spots: list[Spot | None] = []
    for point, size in zip(points, sizes, strict=True):
        best, least = None, math.inf
        for further, distance in enumerate(DISTANCES):
            for spot in _around(point, size, radius, distance, within):
                if _is_free(spot, point, busy, leaders):
                    # A line across a name is as bad as a place further away.
                    cost = further + sum(spot.box.is_crossed(*segment) for segment in segments)
                    best, least = (spot, cost) if cost < least else (best, least)
        spots.append(best)
        if best:
            busy.append(best.box)
            leaders += [best.leader] if best.leader else []
    return spots


def _around(
    point: Point, size: tuple[float, float], radius: float, distance: float, within: Box
) -> Iterator[Spot]:
    """Places around a point, moved as little as is needed to lie within the box."""
    (x, y), (width, height) = point, size
    for across, down in SIDES:
        # Aslant, the corner of the name is as far away as else its side.
        gap = (radius + distance) * (0.7 if abs(across * down) == 1 else 1.0)
        left = x + across * (gap + width / 2) - width / 2
        top = y + down * (gap + height / 2) - height / 2
        left = max(min(left, within.right - width), within.left)
        top = max(min(top, within.bottom - height), within.top)
        box = Box(left, top, left + width, top + height)
        end = (min(max(x, box.left), box.right), min(max(y, box.top), box.bottom))
        reach = math.dist(point, end)
        if distance == DISTANCES[0] or reach <= radius:
            yield Spot(box, None)
        else:
            rim = (radius + 2) / reach
            start = (x + rim * (end[0] - x), y + rim * (end[1] - y))
            yield Spot(box, (start, end))


def _is_free(spot: Spot, point: Point, busy: Sequence[Box], leaders: Sequence[Segment]) -> bool:
    if any(spot.box.touches(box) for box in busy):
        return False
    if any(spot.box.is_crossed(*leader) for leader in leaders):
        return False
    others = [box for box in busy if not box.holds(point)]  # a leader begins at its own marker
    return not (spot.leader and any(box.is_crossed(*spot.leader) for box in others))
