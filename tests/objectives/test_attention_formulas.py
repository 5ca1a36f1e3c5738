"""The terms `attention` and `guidance` against plain transcriptions in float64, from maps to loss.

Every row of the tables below is one pair of networks: their heads, grids, and tokens in front.
"""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import product
from typing import Literal, NamedTuple

import pytest
import torch
from torch import Tensor

from distill.objectives.attention import Attention, attention_loss
from distill.objectives.guidance import Guidance, saliency_loss
from distill.types import Anatomy, AttentionSite, Batch, Outputs, Pair, Site
from tests.models import made

Grid = tuple[int, int]
BATCH, CHANNELS = 3, 6


class Side(NamedTuple):
    """A transformer as far as its maps tell."""

    heads: int
    queries: Grid
    keys: Grid
    front: int = 0  # tokens before the grid's
    layers: int = 2


def cells(grid: Grid) -> list[Grid]:
    return list(product(range(grid[0]), range(grid[1])))


def part(one: Grid, n: Grid, other: Grid, m: Grid) -> float:
    """The area of cell `one` of n rows and columns that lies in cell `other` of m; 1 is all."""
    share = Fraction(1)
    for i, count, j, many in zip(one, n, other, m, strict=True):
        begin = max(Fraction(i, count), Fraction(j, many))
        end = min(Fraction(i + 1, count), Fraction(j + 1, many))
        share *= max(end - begin, Fraction(0)) * count
    return float(share)


def plain_map(maps: Tensor, side: Side, grid: Grid, *, front: bool) -> Tensor:
    """(N, N) of (Q, K): mean of the queries in a cell, sum of what keys leave in it."""
    p, rows = side.front, []
    dealt = [[part(k, side.keys, c, grid) for k in cells(side.keys)] for c in cells(grid)]
    seen = [[part(c, grid, q, side.queries) for q in cells(side.queries)] for c in cells(grid)]
    means = [[0.0] * p + row for row in seen]
    sums = [[0.0] * p + row for row in dealt]
    if front and p:
        means = [[1 / p] * p + [0.0] * len(seen[0]), *means]
        sums = [[1.0] * p + [0.0] * len(dealt[0]), *sums]
    for mean in means:
        looked = torch.stack([m * row for m, row in zip(mean, maps, strict=True)]).sum(dim=0)
        row = torch.stack([(looked * looked.new_tensor(key)).sum() for key in sums])
        rows.append(row / row.sum())
    return torch.stack(rows)


def divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """Σ a (log a − log b) / ln N."""
    terms = [a * (a.log() - b.log()) for a, b in zip(teacher, student, strict=True)]
    return torch.stack(terms).sum() / math.log(len(terms))


def plain_kl(student: Tensor, teacher: Tensor) -> Tensor:
    found = []
    for own, other in zip(student, teacher, strict=True):
        pairs = [(a, b) for x, y in zip(other, own, strict=True) for a, b in zip(x, y, strict=True)]
        found.append(torch.stack([divergence(a, b) for a, b in pairs]).mean())
    return torch.stack(found)


def plain_mse(student: Tensor, teacher: Tensor) -> Tensor:
    tokens = student.shape[-1]
    found = []
    for own, other in zip(student, teacher, strict=True):
        squares = [(a - b) ** 2 for a, b in zip(own.flatten(), other.flatten(), strict=True)]
        found.append(tokens * torch.stack(squares).sum() / len(squares))
    return torch.stack(found)


def plain_saliency(features: Tensor, looked: Tensor) -> Tensor:
    found = []
    for own, other in zip(features, looked, strict=True):
        energy = torch.stack([(own[:, i, j] ** 2).sum() for i, j in cells((*own.shape[1:],))])
        found.append(divergence(other, energy / energy.sum()))
    return torch.stack(found)


def quantile(values: Tensor, part: float) -> Tensor:
    ordered = values.sort().values
    at = part * (len(values) - 1)
    low = math.floor(at)
    high = min(low + 1, len(values) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def plain_attention(
    students: list[Tensor],
    teachers: list[Tensor],
    own: Side,
    other: Side,
    kind: Literal["kl", "mse"],
    heads: Literal["mean", "max"],
) -> Tensor:
    """Heads become one, both maps go to the coarser grid; the mean over layers."""
    grid = (min(own.queries[0], other.queries[0]), min(own.queries[1], other.queries[1]))
    front = own.front > 0 and other.front > 0

    def one(maps: Tensor, side: Side) -> Tensor:
        joined = maps.mean(dim=0)
        if heads == "max":
            joined = maps.max(dim=0).values
            joined = joined / joined.sum(dim=1, keepdim=True)
        return plain_map(joined, side, grid, front=front)[None]

    losses = []
    for a, b in zip(students, teachers, strict=True):
        x = torch.stack([one(maps, own) for maps in a])
        y = torch.stack([one(maps, other) for maps in b])
        losses.append((plain_kl if kind == "kl" else plain_mse)(x, y))
    return torch.stack(losses).mean(dim=0)


def plain_guidance(
    features: Tensor, maps: Tensor, teacher: Side, query: list[Tensor], key: list[Tensor]
) -> Tensor:
    """½ KL(where is looked ‖ Σ_c F²) + ½ KL(A ‖ softmax(Q Kᵀ / √d)), both over ln h w."""
    grid = (features.shape[2], features.shape[3])
    found = []
    for own, each in zip(features, maps, strict=True):
        joined = each.mean(dim=0)
        whole = plain_map(joined, teacher, grid, front=True)
        seen = whole[0, 1:] if teacher.front else whole.mean(dim=0)
        seen = torch.minimum(seen, quantile(seen, 0.99))
        places = [own[:, i, j] for i, j in cells(grid)]
        q, k = ([w[:, :, 0, 0] @ x + b for x in places] for w, b in (query, key))
        scores = [[(a * b).sum() / math.sqrt(len(a)) for b in k] for a in q]
        powers = [torch.stack(row).exp() for row in scores]
        affinity = torch.stack([row / row.sum() for row in powers])
        related = plain_kl(
            affinity[None, None], plain_map(joined, teacher, grid, front=False)[None, None]
        )
        where = plain_saliency(own[None], (seen / seen.sum())[None])
        found.append(where[0] / 2 + related[0] / 2)
    return torch.stack(found)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rows(seed: int, side: Side) -> Tensor:
    """Maps as a network would make them."""
    tokens = [side.front + math.prod(grid) for grid in (side.queries, side.keys)]
    return (1.5 * draw(seed, BATCH, side.heads, *tokens)).softmax(dim=-1)


def transformer(side: Side) -> Anatomy:
    sites = tuple(
        AttentionSite(
            f"b{i}@attention", side.heads, side.queries, side.keys, side.front, (i + 1) / 6
        )
        for i in range(6)
    )
    return Anatomy("vit", 6, False, {}, (), (), sites)


def told(features: dict[str, Tensor]) -> Outputs:
    return Outputs(torch.zeros(BATCH, 3), features)


def same(found: Tensor, expected: Tensor, *gradients: tuple[Tensor | None, Tensor | None]) -> None:
    """To what float32 leaves of them: seven digits, six of a gradient."""
    assert found.dtype == torch.float32
    assert expected.dtype == torch.float64
    torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=1e-7)
    for own, exact in gradients:
        assert own is not None
        assert exact is not None
        assert exact.abs().max() > 0
        scale = float(exact.abs().max())
        torch.testing.assert_close(own.double(), exact, rtol=1e-4, atol=2e-5 * scale)


PAIRS = [
    (Side(2, (3, 4), (3, 4)), Side(2, (3, 4), (3, 4))),
    (Side(3, (3, 3), (3, 3), front=1), Side(4, (3, 3), (3, 3), front=1)),
    (Side(2, (4, 4), (4, 4), front=1), Side(5, (3, 3), (3, 3), front=2)),
    (Side(1, (2, 3), (2, 3)), Side(3, (5, 4), (5, 4), front=1)),
    (Side(2, (5, 3), (5, 3), front=1), Side(2, (4, 4), (2, 2))),
]


@pytest.mark.parametrize("heads", ["mean", "max"])
@pytest.mark.parametrize("kind", ["kl", "mse"])
@pytest.mark.parametrize(("own", "other"), PAIRS, ids=range(len(PAIRS)))
def test_attention_is_its_formula(
    own: Side, other: Side, kind: Literal["kl", "mse"], heads: Literal["mean", "max"]
) -> None:
    term = Attention(kind=kind, heads=heads)
    ids = torch.arange(BATCH)
    term.connect(Pair(transformer(own), transformer(other), 3, ids))
    assert term.reads.student == term.reads.teacher == ("b5@attention", "b4@attention")
    student = [rows(seed, own).requires_grad_() for seed in (1, 2)]
    teacher = [rows(seed, other) for seed in (3, 4)]
    exact = [maps.detach().double().requires_grad_() for maps in student]
    batch = Batch(torch.zeros(BATCH, 3, 2, 2), torch.zeros(BATCH, 3), ids, ids)
    found = term(
        told(dict(zip(term.reads.student, student, strict=True))),
        told(dict(zip(term.reads.teacher, teacher, strict=True))),
        batch,
    )
    known = [maps.double() for maps in teacher]
    expected = plain_attention(exact, known, own, other, kind, heads)
    found.sum().backward()
    expected.sum().backward()
    same(found, expected, *((a.grad, b.grad) for a, b in zip(student, exact, strict=True)))


@pytest.mark.parametrize("shape", [(1, 4), (3, 9), (2, 16)])
@pytest.mark.parametrize("kind", ["kl", "mse"])
def test_the_distance_of_two_maps_is_its_formula(
    kind: Literal["kl", "mse"], shape: tuple[int, int]
) -> None:
    heads, tokens = shape
    side = Side(heads, (1, tokens), (1, tokens))
    own, other = rows(5, side).requires_grad_(), rows(6, side).requires_grad_()
    exact = own.detach().double().requires_grad_()
    found = attention_loss(own, other, kind=kind)
    expected = (plain_kl if kind == "kl" else plain_mse)(exact, other.detach().double())
    found.sum().backward()
    expected.sum().backward()
    same(found, expected, (own.grad, exact.grad))
    assert other.grad is None


GUIDED = [
    ((3, 4), Side(2, (3, 4), (3, 4))),
    ((4, 4), Side(3, (4, 4), (4, 4), front=1)),
    ((3, 3), Side(2, (5, 4), (5, 4), front=2)),
    ((5, 4), Side(1, (3, 3), (3, 3), front=1)),
]


@pytest.mark.parametrize(("grid", "other"), GUIDED, ids=range(len(GUIDED)))
def test_guidance_is_its_formula(grid: Grid, other: Side) -> None:
    site = Site("s", CHANNELS, grid, 4.0, 1.0, 0)
    ids = torch.arange(BATCH)
    student = Anatomy("cnn", CHANNELS, False, {"s": site}, (site,), (), ())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        term = Guidance(width=5)
        term.connect(Pair(student, transformer(other), 3, ids))
    features = draw(8, BATCH, CHANNELS, *grid).requires_grad_()
    exact = features.detach().double().requires_grad_()
    maps = rows(9, other)
    batch = Batch(torch.zeros(BATCH, 3, 2, 2), torch.zeros(BATCH, 3), ids, ids)
    found = term(told({"s": features}), told({"b5@attention": maps}), batch)
    layers = [
        [p.detach().double().requires_grad_() for p in layer.parameters()]
        for layer in (term.query, term.key)
    ]
    expected = plain_guidance(exact, maps.double(), other, *layers)
    found.sum().backward()
    expected.sum().backward()
    # The key's bias moves all scores of a row alike, which changes nothing.
    same(
        found,
        expected,
        (features.grad, exact.grad),
        (term.query.weight.grad, layers[0][0].grad),
        (term.query.bias.grad, layers[0][1].grad),
        (term.key.weight.grad, layers[1][0].grad),
    )


@pytest.mark.parametrize("grid", [(2, 2), (3, 4), (5, 5)])
def test_where_to_look_is_its_formula(grid: Grid) -> None:
    features = (40 * draw(10, BATCH, CHANNELS, *grid)).requires_grad_()
    exact = features.detach().double().requires_grad_()
    looked = draw(11, BATCH, math.prod(grid)).softmax(dim=-1).requires_grad_()
    found = saliency_loss(features, looked)
    expected = plain_saliency(exact, looked.detach().double())
    found.sum().backward()
    expected.sum().backward()
    same(found, expected, (features.grad, exact.grad))
    assert looked.grad is None


def test_a_cnn_comes_to_look_where_the_transformer_looks() -> None:
    """Image by image, beyond what is looked at in all of them."""
    sizes = {"width": 32, "depth": 2, "heads": 4, "patch_size": 4, "pool": "cls"}
    student, teacher = made.network("resnet8", (16, 16)), made.network("vit", (16, 16), **sizes)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)  # so that it looks at some places more
    images, ids = draw(12, 8, 3, 16, 16).sigmoid(), torch.arange(8)
    batch = Batch(images, torch.zeros(8, 5), ids, ids)
    term = Guidance()
    term.connect(Pair(student.anatomy(), teacher.anatomy(), 5, ids))
    student.tap(term.reads.student)
    teacher.tap(term.reads.teacher)
    with torch.no_grad():
        told_ = teacher.eval()(images)
    looked = told_.read(term.reads.teacher[0]).mean(dim=1)[:, 0, 1:]

    def alike(outputs: Outputs) -> float:
        energy = outputs.read(term.reads.student[0]).detach().square().sum(dim=1).flatten(1)
        shares = energy / energy.sum(dim=1, keepdim=True)
        own, other = ((x - x.mean(dim=0)).flatten() for x in (shares, looked))
        return float(torch.corrcoef(torch.stack([own, other]))[0, 1])

    optimizer = torch.optim.Adam([*student.parameters(), *term.parameters()], lr=3e-3)
    found = []
    for _ in range(60):
        outputs = student.train()(images)
        found.append(alike(outputs))
        optimizer.zero_grad()
        term(outputs, told_, batch).mean().backward()
        optimizer.step()
    assert found[0] < 0.2
    assert found[-1] > 0.8
