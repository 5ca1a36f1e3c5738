"""The order of candidate teachers for a goal, with the reason of each in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from distill import statistics
from distill.engine.trials import Outcome
from distill.errors import DivergedError
from distill.statistics import named

Goal = Literal["accuracy", "mobile", "time"]

# What a goal would rather have less of, among teachers whose students are as good.
COSTS = {"accuracy": "flops", "mobile": "parameters", "time": "seconds_per_image"}


def summary(runs: Sequence[Outcome]) -> dict[str, Any]:
    """The student's accuracy on the validation images."""
    if failed := next((one.failed for one in runs if one.failed), None):
        return {"failed": failed}
    rows = np.stack([one.correct for one in runs])
    found = statistics.estimate(rows.mean(), statistics.bootstrap([rows])[0])
    return {
        **named("student_top1", found),
        "student_nll": float(np.mean([one.scores["nll"] for one in runs])),
        "failed": None,
    }


def ranked(
    candidates: Sequence[dict[str, Any]],
    proxies: Sequence[Sequence[Outcome]],
    control: Sequence[Outcome],
    goal: Goal,
) -> list[dict[str, Any]]:
    """The candidates with what their students are, in order, each with the reason in words.

    Raises:
        DivergedError: If every proxy student failed.
    """
    rows = [{**one, **summary(runs)} for one, runs in zip(candidates, proxies, strict=True)]
    good = [i for i, row in enumerate(rows) if row["failed"] is None]
    if not good:
        raise DivergedError(f"every proxy student failed; the first: {rows[0]['failed']}")
    plain_rows = None
    if not any(one.failed for one in control):
        plain_rows = np.stack([one.correct for one in control])
    correct = [np.stack([one.correct for one in proxies[i]]) for i in good]
    draws = statistics.bootstrap([*correct, *([] if plain_rows is None else [plain_rows])])
    values = np.array([each.mean() for each in correct])
    best = max(range(len(good)), key=lambda k: (values[k], -rows[good[k]]["student_nll"]))
    level = statistics.plateau(values, draws[: len(good)], best)
    for k, i in enumerate(good):
        rows[i]["plateau"] = k in level
        if plain_rows is not None:
            gain = statistics.estimate(values[k] - plain_rows.mean(), draws[k] - draws[-1])
            rows[i] |= named("gain", gain)
            rows[i]["below_student"] = bool(rows[i]["val_top1"] < plain_rows.mean())
    price = COSTS[goal]
    ordered = sorted(
        (rows[i] for i in good),
        key=lambda row: (
            (not row["plateau"], row[price] if row["plateau"] else -row["student_top1"])
            if goal != "accuracy"
            else (-row["student_top1"], row["student_nll"])
        ),
    )
    for row in ordered:
        row["front"] = not any(_dominates(other, row, price) for other in ordered)
    for place, row in enumerate(ordered, start=1):
        row |= {"rank": place, "reason": reason(row, ordered, goal)}
    lost = [row for row in rows if row["failed"] is not None]
    return ordered + [
        {**row, "rank": None, "reason": f"its student failed: {row['failed']}"} for row in lost
    ]


def _dominates(one: dict[str, Any], other: dict[str, Any], price: str) -> bool:
    """Whether a candidate costs no more and teaches no worse, and one of both is better."""
    ours, theirs = ((row[price], -row["student_top1"]) for row in (one, other))
    return ours != theirs and all(a <= b for a, b in zip(ours, theirs, strict=True))


def reason(row: dict[str, Any], ordered: Sequence[dict[str, Any]], goal: Goal) -> str:
    """Why a candidate stands where it does."""
    top = max(ordered, key=lambda one: (one["student_top1"], -one["student_nll"]))
    behind = 100 * (top["student_top1"] - row["student_top1"])
    if row is top:
        text = "its student is the best"
    elif behind == 0:
        text = "its student is as good as the best"
    else:
        within = "within one standard error" if row["plateau"] else "more than a standard error"
        text = f"its student is {behind:.2f} points behind the best, {within}"
    if goal != "accuracy" and row["plateau"]:
        word, price = {
            "mobile": ("smallest", f"{row['parameters']:,} parameters"),
            "time": ("quickest", f"{row['images_per_second']:,.0f} images/s"),
        }[goal]
        first = f"the {word} on the plateau, " if row is ordered[0] else ""
        text += f"; {first}{price}"
    if row.get("below_student"):
        text += "; the teacher itself is worse than the student alone, and usually holds it back"
    return text
