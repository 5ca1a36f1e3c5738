"""Contrast with a memory: what it keeps, what it is compared with, and that it is learned from."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.errors import IncompatibleError
from distill.objectives._draws import uniform_of
from distill.objectives.crd import CRD
from distill.types import Anatomy, Batch, Outputs, Pair

OWN, OTHER = 6, 9  # channels of `pooled`
SAMPLES = torch.arange(40) * 3 + 5  # ids have gaps where a fraction of the data is trained on


@pytest.fixture(autouse=True)
def _same_numbers() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def build(*, negatives: int = 64, temperature: float = 0.07) -> CRD:
    term = CRD(dim=8, negatives=negatives, temperature=temperature)
    student, teacher = (
        Anatomy(name, width, False, {}, (), (), ()) for name, width in (("s", OWN), ("t", OTHER))
    )
    term.connect(Pair(student, teacher, 3, SAMPLES))
    return term


def batch(rows: list[int]) -> Batch:
    ids = SAMPLES[rows]
    return Batch(torch.rand(len(rows), 3, 2, 2), torch.rand(len(rows), 3), ids, 0 * ids)


def outputs(width: int, size: int) -> Outputs:
    return Outputs(torch.zeros(size, 3), {"pooled": torch.randn(size, width)})


def units(term: CRD, student: Outputs, teacher: Outputs) -> list[Tensor]:
    sides = (student.read("pooled"), teacher.read("pooled"))
    with torch.no_grad():
        return [F.normalize(head(x), dim=1) for head, x in zip(term.heads, sides, strict=True)]


def plain(term: CRD, student: Outputs, teacher: Outputs, rows: list[int]) -> list[float]:
    """The paper's loss, one sample and one other at a time; its own image is no other."""
    memory, count = term.memory.double(), len(SAMPLES)
    drawn = (uniform_of(term.step, term.negatives, salt=3) * count).long().tolist()
    total = [0.0] * len(rows)
    for side, vectors in enumerate(units(term, student, teacher)):
        kept = memory[1 - side]

        def score(u: Tensor, place: int, kept: Tensor = kept) -> float:
            return math.exp(float(u.double() @ kept[place]) / term.temperature)

        z = sum(score(u, n) for u in vectors for n in drawn) / len(drawn) / len(rows) * count
        noise = len(drawn) / count
        for i, (u, row) in enumerate(zip(vectors, rows, strict=True)):
            own = score(u, row) / z
            total[i] -= math.log(own / (own + noise))
            for n in drawn:
                if n != row:
                    other = score(u, n) / z
                    total[i] -= math.log(1 - other / (other + noise))
    return total


def test_the_first_step_is_the_papers() -> None:
    rows = [3, 0, 39, 17, 20]
    term, student, teacher = build(), outputs(OWN, 5), outputs(OTHER, 5)
    expected = plain(term, student, teacher, rows)
    found = term(student, teacher, batch(rows))
    torch.testing.assert_close(found.double(), torch.tensor(expected).double(), rtol=1e-4, atol=0)


def test_the_own_image_is_no_negative() -> None:
    """However many are drawn, and however alike the own image is."""
    for seed in range(5):
        term, student, teacher = build(negatives=200), outputs(OWN, 1), outputs(OTHER, 1)
        term.eval()
        term.step.fill_(seed)
        drawn = (uniform_of(term.step, 200, salt=3) * len(SAMPLES)).long()
        assert (drawn == 4).any()
        before = term(student, teacher, batch([4])).item()
        for side, u in enumerate(units(term, student, teacher)):
            score = (u[0] @ term.memory[1 - side, 4]) / term.temperature
            shift = math.log(200 / len(SAMPLES))
            before += float(F.softplus(shift + score) - F.softplus(shift - score))
            term.memory[1 - side, 4] *= -1  # which only the first of the two parts may notice
        assert term(student, teacher, batch([4])).item() == pytest.approx(before, rel=1e-4)


def test_rows_of_the_batch_are_remembered_and_no_others() -> None:
    rows = [3, 0, 39, 17, 20]
    term, student, teacher = build(), outputs(OWN, 5), outputs(OTHER, 5)
    before = term.memory.clone()
    torch.testing.assert_close(before.norm(dim=2), torch.ones(2, len(SAMPLES)))
    term(student, teacher, batch(rows))
    for side, unit in enumerate(units(term, student, teacher)):
        mixed = F.normalize(0.5 * before[side, rows] + 0.5 * unit, dim=1)
        torch.testing.assert_close(term.memory[side, rows], mixed)
    rest = [i for i in range(len(SAMPLES)) if i not in rows]
    assert torch.equal(term.memory[:, rest], before[:, rest])
    assert not term.memory.requires_grad


def test_the_constant_is_that_of_the_first_batch_and_evaluation_changes_nothing() -> None:
    term = build()
    term.eval()
    sides = outputs(OWN, 5), outputs(OTHER, 5)
    fresh = copy.deepcopy(term.state_dict())
    term(*sides, batch([0, 1, 2, 3, 4]))
    assert all(torch.equal(fresh[key], value) for key, value in term.state_dict().items())
    term.train()
    term(*sides, batch([0, 1, 2, 3, 4]))
    constants = term.constants.clone()
    assert (constants != 0).all()
    term(outputs(OWN, 2), outputs(OTHER, 2), batch([7, 8]))
    assert torch.equal(term.constants, constants)


def test_memory_and_constants_go_into_a_checkpoint() -> None:
    term = build()
    term(outputs(OWN, 5), outputs(OTHER, 5), batch([0, 1, 2, 3, 4]))
    again = build()
    again.load_state_dict(term.state_dict())
    told = outputs(OWN, 3), outputs(OTHER, 3), batch([2, 3, 9])
    assert torch.equal(term(*told), again(*told))
    assert {"memory", "constants"} < term.state_dict().keys()


def test_every_step_draws_others() -> None:
    term = build()
    steps = []
    for progress in (0.1, 0.2, 0.2):
        term.set_progress(progress)
        steps.append(uniform_of(term.step, 64, salt=3))
    assert not torch.equal(steps[0], steps[1])
    assert torch.equal(steps[1], steps[2])
    many = uniform_of(term.step, 40_000, salt=3)
    counts = torch.bincount((many * len(SAMPLES)).long(), minlength=len(SAMPLES))
    assert ((counts - 1000).abs() < 150).all()


def test_epochs_on_a_toy_lower_the_loss_and_tell_the_images_apart() -> None:
    term, layer = build(negatives=256), nn.Linear(OWN, OWN)
    inputs = torch.randn(len(SAMPLES), OWN)
    told = inputs @ torch.randn(OWN, OTHER)
    optimizer = torch.optim.Adam([*layer.parameters(), *term.parameters()], lr=0.02)
    epochs = []
    for epoch in range(40):
        losses = []
        for start in range(0, len(SAMPLES), 10):
            rows = list(range(start, start + 10))
            term.set_progress((epoch + start / len(SAMPLES)) / 40)
            own = Outputs(torch.zeros(10, 3), {"pooled": layer(inputs[rows])})
            other = Outputs(torch.zeros(10, 3), {"pooled": told[rows]})
            loss = term(own, other, batch(rows)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        epochs.append(sum(losses) / len(losses))
    assert epochs[1] < epochs[0]
    assert epochs[-1] < 0.5 * epochs[0]
    u = F.normalize(term.heads[0](layer(inputs)), dim=1)
    v = F.normalize(term.heads[1](told), dim=1)
    found = (u @ v.T).argmax(dim=1)
    assert (found == torch.arange(len(SAMPLES))).float().mean() > 0.9


@pytest.mark.parametrize("widths", [(0, 9), (6, 0)])
def test_networks_without_a_classifier_are_refused(widths: tuple[int, int]) -> None:
    sides = [Anatomy(f"w{width}", width, False, {}, (), (), ()) for width in widths]
    with pytest.raises(IncompatibleError, match="w0 has no classifier"):
        CRD().connect(Pair(*sides, 3, SAMPLES))
