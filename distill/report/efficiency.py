"""Accuracy over images as files: numbers for programs, a picture and a page for people."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

from distill.report import files
from distill.report.page import Picture, Table, Text, page
from distill.report.plot import Figure, Series

MOST_TICKS = 8  # up to so many sizes each has a tick of its own
MOST_PAIRS = 6  # of curves, the best ones first, that the verdict compares
SURE = 0.95  # of the resamples; where fewer say something, their number is said


def write(found: Mapping[str, Any], out: Path) -> None:
    """Put `efficiency.json`, `.csv`, `.svg`, `.png` and `.html` into `out`.

    Args:
        found: The curves as plain data.
        out: A folder.
    """
    table, picture = table_of(found), figure(found)
    html = to_html(found, picture, table)
    files.write(out, "efficiency", found, table=table, figure=picture, html=html)


def verdict(found: Mapping[str, Any]) -> list[str]:
    """What was found, in sentences."""
    curves, sizes = _ranked(found), found["sizes"]
    areas = "; ".join(f"{_quoted(curve)} {_percent(curve, 'area')}" for curve in curves)
    if len(sizes) > 1:
        pairs = list(combinations(curves, 2))[:MOST_PAIRS]
        lines = [_compared(*pair, found) for pair in pairs]
        lines.append(
            f"Mean accuracy over the logarithm of the number of images, {sizes[0]:,} to "
            f"{sizes[-1]:,}: {areas}."
        )
        lines.append(
            "A steeper curve does not show a stronger bias: a bias that fits the images makes a "
            "curve higher and flatter."
        )
    else:
        lines = [
            f"With {sizes[0]:,} images: {areas}.",
            "One number of images makes no curve; more come with --sizes.",
        ]
    failed = [
        f"{_quoted(curve)} with {point['size']:,} images ({point['failed']})"
        for curve in found["curves"]
        for point in curve["points"]
        if point["failed"]
    ]
    if failed:
        lines.append(f"Failed: {'; '.join(failed)}. What is said of these curves leaves that out.")
    return lines + [f"{note}." for note in found["notes"]]


def _ranked(found: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The curves that are there, from the largest area to the smallest."""
    curves = [curve for curve in found["curves"] if curve["area"] is not None]
    return sorted(curves, key=lambda curve: -float(curve["area"]))


def _quoted(curve: Mapping[str, Any]) -> str:
    return f'"{curve["name"]}"'


def _multiplier(
    better: Mapping[str, Any], other: Mapping[str, Any], found: Mapping[str, Any]
) -> Mapping[str, Any]:
    """What there is of two curves, as the one that needs fewer images has it."""
    pairs = [(better["name"], other["name"]), (other["name"], better["name"])]
    both = [one for one in found["multipliers"] if (one["of"], one["over"]) in pairs]
    both.sort(key=lambda one: pairs.index((one["of"], one["over"])))
    return max(both, key=lambda one: float(one["value"] or 0.0))


def _compared(better: Mapping[str, Any], other: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """How many times fewer images one of two curves needs; `better` has the larger area."""
    fewer = _multiplier(better, other, found)
    if fewer["value"] is None:
        return _disjoint(better, other)
    said = (
        f'"{fewer["of"]}" needs {fewer["value"]:.2f} times fewer images than "{fewer["over"]}" for '
        "the same accuracy"
    )
    if fewer["ci95"] is None:
        return f"{said}; of its interval nothing is known."
    low, high = fewer["ci95"]
    said += f" (95 % interval {low:.2f} to {high:.2f}"
    if fewer["draws"] < SURE * found["resamples"]:
        said += (
            f" in the {fewer['draws']:,} of {found['resamples']:,} resamples in which they have "
            "accuracies in common"
        )
    return f"{said}): these data cannot tell them apart." if low <= 1 <= high else f"{said})."


def _disjoint(better: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Two curves that reach no accuracy in common: nothing says what one is in the other's."""
    ours, theirs = (
        [point for point in curve["points"] if not point["failed"]] for curve in (better, other)
    )
    lowest = min(ours, key=lambda point: float(point["top1"]))
    highest = max(theirs, key=lambda point: (float(point["top1"]), point["size"]))
    if lowest["top1_ci95"][0] > highest["top1_ci95"][1]:
        return (
            f"{_quoted(better)} is better with {lowest['size']:,} images ({lowest['top1']:.1%}) "
            f"than {_quoted(other)} with {highest['size']:,} ({highest['top1']:.1%}): they have no "
            "accuracy in common, and so no factor."
        )
    return (
        f"{_quoted(better)} and {_quoted(other)} have no range of accuracies in common, and so no "
        "factor; their intervals overlap."
    )


def cell(point: Mapping[str, Any]) -> str:
    """The accuracy of a curve's point with its interval, for a table of all curves."""
    return "failed" if point["failed"] else _percent(point, "top1")


def _percent(row: Mapping[str, Any], key: str) -> str:
    low, high = (100 * end for end in row[f"{key}_ci95"])
    return f"{row[key]:.1%} ({low:.1f} to {high:.1f})"


def table_of(found: Mapping[str, Any]) -> str:
    """A row for every trial of every curve, as CSV."""
    of_curve, of_point = ("name", "recipe", "teacher"), ("size", "fraction", "epochs", "steps")
    of_run = ("seed", "top1", "nll", "train_top1", "run", "failed")
    rows = [
        [*(curve[key] for key in of_curve), *(point[key] for key in of_point)]
        + [run[key] for key in of_run]
        for curve in found["curves"]
        for point in curve["points"]
        for run in point["runs"]
    ]
    return files.to_csv(["curve", *of_curve[1:], *of_point, *of_run], rows)


def figure(found: Mapping[str, Any]) -> Figure:
    """Test accuracy over the number of training images, a curve for each recipe."""
    series = []
    for curve in found["curves"]:
        points = [point for point in curve["points"] if not point["failed"]]
        if points:
            series.append(
                Series(
                    name=curve["name"],
                    x=[point["size"] for point in points],
                    y=[point["top1"] for point in points],
                    low=[point["top1_ci95"][0] for point in points],
                    high=[point["top1_ci95"][1] for point in points],
                )
            )
    sizes, seeds = found["sizes"], len(found["seeds"])
    return Figure(
        title="Accuracy by number of training images",
        x_label="training images",
        y_label=f"top-1, {found['images']['test']:,} test images, {seeds} seed{'s' * (seeds > 1)}",
        series=series,
        log_x=True,
        percent=True,
        x_ticks=sizes if len(sizes) <= MOST_TICKS else None,
    )


def to_html(found: Mapping[str, Any], picture: Figure, table: str) -> str:
    """The page."""
    curves, images = found["curves"], found["images"]
    seeds = ", ".join(map(str, found["seeds"]))
    return page(
        picture.title,
        verdict=verdict(found),
        blocks=[
            Picture(picture, "efficiency", table),
            _by_size(found),
            *([_multipliers(found)] if found["multipliers"] else []),
            Text(
                f"Each student was judged by the {images['test']:,} test images after its last "
                "epoch. This is a measurement: nothing was chosen by it, and who chooses a recipe "
                "by it has no test images left to report."
            ),
            Text(
                "The images of a size are class-balanced and lie within those of the next one, up "
                f"to all {images['train']:,}; which they are follows from data.seed, and the seeds "
                f"of training are {seeds}. Every student takes as many optimizer steps as its "
                "recipe does on all images, in whole epochs, with the same part of them as warm-up."
            ),
            Text(
                "Intervals hold 95 % of the resamples of a bootstrap over test images, and over "
                "seeds where there are several; other images to train on would widen them. The "
                "factors are means over the accuracies that two curves have in common; where there "
                "are none, there is no factor. Train top-1 is on up to 2,000 of the images that a "
                "student was trained on, and the gap is what is lost from there to the test images."
            ),
            *map(_points, curves),
        ],
        footer="distill sample-efficiency",
    )


def _by_size(found: Mapping[str, Any]) -> Table:
    rows = [
        [
            curve["name"],
            *("failed" if one["failed"] else f"{one['top1']:.1%}" for one in curve["points"]),
        ]
        for curve in found["curves"]
    ]
    heads = ["images", *(f"{size:,}" for size in found["sizes"])]
    return Table("Test accuracy", heads, rows, numeric=tuple(range(1, len(heads))))


def _multipliers(found: Mapping[str, Any]) -> Table:
    """Each pair of curves once."""
    rows = []
    for better, other in combinations(_ranked(found), 2):
        one = _multiplier(better, other, found)
        value, interval = one["value"], one["ci95"]
        times = "none" if value is None else f"{value:.2f}"
        shown = "" if interval is None else f"{interval[0]:.2f} to {interval[1]:.2f}"
        rows.append([one["of"], one["over"], times, shown, f"{one['draws']:,}"])
    heads = ("needs fewer images", "than", "times", "95 % interval", "resamples")
    caption = f"Images for the same accuracy (of {found['resamples']:,} resamples)"
    return Table(caption, heads, rows, numeric=(2, 3, 4))


def _points(curve: Mapping[str, Any]) -> Table:
    rows = []
    for point in curve["points"]:
        known = [f"{point[key]:,}" for key in ("size", "epochs", "steps")]
        if point["failed"]:
            rows.append([*known, "failed", "", "", "", ""])
            continue
        low, high = (100 * end for end in point["top1_ci95"])
        scores = [f"{point['top1']:.2%}", f"{low:.1f} to {high:.1f}"]
        scores += [f"{point['train_top1']:.2%}", f"{100 * point['gap']:+.2f}"]
        rows.append([*known, *scores, f"{point['nll']:.3f}"])
    heads = ["images", "epochs", "steps", "test top-1", "95 % interval"]
    heads += ["train top-1", "gap, points", "NLL"]
    return Table(curve["name"], heads, rows, numeric=tuple(range(len(heads))))
