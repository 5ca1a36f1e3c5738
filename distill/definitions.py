"""What each number of an evaluation means, exactly, and the form in which it is told."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, Literal, NamedTuple

from distill import yamlio

Unit = Literal[
    "percent",  # a fraction, shown in per cent
    "points",  # a difference of fractions, shown in percentage points
    "nats",
    "ratio",
    "number",
    "pixels",
    "milliseconds",
    "per second",
    "count",
    "bytes",
]

# What `distill evaluate --suite` takes, in the order of a report.
SUITES = {
    "clean": "accuracy and calibration on the test split",
    "fidelity": "how far the student says what its teacher says",
    "corruptions": "accuracy on images that are noisy, blurred, weathered, coded or moved",
    "bias": "equivariance, locality, similarity, rank, sharpness, spectrum, permutations",
    "dense": "what the features know of foreground and background, cell by cell",
    "cost": "parameters, operations, memory, time and size on disk",
}
LETTERS = " kMGT"  # of thousands


class Definition(NamedTuple):
    """One measure."""

    suite: str
    title: str
    unit: Unit
    better: Literal["higher", "lower", "neither"]
    version: int
    text: str


class Number(NamedTuple):
    """A value of a measure, and what is known of it."""

    value: float | None
    ci95: tuple[float, float] | None = None  # None: it is exact, or its interval is not known
    n: int | None = None  # images it was measured on
    seeds: int = 1  # runs it is the mean of
    reason: str = ""  # why there is no value, a clause

    def to_json(self, name: str) -> dict[str, Any]:
        """Plain data, with the version of the definition."""
        found: dict[str, Any] = {
            "value": self.value,
            "ci95": None if self.ci95 is None else list(self.ci95),
            "n": self.n,
            "seeds": self.seeds,
            "definition_version": definitions()[name].version,
        }
        return found | ({"reason": self.reason} if self.reason else {})


@functools.cache
def definitions() -> dict[str, Definition]:
    """Every measure by its name, in the order of a report."""
    text = Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8")
    return {
        name: Definition(suite, **fields)
        for suite, measures in yamlio.load(text)[0].items()
        for name, fields in measures.items()
    }


def shown(name: str, number: Number, *, interval: bool = True) -> str:
    """A number as people read it, with its interval where there is one."""
    if number.value is None:
        return f"not defined: {number.reason}"
    unit = definitions()[name].unit
    value, end = _form(unit, number.value)
    if not interval or number.ci95 is None:
        return f"{value}{end}"
    low, high = (_form(unit, one)[0] for one in number.ci95)
    return f"{value}{end} [{low}, {high}]"


def _form(unit: Unit, value: float) -> tuple[str, str]:
    """Digits, and the unit behind them."""
    match unit:
        case "percent":
            return f"{100 * value:.2f}", " %"
        case "points":
            return f"{100 * value:+.2f}", " points"
        case "count":
            return _large(value).rstrip(), ""
        case "bytes":
            return _large(value) + "B", ""
        case "milliseconds":
            return f"{value:.3g}", " ms"
        case "per second":
            return f"{value:,.0f}", " /s"
        case "pixels":
            return f"{value:.2f}", " px"
        case "nats" | "ratio" | "number":
            return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}", ""


def _large(value: float) -> str:
    """Four digits, and k, M, G or T."""
    power = 0 if value < 10_000 else min(len(LETTERS) - 1, (len(str(int(value))) - 1) // 3)
    letter = LETTERS[power].strip()
    digits = f"{value:,.0f}" if power == 0 else f"{value / 1000**power:.4g}"
    return f"{digits} {letter}"
