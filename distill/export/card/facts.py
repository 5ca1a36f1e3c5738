"""What is known of an exported student, and how surely."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from distill.definitions import Number, definitions, shown
from distill.export.card.markdown import Markdown, name, table
from distill.recipe import Recipe
from distill.report.exhibits import number, value
from distill.report.run import helped

if TYPE_CHECKING:
    from distill.engine.run import Result
    from distill.models.network import Description

Z = 1.959964  # of a two-sided 95 % interval
SCORES = ("top1", "top5", "nll", "ece")
# What is shown of an evaluation beside them.
MEASURES = (
    ("clean", "balanced_accuracy"), ("clean", "macro_f1"), ("clean", "brier"),
    ("clean", "temperature"), ("clean", "ece_scaled"), ("fidelity", "agreement"),
    ("fidelity", "teacher_kl"), ("fidelity", "retention"), ("fidelity", "error_imitation"),
    ("fidelity", "negative_transfer"), ("corruptions", "mca"), ("corruptions", "mca_affine"),
    ("corruptions", "mce"), ("corruptions", "corrupted_ece"), ("bias", "consistency"),
    ("dense", "dense_iou"),
)  # fmt: skip


class Data(NamedTuple):
    """The images, as far as a card tells of them."""

    name: str  # as a recipe has it
    classes: tuple[str, ...]  # in the order of the logits
    image_size: int  # pixels of the sides
    train: int  # images that were trained on
    val: int
    test: int
    fingerprint: str


class About(NamedTuple):
    """All that a card is made from."""

    recipe: Recipe
    result: Result | None  # None: it is not recorded how good the weights are
    data: Data
    weights: Description
    evaluation: Mapping[str, Any] | None  # evaluation.json, of these very weights
    exported: Mapping[str, Any]  # export.json


def scores(about: About) -> dict[str, Number]:
    """The student's scores on the test split; none where nothing is recorded."""
    told = {} if about.result is None else about.result._asdict()
    return _scores(about, told, measured(about).get("student"))


def measured(about: About) -> dict[str, Mapping[str, Any]]:
    """The evaluation's subjects by their part, where its numbers are those of this run alone."""
    own = _subject(about)
    if own is None or about.evaluation is None:
        return {}
    by_name = {one["name"]: one for one in about.evaluation["subjects"]}
    parts = {"student": own["name"], "teacher": own["teacher"], "student alone": own["control"]}
    found = {part: by_name[one] for part, one in parts.items() if one in by_name}
    single = {part: one for part, one in found.items() if len(one["seeds"]) == 1}
    return single if "student" in single else {}


def verdict(about: About) -> Iterator[str]:
    """How good it is and whether the teacher helped, in sentences of Markdown."""
    result, top1 = about.result, scores(about).get("top1")
    if top1 is not None and top1.value is not None and top1.ci95 is not None:
        low, high = (100 * end for end in top1.ci95)
        yield (
            f"The student is right on **{percent(top1.value)}** of {about.data.test:,} test images "
            f"(95 % interval {low:.2f} to {high:.2f} %)."
        )
    gain = _gain(about)
    if gain is not None:
        low, high = (100 * end for end in gain.ci95)
        yield (
            "Trained from labels alone, on the same images in the same order, it is right on "
            f"{percent(gain.alone)}. {helped(100 * gain.value, low, high).rstrip('.')} "
            f"(95 %, paired by test image: {low:+.2f} to {high:+.2f} points)."
        )
    elif result is not None and result.teachers:
        yield "Whether the teacher helped was not measured: there is no run of it without one."
    subject = _subject(about)
    mean = None if subject is None else number(subject, "clean", "top1")
    if subject is not None and len(subject["seeds"]) > 1 and mean is not None:
        seeds = ", ".join(map(str, subject["seeds"]))
        yield (
            f"Over seeds {seeds} the same training reaches {shown('top1', mean)} in the mean, an "
            f"interval over test images and seeds; this student is that of seed "
            f"{about.recipe.train.seed}."
        )


def results(about: About) -> Markdown:
    """Teachers, student and the student alone, a row each; empty where nothing is recorded."""
    result, found = about.result, measured(about)
    if result is None:
        return Markdown()
    one_teacher = len(result.teachers) == 1
    rows: list[tuple[str, Mapping[str, Any], Mapping[str, Any] | None]] = [
        ("teacher", one, found.get("teacher") if one_teacher else None) for one in result.teachers
    ]
    if not one_teacher and "teacher" in found:
        rows.append(("teachers together", {}, found["teacher"]))
    own = {"model": result.student}
    rows.append(("**student**", result._asdict() | own, found.get("student")))
    if result.baseline or "student alone" in found:
        rows.append(("student alone", (result.baseline or {}) | own, found.get("student alone")))
    keys, cells = _keys(about), []
    for role, told, subject in rows:
        found_scores = _scores(about, told, subject)
        cells.append(
            (
                Markdown(role),
                name(str(told["model"])) if "model" in told else "–",
                *(told_of(key, found_scores.get(key)) for key in keys),
                f"{told['parameters']:,}" if "parameters" in told else "–",
                f"{told['flops'] / 1e6:,.1f}" if "flops" in told else "–",
            )
        )
    heads = ("", "model", *(definitions()[key].title for key in keys), "parameters", "MFLOPs")
    return table(heads, cells, left=2)


def measures(about: About) -> Markdown:
    """What else an evaluation found: a row a measure, a column a subject; empty without one."""
    subjects = measured(about)
    rows = []
    for suite, key in MEASURES:
        cells = [number(subject, suite, key) for subject in subjects.values()]
        if any(cell is not None and cell.value is not None for cell in cells):
            rows.append((definitions()[key].title, *(told_of(key, cell) for cell in cells)))
    return table(("", *subjects), rows) if rows else Markdown()


def meanings(about: About) -> Markdown:
    """What the scores and measures that are shown mean; empty where none is."""
    subjects = measured(about).values()
    keys = [
        *scores(about),
        *(k for s, k in MEASURES if any(value(one, s, k) is not None for one in subjects)),
    ]
    rows = [(definitions()[key].title, definitions()[key].text) for key in keys]
    return table(("", "definition"), rows, left=2) if rows else Markdown()


def told_of(key: str, one: Number | None) -> Markdown:
    """A number with its interval, or a dash."""
    return Markdown("–" if one is None or one.value is None else shown(key, one))


def percent(share: float) -> str:
    """A fraction in per cent, as the tables have it."""
    return shown("top1", Number(share))


def wilson(share: float, images: int) -> tuple[float, float]:
    """The 95 % interval of a share of independent images.

    (p + z²/2n ± z √(p (1 − p)/n + z²/4n²)) / (1 + z²/n), z = 1.96 (Wilson 1927). Near 0 and 1 it
    stays within [0, 1] and has its coverage, which p ± z √(p (1 − p)/n) does not.

    Args:
        share: p, in [0, 1].
        images: n, 1 or more.
    """
    middle = share + Z**2 / (2 * images)
    half = Z * math.sqrt(share * (1 - share) / images + Z**2 / (4 * images**2))
    scale = 1 + Z**2 / images
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


class _Gain(NamedTuple):
    """What the teacher added to top-1, all as fractions."""

    alone: float  # top-1 of the same student without it
    value: float
    ci95: tuple[float, float]


def _gain(about: About) -> _Gain | None:
    """As the run found it, or the evaluation of it beside a run without the teacher."""
    result, found = about.result, measured(about)
    if result is not None and result.baseline and result.gain is not None and result.gain_ci95:
        low, high = result.gain_ci95
        return _Gain(result.baseline["top1"], result.gain, (low, high))
    if about.evaluation is None or "student alone" not in found:
        return None
    pair = found["student"]["name"], found["student alone"]["name"]
    alone = value(found["student alone"], "clean", "top1")
    for one in about.evaluation["comparisons"]:
        if (one["subject"], one["reference"]) == pair and alone is not None:
            low, high = one["numbers"]["gain"]["ci95"]
            return _Gain(alone, one["numbers"]["gain"]["value"], (low, high))
    return None


def _subject(about: About) -> Mapping[str, Any] | None:
    """What the evaluation has of this run; None where there is none, or it is of other images."""
    found = about.evaluation
    if found is None or found["data"]["fingerprint"] != about.data.fingerprint:
        return None
    runs = [one for one in found["subjects"] if one["role"] == "run"]
    run = Path(about.exported["run"]).name
    named = [one for one in runs if run in [Path(place).name for place in one["runs"]]]
    return next(iter(named or (runs if len(runs) == 1 else [])), None)


def _keys(about: About) -> list[str]:
    """The scores that mean something: of five classes, each is among the five most probable."""
    return [key for key in SCORES if key != "top5" or len(about.data.classes) > 5]


def _scores(
    about: About, told: Mapping[str, Any], subject: Mapping[str, Any] | None
) -> dict[str, Number]:
    """With the evaluation's intervals, else Wilson's of what is a share of the test images."""
    found, images = {}, about.data.test
    for key in _keys(about):
        one = None if subject is None else number(subject, "clean", key)
        if (one is None or one.value is None) and key in told:
            share = key in ("top1", "top5")
            one = Number(told[key], wilson(told[key], images) if share else None, images)
        if one is not None and one.value is not None:
            found[key] = one
    return found
