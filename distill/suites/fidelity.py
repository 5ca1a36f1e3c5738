"""How far students say what their teachers say."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from distill.definitions import Number
from distill.diagnostics import UndefinedError, fidelity
from distill.diagnostics.fidelity import Ratio
from distill.engine.machine import Machine
from distill.suites import Found, mean, nothing, ratio
from distill.suites.subjects import Subject, training_views

VIEWS = 1024  # augmented training images that teacher and student are both shown
_NAMES = (
    "agreement", "agreement_top5", "teacher_kl", "retention", "error_imitation",
    "negative_transfer", "train_agreement", "train_kl",
)  # fmt: skip


def measure(subjects: Sequence[Subject], here: Machine) -> dict[str, Found]:
    """Of every run with a teacher, and of its control, which never met it, with the same one."""
    by_name = {subject.name: subject for subject in subjects}
    found = {}
    for subject in subjects:
        teacher, control = (by_name.get(name or "") for name in (subject.teacher, subject.control))
        if teacher is None:
            found[subject.name] = nothing("it has no teacher that could be asked", *_NAMES)
        else:
            found[subject.name] = _of(subject, teacher, control, here)
    return found


def _of(subject: Subject, teacher: Subject, control: Subject | None, here: Machine) -> Found:
    own = [one.answers for one in subject.members]
    labels = own[0].labels
    taught, alone = (
        None if side is None else _one_each([one.answers.logits for one in side.members], len(own))
        for side in (teacher, control)
    )
    assert taught is not None
    pairs = [(one.logits, t) for one, t in zip(own, taught, strict=True)]
    numbers = {
        "agreement": mean([fidelity.agreement(s, t) for s, t in pairs]),
        "agreement_top5": mean([fidelity.agreement(s, t, k=5) for s, t in pairs]),
        "teacher_kl": mean([fidelity.divergence(s, t) for s, t in pairs]),
    }
    try:
        numbers["retention"] = _ratio([fidelity.retention(s, t, labels) for s, t in pairs])
    except UndefinedError as error:
        numbers["retention"] = Number(None, reason=str(error))
    try:
        imitated = [fidelity.imitation(s, t, labels) for s, t in pairs]
        numbers["error_imitation"] = _ratio(imitated)
        controls: list[np.ndarray | None] = list(alone) if alone else []
        controls += [None] * (len(own) - len(controls))
        numbers["negative_transfer"] = _ratio(
            [
                fidelity.negative_transfer(s, t, labels, c)
                for (s, t), c in zip(pairs, controls, strict=True)
            ]
        )
    except UndefinedError as error:
        for name in ("error_imitation", "negative_transfer"):
            numbers.setdefault(name, Number(None, reason=str(error)))
    if subject.role == "alone":
        reason = "it is itself the student without the teacher"
        numbers["negative_transfer"] = Number(None, reason=reason)
    numbers |= _on_training_views(subject, teacher, here)
    return Found(numbers, {"teacher": teacher.name}, {})


def _on_training_views(subject: Subject, teacher: Subject, here: Machine) -> dict[str, Number]:
    """Agreement and divergence of the first seed on images as they were trained on."""
    student, taught = subject.first, teacher.first
    if student.network is None or taught.network is None:
        reason = "a cache says nothing of other images"
        return {name: Number(None, reason=reason) for name in ("train_agreement", "train_kl")}
    said: list[list[np.ndarray]] = [[], []]
    with torch.no_grad():
        for batch in training_views(student, here, images=VIEWS):
            shown = batch.images if batch.shown is None else batch.shown
            for column, network, images in (
                (said[0], student.network, batch.images),
                (said[1], taught.network, shown),
            ):
                column.append(network(images).logits.float().cpu().numpy())
    pair = [np.concatenate(column) for column in said]
    return {
        "train_agreement": mean([fidelity.agreement(*pair)]),
        "train_kl": mean([fidelity.divergence(*pair)]),
    }


def _one_each(logits: list[np.ndarray], count: int) -> list[np.ndarray]:
    """A teacher or control for each of the runs: their own, or the one that they share."""
    return logits if len(logits) == count else [logits[0]] * count


def _ratio(parts: list[Ratio]) -> Number:
    return ratio([part.above for part in parts], [part.below for part in parts])
