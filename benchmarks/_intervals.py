"""Intervals over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

# Student's t, 97.5 % quantile, by degrees of freedom.
T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and half of its 95 % interval over seeds (Student's t), of several."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return mean, None
    return mean, T[len(values) - 1] * statistics.stdev(values) / len(values) ** 0.5
