"""Costs equal the published ones."""

from __future__ import annotations

import pytest

from distill import models, recipe
from distill.models import cost

# Parameters and multiply-adds of one image at 224 px, as torchvision documents its weights.
PUBLISHED = {
    "torchvision/resnet18": (11_689_512, 1.814e9),
    "torchvision/vit_b_16": (86_567_656, 17.564e9),
    "torchvision/mobilenet_v3_small": (2_542_856, 0.057e9),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_flops_are_the_published_ones(name: str) -> None:
    network = models.build_student(
        recipe.Model(model=name, weights=None),
        classes=tuple(map(str, range(1000))),
        image_size=224,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
    )
    parameters, multiply_adds = PUBLISHED[name]
    assert cost.parameters(network) == parameters
    assert cost.flops(network, 224) == pytest.approx(2 * multiply_adds, rel=0.01)


def test_counting_leaves_the_network_as_it_was() -> None:
    network = models.build_student(
        recipe.Model(model="resnet8", weights=None),
        classes=("a", "b"),
        image_size=8,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
    )
    assert cost.flops(network, 8) > 0
    assert network.training
    assert all(p.requires_grad and p.device.type == "cpu" for p in network.parameters())
