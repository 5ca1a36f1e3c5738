"""A ranking of teachers as files: numbers for programs, a picture and a page for people."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill import console
from distill.report import files
from distill.report.page import Code, Picture, Table, Text, page
from distill.report.plot import Figure, Series

# How much of what a goal costs stands on the picture's axis: its key, its name, its unit.
AXES = {
    "accuracy": ("flops", "GFLOPs of the teacher", 1e9),
    "mobile": ("parameters", "million parameters of the teacher", 1e6),
    "time": ("seconds_per_image", "milliseconds of the teacher an image, here", 1e-3),
}
LOG_RATIO = 10.0  # of the dearest to the cheapest, from which the axis is logarithmic


def write(found: Mapping[str, Any], out: Path) -> None:
    """Put `ranking.json`, `.csv`, `.svg`, `.png` and `.html` into `out`.

    Args:
        found: A ranking as plain data.
        out: A folder.
    """
    table, picture = table_of(found), figure(found)
    html = to_html(found, picture, table)
    files.write(out, "ranking", found, table=table, figure=picture, html=html)


def verdict(found: Mapping[str, Any]) -> list[str]:
    """What was found, in sentences."""
    best, alone = found["best"], found["alone"]
    lines = [f"First for {found['goal']}: {best['name']}; {best['reason']}."]
    if "gain" in best:
        low, high = (100 * end for end in best["gain_ci95"])
        lines.append(
            f"After {found['epochs']} epochs its student is right on {best['student_top1']:.2%} of "
            f"the validation images, the student alone on {alone['student_top1']:.2%}: "
            f"{100 * best['gain']:+.2f} points (95 % interval {low:+.2f} to {high:+.2f})."
        )
        if low <= 0:
            lines.append(
                "That interval holds 0: so short a student does not show that this teacher helps. "
                "More seeds or epochs may: --seeds 0,1,2, --proxy-epochs."
            )
    if len(found["seeds"]) == 1:
        lines.append(files.ONE_SEED)
    below = [row["name"] for row in found["ranking"] if row.get("below_student")]
    if below:
        lines.append(
            f"Worse than the student alone: {', '.join(below)}. Such a teacher usually holds a "
            "student back."
        )
    if found["refused"]:
        names = ", ".join(f"{one['name']} ({one['reason']})" for one in found["refused"])
        lines.append(f"Left out: {names}.")
    return lines


HEADS = ("", "teacher", "top-1", "NLL", "ECE", "entropy", "parameters", "MFLOPs", "images/s")
STUDENT_HEADS = ("student top-1", "gain", "95 % interval", "")


def cells(row: Mapping[str, Any]) -> list[str]:
    """A candidate as cells of a table."""
    own = [
        "" if row["rank"] is None else str(row["rank"]),
        row["name"],
        f"{row['val_top1']:.2%}",
        f"{row['val_nll']:.3f}",
        f"{row['val_ece']:.3f}",
        f"{row['entropy']:.2f}",
        f"{row['parameters']:,}",
        f"{row['flops'] / 1e6:,.1f}",
        f"{row['images_per_second']:,.0f}",
    ]
    if row["failed"]:
        return [*own, "", "", "", "failed"]
    marks = [word for word, key in (("plateau", "plateau"), ("front", "front")) if row[key]]
    gain = interval = ""
    if "gain" in row:
        low, high = (100 * end for end in row["gain_ci95"])
        gain, interval = f"{100 * row['gain']:+.2f}", f"{low:+.2f} to {high:+.2f}"
    return [*own, f"{row['student_top1']:.2%}", gain, interval, ", ".join(marks)]


def table_of(found: Mapping[str, Any]) -> str:
    """A row for every candidate, as CSV."""
    keys = (
        "rank",
        "name",
        "val_top1",
        "val_nll",
        "val_ece",
        "entropy",
        "parameters",
        "flops",
        "images_per_second",
        "student_top1",
        "student_top1_se",
        "gain",
        "gain_se",
        "plateau",
        "front",
        "failed",
        "reason",
    )
    return files.to_csv(keys, [[row.get(key) for key in keys] for row in found["ranking"]])


def figure(found: Mapping[str, Any]) -> Figure:
    """The students' accuracy over what their teachers cost; the front is filled."""
    key, label, unit = AXES[found["goal"]]
    rows = [row for row in found["ranking"] if row["failed"] is None]
    costs = [row[key] / unit for row in rows]
    alone = found["alone"].get("student_top1")
    return Figure(
        title=f"Students after {found['epochs']} epochs",
        x_label=label,
        y_label=f"student's top-1, {found['images']:,} validation images",
        series=[
            Series(
                name="students",
                x=costs,
                y=[row["student_top1"] for row in rows],
                low=[row["student_top1_ci95"][0] for row in rows],
                high=[row["student_top1_ci95"][1] for row in rows],
                joined=False,
                labels=[row["name"] for row in rows],
                emphasis=[i for i, row in enumerate(rows) if row["front"]],
            )
        ],
        log_x=max(costs) / min(costs) > LOG_RATIO,
        percent=True,
        levels=[] if alone is None else [("student alone", alone)],
    )


def to_html(found: Mapping[str, Any], picture: Figure, table: str) -> str:
    """The page."""
    rows = found["ranking"]
    shown, own = [cells(row) for row in rows], len(HEADS)
    students = [row[:2] + row[own:] for row in shown]
    seeds = ", ".join(map(str, found["seeds"]))
    price = {"accuracy": "FLOPs", "mobile": "parameters", "time": "time here"}[found["goal"]]
    return page(
        f"Teachers for {found['goal']}",
        verdict=verdict(found),
        blocks=[
            Picture(picture, "ranking", table),
            Table("Teachers", HEADS, [row[:own] for row in shown], (0,), (0, *range(2, own))),
            Table("Their students", ("", "teacher", *STUDENT_HEADS), students, (0,), (0, 2, 3, 4)),
            Table(
                "Why",
                ("", "teacher", "reason"),
                [(str(row["rank"] or ""), row["name"], row["reason"]) for row in rows],
                (0,),
                (0,),
            ),
            Text(
                f"All of it is measured on these data: teachers on {found['images']:,} validation "
                f"images (entropy in nats at T = {found['temperature']:g}), and by a student of "
                f"each that is trained for {found['epochs']} epochs on the same images, views and "
                f"order (seeds {seeds}). An ensemble is the mean of its members' probabilities, "
                "out of their caches. On the plateau are those whose students are within one "
                "standard error of the best, on the same images and seeds; on the front those "
                f"that no other beats in both the student's accuracy and {price}. The test split "
                "was not read."
            ),
            Code(
                f"distill train {console.typed(found['best']['recipe'])}",
                "The recipe with the first of them:",
            ),
        ],
        footer="distill rank-teachers",
    )
