"""Trainings by what they have in common, and how far one side is ahead of another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from _intervals import interval

Side = Mapping[int, Mapping[str, Any]]  # records of runs, by seed


def sides(found: Mapping[str, Any]) -> dict[str, dict[int, Mapping[str, Any]]]:
    """Trainings by condition and seed."""
    by_condition: dict[str, dict[int, Mapping[str, Any]]] = {}
    for run in found.values():
        if "top1" in run["found"]:
            by_condition.setdefault(run["condition"], {})[run["seed"]] = run
    return by_condition


def gain(one: Side, other: Side) -> tuple[float, tuple[float, float] | None]:
    """By how many points one side is ahead of the other, paired by seed, and its 95 % interval."""
    both = sorted(one.keys() & other.keys())
    return _over_seeds(one[seed]["found"]["top1"] - other[seed]["found"]["top1"] for seed in both)


def own_gain(side: Side) -> tuple[float, tuple[float, float] | None]:
    """By how many points runs are ahead of the student alone that each has beside it."""
    return _over_seeds(run["found"]["gain"] for run in side.values())


def _over_seeds(parts: Iterable[float]) -> tuple[float, tuple[float, float] | None]:
    mean, half = interval([100 * part for part in parts])
    return mean, None if half is None else (mean - half, mean + half)
