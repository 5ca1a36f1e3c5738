"""CKA against its formula, and where it is known: for turned features, and for unrelated ones."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from distill.diagnostics import UndefinedError, similarity
from distill.diagnostics.similarity import cka, gram, linear_cka
from distill.diagnostics.tapped import opened
from tests.diagnostics.test_equivariance import VIT, state, student
from tests.models import made


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def hsic(x: np.ndarray, y: np.ndarray) -> float:
    """Equation 3 of Nguyen et al., as it is written."""
    n = len(x)
    k, l = x @ x.T, y @ y.T  # noqa: E741
    np.fill_diagonal(k, 0)
    np.fill_diagonal(l, 0)
    one = np.ones(n)
    first = np.trace(k @ l)
    second = (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2))
    third = 2 / (n - 2) * (one @ k @ l @ one)
    return float((first + second - third) / (n * (n - 3)))


def of(x: Tensor, y: Tensor, size: int | None = None) -> float:
    size = size or len(x)
    pairs = zip(torch.split(x, size), torch.split(y, size), strict=True)
    return float(linear_cka((gram(a)[None], gram(b)[None]) for a, b in pairs))


@pytest.mark.parametrize("sizes", [(40,), (12, 12, 12), (20, 4, 9)])
def test_the_formula(sizes: tuple[int, ...]) -> None:
    x = normal(sum(sizes), 7) + 3
    y = (x[:, :5] + normal(sum(sizes), 5, seed=1)).exp()
    a, b = ([part.numpy() for part in torch.split(z, sizes)] for z in (x, y))
    kl, kk, ll = (
        sum(n * hsic(p, q) for n, p, q in zip(sizes, left, right, strict=True))
        for left, right in ((a, b), (a, a), (b, b))
    )
    grams = zip(
        *([gram(part)[None] for part in torch.split(z, sizes)] for z in (x, y)), strict=True
    )
    found = float(linear_cka(grams))
    assert found == pytest.approx(kl / math.sqrt(kk * ll), rel=1e-10)
    assert 0.1 < found < 0.9


def test_all_pairs_at_once() -> None:
    several = [normal(10, 3 + i, seed=i) for i in range(5)]
    ours, theirs = (torch.stack([gram(x) for x in some]) for some in (several[:2], several[2:]))
    found = linear_cka([(ours, theirs)])
    expected = [[of(x, y) for y in several[2:]] for x in several[:2]]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_turned_scaled_and_moved_features_are_the_same() -> None:
    x = normal(64, 20) * torch.linspace(0.1, 5, 20, dtype=torch.float64)
    turn, _ = torch.linalg.qr(normal(20, 20, seed=1))
    for same in (x, x @ turn, -1e4 * x, x + 100, torch.cat([x @ turn, 0 * x], dim=1)):
        assert of(x, same) == pytest.approx(1, abs=1e-9)
    assert of(x, x[torch.arange(64).flip(0)]) < 0.2
    assert of(x, x @ normal(20, 20, seed=2)) < 0.99  # other linear maps are seen


def test_unrelated_features_have_nothing_in_common() -> None:
    x, y = normal(2048, 100), normal(2048, 200, seed=1)
    assert abs(of(x, y, 256)) < 0.02
    rows = (z - z.mean(dim=0) for z in (x[:256], y[:256]))
    k, l = (z @ z.T for z in rows)  # noqa: E741
    assert (k * l).sum() / (k.norm() * l.norm()) > 0.3  # what the biased one says of them


def test_small_batches_estimate_the_same() -> None:
    """HSIC of 8 images has the mean of HSIC of 512."""
    x = normal(8192, 6)
    y = x @ normal(6, 6, seed=1) + 2 * normal(8192, 6, seed=2)
    truth = of(x, y, 4096)
    assert 0.1 < truth < 0.9
    assert of(x, y, 8) == pytest.approx(truth, abs=0.02)
    assert of(x, y, 4) == pytest.approx(truth, abs=0.04)


def test_wide_features_are_summed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    x = normal(8, 3, 5, 7)
    whole = gram(x)
    monkeypatch.setattr(similarity, "_COLUMNS", 10)
    torch.testing.assert_close(gram(x), whole)
    assert whole.sum(dim=0).abs().max() < 1e-12
    assert not whole.diag().any()


def test_features_that_are_all_the_same_have_no_cka() -> None:
    x = normal(8, 3)
    assert math.isnan(of(x, torch.full((8, 2), 0.1)))


def batches(*sizes: int) -> Iterator[Tensor]:
    yield from torch.split(made.images((16, 16), sum(sizes)), sizes)


def test_networks() -> None:
    teacher, student_ = student(model="resnet8"), student(**VIT)
    found = cka(teacher, student_, batches(12, 9, 3))
    assert [site.name for site in found.teacher_sites] == ["layer1", "layer2", "layer3"]
    assert [site.name for site in found.student_sites] == ["blocks.0", "blocks.1"]
    features = []
    for network in (teacher, student_):
        copied, sites = opened(network, made.images((16, 16)))
        with torch.no_grad():
            own = copied(made.images((16, 16), 24)[:21]).features  # 3 are left over
        assert own is not None
        features.append(([own[site.name].double() for site in sites], own["pooled"].double()))
    (ours, x), (theirs, y) = features

    def expected(a: Tensor, b: Tensor) -> float:
        grams = ((gram(a[i])[None], gram(b[i])[None]) for i in (slice(12), slice(12, 21)))
        return float(linear_cka(grams))

    for i, a in enumerate(ours):
        for j, b in enumerate(theirs):
            assert found.grids[i, j] == pytest.approx(expected(a, b), rel=1e-5)
            means = expected(a.mean(dim=(2, 3)), b.mean(dim=(2, 3)))
            assert found.matrix[i, j] == pytest.approx(means, rel=1e-5)
    assert found.pooled == pytest.approx(expected(x, y), rel=1e-5)


def test_a_network_is_like_itself() -> None:
    for network in (student(model="resnet8"), made.shared("timm/swin_tiny_patch4_window7_224")):
        size = (16, 16) if network.model == "resnet8" else made.SQUARE
        found = cka(network, network, [made.images(size, 8)])
        for matrix in (found.matrix, found.grids):
            assert torch.allclose(matrix.diag(), torch.ones(len(matrix), dtype=torch.float64))
            assert torch.allclose(matrix, matrix.T)
            assert matrix.max() <= 1 + 1e-9
        assert found.pooled == pytest.approx(1)


def test_too_few_images() -> None:
    network = student(model="resnet8")
    for sizes in ((), (3,), (3, 3)):
        with pytest.raises(UndefinedError, match="fewer than 4 images"):
            cka(network, network, batches(*sizes) if sizes else [])


def test_a_network_without_a_classifier() -> None:
    network = student(model="resnet8")
    bare = made.wrapped(network.backbone, "resnet8", (16, 16))
    bare.description = bare.description.model_copy(update={"num_classes": 77})
    found = cka(network, bare.eval(), batches(8))
    assert found.pooled is None
    assert found.matrix.shape == (3, 3)


def test_nothing_is_changed_by_the_asking() -> None:
    teacher, student_ = student(model="resnet8"), student(**VIT).train()
    before = state(teacher), state(student_)
    x = made.images((16, 16), 8)
    with torch.autocast("cpu", torch.bfloat16):
        found = cka(teacher, student_, [x])
    again = cka(teacher, student_.eval(), [x])
    assert torch.equal(found.grids, again.grids)
    torch.testing.assert_close((state(teacher), state(student_.train())), before, rtol=0, atol=0)
    assert torch.equal(x, made.images((16, 16), 8))
