"""How far a student says what its teacher says, and whether it took over its errors.

Stanton, Izmailov, Kirichenko, Alemi, Wilson: Does Knowledge Distillation Really Work?, 2021,
arXiv:2106.05945.

What two networks agree on they may owe to the data: networks that never met agree on most images.
Only what a student has beyond a control, trained as it was but without the teacher, is transfer.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from distill.diagnostics import UndefinedError
from distill.diagnostics.calibration import log_probabilities


class Ratio(NamedTuple):
    """A mean over some of the images; both parts can be resampled together."""

    above: Int[np.ndarray, " N"]  # what is counted; 0 at images that are not asked about
    below: Bool[np.ndarray, " N"]  # whether an image is asked about

    @property
    def value(self) -> float:
        """Σ above / Σ below."""
        return float(self.above.sum() / self.below.sum())


def agreement(
    student: Float[np.ndarray, "N K"], teacher: Float[np.ndarray, "N K"], *, k: int = 1
) -> Bool[np.ndarray, " N"]:
    """Whether the teacher's most probable class is among the student's k most probable ones.

    Of equally probable classes the first ones come first, as argmax has it: for k = 1 it is
    whether both predict the same.

    Args:
        student: Logits.
        teacher: Logits over the same classes.
        k: At least 1; from the number of classes on it is always true.
    """
    told = teacher.argmax(axis=1)[:, None]
    own = np.take_along_axis(student, told, axis=1)
    earlier = np.arange(student.shape[1]) < told
    ahead: np.ndarray = ((student > own) | ((student == own) & earlier)).sum(axis=1)
    return ahead < k


def divergence(
    student: Float[np.ndarray, "N K"], teacher: Float[np.ndarray, "N K"]
) -> Float[np.ndarray, " N"]:
    """KL divergence of each image, Σ_k p_k (log p_k − log q_k) at temperature 1, in nats.

    Args:
        student: Logits, of which q is the softmax.
        teacher: Logits over the same classes, of which p is the softmax.
    """
    log_p, log_q = log_probabilities(teacher), log_probabilities(student)
    kl: np.ndarray = (np.exp(log_p) * (log_p - log_q)).sum(axis=1)
    return kl


def retention(
    student: Float[np.ndarray, "N K"],
    teacher: Float[np.ndarray, "N K"],
    labels: Int[np.ndarray, " N"],
) -> Ratio:
    """Of what the teacher gets right, what the student gets right: P(ŷ_s = y | ŷ_t = y).

    Raises:
        UndefinedError: If the teacher gets nothing right.
    """
    known = teacher.argmax(axis=1) == labels
    if not known.any():
        raise UndefinedError("its teacher gets no image right")
    return Ratio((agreement(student, teacher) & known).astype(np.int64), known)


def imitation(
    student: Float[np.ndarray, "N K"],
    teacher: Float[np.ndarray, "N K"],
    labels: Int[np.ndarray, " N"],
) -> Ratio:
    """Of the teacher's errors, those that the student makes alike: P(ŷ_s = ŷ_t | ŷ_t ≠ y).

    Raises:
        UndefinedError: If the teacher makes no error.
    """
    erred = teacher.argmax(axis=1) != labels
    if not erred.any():
        raise UndefinedError("its teacher gets no image wrong")
    return Ratio((agreement(student, teacher) & erred).astype(np.int64), erred)


def negative_transfer(
    student: Float[np.ndarray, "N K"],
    teacher: Float[np.ndarray, "N K"],
    labels: Int[np.ndarray, " N"],
    control: Float[np.ndarray, "N K"] | None,
) -> Ratio:
    """Errors that came from the teacher: `imitation` of the student less that of a control.

    The share of the teacher's errors that the student makes alike, and that its like, trained
    without the teacher, would not. Per image it is 1, 0 or −1.
    Mason-Williams, Mason-Williams, Yannakoudakis: Rethinking Knowledge Distillation: A Data
    Dependent Regulariser With a Negative Asymmetric Payoff, 2025, arXiv:2510.12615.

    Args:
        student: Logits.
        teacher: Logits.
        labels: Of each image.
        control: Logits of the same network trained without the teacher.

    Raises:
        UndefinedError: If there is no control, or the teacher makes no error.
    """
    if control is None:
        raise UndefinedError("there is no student trained without the teacher to compare it with")
    mine, its = (imitation(one, teacher, labels) for one in (student, control))
    return Ratio(mine.above - its.above, mine.below)
