"""Each loss against a plain transcription of its formula, in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distill.objectives.ce import ce_loss
from distill.objectives.hard import hard_loss
from distill.objectives.kd import kd_loss
from distill.objectives.similarity import similarity_loss

temperatures = st.floats(0.5, 20)
seeds = st.integers(0, 2**32 - 1)


def draw(seed: int, size: int = 5, classes: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """Student's logits, teacher's logits, and labels that are mixed."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(size, classes, generator=generator) for _ in range(2))
    return student, teacher, torch.rand(size, classes, generator=generator).softmax(dim=-1)


def softmax(logits: list[float]) -> list[float]:
    powers = [math.exp(z) for z in logits]
    return [power / sum(powers) for power in powers]


@settings(deadline=None, max_examples=50)
@given(seeds, st.floats(0, 1))
def test_ce(seed: int, smoothing: float) -> None:
    student, _, labels = draw(seed)
    plain = []
    for z, y in zip(student.double().tolist(), labels.double().tolist(), strict=True):
        q = softmax(z)
        smooth = [(1 - smoothing) * p + smoothing / len(y) for p in y]
        plain.append(-sum(p * math.log(r) for p, r in zip(smooth, q, strict=True)))
    found = ce_loss(student, labels, smoothing=smoothing)
    np.testing.assert_allclose(found.numpy(), plain, rtol=1e-5, atol=1e-6)


def test_ce_of_hard_labels_is_pytorchs() -> None:
    student, teacher, _ = draw(1)
    classes = teacher.argmax(dim=-1)
    for smoothing in (0.0, 0.1):
        torch.testing.assert_close(
            ce_loss(student, torch.eye(7)[classes], smoothing=smoothing),
            torch.nn.functional.cross_entropy(
                student, classes, label_smoothing=smoothing, reduction="none"
            ),
        )


@settings(deadline=None, max_examples=50)
@given(seeds, temperatures)
def test_kd(seed: int, temperature: float) -> None:
    student, teacher, _ = draw(seed)
    plain = []
    for z, t in zip(student.double().tolist(), teacher.double().tolist(), strict=True):
        q = softmax([a / temperature for a in z])
        p = softmax([a / temperature for a in t])
        divergence = sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))
        plain.append(temperature**2 * divergence)
    found = kd_loss(student, teacher, temperature=temperature)
    lost = 4e-7 * temperature**2  # float32 holds a logarithm to 1e-7, and T² multiplies that
    np.testing.assert_allclose(found.numpy(), plain, rtol=1e-4, atol=max(lost, 1e-5))


@settings(deadline=None, max_examples=50)
@given(seeds)
def test_hard(seed: int) -> None:
    student, teacher, _ = draw(seed)
    plain = [
        -math.log(softmax(z)[max(range(len(t)), key=t.__getitem__)])
        for z, t in zip(student.double().tolist(), teacher.tolist(), strict=True)
    ]
    np.testing.assert_allclose(hard_loss(student, teacher).numpy(), plain, rtol=1e-5, atol=1e-6)


@settings(deadline=None, max_examples=50)
@given(seeds)
def test_similarity(seed: int) -> None:
    student, teacher, _ = draw(seed)
    wide = torch.cat([teacher, teacher.square()], dim=1)  # the two need not be of one width

    def alike(features: list[list[float]]) -> list[list[float]]:
        rows = [[sum(map(math.prod, zip(a, b, strict=True))) for b in features] for a in features]
        return [[value / math.sqrt(sum(v * v for v in row)) for value in row] for row in rows]

    own, other = alike(student.double().tolist()), alike(wide.double().tolist())
    plain = [
        sum((a - b) ** 2 for a, b in zip(row, target, strict=True)) / len(own)
        for row, target in zip(own, other, strict=True)
    ]
    np.testing.assert_allclose(similarity_loss(student, wide), plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
def test_the_gradient_of_kd_is_t_times_the_difference_of_probabilities(temperature: float) -> None:
    student, teacher, _ = draw(3, size=6)
    student.requires_grad_()
    kd_loss(student, teacher, temperature=temperature).mean().backward()
    q, p = ((z.detach().double() / temperature).softmax(dim=-1) for z in (student, teacher))
    expected = temperature * (q - p) / len(student)
    assert student.grad is not None
    assert (student.grad.double() - expected).abs().max() < 1e-6


def test_t_squared_keeps_the_gradient_of_small_logits_the_same_at_every_temperature() -> None:
    student, teacher, _ = draw(4)
    student, teacher = 0.01 * student, 0.01 * teacher
    norms = []
    for temperature in (1.0, 2.0, 4.0, 8.0, 16.0):
        z = student.clone().requires_grad_()
        kd_loss(z, teacher, temperature=temperature).mean().backward()
        assert z.grad is not None
        norms.append(float(z.grad.norm()))
    assert max(norms) < 1.02 * min(norms)


def test_kd_is_zero_at_agreement_and_positive_elsewhere() -> None:
    student, teacher, _ = draw(5)
    assert kd_loss(teacher, teacher, temperature=3.0).abs().max() < 1e-6
    assert (kd_loss(student, teacher, temperature=3.0) > 0).all()
