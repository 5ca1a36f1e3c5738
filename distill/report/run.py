"""A run as a page: what came of it, how it went, and from what."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Self

from annotated_types import Len
from pydantic import BaseModel, model_validator

from distill import console, jsonio, storage
from distill.errors import DamagedError
from distill.report import files
from distill.report.page import Block, Code, Heading, Picture, Table, Text, page
from distill.report.plot import Figure, Series

_ANEW = "`distill train --restart` trains again; a copy may be whole where it came from"
MOST_POINTS = 200  # of a curve, which has 384 units of width


class _Row(BaseModel):
    parameters: int
    flops: int
    top1: float | None = None
    top5: float | None = None
    nll: float | None = None
    ece: float | None = None

    @model_validator(mode="after")
    def _all_scores_or_none(self) -> Self:
        if len({one is None for one in (self.top1, self.top5, self.nll, self.ece)}) > 1:
            raise ValueError("some of its scores are missing")
        return self


class _Teacher(_Row):
    model: str


class _Scored(_Row):
    top1: float


class _Result(_Scored):
    """What the page tells of `result.json`."""

    student: str
    warnings: list[str]
    teachers: list[_Teacher]
    baseline: _Scored | None = None
    gain: float | None = None
    gain_ci95: Annotated[list[float], Len(2, 2)] | None = None

    @model_validator(mode="after")
    def _whole_gain(self) -> Self:
        if self.gain is not None and (self.baseline is None or self.gain_ci95 is None):
            raise ValueError("a gain over no baseline, or without its interval")
        return self


def write(run: Path) -> None:
    """Put `report.html` into a finished run's directory, from the files that are in it.

    One that is there already, and newer than the result, stays: an evaluation says more.
    """
    report = run / "report.html"
    if report.exists() and report.stat().st_mtime_ns >= (run / "result.json").stat().st_mtime_ns:
        return
    result = _result(run)
    html = page(
        f"Run {run.resolve().name}",
        verdict=verdict(result),
        blocks=[
            networks(result),
            *(Text(f"Warning: {warning}") for warning in result["warnings"]),
            *curves({run.resolve().name: run, **_baseline(run)}),
            Heading("Recipe"),
            recipe(run),
            Heading("More"),
            Code(
                f"distill evaluate {console.typed(run)} --suite all",
                "Calibration, fidelity, corruptions, inductive biases and costs, in this page:",
            ),
        ],
        footer="distill train",
    )
    storage.write(report, html.encode(errors="replace"))


def _result(run: Path) -> dict[str, Any]:
    """What the page tells of a run.

    Raises:
        DamagedError: If it is not what `train` writes.
    """
    file = run / "result.json"
    try:
        found = jsonio.mapping(file.read_text(encoding="utf-8"))
        return jsonio.checked(_Result, found).model_dump(exclude_none=True)
    except (OSError, ValueError) as error:
        raise DamagedError(f"{file}: cannot be read: {error}", hint=_ANEW) from None


def _baseline(run: Path) -> dict[str, Path]:
    path = run / "baseline"
    return {"alone": path} if (path / "metrics.jsonl").is_file() else {}


def verdict(result: Mapping[str, Any]) -> list[str]:
    """Whether the teacher helped, by how much, and how sure that is."""
    top1 = f"{result['top1']:.2%}"
    if result.get("gain") is None:
        lines = [f"{result['student']} is right on {top1} of the test images."]
        if result["teachers"]:
            lines.append(
                "Whether the teacher helped was not measured: `distill train --baseline` trains "
                "the same student without it."
            )
        return lines
    low, high = (100 * end for end in result["gain_ci95"])
    gain = 100 * result["gain"]
    lines = [helped(gain, low, high)]
    lines.append(
        f"{result['student']} is right on {top1} of the test images, alone on "
        f"{result['baseline']['top1']:.2%}: {gain:+.2f} points, 95 % interval over images "
        f"{low:+.2f} to {high:+.2f}."
    )
    return [*lines, files.ONE_RUN]


def helped(gain: float, low: float, high: float) -> str:
    """The first sentence of a verdict, from a gain and its interval in points."""
    if low > 0:
        return f"The teacher helped: {gain:+.2f} points."
    if high < 0:
        return f"The teacher hurt: {gain:+.2f} points."
    return f"No difference is shown: {gain:+.2f} points, and 0 is within the interval."


def networks(result: Mapping[str, Any]) -> Table:
    """Teachers, student and the student alone, with what they cost."""
    rows = [("teacher", teacher) for teacher in result["teachers"]]
    rows.append(("student", {**result, "model": result["student"]}))
    if result.get("baseline"):
        rows.append(("student alone", {**result["baseline"], "model": result["student"]}))
    return Table(
        "Test split, read once, after the last epoch",
        ("", "model", "top-1", "top-5", "NLL", "ECE", "parameters", "MFLOPs"),
        [
            (
                role,
                str(one["model"]),
                *_scores(one),
                f"{one['parameters']:,}",
                f"{one['flops'] / 1e6:,.1f}",
            )
            for role, one in rows
        ],
        strong=[i for i, (role, _) in enumerate(rows) if role == "student"],
        numeric=range(2, 8),
    )


def _scores(one: Mapping[str, Any]) -> tuple[str, ...]:
    if "top1" not in one:  # a teacher whose cache has no scores
        return ("", "", "", "")
    rates = (f"{one[name]:.2%}" for name in ("top1", "top5"))
    return (*rates, f"{one['nll']:.3f}", f"{one['ece']:.3f}")


def curves(runs: Mapping[str, Path]) -> Iterator[Block]:
    """How the losses fell and the validation accuracy rose, of several runs by name."""
    metrics = {name: _metrics(run) for name, run in runs.items()}
    rows_of = [row for rows in metrics.values() for row in rows if row["split"] == "train"]
    # Losses of different objectives do not compare; what they all have in them does.
    common = "ce" if all("ce" in row for row in rows_of) else "loss"
    label = {"ce": "cross-entropy of the labels", "loss": "loss, each of its own objective"}[common]
    wanted = (
        ("loss", "train", common, "In training", label, False),
        ("accuracy", "val", "top1", "Accuracy on the validation split", "top-1", True),
    )
    for stem, split, key, title, label, percent in wanted:
        series = [
            Series(name, *_thinned([row for row in rows if row["split"] == split], key))
            for name, rows in metrics.items()
            if any(row["split"] == split and key in row for row in rows)
        ]
        if series:
            table = [
                (one.name, int(x), y) for one in series for x, y in zip(one.x, one.y, strict=True)
            ]
            figure = Figure(title, "step", label, series, percent=percent)
            yield Picture(figure, stem, files.to_csv(("run", "step", key), table))
    judged = {
        name: [(row["step"], row["top1"]) for row in rows if row["split"] == "val"]
        for name, rows in metrics.items()
    }
    points = {name: own for name, own in judged.items() if own}
    if len(points) > 1:  # alone, a run is there at its own end
        yield speed(points)


def speed(points: Mapping[str, Sequence[tuple[int, float]]]) -> Table:
    """How soon each run was as accurate on the validation split as the worst of them is at its end.

    The mean over its steps is the area under the curve, by the trapezoidal rule, over its length.

    Args:
        points: Step and top-1 of every validation, by run; one at least.
    """
    goal = min(own[-1][1] for own in points.values())
    rows = []
    for name, own in points.items():
        length = own[-1][0] - own[0][0]
        area = sum((t - s) * (a + b) / 2 for (s, a), (t, b) in pairwise(own))
        mean = area / length if length else own[-1][1]
        reached = next(step for step, top1 in own if top1 >= goal)
        rows.append((name, f"{reached:,}", f"{own[-1][0]:,}", f"{mean:.2%}", f"{own[-1][1]:.2%}"))
    return Table(
        "Speed of training",
        ("", f"steps to {goal:.2%}", "of", "mean over the steps", "at the end"),
        rows,
        numeric=range(1, 5),
    )


def _metrics(run: Path) -> list[dict[str, Any]]:
    """The rows of a run.

    Raises:
        DamagedError: If one is not what `train` writes.
    """
    file = run / "metrics.jsonl"
    if not file.is_file():
        return []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        rows = [jsonio.mapping(line) for line in lines]
        for row in rows:
            numbers = {key: value for key, value in row.items() if key != "split"}
            if not all(map(math.isfinite, jsonio.checked(dict[str, float], numbers).values())):
                raise ValueError("a number that is not finite")
            if not isinstance(row.get("split"), str) or not isinstance(row.get("step"), int):
                raise ValueError("a row without a split and a step")
    except (OSError, ValueError) as error:
        raise DamagedError(f"{file}: cannot be read: {error}", hint=_ANEW) from None
    return rows


def _thinned(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Steps and values, each the mean of as many rows as there are too many."""
    rows = [row for row in rows if key in row]
    size = max(1, -(-len(rows) // MOST_POINTS))
    parts = [rows[i : i + size] for i in range(0, len(rows), size)]
    means = ([sum(row[k] for row in part) / len(part) for part in parts] for k in ("step", key))
    steps, values = means
    return steps, values


def recipe(run: Path) -> Code:
    """The run's complete recipe."""
    file = run / "recipe.yaml"
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DamagedError(f"{file}: cannot be read: {error}", hint=_ANEW) from None
    return Code(text, "The recipe, complete: distill train repeats the run with it.")
