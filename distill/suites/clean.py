"""Accuracy and calibration on the test split."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy import ndarray

from distill import evaluate
from distill.definitions import Number
from distill.diagnostics import UndefinedError, calibration, confusion
from distill.evaluate import Answers, Predictions
from distill.statistics import resampled
from distill.suites import Found, Image, centred, interval, mean, png
from distill.suites.subjects import Subject, pixels

WORST = 24  # images that are shown
_SIDES = ("labels", "predicted")
MOST_CLASSES = 100  # up to which means over classes have intervals


def measure(subjects: Sequence[Subject]) -> dict[str, Found]:
    """Scores with their intervals, and the tables that say where they come from.

    Raises:
        DivergedError: If a network's answers are not finite numbers.
    """
    by_name = {subject.name: subject for subject in subjects}
    return {subject.name: _scores(subject, by_name) for subject in subjects}


def _scores(subject: Subject, by_name: dict[str, Subject]) -> Found:
    told = [member.answers for member in subject.members]
    predictions = [member.predictions for member in subject.members]
    for one in predictions:
        evaluate.scores(one)  # refuses what is not finite
    pairs = [(one.logits, one.labels) for one in told]
    num_classes = told[0].logits.shape[1]
    numbers = {
        "top1": mean([one.correct for one in predictions]),
        "top5": mean([one.top5 for one in predictions]),
        "nll": mean([one.nll for one in predictions]),
        "brier": mean([calibration.brier(*pair) for pair in pairs]),
        "ece": _error([evaluate.gaps(one.confidence, one.correct) for one in predictions]),
        "ece_adaptive": _error(
            [calibration.adaptive_gaps(one.confidence, one.correct) for one in predictions]
        ),
        "temperature": _temperature(told),
        "ece_scaled": _scaled(told),
        **_over_classes(predictions, num_classes),
    }
    counts: ndarray = np.sum(
        [confusion.confusion(one.labels, one.predicted, num_classes) for one in predictions], axis=0
    )
    tables = {
        "classes": list(subject.first.dataset.classes),
        "reliability": _reliability(predictions),
        "confusion": counts.tolist(),
        "per_class": {
            name: [None if math.isnan(value) else float(value) for value in column]
            for name, column in confusion.by_class(counts)._asdict().items()
        },
    }
    images = {"worst": _worst(subject, by_name)} if subject.role == "run" else {}
    return Found(numbers, tables, images)


def _error(gaps: list[ndarray]) -> Number:
    """Σ_b |mean gap of bin b|, from what each image adds to each bin."""
    rows = [np.stack([one[:, b] for one in gaps]) for b in range(gaps[0].shape[1])]

    def of(means: ndarray) -> ndarray:
        found: ndarray = np.abs(means).sum(axis=0)
        return found

    value = float(of(np.stack([row.mean(axis=1, keepdims=True) for row in rows])).mean())
    return centred(value, resampled(rows, of), n=len(gaps[0]), seeds=len(gaps))


def _temperature(told: list[Answers]) -> Number:
    try:
        fitted = [calibration.fit_temperature(one.logits, one.labels) for one in told]
    except UndefinedError as error:
        return Number(None, seeds=len(told), reason=str(error))
    value = float(np.mean([one.temperature for one in fitted]))
    if any(one.at_bound for one in fitted):
        return Number(None, seeds=len(told), reason="no temperature fits its answers best")
    variance = float(np.mean([one.se**2 for one in fitted]))
    if len(fitted) > 1:
        variance += float(np.var([one.temperature for one in fitted], ddof=1)) / len(fitted)
    half = 1.96 * math.sqrt(variance)
    return Number(value, (value - half, value + half), len(told[0].ids), len(told))


def _scaled(told: list[Answers]) -> Number:
    try:
        scaled = [calibration.cross_scaled(one.logits, one.labels) for one in told]
    except UndefinedError as error:
        return Number(None, seeds=len(told), reason=str(error))
    tops = [calibration.top_label(z, one.labels) for z, one in zip(scaled, told, strict=True)]
    return _error([evaluate.gaps(*top) for top in tops])


def _over_classes(predictions: list[Predictions], num_classes: int) -> dict[str, Number]:
    """Balanced accuracy and macro F1."""
    counts = [confusion.confusion(p.labels, p.predicted, num_classes) for p in predictions]
    values = {
        "balanced_accuracy": float(np.mean([confusion.balanced_accuracy(c) for c in counts])),
        "macro_f1": float(np.mean([confusion.macro_f1(c) for c in counts])),
    }
    n, seeds = len(predictions[0].ids), len(predictions)
    if num_classes > MOST_CLASSES:
        return {name: Number(value, None, n, seeds) for name, value in values.items()}
    labels, predicted = (np.stack([getattr(p, side) for p in predictions]) for side in _SIDES)
    rows = []
    for k in range(num_classes):
        rows += [(labels == k) & (predicted == k), labels == k, predicted == k]

    def recall(means: ndarray) -> ndarray:
        right, support, _ = means[0::3], means[1::3], means[2::3]
        return _mean_where(right, support)

    def f1(means: ndarray) -> ndarray:
        right, support, predicted = means[0::3], means[1::3], means[2::3]
        return _mean_where(2 * right, np.where(support > 0, support + predicted, 0))

    draws = {"balanced_accuracy": resampled(rows, recall), "macro_f1": resampled(rows, f1)}
    return {name: interval(value, draws[name], n=n, seeds=seeds) for name, value in values.items()}


def _mean_where(part: ndarray, whole: ndarray) -> ndarray:
    """The mean over classes of part / whole, of those that are there."""
    there = whole > 0
    shares = np.where(there, part / np.where(there, whole, 1), 0)
    found: ndarray = shares.sum(axis=0) / np.maximum(there.sum(axis=0), 1)
    return found


def _reliability(predictions: list[Predictions]) -> dict[str, Any]:
    """By bin of confidence, of all seeds together; None where there is no image."""
    confidence = np.concatenate([one.confidence for one in predictions])
    correct = np.concatenate([one.correct for one in predictions])
    found = calibration.reliability(confidence, correct)
    return {
        name: [None if math.isnan(value) else float(value) for value in column]
        for name, column in found._asdict().items()
    }


def _worst(subject: Subject, by_name: dict[str, Subject]) -> list[Image]:
    """The images that the first of its networks is most wrong about, with what was said of them."""
    tested = subject.first
    told, classes = tested.answers, tested.dataset.classes
    order = np.argsort(-tested.predictions.nll, kind="stable")[:WORST]
    order = order[~tested.predictions.correct[order]]
    said = np.exp(calibration.log_probabilities(told.logits[order]))
    taught = by_name[subject.teacher].first.answers.logits if subject.teacher else None
    found = []
    for place, p, image in zip(order, said, pixels(tested, told.ids[order]), strict=True):
        lines = [
            f"label: {classes[told.labels[place]]}, {p[told.labels[place]]:.1%}",
            f"student: {classes[p.argmax()]}, {p.max():.1%}",
        ]
        if taught is not None:
            q = np.exp(calibration.log_probabilities(taught[place : place + 1])[0])
            lines.append(f"teacher: {classes[q.argmax()]}, {q.max():.1%}")
        found.append(Image(png(image), (f"image {told.ids[place]}", *lines)))
    return found
