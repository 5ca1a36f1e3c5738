"""Fidelity by its plain formulas, and where it is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchmetrics.functional.regression import kl_divergence

from distill.diagnostics import UndefinedError, fidelity


def case(seed: int) -> tuple[np.ndarray, ...]:
    """Logits of a student, a teacher and a control that have something in common, and labels."""
    draw = np.random.default_rng(seed)
    n, classes = int(draw.integers(20, 200)), int(draw.integers(2, 30))
    labels = draw.integers(classes, size=n)
    common = draw.normal(size=(n, classes)) + 2 * np.eye(classes)[labels]
    scale = 10 ** draw.uniform(-1, 1)
    student, teacher, control = (
        scale * (common + draw.normal(size=(n, classes))) for _ in range(3)
    )
    return student, teacher, control, labels


def test_agreement_is_that_of_sorted_classes() -> None:
    for seed in range(200):
        student, teacher, _, _ = case(seed)
        told = teacher.argmax(axis=1)
        same = student.argmax(axis=1) == told
        assert (fidelity.agreement(student, teacher) == same).all()
        for k in (2, 5, 40):
            first = np.argsort(-student, axis=1)[:, :k]
            expected = (first == told[:, None]).any(axis=1)
            assert (fidelity.agreement(student, teacher, k=k) == expected).all()


def test_of_equal_classes_the_first_come_first() -> None:
    student = np.zeros((4, 4))
    teacher = np.eye(4)
    for k in range(1, 5):
        assert fidelity.agreement(student, teacher, k=k).sum() == k
    tied = np.array([[1.0, 2.0, 2.0]])
    assert fidelity.agreement(tied, tied).all()


def test_divergence_is_that_of_torch_and_torchmetrics() -> None:
    for seed in range(200):
        student, teacher, _, _ = case(seed)
        found = fidelity.divergence(student, teacher)
        log_p, log_q = (torch.from_numpy(z).log_softmax(dim=1) for z in (teacher, student))
        expected = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=1)
        assert found == pytest.approx(expected.numpy(), abs=1e-12)
        reference = kl_divergence(log_p, log_q, log_prob=True)
        assert found.mean() == pytest.approx(float(reference), abs=1e-12)
        assert (found > -1e-15).all()


def test_divergence_of_what_is_known() -> None:
    student, teacher, _, _ = case(0)
    assert (fidelity.divergence(teacher, teacher) == 0).all()
    shifted = fidelity.divergence(student + 3.0, teacher)
    assert shifted == pytest.approx(fidelity.divergence(student, teacher))
    even, sure = np.zeros((1, 8)), 1e4 * np.eye(8)[:1]
    assert fidelity.divergence(even, sure) == pytest.approx([np.log(8)])
    assert fidelity.divergence(sure, even) == pytest.approx([7 / 8 * 1e4 - np.log(8)])


def test_ratios_are_conditional_frequencies() -> None:
    for seed in range(200):
        student, teacher, control, labels = case(seed)
        y_s, y_t, y_c = (z.argmax(axis=1) for z in (student, teacher, control))
        kept = fidelity.retention(student, teacher, labels)
        assert kept.value == pytest.approx((y_s[y_t == labels] == labels[y_t == labels]).mean())
        wrong = y_t != labels
        if not wrong.any():
            continue
        copied = fidelity.imitation(student, teacher, labels)
        assert copied.value == pytest.approx((y_s[wrong] == y_t[wrong]).mean())
        moved = fidelity.negative_transfer(student, teacher, labels, control)
        expected = (y_s[wrong] == y_t[wrong]).mean() - (y_c[wrong] == y_t[wrong]).mean()
        assert moved.value == pytest.approx(expected, abs=1e-12)
        for ratio in (kept, copied, moved):
            assert not ratio.above[~ratio.below].any()


def test_transfer_is_what_the_student_has_beyond_its_control() -> None:
    student, teacher, _, labels = case(1)
    assert fidelity.negative_transfer(student, teacher, labels, student).value == 0
    whole = fidelity.negative_transfer(teacher, teacher, labels, np.eye(student.shape[1])[labels])
    assert whole.value == 1  # the student errs as the teacher does, the control never
    assert fidelity.retention(teacher, teacher, labels).value == 1


def test_without_a_control_or_an_error_there_is_no_transfer() -> None:
    student, teacher, control, labels = case(2)
    with pytest.raises(UndefinedError, match="no student trained without the teacher"):
        fidelity.negative_transfer(student, teacher, labels, None)
    right = np.eye(teacher.shape[1])[labels]
    with pytest.raises(UndefinedError, match="no image wrong"):
        fidelity.imitation(student, right, labels)
    with pytest.raises(UndefinedError, match="no image wrong"):
        fidelity.negative_transfer(student, right, labels, control)
    with pytest.raises(UndefinedError, match="no image right"):
        fidelity.retention(student, -right, labels)
