"""Two subjects on the same images: what the one has over the other, and how sure that is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy import ndarray

from distill import evaluate
from distill.definitions import Number
from distill.diagnostics.mcnemar import mcnemar
from distill.statistics import resampled
from distill.suites import Found, interval
from distill.suites.subjects import Subject


class Comparison(NamedTuple):
    """A subject and the one that it is measured by."""

    subject: str
    reference: str
    numbers: dict[str, Number]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        numbers = {name: number.to_json(name) for name, number in self.numbers.items()}
        return {"subject": self.subject, "reference": self.reference, "numbers": numbers}


def compare_all(
    subjects: Sequence[Subject],
    found: Mapping[str, Mapping[str, Found]],
    reference: str | None = None,
) -> list[Comparison]:
    """Each run with its control, and with the reference; left out, that is the first run."""
    by_name = {subject.name: subject for subject in subjects}
    runs = [subject for subject in subjects if subject.role == "run"]
    pairs: dict[tuple[str, str], None] = {}
    for subject in runs:
        for other in (subject.control, reference or runs[0].name):
            if other not in (None, subject.name) and (other, subject.name) not in pairs:
                pairs[subject.name, str(other)] = None
    return [compare(by_name[one], by_name[other], found) for one, other in pairs]


def compare(one: Subject, other: Subject, found: Mapping[str, Mapping[str, Found]]) -> Comparison:
    """The differences, paired by image, and by seed where there are as many.

    Args:
        one: Who is compared.
        other: With whom.
        found: What was measured, by suite and subject.
    """
    sides = [[member.predictions for member in side.members] for side in (one, other)]
    seeds = min(map(len, sides))
    if max(map(len, sides)) == 1:  # as `distill train --baseline` has it
        gain, ends = evaluate.paired_gain(sides[0][0], sides[1][0])
        numbers = {"gain": Number(gain, ends, len(sides[0][0].ids))}
    else:
        correct = [[np.stack([p.correct for p in side])] for side in sides]
        numbers = {"gain": _difference(correct, _only, seeds)}
    nll = [[np.stack([p.nll for p in side])] for side in sides]
    numbers["gain_nll"] = _difference(nll, _only, seeds)
    gaps = [[evaluate.gaps(p.confidence, p.correct) for p in side] for side in sides]
    by_bin = [
        [np.stack([one[:, b] for one in side]) for b in range(evaluate.BINS)] for side in gaps
    ]
    numbers["gain_ece"] = _difference(by_bin, _error, seeds)
    first, second = (side[0].correct for side in sides)
    numbers["mcnemar_p"] = Number(mcnemar(first, second).p, n=len(first))
    corrupted = [found.get("corruptions", {}).get(side.name) for side in (one, other)]
    rows = [[np.stack(f.per_image["mca"])] for f in corrupted if f and "mca" in f.per_image]
    if len(rows) == 2:
        numbers["gain_mca"] = _difference(rows, _only, seeds)
    return Comparison(one.name, other.name, numbers)


def _difference(
    sides: list[list[ndarray]], statistic: Callable[[ndarray], ndarray], seeds: int
) -> Number:
    """The statistic of the one side less that of the other, on the same resamples.

    Args:
        sides: Of both the rows of (seed, image).
        statistic: Of the means of the rows, one number a seed.
        seeds: That are paired.
    """
    values = [
        float(statistic(np.stack([row.mean(axis=1, keepdims=True) for row in rows])).mean())
        for rows in sides
    ]
    draws = [resampled(rows, statistic) for rows in sides]
    n = sides[0][0].shape[1]
    return interval(values[0] - values[1], draws[0] - draws[1], n=n, seeds=seeds)


def _only(means: ndarray) -> ndarray:
    only: ndarray = means[0]
    return only


def _error(means: ndarray) -> ndarray:
    total: ndarray = np.abs(means).sum(axis=0)
    return total
