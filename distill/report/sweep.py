"""A sweep as files: numbers for programs, a picture and a page for people."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distill import console
from distill.report import files
from distill.report.page import Code, Picture, Table, Text, page
from distill.report.plot import Figure, Series

LOG_RATIO = 20.0  # of the greatest to the smallest value, from which an axis is logarithmic


def write(found: Mapping[str, Any], out: Path) -> None:
    """Put `sweep.json`, `.csv`, `.svg`, `.png` and `.html` into `out`.

    Args:
        found: A sweep as plain data.
        out: A folder.
    """
    table, picture = table_of(found), figure(found)
    html = to_html(found, picture, table)
    files.write(out, "sweep", found, table=table, figure=picture, html=html)


def verdict(found: Mapping[str, Any]) -> list[str]:
    """What was found, in sentences."""
    best, axes = found["best"], found["axes"]
    low, high = best["test_top1_ci95"]
    lines = [
        f"Best: {values(best, axes)}, right on {best['val_top1']:.2%} of the validation images "
        f"and on {best['test_top1']:.2%} of the test images (95 % interval {low:.2%} to "
        f"{high:.2%})."
    ]
    alike = [values(one, axes) for one in found["plateau"]]
    if len(alike) > 1:
        lines.append(
            f"Within one standard error of it: {'; '.join(alike)}. These data cannot tell them "
            "apart."
        )
    ends = {name: (min(known), max(known)) for name, known in axes.items() if len(known) > 2}
    for name, known in ends.items():
        if best[name] in known:
            lines.append(
                f"The best {name} is at the end of what was tried: it may go on beyond "
                f"{best[name]:g}."
            )
    if "gain" in best:
        low, high = (100 * end for end in best["gain_ci95"])
        alone = found["levels"]["student alone"]
        lines.append(
            f"The student alone is right on {alone:.2%} of the validation images: with its teacher "
            f"{100 * best['gain']:+.2f} points (95 % interval {low:+.2f} to {high:+.2f})"
            + ("." if low > 0 else ", which does not show that it helps.")
        )
    if len(found["seeds"]) == 1:
        lines.append(files.ONE_SEED)
    failed = [values(row, axes) for row in found["settings"] if row["failed"]]
    if failed:
        lines.append(f"Failed: {'; '.join(failed)}.")
    return lines


def values(row: Mapping[str, Any], axes: Mapping[str, Sequence[float]]) -> str:
    """The values of a setting, as `temperature 4, weight 0.9`."""
    return ", ".join(f"{name} {row[name]:.10g}" for name in axes)


def table_of(found: Mapping[str, Any]) -> str:
    """A row for every setting, as CSV."""
    keys = ("val_top1", "val_top1_low", "val_top1_high", "val_top1_se", "val_nll")
    rows = []
    for row in found["settings"]:
        low, high = row.get("val_top1_ci95", (None, None))
        known = {**row, "val_top1_low": low, "val_top1_high": high}
        numbers = [known.get(key) for key in keys]
        named = [row[name] for name in found["axes"]]
        rows.append([*named, len(row["runs"]), *numbers, row["plateau"], row["failed"]])
    return files.to_csv([*found["axes"], "seeds", *keys, "plateau", "failed"], rows)


def figure(found: Mapping[str, Any]) -> Figure | None:
    """Validation accuracy over the first axis that has several values; a curve for all others."""
    axes = found["axes"]
    wide = [name for name, known in axes.items() if len(known) > 1]
    good = [row for row in found["settings"] if not row["failed"]]
    if not wide:
        return None
    along, others = wide[0], [name for name in axes if name != wide[0]]
    series, alike = [], []
    for point in itertools.product(*(axes[name] for name in others)):
        fixed = dict(zip(others, point, strict=True))
        rows = [row for row in good if all(row[name] == value for name, value in fixed.items())]
        rows.sort(key=lambda row: float(row[along]))
        if not rows:
            continue
        chosen = [i for i, row in enumerate(rows) if row["runs"] == found["best"]["runs"]]
        alike += [float(row[along]) for row in rows if row["plateau"]]
        series.append(
            Series(
                name=values(fixed, fixed) or "student",
                x=[row[along] for row in rows],
                y=[row["val_top1"] for row in rows],
                low=[row["val_top1_ci95"][0] for row in rows],
                high=[row["val_top1_ci95"][1] for row in rows],
                emphasis=chosen,
            )
        )
    known = axes[along]
    seeds = len(found["seeds"])
    return Figure(
        title=f"Validation accuracy by {along}",
        x_label=along,
        y_label=f"top-1, {found['images']['val']:,} images, {seeds} seed{'s' * (seeds > 1)}",
        series=series,
        log_x=min(known) > 0 and max(known) / min(known) > LOG_RATIO,
        percent=True,
        x_ticks=known if len(known) <= 10 and max(known) / max(min(known), 1e-9) <= 20 else None,
        levels=list(found["levels"].items()),
        shaded=[(min(alike), max(alike))] if len(series) == 1 and len(set(alike)) > 1 else (),
    )


def to_html(found: Mapping[str, Any], picture: Figure | None, table: str) -> str:
    """The page."""
    axes = found["axes"]
    heads = [*axes, "validation top-1", "95 % interval", "NLL", ""]
    rows, strong = [], []
    for i, row in enumerate(found["settings"]):
        if row["runs"] == found["best"]["runs"]:
            strong.append(i)
        rows.append([*(f"{row[name]:.10g}" for name in axes), *scored(row, found)])
    blocks = [] if picture is None else [Picture(picture, "sweep", table)]
    numeric = tuple(range(len(axes) + 3))
    seeds = ", ".join(map(str, found["seeds"]))
    return page(
        f"Sweep of {' and '.join(axes)}",
        verdict=verdict(found),
        blocks=[
            *blocks,
            Table("All settings", heads, rows, tuple(strong), numeric),
            Text(
                f"Students are trained to the last epoch and chosen by {found['images']['val']:,} "
                f"validation images, which no student was trained on (seeds of training: {seeds}). "
                f"The {found['images']['test']:,} test images were read for the best setting "
                "alone. Intervals are percentiles of a bootstrap over images, and over seeds where "
                "there are several; a setting is on the plateau if it is within one standard error "
                "of the best on the same images and seeds."
            ),
            Code(f"distill train {console.typed(found['best']['recipe'])}", "The best recipe:"),
        ],
        footer="distill temperature-sweep",
    )


def scored(row: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """A setting's scores, as cells of a table."""
    if row["failed"]:
        return ["", "", "", f"failed: {row['failed']}"]
    low, high = row["val_top1_ci95"]
    best = row["runs"] == found["best"]["runs"]
    mark = "best" if best else "plateau" if row["plateau"] else ""
    return [f"{row['val_top1']:.2%}", f"{low:.2%} to {high:.2%}", f"{row['val_nll']:.3f}", mark]
