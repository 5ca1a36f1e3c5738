"""Spectra of grids that have a known one, and of networks' features."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from distill.diagnostics import UndefinedError
from distill.diagnostics.spectrum import amplitude, frequencies, spectra, variance
from distill.diagnostics.tapped import opened
from tests.diagnostics.test_equivariance import VIT, state, student
from tests.models import made

SIZES = [(8, 8), (7, 7), (2, 2), (3, 3), (8, 12), (14, 7)]


def noise(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def blurred(x: Tensor) -> Tensor:
    """The mean of 3 x 3 cells, around the edges."""
    for dim in (2, 3):
        x = sum(x.roll(shift, dim) for shift in (-1, 0, 1)) / 3
    return x


def impulse(height: int, width: int) -> Tensor:
    """What has all frequencies alike."""
    x = torch.zeros(1, 1, height, width, dtype=torch.float64)
    x[..., height // 2, width // 3] = 1
    return x


def test_constant_maps_do_not_vary() -> None:
    x = torch.full((2, 3, 6, 6), 5.0)
    assert not variance(x).any()
    assert (amplitude(x)[:, 1:] < -10).all()


def test_variance_is_over_cells_alone() -> None:
    x = noise(5, 4, 6, 9)
    expected = [sum(torch.var(channel) for channel in image) / 4 for image in x]
    assert torch.allclose(variance(x), torch.stack(expected))
    moved = x * 3 + noise(5, 4)[:, :, None, None]
    assert torch.allclose(variance(moved), 9 * variance(x))


@pytest.mark.parametrize("size", SIZES)
def test_an_impulse_is_flat_and_a_box_takes_what_it_must(size: tuple[int, int]) -> None:
    x, at = impulse(*size), math.pi * frequencies(size)
    assert amplitude(x).shape == (1, min(size) // 2 + 1) == (1, len(at))
    assert amplitude(x).abs().max() < 1e-9
    longer = torch.tensor([round(float(w) * max(size) / (2 * math.pi)) for w in at])
    there = 2 * math.pi * longer.double() / max(size)  # the nearest that the longer side has
    box = [(1 + 2 * torch.cos(w)).abs() / 3 for w in (at, there)]
    expected = (box[0] * box[1] + 1e-6).log() - math.log(1 + 1e-6)
    if min(size) > 2:  # else the box is larger than the grid
        assert torch.allclose(amplitude(blurred(x))[0], expected, atol=1e-6)
        assert (expected[1:] < 0).all()


def test_the_highest_frequency_of_a_blur_by_hand() -> None:
    assert float(amplitude(blurred(impulse(8, 8)))[0, -1]) == pytest.approx(
        -2 * math.log(3), abs=1e-4
    )
    board = (-1.0) ** (torch.arange(8)[:, None] + torch.arange(8))
    x = (1 + board)[None, None]  # as much of the highest as of the lowest
    assert float(amplitude(x)[0, -1]) == pytest.approx(0, abs=1e-9)


def test_white_noise_is_flat() -> None:
    """But for ½ ln 2 between the ends: complex coefficients are less often small."""
    found = amplitude(noise(64, 64, 8, 8)).mean(dim=0)
    complex_ones = 0.5 * math.log(2)
    expected = torch.tensor([0, *[complex_ones] * 3, 0], dtype=torch.float64)
    assert (found - expected).abs().max() < 0.06  # four standard errors
    assert amplitude(blurred(noise(64, 64, 8, 8)))[:, -1].mean() < -2


def test_frequencies() -> None:
    assert frequencies((8, 8)).tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert frequencies((7, 7)).tolist() == pytest.approx([0, 2 / 7, 4 / 7, 6 / 7])
    assert frequencies((8, 4)).tolist() == [0, 0.5, 1]
    for size in SIZES:
        assert float(frequencies(size)[-1]) == pytest.approx(
            1 if min(size) % 2 == 0 else 1 - 1 / min(size)
        )


@pytest.mark.parametrize("n", [8, 7])
def test_the_published_curve(n: int) -> None:
    """The shifted transform's diagonal from its middle on; the code has no end at π."""
    x = blurred(noise(3, 5, n, n)) + 2
    logs = (torch.fft.fft2(x).abs() + 1e-6).log()
    middle = torch.fft.fftshift(logs, dim=(2, 3)).mean(dim=1)
    diagonal = torch.diagonal(middle, dim1=1, dim2=2)[:, n // 2 :]
    expected = diagonal - diagonal[:, :1]
    found = amplitude(x)
    assert torch.allclose(found[:, : expected.shape[1]], expected)
    assert found.shape[1] == expected.shape[1] + (n % 2 == 0)


def test_networks() -> None:
    x = made.images((16, 16), 6)
    for network in (student(model="resnet8"), student(**VIT)):
        found = spectra(network, x)
        copied, sites = opened(network, x)
        with torch.no_grad():
            features = copied(x).features
        assert features is not None
        assert [one.site for one in found] == list(sites)
        for one in found:
            grid = features[one.site.name]
            assert torch.allclose(one.variance, variance(grid))
            assert torch.allclose(one.amplitude, amplitude(grid))
            assert torch.equal(one.frequency, frequencies(one.site.grid))
            assert one.amplitude.shape == (6, len(one.frequency))


def test_sites_of_one_cell_are_left_out() -> None:
    deep = spectra(made.network("torchvision/resnet18", (32, 32)), made.images((32, 32)))
    assert [one.site.grid[0] for one in deep] == [16, 8, 8, 4, 4, 2, 2]
    flat = student(**{**VIT, "patch_size": 16})
    with pytest.raises(UndefinedError, match="no grid of more than one"):
        spectra(flat, made.images((16, 16)))


def test_nothing_is_changed_by_the_asking() -> None:
    network, x = student(**VIT).train(), made.images((16, 16), 5)
    before = state(network)
    found = spectra(network, x)
    torch.testing.assert_close(state(network), before, rtol=0, atol=0)
    for whole, parts in zip(found, spectra(network, x, batch_size=2), strict=True):
        assert torch.allclose(whole.amplitude, parts.amplitude, atol=1e-4)
        assert torch.allclose(whole.variance, parts.variance, rtol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        again = spectra(network, x)
    assert all(torch.equal(a.amplitude, b.amplitude) for a, b in zip(found, again, strict=True))
