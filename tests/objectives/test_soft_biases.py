"""Losses that make a student prefer what a convolution is built to do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distill import models
from distill.data import datasets
from distill.data.loader import Loader
from distill.engine.step import Distiller
from distill.engine.train import train
from distill.models import weights
from distill.models.network import Network
from distill.objectives import Objective
from distill.objectives._draws import uniform
from distill.objectives._term import Term
from distill.objectives.ce import CE
from distill.objectives.shift_consistency import ShiftConsistency, moved, shift_consistency_loss
from distill.objectives.subset import Subset
from distill.recipe import Model, Recipe
from distill.types import Batch

RECIPE = """
data: {{name: digits, fraction: 0.3}}
student: {{model: vit, patch_size: 2, width: 32, depth: 3, heads: 2, mlp_ratio: 2}}
objective: [{{term: ce}}, {{term: {term}, weight: {weight}}}]
optimizer: {{lr: 2e-3, warmup_epochs: 1}}
train: {{epochs: 6, batch_size: 54}}
"""


def learned(tmp_path: Path, term: str, weight: float) -> tuple[Network, Tensor]:
    """A student under this much of a bias, and the images of the test split."""
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(term=term, weight=weight))
    recipe = Recipe.load(path)
    train(recipe, tmp_path / f"{term}-{weight}")
    network = weights.load(tmp_path / f"{term}-{weight}").eval()
    dataset = datasets.load(recipe.data)
    loader = Loader(dataset, recipe.data, batch_size=200, train_seed=1, device=torch.device("cpu"))
    images = next(loader.epoch(0)).images
    loader.close()
    return network, images


def batch(size: int, side: int = 8) -> Batch:
    ids = torch.arange(size)
    return Batch(torch.rand(size, 3, side, side), torch.eye(2)[ids % 2], ids, torch.zeros_like(ids))


def test_the_more_shift_consistency_counts_the_less_a_shift_changes(tmp_path: Path) -> None:
    changes = []
    for weight in (0.0, 3.0, 100.0):
        network, images = learned(tmp_path, "shift_consistency", weight)
        one = torch.ones(len(images), dtype=torch.long)
        with torch.no_grad():
            still, shifted = network(images).logits, network(moved(images, one, 0 * one)).logits
        pixels = torch.ones(len(images))
        changes.append(float(shift_consistency_loss(still, shifted, pixels=pixels).mean()))
    assert changes[0] > changes[1] > changes[2]


def test_images_move_by_whole_pixels_and_are_mirrored_at_the_border() -> None:
    images = torch.rand(5, 3, 6, 7)
    down, right = torch.tensor([0, 1, -1, 2, 0]), torch.tensor([0, 0, 0, -1, 3])
    found = moved(images, down, right)
    torch.testing.assert_close(found[0], images[0])
    torch.testing.assert_close(found[1, :, 1:], images[1, :, :-1])
    torch.testing.assert_close(found[1, :, 0], images[1, :, 1])
    torch.testing.assert_close(found[2, :, :-1], images[2, :, 1:])
    torch.testing.assert_close(found[3, :, 2:, :-1], images[3, :, :-2, 1:])
    torch.testing.assert_close(found[4, :, :, 3:], images[4, :, :, :-3])


def test_every_side_is_moved_to() -> None:
    term = ShiftConsistency(pixels=2)
    data = batch(200)._replace(views=torch.arange(200) % 3)
    down, right = term._moves(data)
    sides = set(zip(down.tolist(), right.tolist(), strict=True))
    assert sides == {(a, b) for a in (-2, 0, 2) for b in (-2, 0, 2)} - {(0, 0)}
    torch.testing.assert_close(term.show(data), moved(data.images, down, right))


@pytest.mark.parametrize(("side", "patch", "shown"), [(8, 2, 4), (8, 4, 1), (10, 4, 2)])
def test_a_subset_shows_its_part_of_the_patches(side: int, patch: int, shown: int) -> None:
    term = Subset(keep=0.25, patch=patch)
    data = batch(30, side)
    seen = term.show(data)
    same = (seen == data.images).all(dim=1)
    assert ((seen == 0.5).all(dim=1) | same).all()
    cells = -(-side // patch)
    for one in same:
        corners = one[::patch, ::patch]
        assert corners.shape == (cells, cells)
        assert int(corners.sum()) == shown
    assert len({tuple(one.flatten().tolist()) for one in same}) > 1


def test_a_subset_is_learned_from(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(term="subset", weight=1.0))
    train(Recipe.load(path, ["train.epochs=12"]), tmp_path / "run")
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [float(row.partition('"subset": ')[2].partition(",")[0]) for row in rows]
    assert losses[-1] < 0.7 * losses[0]


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**40), st.integers(0, 1000), st.integers(1, 2**20))
def test_draws_follow_sample_and_view_alone(sample: int, view: int, salt: int) -> None:
    ids, views = torch.tensor([sample, sample + 1, 5]), torch.tensor([view, view, 7])
    data = Batch(torch.rand(3, 3, 2, 2), torch.eye(3), ids, views)
    found = uniform(data, 9, salt=salt)
    assert found.shape == (3, 9)
    assert (found >= 0).all()
    assert (found < 1).all()
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(uniform(data.rows(order), 9, salt=salt), found[order])
    torch.testing.assert_close(uniform(data, 4, salt=salt), found[:, :4])
    assert not found.equal(uniform(data, 9, salt=salt + 1))


def test_draws_are_uniform_and_unlike_each_other() -> None:
    ids = torch.arange(4000)
    data = Batch(torch.rand(1, 3, 2, 2), torch.eye(1), ids, torch.zeros_like(ids))
    found = uniform(data, 8, salt=3)
    counts = torch.histc(found, bins=16, min=0, max=1)
    expected = found.numel() / 16
    assert float(((counts - expected) ** 2 / expected).sum()) < 45  # chi squared, 15 degrees
    assert float(torch.corrcoef(found.T).fill_diagonal_(0).abs().max()) < 0.08


@pytest.mark.parametrize("term", [Subset(), ShiftConsistency()])
def test_other_images_leave_no_trace_in_running_statistics(term: Term) -> None:
    statistics = []
    for terms in ({"ce": CE()}, {"ce": CE(), "more": term}):
        torch.manual_seed(0)
        student = models.build_student(
            Model(model="resnet8", weights=None),
            classes=("a", "b"),
            image_size=8,
            mean=(0.5, 0.5, 0.5),
            std=(0.2, 0.2, 0.2),
        )
        weights_ = dict.fromkeys(terms, 1.0)
        objective = Objective(terms, weights_)
        objective.connect(student.anatomy(), [], num_classes=2, samples=torch.arange(6))
        student.tap(objective.student_taps())
        distiller = Distiller(student, objective).train()
        torch.manual_seed(1)
        distiller(batch(6), None, weights_).total.backward()
        assert all(p.grad is not None for p in student.parameters())
        statistics.append({name: buffer.clone() for name, buffer in student.named_buffers()})
    plain, more = statistics
    assert any("running" in name for name in plain)
    for name, buffer in plain.items():
        assert torch.equal(more[name], buffer), name
