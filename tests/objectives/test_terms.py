"""What every term keeps, found by being there: a new file in `distill/objectives` is tested."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from distill import component
from distill.objectives._term import Term
from distill.types import Batch, Outputs

TERMS = sorted(component.find("objectives"))
CLASSES = (2, 3, 10)
LABELS = ("one-hot", "mixed")


@pytest.fixture(autouse=True)
def _same_numbers() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def build(name: str, **arguments: Any) -> Term:
    term = component.build("objectives", name, arguments)
    assert isinstance(term, Term)
    return term


def batch(size: int, classes: int, labels: str = "one-hot") -> Batch:
    y = torch.eye(classes)[torch.arange(size) % classes]
    if labels == "mixed":
        y = 0.7 * y + 0.3 * y.roll(1, 0)
    ids = torch.arange(size)
    return Batch(torch.rand(size, 3, 4, 4), y, ids, torch.zeros_like(ids))


def logits(size: int, classes: int, scale: float = 3.0) -> Tensor:
    return torch.randn(size, classes) * scale


def outputs(term: Term, z: Tensor) -> Outputs:
    """The values as logits, and as every feature that the term reads."""
    return Outputs(z, dict.fromkeys(term.features, z) or None)


def loss(term: Term, student: Tensor, teacher: Tensor, data: Batch) -> Tensor:
    return term(outputs(term, student), outputs(term, teacher), data)


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("name", TERMS)
def test_value_and_gradient_are_finite_however_large_the_logits(
    name: str, classes: int, labels: str
) -> None:
    term, data = build(name), batch(6, classes, labels)
    signs = torch.where(torch.rand(6, classes) < 0.5, -1.0, 1.0)
    constant = torch.zeros(6, classes)
    cases = [logits(6, classes), 1e4 * signs, -1e4 * signs, constant, constant + 1e4]
    for student in cases:
        for teacher in cases:
            z = student.clone().requires_grad_()
            value = loss(term, z, teacher, data)
            assert value.shape in ((6,), ())
            assert value.dtype == torch.float32
            value.mean().backward()
            assert value.isfinite().all()
            assert z.grad is not None
            assert z.grad.isfinite().all()


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("name", TERMS)
def test_the_student_gets_a_gradient_and_the_teacher_none(name: str, classes: int) -> None:
    term, data = build(name), batch(8, classes, "mixed")
    student = logits(8, classes).requires_grad_()
    teacher = logits(8, classes).requires_grad_()
    loss(term, student, teacher, data).sum().backward()
    assert student.grad is not None
    assert student.grad.abs().max() > 0
    assert teacher.grad is None or not teacher.grad.any()


@pytest.mark.parametrize("name", TERMS)
def test_a_term_that_needs_no_teacher_works_without_one(name: str) -> None:
    term, data = build(name), batch(4, 3)
    student = Outputs(logits(4, 3))
    if term.needs_teacher:
        with pytest.raises(AssertionError):
            term(student, None, data)
    else:
        assert torch.equal(term(student, None, data), term(student, Outputs(logits(4, 3)), data))


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("name", TERMS)
def test_the_order_of_the_batch_does_not_matter(name: str, labels: str) -> None:
    term, data = build(name).double(), batch(12, 5, labels)
    student, teacher = logits(12, 5).double(), logits(12, 5).double()
    order = torch.randperm(12)
    moved = data.rows(order)
    value = loss(term, student, teacher, data)
    again = loss(term, student[order], teacher[order], moved)
    torch.testing.assert_close(again, value[order] if value.ndim else value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("name", TERMS)
def test_agreement_is_a_minimum(name: str, classes: int) -> None:
    """At the teacher's own logits no small step is better, for terms that compare the two."""
    term, data = build(name), batch(8, classes)
    # Sure of the label, so that a term that also reads labels, or only the first class, agrees.
    teacher = 30 * data.labels
    best = loss(term, teacher, teacher, data).mean()
    for _ in range(20):
        other = loss(term, teacher + logits(8, classes, 5.0), teacher, data).mean()
        assert other >= best - 1e-5
    assert best.abs() < 1e-4


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("name", TERMS)
def test_bf16_logits_give_the_value_of_their_float32_copies(name: str, labels: str) -> None:
    term, data = build(name), batch(8, 10, labels)
    student, teacher = logits(8, 10).bfloat16(), logits(8, 10).bfloat16()
    found = loss(term, student, teacher, data)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, loss(term, student.float(), teacher.float(), data))


@pytest.mark.parametrize("name", TERMS)
def test_compiled_without_a_break_it_is_the_same(name: str) -> None:
    term, data = build(name), batch(8, 10, "mixed")
    compiled = torch.compile(term, fullgraph=True, backend="aot_eager")
    values, gradients = [], []
    student, teacher = logits(8, 10), logits(8, 10)
    for forward in (term, compiled):
        z = student.clone().requires_grad_()
        value = forward(outputs(term, z), outputs(term, teacher), data)
        value.sum().backward()
        values.append(value.detach())
        gradients.append(z.grad)
    torch.testing.assert_close(values[0], values[1], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-7)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", TERMS)
def test_one_image_is_enough(name: str) -> None:
    value = loss(build(name), logits(1, 4), logits(1, 4), batch(1, 4))
    assert value.isfinite().all()
