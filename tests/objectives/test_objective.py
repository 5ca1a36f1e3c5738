from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from distill.errors import RecipeError
from distill.objectives import build
from distill.objectives.ce import ce_loss
from distill.objectives.kd import kd_loss
from distill.recipe import TermSpec
from distill.types import Batch, Outputs

CE = {"term": "ce", "weight": 0.25}
KD = {"term": "kd", "weight": {"start": 1.0, "end": 0.5}, "temperature": 2.0}


def specs(*data: dict[str, object]) -> list[TermSpec]:
    return [TermSpec.model_validate(spec) for spec in data]


@pytest.fixture
def batch() -> Batch:
    ids = torch.arange(6)
    labels = torch.eye(4)[ids % 4]
    return Batch(torch.rand(6, 3, 2, 2), labels, ids, torch.zeros_like(ids))


@pytest.fixture
def outputs() -> tuple[Outputs, Outputs]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(6, 4, generator=generator) for _ in range(2))
    return Outputs(student), Outputs(teacher)


def test_the_total_is_the_weighted_sum_of_the_means(
    batch: Batch, outputs: tuple[Outputs, Outputs]
) -> None:
    student, teacher = outputs
    objective = build(specs(CE, KD))
    losses = objective(student, teacher, batch, objective.weights_at(0.5))
    ce = ce_loss(student.logits, batch.labels, smoothing=0.0).mean()
    kd = kd_loss(student.logits, teacher.logits, temperature=2.0).mean()
    torch.testing.assert_close(losses.total, 0.25 * ce + 0.75 * kd)
    assert list(losses.parts) == ["ce", "kd"]
    torch.testing.assert_close(losses.parts["kd"], kd)  # parts are not weighted
    assert not losses.logits.requires_grad


def test_weights_follow_their_schedules() -> None:
    objective = build(specs(CE, KD))
    assert objective.weights_at(0.0) == {"ce": 0.25, "kd": 1.0}
    assert objective.weights_at(1.0) == {"ce": 0.25, "kd": 0.5}


def test_one_loss_may_stand_twice_under_two_names(
    batch: Batch, outputs: tuple[Outputs, Outputs]
) -> None:
    objective = build(specs(KD, {**KD, "name": "soft", "temperature": 8.0}))
    losses = objective(*outputs, batch, objective.weights_at(0.0))
    assert list(losses.parts) == ["kd", "soft"]
    assert losses.parts["kd"] != losses.parts["soft"]


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(RecipeError, match="kd: temperature: should be greater than 0"):
        build(specs({"term": "kd", "temperature": 0}))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_gradient_ratio_against_its_closed_form(
    batch: Batch, outputs: tuple[Outputs, Outputs], temperature: float
) -> None:
    student, teacher = outputs
    objective = build(specs(CE, {**KD, "temperature": temperature}))
    weights = {"ce": 0.25, "kd": 0.8}
    z, t, y = (x.double() for x in (student.logits, teacher.logits, batch.labels))
    ce: Tensor = 0.25 * (z.softmax(-1) - y) / 6
    kd = 0.8 * temperature * ((z / temperature).softmax(-1) - (t / temperature).softmax(-1)) / 6
    found = objective.gradient_ratio(student.logits, teacher, batch, weights)
    assert found is not None
    assert float(found) == pytest.approx(float(kd.norm() / ce.norm()), rel=1e-5)


def test_the_gradient_ratio_leaves_no_trace(batch: Batch, outputs: tuple[Outputs, Outputs]) -> None:
    student, teacher = outputs
    student.logits.requires_grad_()
    objective = build(specs(CE, KD))
    with torch.no_grad():
        objective.gradient_ratio(student.logits, teacher, batch, objective.weights_at(0.0))
    assert student.logits.grad is None


@pytest.mark.parametrize("alone", [CE, KD])
def test_there_is_no_gradient_ratio_of_one_side(
    batch: Batch, outputs: tuple[Outputs, Outputs], alone: dict[str, object]
) -> None:
    objective = build(specs(alone))
    weights = objective.weights_at(0.0)
    assert objective.gradient_ratio(outputs[0].logits, outputs[1], batch, weights) is None


def test_no_gradient_ratio_where_the_labels_have_no_weight(
    batch: Batch, outputs: tuple[Outputs, Outputs]
) -> None:
    objective = build(specs({**CE, "weight": 0.0}, KD))
    weights = {"ce": 0.0, "kd": 1.0}
    assert objective.gradient_ratio(outputs[0].logits, outputs[1], batch, weights) is None


def test_terms_are_modules_of_the_objective() -> None:
    assert isinstance(build(specs(CE)), nn.Module)
    assert list(build(specs(CE, KD)).terms) == ["ce", "kd"]
