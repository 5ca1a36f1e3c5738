"""Losses on features and relations against plain transcriptions of their papers, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise, product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distill.objectives.at import at_loss, energy
from distill.objectives.crd import crd_loss
from distill.objectives.features import features_loss
from distill.objectives.infonce import infonce_loss
from distill.objectives.kd import kd_loss
from distill.objectives.locality_penalty import locality_penalty_loss
from distill.objectives.ofa import ofa_loss
from distill.objectives.relations import relations_loss
from distill.objectives.review import review_loss
from distill.objectives.rkd import angle_loss, distance_loss
from distill.objectives.similarity import similarity_loss
from distill.objectives.vitkd import vitkd_loss

Loss = Callable[[Tensor, Tensor], Tensor]
GRIDS, WIDER, MAPS, VECTORS = (4, 5, 6), (7, 5, 6), (2, 6, 6), (9,)
LABELS = torch.tensor([2, 0, 5, 8, 2])
SAME = torch.tensor([[False, False, True, False, False, False]] * 5)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum() / (a.square().sum().sqrt() * b.square().sum().sqrt())


def smooth_l1(a: Tensor, b: Tensor) -> Tensor:
    d = (a - b).abs()
    return torch.where(d < 1, d * d / 2, d - 0.5)


def plain_at(s: Tensor, t: Tensor) -> Tensor:
    rows = []
    for one, other in zip(s, t, strict=True):
        a, b = ((x**2).sum(dim=0) / len(x) for x in (one, other))
        a, b = (x / (x**2).sum().sqrt() for x in (a, b))
        rows.append(((a - b) ** 2).sum() / a.numel())
    return torch.stack(rows)


def plain_features(s: Tensor, t: Tensor) -> Tensor:
    rows = []
    for one, other in zip(s, t, strict=True):
        cells = list(product(range(s.shape[2]), range(s.shape[3])))
        angle = sum((1 - cosine(one[:, i, j], other[:, i, j]) for i, j in cells), one.sum() * 0)
        rows.append(angle / len(cells) / 2 + smooth_l1(one, other).mean() / 2)
    return torch.stack(rows)


def plain_mse(s: Tensor, t: Tensor) -> Tensor:
    return torch.stack([((a - b) ** 2).sum() / a.numel() for a, b in zip(s, t, strict=True)])


def plain_similarity(s: Tensor, t: Tensor) -> Tensor:
    def rows(x: Tensor) -> list[Tensor]:
        grams = [torch.stack([(a * b).sum() for b in x]) for a in x]
        return [gram / gram.square().sum().sqrt() for gram in grams]

    return torch.stack(
        [((a - b) ** 2).sum() / len(s) for a, b in zip(rows(s), rows(t), strict=True)]
    )


def plain_relations(s: Tensor, t: Tensor) -> Tensor:
    count, found = len(s), []
    for i in range(count):
        others = [j for j in range(count) if j != i]
        apart = [(cosine(s[i], s[j]) - cosine(t[i], t[j])) ** 2 for j in others]
        found.append(torch.stack(apart).mean())
    return torch.stack(found)


def plain_distance(s: Tensor, t: Tensor) -> Tensor:
    def distances(x: Tensor) -> dict[tuple[int, int], Tensor]:
        pairs = [(i, j) for i in range(len(x)) for j in range(len(x)) if i != j]
        found = {(i, j): ((x[i] - x[j]) ** 2).sum().sqrt() for i, j in pairs}
        mean = torch.stack(list(found.values())).mean()
        return {pair: d / mean for pair, d in found.items()}

    own, other = distances(s), distances(t)
    return torch.stack([smooth_l1(own[p], other[p]) for p in own]).sum() / len(s) ** 2


def plain_angle(s: Tensor, t: Tensor) -> Tensor:
    count, total = len(s), s.sum() * 0
    for j, i, k in product(range(count), repeat=3):
        if j not in (i, k):
            total = total + smooth_l1(*(cosine(x[i] - x[j], x[k] - x[j]) for x in (s, t)))
    return total / count**3


def plain_infonce(s: Tensor, t: Tensor) -> Tensor:
    rows = []
    for i, u in enumerate(s):
        powers = [(cosine(u, v) / 0.1).exp() for v in t]
        rows.append(-(powers[i] / torch.stack(powers).sum()).log())
    return torch.stack(rows)


def plain_review(s: Tensor, t: Tensor) -> Tensor:
    def pooled(x: Tensor, side: int) -> Tensor:
        def parts(count: int) -> list[slice]:
            return [slice(i * count // side, -(-(i + 1) * count // side)) for i in range(side)]

        rows, columns = parts(x.shape[2]), parts(x.shape[3])
        return torch.stack([x[:, :, a, b].mean(dim=(2, 3)) for a in rows for b in columns], dim=2)

    total, weights = plain_mse(s, t), 1.0
    for side, weight in ((4, 0.5), (2, 0.25), (1, 0.125)):
        total = total + weight * plain_mse(pooled(s, side), pooled(t, side))
        weights += weight
    return total / weights


def plain_ofa(s: Tensor, t: Tensor) -> Tensor:
    rows = []
    for z, told, y in zip(s, t, LABELS.tolist(), strict=True):
        q, p = (x.exp() / x.exp().sum() for x in (z, told))
        one = [float(k == y) for k in range(len(z))]
        terms = [((p[k] + one[k]) ** 1.3 - one[k]) * q[k].log() for k in range(len(z))]
        rows.append(-torch.stack(terms).sum())
    return torch.stack(rows)


def plain_vitkd(s: Tensor, t: Tensor) -> Tensor:
    return torch.stack([((a - b) ** 2).sum() for a, b in zip(s, t, strict=True)])


def plain_crd(s: Tensor, t: Tensor) -> Tensor:
    """Of 1000 samples and six others, of which the third is the anchor itself; Z = e²."""
    rows, noise = [], 6 / 1000
    for own, others in zip(s[:, 0], s[:, 1:7], strict=True):
        h = [score.exp() / math.e**2 / (score.exp() / math.e**2 + noise) for score in others]
        first = own.exp() / math.e**2 / (own.exp() / math.e**2 + noise)
        rest = [(1 - x).log() for i, x in enumerate(h) if i != 2]
        rows.append(-first.log() - torch.stack(rest).sum())
    return torch.stack(rows)


def places(rows: int, columns: int) -> Tensor:
    cells = list(product(range(rows), range(columns)))
    return torch.tensor(
        [[((a - c) / rows) ** 2 + ((b - d) / columns) ** 2 for c, d in cells] for a, b in cells]
    )


def plain_locality_penalty(s: Tensor, t: Tensor) -> Tensor:
    d = places(2, 3).double()
    maps = s.softmax(dim=-1)
    rows = []
    for one in maps:
        triples = product(range(2), range(6), range(6))
        mean = torch.stack([one[a, q, k] * d[q, k] for a, q, k in triples]).sum() / (2 * 6)
        rows.append(mean / (d.sum() / 36))
    return torch.stack(rows)


CASES: dict[str, tuple[Loss, Loss, tuple[int, ...], tuple[int, ...]]] = {
    "at": (lambda s, t: at_loss(energy(s), energy(t)), plain_at, GRIDS, WIDER),
    "features": (lambda s, t: features_loss(s, t, kind="cosine"), plain_features, GRIDS, GRIDS),
    "mse": (lambda s, t: features_loss(s, t, kind="mse"), plain_mse, GRIDS, GRIDS),
    "similarity": (similarity_loss, plain_similarity, VECTORS, (4,)),
    "relations": (relations_loss, plain_relations, VECTORS, (4,)),
    "distance": (distance_loss, plain_distance, VECTORS, (4,)),
    "angle": (angle_loss, plain_angle, VECTORS, (4,)),
    "infonce": (lambda s, t: infonce_loss(s, t, temperature=0.1), plain_infonce, VECTORS, VECTORS),
    "review": (review_loss, plain_review, GRIDS, GRIDS),
    "ofa": (lambda s, t: ofa_loss(s, t, LABELS, epsilon=1.3), plain_ofa, VECTORS, VECTORS),
    "vitkd": (vitkd_loss, plain_vitkd, GRIDS, GRIDS),
    "crd": (
        lambda s, t: crd_loss(s[:, 0], s[:, 1:7], SAME, constant=torch.tensor(2.0), samples=1000),
        plain_crd,
        VECTORS,
        VECTORS,
    ),
    "locality_penalty": (
        lambda s, t: locality_penalty_loss(s.softmax(dim=-1), places(2, 3)),
        plain_locality_penalty,
        MAPS,
        MAPS,
    ),
}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_are_those_of_the_paper(name: str, seed: int) -> None:
    ours, plain, own, other = CASES[name]
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (2 * torch.randn(5, *shape, generator=generator) for shape in (own, other))
    z, exact = student.clone().requires_grad_(), student.double().requires_grad_()
    t = teacher.clone().requires_grad_()
    found, expected = ours(z, t), plain(exact, teacher.double())
    assert found.shape == expected.shape
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)
    found.mean().backward()
    expected.mean().backward()
    assert z.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(z.grad.double(), exact.grad, rtol=1e-3, atol=1e-6)
    # A contrast learns both sides' heads: elsewhere the teacher is left alone.
    assert (t.grad is not None) == (name == "infonce")


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["similarity", "relations", "distance", "angle"])
def test_relations_do_not_change_when_features_turn(name: str) -> None:
    ours = CASES[name][0]
    student, teacher = draw(0, 8, 6), draw(1, 8, 5)
    turn, other = (torch.linalg.qr(draw(2, n, n))[0] for n in (6, 5))
    found = ours(student @ turn, teacher @ other)
    torch.testing.assert_close(found, ours(student, teacher), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["distance", "angle"])
def test_rkd_does_not_change_when_features_grow_or_move(name: str) -> None:
    ours = CASES[name][0]
    student, teacher = draw(0, 8, 6), draw(1, 8, 5)
    found = ours(7 * student + 3, 0.1 * teacher - 2)
    torch.testing.assert_close(found, ours(student, teacher), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["distance", "angle"])
def test_rkd_sees_small_differences_of_large_features(name: str) -> None:
    """All that pooled features of a young student are: much that is common, little that is not."""
    ours = CASES[name][0]
    student, teacher = draw(0, 8, 6), draw(1, 8, 5)
    found = ours(student + 3000, teacher)
    torch.testing.assert_close(found, ours(student, teacher), rtol=1e-2, atol=0)


@pytest.mark.parametrize("name", ["at", "relations"])
def test_the_scale_of_features_does_not_matter(name: str) -> None:
    ours, _, own, other = CASES[name]
    student, teacher = draw(0, 5, *own), draw(1, 5, *other)
    for a, b in ((1e-3, 1e3), (1e4, 1.0), (1.0, 1e-4)):
        found = ours(a * student, b * teacher)
        torch.testing.assert_close(found, ours(student, teacher), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(
    "name",
    ["at", "features", "mse", "similarity", "relations", "distance", "angle", "review", "vitkd"],
)
def test_the_same_features_are_at_no_distance(name: str) -> None:
    ours, _, own, _ = CASES[name]
    x = draw(3, 5, *own)
    assert ours(x, x).abs().max() < 1e-6
    assert ours(x, draw(4, 5, *own)).mean() > 1e-3


@pytest.mark.parametrize("name", ["similarity", "relations", "distance", "angle"])
def test_relations_of_equal_images_have_finite_gradients(name: str) -> None:
    x = draw(0, 6, 4)
    x[3] = x[1]
    for values in (x, torch.ones(6, 4), torch.zeros(6, 4), 1e4 * x, x[:1]):
        student = values.clone().requires_grad_()
        value = CASES[name][0](student, draw(1, len(values), 5))
        value.mean().backward()
        assert value.isfinite().all()
        assert student.grad is not None
        assert student.grad.isfinite().all()


def test_one_image_has_no_relations() -> None:
    one, other = draw(0, 1, 6), draw(1, 1, 5)
    for ours in (relations_loss, distance_loss, angle_loss):
        assert float(ours(one, other).sum()) == 0


@pytest.mark.parametrize("side", [1, 2, 3, 4, 5, 8])
def test_reviews_weights_sum_to_one(side: int) -> None:
    x = draw(0, 2, 3, side, side)
    torch.testing.assert_close(review_loss(x + 0.5, x), torch.full((2,), 0.25))


@pytest.mark.parametrize(("side", "weights"), [(8, 1.875), (4, 1.75), (2, 1.5)])
def test_review_counts_what_pooling_leaves(side: int, weights: float) -> None:
    """What changes sign from cell to cell is seen on the finest grid alone."""
    signs = (-1.0) ** (torch.arange(side)[:, None] + torch.arange(side))
    x = draw(0, 2, 3, side, side)
    torch.testing.assert_close(review_loss(x + signs, x), torch.full((2,), 1 / weights))


def test_at_epsilon_one_ofa_is_kd_and_the_teachers_entropy() -> None:
    z, t = draw(0, 5, 9).requires_grad_(), draw(1, 5, 9)
    labels = torch.tensor([2, 0, 5, 8, 2])
    p = t.softmax(dim=1)
    found = ofa_loss(z, t, labels, epsilon=1.0)
    torch.testing.assert_close(found, F.cross_entropy(z, p, reduction="none"))
    entropy = -(p * p.log()).sum(dim=1)
    expected = kd_loss(z, t, temperature=1.0)
    torch.testing.assert_close(found, expected + entropy)
    gradients = [torch.autograd.grad(x.sum(), z)[0] for x in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_the_larger_epsilon_the_more_the_label_counts() -> None:
    z, t, labels = draw(0, 5, 9).requires_grad_(), draw(1, 5, 9), torch.tensor([2, 0, 5, 8, 2])
    pulls = []
    for epsilon in (1.0, 1.25, 1.5, 2.0):
        loss = ofa_loss(z, t, labels, epsilon=epsilon)
        assert (loss > 0).all()
        pulls.append(-torch.autograd.grad(loss.sum(), z)[0][torch.arange(5), labels])
    for less, more in pairwise(pulls):
        assert (more > less).all()


def test_attention_to_itself_costs_nothing_and_uniform_attention_one() -> None:
    d = places(3, 4)
    itself, uniform = torch.eye(12).expand(2, 3, 12, 12), torch.full((2, 3, 12, 12), 1 / 12)
    assert locality_penalty_loss(itself, d).abs().max() == 0
    torch.testing.assert_close(locality_penalty_loss(uniform, d), torch.ones(2))
    corners = torch.zeros(12, 12)
    corners[torch.arange(12), d.argmax(dim=1)] = 1
    assert (locality_penalty_loss(corners.expand(2, 3, 12, 12), d) > 1).all()
    assert locality_penalty_loss(torch.ones(2, 3, 1, 1), places(1, 1)).abs().max() == 0


def test_contrast_is_finite_at_any_score() -> None:
    scores = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4]).requires_grad_()
    others = scores.detach()[:, None] * torch.tensor([1.0, -1.0, 0.0, 0.5, 1.0, 1.0])
    others.requires_grad_()
    found = crd_loss(scores, others, SAME, constant=torch.tensor(7.0), samples=1000)
    found.sum().backward()
    assert found.isfinite().all()
    assert scores.grad is not None
    assert others.grad is not None
    assert scores.grad.isfinite().all()
    assert others.grad.isfinite().all()
    assert not others.grad[:, 2].any()  # the anchor's own image
