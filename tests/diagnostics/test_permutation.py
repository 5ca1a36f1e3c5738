"""Parts change places and nothing else; who does not look at places does not notice."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distill import models, recipe
from distill.data import controls
from distill.data.hashing import hash64
from distill.diagnostics import UndefinedError
from distill.diagnostics.permutation import correct, patches, pixels
from distill.models.network import Network
from distill.types import Outputs

SIZES = [(8, 8, 2), (8, 8, 8), (28, 28, 8), (30, 22, 4), (9, 5, 3), (7, 7, 2), (16, 16, 1)]


def images(height: int, width: int, count: int = 4) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1))


def shuffled_plainly(image: np.ndarray, sample: int, grid: int, seed: int) -> np.ndarray:
    """One patch after the other."""
    _, height, width = image.shape
    rows, columns = height // grid, width // grid
    top, left = (height - rows * grid) // 2, (width - columns * grid) // 2
    corners = [(top + i * rows, left + j * columns) for i in range(grid) for j in range(grid)]
    salt = int.from_bytes(b"patches", "big")
    keys = [int(hash64(seed, salt, grid, sample, place)) for place in range(grid**2)]
    order = sorted(range(grid**2), key=keys.__getitem__)
    found = image.copy()
    for (y, x), source in zip(corners, order, strict=True):
        v, u = corners[source]
        found[:, y : y + rows, x : x + columns] = image[:, v : v + rows, u : u + columns]
    return found


@pytest.mark.parametrize(("height", "width", "grid"), SIZES)
def test_patches_change_places_whole(height: int, width: int, grid: int) -> None:
    x, ids = images(height, width), torch.tensor([5, 0, 123_456, 7])
    given = x.clone()
    found = patches(x, ids, grid, seed=3)
    expected = [
        shuffled_plainly(image.numpy(), int(sample), grid, 3)
        for image, sample in zip(x, ids, strict=True)
    ]
    assert np.array_equal(found.numpy(), np.stack(expected))
    assert torch.equal(found.flatten(1).sort().values, x.flatten(1).sort().values)  # a bijection
    assert torch.equal(x, given)
    assert torch.equal(found, x) == (grid == 1)


def test_what_does_not_fit_stays_as_a_border() -> None:
    x = images(30, 22)
    found = patches(x, torch.arange(4), 8, seed=0)  # patches of 3 x 2: 24 x 16 in the middle
    inside = torch.zeros(30, 22, dtype=torch.bool)
    inside[3:27, 3:19] = True
    assert torch.equal(found[..., ~inside], x[..., ~inside])
    assert (found[..., inside] != x[..., inside]).float().mean() > 0.9


def test_an_image_has_a_permutation_of_its_own() -> None:
    x = images(12, 12, count=1).expand(50, -1, -1, -1)
    ids = torch.arange(50)
    found = patches(x, ids, 4)
    assert len({image.numpy().tobytes() for image in found}) == 50
    assert torch.equal(patches(x[7:9], ids[7:9], 4), found[7:9])  # whatever else is in the batch
    assert torch.equal(patches(x, ids, 4), found)
    assert not torch.equal(patches(x, ids, 4, seed=1), found)


def test_all_permutations_are_equally_probable() -> None:
    count = 24_000
    corners = torch.arange(4.0).reshape(1, 1, 2, 2).expand(count, -1, -1, -1)
    found = patches(corners, torch.arange(count), 2).flatten(1).to(torch.int64)
    seen = Counter(map(tuple, found.tolist()))
    assert len(seen) == 24
    chi_square = sum((n - 1000) ** 2 / 1000 for n in seen.values())
    assert chi_square < 49.7  # 0.1 % of all seeds exceed it, with 23 degrees of freedom


def test_images_that_are_too_small() -> None:
    with pytest.raises(UndefinedError, match="its images of 6 x 9 px have no 8 x 8 patches"):
        patches(images(6, 9), torch.arange(4), 8)


def test_pixels_are_those_of_the_recipes_control() -> None:
    x = images(6, 9)
    found = pixels(x, seed=5)
    stored = (x * 255).to(torch.uint8)
    control = controls.permuted_pixels(stored.permute(0, 2, 3, 1).numpy(), seed=5)
    assert np.array_equal(pixels(stored.float(), seed=5).permute(0, 2, 3, 1).numpy(), control)
    places = torch.arange(54.0).reshape(1, 1, 6, 9).expand(2, 3, -1, -1)
    moved = pixels(places, seed=5)
    assert (moved == moved[0, 0]).all()  # the same in all images and channels
    assert torch.equal(moved[0, 0].flatten().sort().values, torch.arange(54.0))
    assert not torch.equal(found, pixels(x, seed=6))


class Bag(nn.Module):
    """The mean of what its patches say, each by itself."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 16, side, side)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Outputs:
        return Outputs(self.head(self.embed(x).relu().mean(dim=(2, 3))))


def test_a_bag_of_patches_does_not_notice() -> None:
    torch.manual_seed(0)
    network, x, ids = Bag(4).double(), images(16, 16, count=200).double(), torch.arange(200)
    labels = network(x).logits.argmax(dim=1)
    for grid in (2, 4):  # patches of its own size, and of several
        assert (network(patches(x, ids, grid)).logits - network(x).logits).abs().max() <= 1e-12
        assert correct(network, x, labels, ids, grid=grid).all()
    for grid in (8, None):
        assert 0 < correct(network, x, labels, ids, grid=grid).double().mean() < 1


def vit(position: str) -> Network:
    torch.manual_seed(0)
    model = recipe.Model(
        model="vit", width=32, depth=3, heads=4, patch_size=4, position=position, pool="mean"
    )
    built = models.build_student(
        model, classes=tuple("abcde"), image_size=16, mean=(0.5,) * 3, std=(0.25,) * 3
    )
    for name, parameter in built.named_parameters():
        if name.endswith("head.weight") or "position" in name:
            nn.init.normal_(parameter, std=0.5)
    return built.eval()


@pytest.mark.parametrize("position", ["none", "learned", "sincos", "conv"])
def test_a_transformer_knows_places_by_its_positions_alone(position: str) -> None:
    network, x, ids = vit(position), images(16, 16), torch.arange(4)
    with torch.no_grad():
        before, after = network(x).logits, network(patches(x, ids, 4)).logits
        finer = network(patches(x, ids, 8)).logits
    assert before.std() > 0.01
    if position == "none":
        assert (after - before).abs().max() <= 1e-5
    else:
        assert (after - before).abs().max() >= 1e-3
    assert (finer - before).abs().max() >= 1e-3  # inside of patches everyone knows places


def test_correct_is_what_it_says() -> None:
    network, x = vit("learned"), images(16, 16, count=30)
    ids = torch.arange(30) * 7
    labels = torch.arange(30) % 5
    before: dict[str, Any] = {name: t.clone() for name, t in network.state_dict().items()}
    with torch.no_grad():
        by_patches = network(patches(x, ids, 2, seed=1)).logits.argmax(dim=1) == labels
        by_pixels = network(pixels(x, seed=1)).logits.argmax(dim=1) == labels
    for size in (1, 7, 64):
        found = correct(network, x, labels, ids, grid=2, seed=1, batch_size=size)
        assert torch.equal(found, by_patches)
        found = correct(network, x, labels, ids, grid=None, seed=1, batch_size=size)
        assert torch.equal(found, by_pixels)
    assert found.dtype == torch.bool
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(correct(network, x, labels, ids, grid=2, seed=1), by_patches)
    assert all(torch.equal(t, before[name]) for name, t in network.state_dict().items())
    assert not network.training
    assert network(x).logits.requires_grad
    assert math.prod(found.shape) == 30
