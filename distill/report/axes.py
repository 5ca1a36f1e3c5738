"""Where values lie on a plot, and which of them are labelled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from distill.report.drawing import Point

UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
EQUAL = 1e-9  # of their size; values that differ less are shown as one
SMALLEST = 1e-290  # below it numbers lose digits, and a sixth of them may be 0


class Axis(NamedTuple):
    """What an axis shows."""

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]  # a value and its label
    log: bool = False

    def part(self, value: float) -> float:
        """Where a value lies between the ends, 0 and 1."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


class Frame(NamedTuple):
    """The part of a sheet that is between the axes, in units from the top left."""

    left: float
    right: float
    top: float
    bottom: float
    x_axis: Axis
    y_axis: Axis

    def x(self, value: float) -> float:
        """Units from the left of the sheet."""
        return self.left + self.x_axis.part(value) * (self.right - self.left)

    def y(self, value: float) -> float:
        """Units from the top of the sheet."""
        return self.bottom - self.y_axis.part(value) * (self.bottom - self.top)

    def points(self, x: Sequence[float], y: Sequence[float]) -> tuple[Point, ...]:
        """Where points with these coordinates lie on the sheet."""
        return tuple((self.x(a), self.y(b)) for a, b in zip(x, y, strict=True))


def tick_to_tick(values: Sequence[float], *, percent: bool) -> Axis:
    """An axis from tick to tick that holds all values; with `percent` they are fractions."""
    low, high = span(values)
    if percent and 0 <= min(values) <= max(values) <= 1:
        low, high = max(low, 0.0), min(high, 1.0)
    _, step = ticks(low, high)
    # Outwards to whole steps: then no value is above the highest tick, as 100 %.
    first, last = math.floor(low / step + EQUAL), math.ceil(high / step - EQUAL)
    at = [k * step for k in range(first, last + 1)]
    labelled = ((v, number(v, step=step, percent=percent)) for v in at)
    return Axis(min(at[0], *values), max(at[-1], *values), tuple(labelled))


def roomy(
    values: Sequence[float],
    *,
    log: bool,
    percent: bool = False,
    at: Sequence[float] | None = None,
) -> Axis:
    """An axis a little longer than the values, so that markers at its ends are whole.

    Args:
        values: What it must hold; above 0 if `log`.
        log: Equal ratios are equal distances.
        percent: They are fractions.
        at: Its ticks; else they are chosen.
    """
    values = [*values, *(at or ())]
    if log:
        low, high = span([math.log10(value) for value in values])
        room = 0.04 * (high - low)
        low, high = 10 ** (low - room), 10 ** (high + room)
    else:
        low, high = span(values)
        room = 0.04 * (high - low)
        low, high = low - room, high + room
    step = None
    if at is not None:
        chosen = at
    elif log:
        chosen = log_ticks(low, high)
    else:
        chosen, step = ticks(low, high)
    labelled = ((v, number(v, step=step, percent=percent)) for v in sorted(chosen))
    return Axis(low, high, tuple(labelled), log)


def span(values: Sequence[float]) -> tuple[float, float]:
    """Ends of the values, apart even where all are equal."""
    low, high = min(values), max(values)
    if high - low <= max(EQUAL * max(abs(low), abs(high)), SMALLEST):
        half = abs(low) / 10 if abs(low) > SMALLEST else 1.0
        return low - half, high + half
    return low, high


def ticks(low: float, high: float, *, most: int = 6) -> tuple[list[float], float]:
    """Multiples of 1, 2 or 5 times a power of ten from `low` to `high`, and their step.

    The step is the smallest that is no less than (high − low) / most.
    """
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - EQUAL))
    first, last = math.ceil(low / step - EQUAL), math.floor(high / step + EQUAL)
    return [k * step for k in range(first, last + 1)], step


def log_ticks(low: float, high: float, *, most: int = 7) -> list[float]:
    """Powers of ten from `low` to `high`, with their multiples by 1, 2, 5 or 1, 3 if there is room.

    Not more than `most`. Where this leaves fewer than two, the ticks of a linear axis.
    """
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    choices = [((1, 2, 5), 1), ((1, 3), 1), *(((1,), every) for every in range(1, 1 + len(powers)))]
    for digits, every in choices:
        values = [digit * 10.0**power for power in powers[::every] for digit in digits]
        inside = [v for v in values if low * (1 - EQUAL) <= v <= high * (1 + EQUAL)]
        if len(inside) <= most:
            break
    return inside if len(inside) > 1 else ticks(low, high, most=4)[0]


def number(value: float, *, step: float | None = None, percent: bool = False) -> str:
    """A tick's label: 0.25, 1k, 2.5M, 25 %; with the decimals that a step from tick to tick needs.

    Args:
        value: What is shown.
        step: From tick to tick; else four digits are shown at most.
        percent: The value is a fraction.
    """
    if percent:
        return number(100 * value, step=None if step is None else 100 * step) + " %"
    unit, suffix = next((u for u in UNITS if abs(value) >= u[0] * (1 - EQUAL)), (1.0, ""))
    decimals = 0 if step is None else -math.floor(math.log10(max(step, SMALLEST) / unit) + EQUAL)
    if step is None or abs(value) >= 1e15 or decimals > 6:
        text = f"{value / unit:.4g}"
    else:
        text = f"{value / unit:.{max(decimals, 0)}f}"
        if suffix and "." in text:
            text = text.rstrip("0").rstrip(".")
    return text.replace("-", "−") + suffix


def precision(values: Sequence[float], *, digits: int, percent: bool = False) -> float:
    """The step between neighbours when values are shown with so many digits.

    Args:
        values: The largest has the digits; whole numbers have none after the point.
        digits: Of the largest value, those before the point with it.
        percent: The values are fractions, and one of 100 % has one digit more.
    """
    largest = max(map(abs, values), default=0.0)
    if percent or largest == 0:
        return 10.0**-digits
    if all(value == round(value) for value in values):
        return 1.0
    return 10.0 ** (math.ceil(math.log10(largest) - EQUAL) - digits)
