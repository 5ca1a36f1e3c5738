"""A teacher tells, and is not changed by telling."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill import models, recipe
from distill.engine import session
from distill.engine.machine import Machine
from distill.engine.session import Session
from distill.engine.train import train
from distill.models.network import Network
from distill.models.weights import fingerprint, to_bytes
from distill.recipe import Recipe
from distill.teacher import Ensemble, Live, Teacher
from distill.types import Batch, Outputs

CLASSES = tuple("0123456789")


class Fixed(nn.Module):
    """The same logits for every batch."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, images: Tensor) -> Outputs:
        return Outputs(self.logits)


def batch(count: int = 8, classes: int = 10) -> Batch:
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (count,), generator=draw)
    return Batch(
        images=torch.rand(count, 3, 8, 8, generator=draw),
        labels=nn.functional.one_hot(labels, classes).float(),
        ids=torch.arange(count),
        views=torch.zeros(count, dtype=torch.long),
    )


def cnn() -> Network:
    """A network with BatchNorm, in train mode as it is built."""
    data: dict[str, Any] = {
        "classes": CLASSES,
        "image_size": 8,
        "mean": (0.3,) * 3,
        "std": (0.4,) * 3,
    }
    return models.build_student(recipe.Model(model="resnet8", weights=None), **data).train()


def test_a_live_teacher_is_frozen_and_keeps_its_statistics() -> None:
    network = cnn()
    before = fingerprint(network)
    teacher = Live(network)
    told = teacher(batch())
    assert fingerprint(network) == before
    assert not network.training
    assert not told.logits.requires_grad
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert not told.logits.is_inference()  # or the student's backward pass could not save it


@pytest.mark.parametrize("members", [1, 2])
def test_a_training_run_leaves_its_teachers_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, members: int
) -> None:
    files, given = [], []
    for i in range(members):
        torch.manual_seed(i)
        files.append(tmp_path / f"teacher-{i}.safetensors")
        given.append(cnn())
        files[-1].write_bytes(to_bytes(given[-1]))
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"""
        data: {{name: digits, fraction: 0.1, augment: [crop], mixup: 0.5}}
        teachers: [{", ".join(f"{{weights: {file}}}" for file in files)}]
        student: {{model: resnet8}}
        objective: [{{term: ce}}, {{term: kd}}]
        optimizer: {{name: sgd, lr: 0.05, weight_decay: 1e-2}}
        train: {{epochs: 2, batch_size: 30, ema: 0.9}}
        """
    )
    taken: list[Session] = []
    before: list[dict[str, torch.Tensor]] = []
    prepare = session.prepare

    def kept(recipe: Recipe, path: Path, here: Machine) -> Session:
        taken.append(prepare(recipe, path, here))
        for tutor in taken[-1].tutors:
            assert tutor.network is not None
            before.append({n: x.clone() for n, x in tutor.network.state_dict().items()})
        return taken[-1]

    monkeypatch.setattr("distill.engine.train.prepare", kept)
    result = train(Recipe.load(path), tmp_path / "run")
    networks = [tutor.network for tutor in taken[0].tutors]
    assert [fingerprint(network) for network in given] == result.identity["teachers"]
    for network, tensors in zip(networks, before, strict=True):
        after = network.state_dict()
        assert after.keys() == tensors.keys()
        assert all(torch.equal(after[name], tensors[name]) for name in tensors)
    assert len(set(result.identity["teachers"])) == members
    assert all(p.grad is None for network in networks for p in network.parameters())
    learned = {id(p) for group in taken[0].optimizer.param_groups for p in group["params"]}
    assert not learned & {id(p) for network in networks for p in network.parameters()}


def test_no_gradient_reaches_a_teacher() -> None:
    first, second = Fixed(torch.randn(8, 10)), Fixed(torch.randn(8, 10))
    told = Ensemble([Live(first), Live(second)], [1.0, 2.0])(batch())
    student = torch.randn(8, 10, requires_grad=True)
    torch.autograd.backward((student * told.logits).sum())
    assert student.grad is not None
    assert first.logits.grad is None
    assert second.logits.grad is None


def fixed(count: int, seed: int = 0) -> list[Teacher]:
    draw = torch.Generator().manual_seed(seed)
    return [Live(Fixed(3 * torch.randn(8, 10, generator=draw))) for _ in range(count)]


def test_an_ensemble_of_one_is_that_one() -> None:
    (alone,) = fixed(1)
    expected = alone(batch()).logits.softmax(dim=1)
    torch.testing.assert_close(Ensemble([alone], [0.3])(batch()).logits.softmax(dim=1), expected)


def test_an_ensemble_is_the_weighted_mean_of_probabilities() -> None:
    members, weights = fixed(3), [1.0, 2.0, 5.0]
    told = Ensemble(members, weights)(batch()).logits
    shares = [0.125, 0.25, 0.625]
    expected = sum(
        share * member(batch()).logits.double().softmax(dim=1)
        for share, member in zip(shares, members, strict=True)
    )
    assert isinstance(expected, Tensor)
    torch.testing.assert_close(told.double().exp(), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("factor", [1e-3, 7.0])
def test_only_the_ratio_of_weights_counts(factor: float) -> None:
    members = fixed(2)
    one, other = ([w * f for w in (1.0, 3.0)] for f in (1.0, factor))
    told = [Ensemble(members, weights)(batch()).logits for weights in (one, other)]
    torch.testing.assert_close(*told)


@pytest.mark.parametrize("seed", range(20))
def test_an_ensemble_is_no_worse_than_its_members_on_average(seed: int) -> None:
    """Jensen: −log of a mean is at most the mean of the −logs."""
    members, labels = fixed(3, seed), batch().labels.argmax(dim=1)

    def nll(teacher: Callable[[Batch], Outputs]) -> float:
        return float(nn.functional.cross_entropy(teacher(batch()).logits.double(), labels))

    together = nll(Ensemble(members, [1.0, 1.0, 1.0]))
    assert together <= math.fsum(map(nll, members)) / 3 + 1e-6
