"""A step is the plain loop that anyone would write."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill import objectives
from distill.engine.step import Distiller, train_step
from distill.objectives import Objective
from distill.objectives._term import Term
from distill.recipe import TermSpec
from distill.teacher import Live
from distill.types import Batch, Outputs

K = 5


class Net(nn.Module):
    """A small network without statistics of the batch."""

    def __init__(self, normalise: bool = True) -> None:
        super().__init__()
        self.body = nn.Linear(3 * 16, 12)
        self.norm = nn.LayerNorm(12) if normalise else nn.BatchNorm1d(12)
        self.head = nn.Linear(12, K)

    def forward(self, images: Tensor) -> Outputs:
        return Outputs(self.head(self.norm(self.body(images.flatten(1))).relu()))


class Projected(Term):
    """A term that learns: the student's logits through a projector, against the teacher's."""

    def __init__(self) -> None:
        super().__init__()
        self.projector = nn.Linear(K, K)

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        assert teacher is not None
        distance: Tensor = self.projector(student.logits) - teacher.logits
        return distance.square().mean(dim=1)


def batches(count: int, size: int = 12) -> list[Batch]:
    draw = torch.Generator().manual_seed(0)
    found = []
    for i in range(count):
        mixed = torch.rand(size, K, generator=draw).square().softmax(dim=1)
        ids = torch.arange(size) + i * size
        images = torch.rand(size, 3, 4, 4, generator=draw)
        found.append(Batch(images, mixed, ids, torch.zeros_like(ids)))
    return found


def objective() -> Objective:
    return objectives.build(
        [TermSpec(term="ce", name=None, weight=0.3), TermSpec(term="kd", name=None, weight=0.7)]
    )


WEIGHTS = {"ce": 0.3, "kd": 0.7}


@pytest.fixture
def parts() -> tuple[Distiller, Live]:
    torch.manual_seed(0)
    return Distiller(Net(), objective()), Live(Net())


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)


def trained(module: nn.Module, teacher: Live | None, steps: int, **how: Any) -> list[float]:
    optimizer = sgd(module)
    how = {"weights": WEIGHTS} | how
    return [
        float(train_step(module, teacher, optimizer, batch, **how).losses.total)
        for batch in batches(steps)
    ]


@pytest.mark.parametrize("clip_norm", [None, 0.05])
def test_it_is_the_plain_loop_bit_for_bit(
    parts: tuple[Distiller, Live], clip_norm: float | None
) -> None:
    distiller, teacher = parts
    plain = copy.deepcopy(distiller.student)
    totals = trained(distiller, teacher, 10, clip_norm=clip_norm)
    optimizer, expected = sgd(plain), []
    for batch in batches(10):
        z = plain(batch.images).logits
        with torch.no_grad():
            told = teacher.network(batch.images).logits
        ce = F.cross_entropy(z, batch.labels, reduction="none").mean()
        log_q, log_p = (x.div(4.0).log_softmax(dim=-1) for x in (z, told))
        kd = ((log_p.exp() * (log_p - log_q)).sum(dim=-1) * 16.0).mean()
        loss = 0.3 * ce + 0.7 * kd
        optimizer.zero_grad()
        loss.backward()
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(plain.parameters(), clip_norm)
        optimizer.step()
        expected.append(float(loss.detach()))
    assert totals == expected
    for one, two in zip(distiller.student.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, two)


def test_what_it_returns_holds_no_graph(parts: tuple[Distiller, Live]) -> None:
    distiller, teacher = parts
    (batch,) = batches(1)
    step = train_step(distiller, teacher, sgd(distiller), batch, weights=WEIGHTS)
    assert set(step.losses.parts) == {"ce", "kd"}
    total = 0.3 * step.losses.parts["ce"] + 0.7 * step.losses.parts["kd"]
    torch.testing.assert_close(step.losses.total, total)
    assert step.told is not None
    for tensor in (*step.losses.parts.values(), step.losses.total, step.losses.logits):
        assert not tensor.requires_grad
    assert all(parameter.grad is None for parameter in distiller.parameters())


def test_labels_alone_need_no_teacher() -> None:
    torch.manual_seed(0)
    labels = objectives.build([TermSpec(term="ce", name=None, weight=1.0)])
    distiller = Distiller(Net(), labels)
    (batch,) = batches(1)
    step = train_step(distiller, None, sgd(distiller), batch, weights={"ce": 1.0})
    assert step.told is None
    assert torch.equal(step.losses.total, step.losses.parts["ce"])


def test_clipping_takes_student_and_objective_together() -> None:
    torch.manual_seed(0)
    limit, rate = 0.01, 0.5
    distiller = Distiller(Net(), Objective({"projected": Projected()}, {"projected": 1.0}))
    before = [p.detach().clone() for p in distiller.parameters()]
    plain = copy.deepcopy(distiller)
    teacher, (batch,) = Live(Net()), batches(1)
    plain(batch, teacher(batch), {"projected": 1.0}).total.backward()
    gradients = [p.grad for p in plain.parameters() if p.grad is not None]
    assert len(gradients) == len(before)
    norm = torch.stack([g.norm() for g in gradients]).norm()
    assert norm > limit
    optimizer = torch.optim.SGD(distiller.parameters(), lr=rate)
    train_step(distiller, teacher, optimizer, batch, weights={"projected": 1.0}, clip_norm=limit)
    for old, new, gradient in zip(before, distiller.parameters(), gradients, strict=True):
        torch.testing.assert_close(new, old - rate * limit / norm * gradient)
    moves = [(a - b).flatten() for a, b in zip(distiller.parameters(), before, strict=True)]
    assert float(torch.cat(moves).norm().detach()) == pytest.approx(rate * limit, rel=1e-3)


@pytest.mark.parametrize("pieces", [2, 3, 12])
def test_micro_batches_are_one_batch(parts: tuple[Distiller, Live], pieces: int) -> None:
    distiller, teacher = parts
    cut = copy.deepcopy(distiller)
    trained(distiller, teacher, 8)
    trained(cut, teacher, 8, micro_batches=pieces)
    for one, two in zip(distiller.parameters(), cut.parameters(), strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=0)


def test_weights_scale_terms_as_they_are_given(parts: tuple[Distiller, Live]) -> None:
    distiller, teacher = parts
    (batch,) = batches(1)
    told = teacher(batch)
    for weights in ({"ce": 1.0, "kd": 0.0}, {"ce": 0.0, "kd": 2.5}):
        losses = distiller(batch, told, weights)
        expected = sum(weights[name] * part for name, part in losses.parts.items())
        torch.testing.assert_close(losses.total, expected)


def test_a_scaler_leaves_the_step_the_same(parts: tuple[Distiller, Live]) -> None:
    """Scaling by a power of two and back changes no bit, and clipping sees the true norm."""
    distiller, teacher = parts
    scaled = copy.deepcopy(distiller)
    trained(distiller, teacher, 5, clip_norm=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    trained(scaled, teacher, 5, clip_norm=0.05, scaler=scaler)
    for one, two in zip(distiller.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(one, two, atol=1e-7, rtol=0)


def test_autocast_covers_both_forward_passes(parts: tuple[Distiller, Live]) -> None:
    distiller, teacher = parts
    (batch,) = batches(1)
    step = train_step(
        distiller,
        teacher,
        sgd(distiller),
        batch,
        weights=WEIGHTS,
        autocast=torch.autocast("cpu", dtype=torch.bfloat16),
    )
    assert step.told is not None
    assert step.told.logits.dtype is torch.bfloat16
    assert step.losses.logits.dtype is torch.bfloat16
    assert step.losses.total.dtype is torch.float32
    assert all(parameter.dtype is torch.float32 for parameter in distiller.parameters())
