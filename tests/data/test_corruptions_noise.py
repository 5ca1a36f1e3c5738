"""Random numbers are those of the hash, and noise has the distribution that its formula says."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from distill.data.corruptions import draws, noise
from distill.data.hashing import hash64

GREY = torch.full((4, 3, 64, 64), 102 / 255, dtype=torch.float64)
KEY = draws.keys(0, "test", 1, torch.arange(4))


def test_numbers_are_those_of_the_hash() -> None:
    ids = torch.tensor([0, 5, -3, 49_999, 2**40])
    keys = draws.keys(-7, "fog", 2, ids)
    assert np.array_equal(keys.numpy().view(np.uint64), hash64(-7, *b"fog", 2, ids.numpy()))
    for row, key in zip(draws.uniform(keys, 3, 3, stream=4), keys.tolist(), strict=True):
        words = hash64(int(hash64(key, 4)), np.arange(5)).view(np.int32).astype(np.float64)
        assert np.array_equal(row.flatten(), (words[:9] + 2.0**31 + 0.5) / 2.0**32)


def test_uniform_and_normal_numbers_are_what_they_are_called() -> None:
    keys = draws.keys(1, "any", 1, torch.arange(50))
    uniform, normal = draws.uniform(keys, 41, 21), draws.normal(keys, 41, 21)
    assert uniform.shape == normal.shape == (50, 41, 21)
    assert stats.kstest(uniform.flatten(), "uniform").pvalue > 1e-3
    assert stats.kstest(normal.flatten(), "norm").pvalue > 1e-3
    for drawn in (uniform, normal):
        other = drawn.roll(1, 0), drawn.roll(1, 1), draws.uniform(keys, 41, 21, stream=1)
        for one in other:  # 4 standard errors of 43,050 numbers
            assert abs(np.corrcoef(drawn.flatten(), one.flatten())[0, 1]) < 0.02
    assert torch.equal(normal, draws.normal(keys, 861).view(50, 41, 21))


@pytest.mark.parametrize("sigma", [0.04, 0.38])
def test_gaussian_noise_has_its_deviation(sigma: float) -> None:
    added = (noise.gaussian_noise(GREY, KEY, sigma) - GREY) / sigma
    assert abs(added.mean()) < 4 / math.sqrt(added.numel())
    assert abs(added.var() - 1) < 4 * math.sqrt(2 / added.numel())


def test_speckle_noise_grows_with_the_value() -> None:
    added = noise.speckle_noise(GREY, KEY, 0.3) - GREY
    assert torch.allclose(added / 0.3 / GREY, noise.gaussian_noise(GREY, KEY, 1.0) - GREY)


@pytest.mark.parametrize("photons", [3, 60, 500])
@pytest.mark.parametrize("level", [0, 1, 102, 255])
def test_shot_noise_is_poisson(photons: int, level: int) -> None:
    values = noise.shot_noise(torch.full_like(GREY, level / 255), KEY, photons) * photons
    counts = values.round().long().flatten()
    assert torch.allclose(values.flatten(), counts.double(), atol=1e-9)
    mean = photons * level / 255
    if level == 0:
        assert not counts.any()
        return
    assert abs(counts.double().mean() - mean) < 4 * math.sqrt(mean / len(counts))
    found = np.bincount(counts)
    expected = stats.poisson.pmf(np.arange(len(found)), mean) * len(counts)
    often = expected > 5
    # The rest are one cell more.
    found = np.append(found[often], found[~often].sum())
    expected = np.append(expected[often], len(counts) - expected[often].sum())
    assert ((found - expected) ** 2 / expected).sum() < stats.chi2.isf(1e-4, often.sum())


@pytest.mark.parametrize("amount", [0.01, 0.27])
def test_impulses_are_as_often_black_as_white(amount: float) -> None:
    spoilt = noise.impulse_noise(GREY, KEY, amount)
    for value in (0, 1):
        share = (spoilt == value).double().mean()
        error = math.sqrt(amount / 2 * (1 - amount / 2) / spoilt.numel())
        assert abs(share - amount / 2) < 4 * error
    assert (spoilt[(spoilt > 0) & (spoilt < 1)] == 102 / 255).all()
