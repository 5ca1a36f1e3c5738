"""Ranks of matrices whose spectra are known, and of networks' features."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from distill.diagnostics import UndefinedError
from distill.diagnostics import rank as module
from distill.diagnostics.rank import EPSILON, Rank, rank, ranks
from distill.diagnostics.tapped import opened
from tests.diagnostics.test_equivariance import VIT, state, student
from tests.models import made


def with_spectrum(sigma: Tensor, rows: int, width: int, seed: int = 0) -> Tensor:
    """A matrix of these singular values whose columns have mean 0."""
    generator = torch.Generator().manual_seed(seed)
    k = len(sigma)
    left = torch.randn(rows, k, dtype=torch.float64, generator=generator)
    left, _ = torch.linalg.qr(left - left.mean(dim=0))
    right, _ = torch.linalg.qr(torch.randn(width, k, dtype=torch.float64, generator=generator))
    return left * sigma @ right.T


def expected(x: np.ndarray) -> Rank:
    """The definitions as they are written, by singular values."""
    n, d = x.shape
    sigma = np.linalg.svd(x - x.mean(axis=0), compute_uv=False)
    sigma = sigma[sigma > 1e-10 * sigma[0]]
    p, variance = sigma / sigma.sum(), sigma**2
    held = np.cumsum(variance) / variance.sum()
    z = x / np.linalg.norm(x, axis=1, keepdims=True)
    _, coded = np.linalg.slogdet(np.eye(n) + d / (n * 0.01) * z @ z.T)
    return Rank(
        min(n - 1, d),
        math.exp(-(p * np.log(p)).sum()),
        variance.sum() ** 2 / (variance**2).sum(),
        *(int(np.argmax(held >= part)) + 1 for part in (0.9, 0.95, 0.99)),
        coded / 2,
    )


@pytest.mark.parametrize(("rows", "width"), [(50, 12), (12, 50), (20, 20)])
def test_the_definitions(rows: int, width: int) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(rows, width, dtype=torch.float64, generator=generator)
    x = x * torch.linspace(1, 0, width, dtype=torch.float64) ** 3 + 0.2
    assert rank(x) == pytest.approx(expected(x.numpy()), rel=1e-7)
    assert rank(x.float()) == pytest.approx(expected(x.numpy()), rel=1e-3)


@pytest.mark.parametrize("rows", [100, 35])
def test_equal_singular_values(rows: int) -> None:
    """Rank k is k, by every measure, however wide the features are and however few."""
    for seed, k in enumerate((1, 4, 10, 10, 10, 10, 20, 20, 30)):
        found = rank(with_spectrum(torch.full((k,), 3.0, dtype=torch.float64), rows, 40, seed))
        assert found.effective == pytest.approx(k, rel=1e-9)
        assert found.participation == pytest.approx(k, rel=1e-9)
        assert (found.k90, found.k95, found.k99) == tuple(-(-k * p // 100) for p in (90, 95, 99))
        assert found.most == min(rows - 1, 40)


def test_a_spectrum_by_hand() -> None:
    found = rank(with_spectrum(torch.tensor([4.0, 2, 1, 1], dtype=torch.float64), 30, 9))
    assert found.effective == pytest.approx(2 ** (0.5 + 0.5 + 0.75), rel=1e-9)
    assert found.participation == pytest.approx(22**2 / (256 + 16 + 1 + 1), rel=1e-9)
    assert (found.k90, found.k95, found.k99) == (2, 3, 4)  # of 22: 16, 20, 21, 22


def test_the_coding_rate_by_hand() -> None:
    """Rows along orthogonal directions, equally many along each: k equal eigenvalues."""
    for k in (1, 3):
        x = torch.eye(8)[torch.arange(12) % k] * torch.linspace(1, 9, 12)[:, None]
        codes = rank(x).coding_rate
        assert codes == pytest.approx(k / 2 * math.log(1 + 8 / (12 * EPSILON) * 12 / k), rel=1e-6)


def test_neither_turns_nor_scales_nor_shifts_matter() -> None:
    x = with_spectrum(torch.logspace(0, -3, 10, dtype=torch.float64), 40, 25)
    turn, _ = torch.linalg.qr(torch.randn(25, 25, dtype=torch.float64))
    for same in (x @ turn, -1e5 * x, 1e-9 * x, x[torch.randperm(40)]):
        assert rank(same) == pytest.approx(rank(x), rel=1e-6)
    moved = rank(x + 1000)
    assert moved[:-1] == pytest.approx(rank(x)[:-1], rel=1e-6)
    assert moved.coding_rate < rank(x).coding_rate


def test_features_without_any() -> None:
    with pytest.raises(UndefinedError, match="the same for all images"):
        rank(torch.full((5, 3), 0.1))
    with pytest.raises(UndefinedError, match="the same for all images"):
        rank(torch.rand(1, 3))
    with pytest.raises(UndefinedError, match="not finite"):
        rank(torch.tensor([[1.0, 2.0], [math.nan, 1.0]]))
    assert math.isfinite(rank(torch.eye(3)[:, :2]).coding_rate)  # a row of zeros has no direction


def test_networks() -> None:
    x = made.images((16, 16), 30)
    for network in (student(model="resnet8"), student(**VIT)):
        found = ranks(network, x)
        copied, sites = opened(network, x)
        with torch.no_grad():
            features = copied(x).features
        assert features is not None
        assert found.sites == sites
        assert found.pooled == pytest.approx(rank(features["pooled"]), rel=1e-4)
        for site, own in zip(sites, found.cells, strict=True):
            cells = features[site.name].permute(0, 2, 3, 1).flatten(0, 2)
            if len(cells) <= module.ROWS:
                assert own == pytest.approx(rank(cells), rel=1e-4)
            assert 1 <= own.effective <= own.most == site.channels


def test_cells_are_drawn_without_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    places = module._places(30, 200)
    assert places.shape == (30, module.ROWS // 30)
    assert all(len(set(row.tolist())) == len(row) for row in places)
    assert not torch.equal(places[0], places[1])
    assert module._places(30, 5).sort().values.tolist() == [[0, 1, 2, 3, 4]] * 30
    assert module._places(5000, 9).shape == (5000, 1)
    monkeypatch.setattr(module, "ROWS", 60)
    x, network = made.images((16, 16), 10), student(**VIT)
    few = ranks(network, x)
    assert [own.most for own in few.cells] == [24, 24]
    assert few.cells != ranks(network, x.flip(0)).cells  # other cells of each image
    monkeypatch.setattr(module, "ROWS", 20)
    assert [own.most for own in ranks(network, x).cells] == [19, 19]


def test_nothing_is_changed_by_the_asking() -> None:
    network, x = student(**VIT).train(), made.images((16, 16), 10)
    before = state(network)
    found = ranks(network, x, most=2)
    torch.testing.assert_close(state(network), before, rtol=0, atol=0)
    assert len(found.sites) == 2
    again = ranks(network, x, batch_size=3, most=2)
    for whole, parts in zip(
        (found.pooled, *found.cells), (again.pooled, *again.cells), strict=True
    ):
        assert parts == pytest.approx(whole, rel=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert ranks(network, x, most=2) == found
