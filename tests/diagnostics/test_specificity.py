"""Weights that follow the image, and weights that do not, looked up one by one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from timm.layers import CondConv2d
from torch import Tensor, nn

from distill.diagnostics import UndefinedError
from distill.diagnostics.specificity import Layer, specificity
from distill.diagnostics.tapped import tapped
from distill.models.network import Network
from tests.diagnostics.test_equivariance import VIT, state, student
from tests.models import made

DYNAMIC = VIT | {"mixer": "dynamic_conv"}


def by_hand(weights: list[Tensor]) -> float:
    """Unbiased variance over mean square, summed number by number."""
    varied = square = 0.0
    for numbers in zip(*(w.double().flatten().tolist() for w in weights), strict=True):
        mean = sum(numbers) / len(numbers)
        varied += sum((number - mean) ** 2 for number in numbers) / (len(numbers) - 1)
        square += sum(number**2 for number in numbers) / len(numbers)
    return varied / square


def maps(network: Network, images: Tensor, layer: Layer) -> list[Tensor]:
    """Of each image by itself, between cells alone."""
    site = next(s for s in network.anatomy((16, 16)).attention if s.name == layer.name)
    copied, found = tapped(network, [layer.name]), []
    for image in images:
        (whole,) = copied(image[None]).features[layer.name].double()  # type: ignore[index]
        cells = whole[:, site.prefix :, site.prefix :]
        found.append(cells / cells.sum(dim=-1, keepdim=True))
    return found


def kernels(network: Network, images: Tensor, layer: Layer) -> list[Tensor]:
    """Of each image by itself, from what the layer was given."""
    module: Any = copy.deepcopy(network).backbone.get_submodule(layer.name)
    given = tapped(network, [layer.name.replace("attention", "norm1")])
    found = []
    for image in images:
        (grid,) = given(image[None]).features.values()  # type: ignore[union-attr]
        found.append(module.kernels(grid.flatten(2).transpose(1, 2))[0])
    return found


@pytest.mark.parametrize(
    "keys",
    [VIT, VIT | {"pool": "cls"}, {"model": "swin_tiny", "patch_size": 2, "window": 2}],
    ids=["mean", "cls", "windows"],
)
def test_of_attention_it_is_that_of_the_maps(keys: dict[str, object]) -> None:
    network, images = student(**keys), made.images((16, 16), 5)
    found = specificity(network, images)
    assert [layer.name for layer in found] == [s.name for s in network.anatomy((16, 16)).attention]
    for layer in found[:3]:
        assert layer.kind == "attention"
        expected = by_hand(maps(network, images, layer))
        assert layer.value == pytest.approx(expected, rel=1e-4)
        assert 0.001 < layer.value < 1


def test_of_a_dynamic_convolution_it_is_that_of_its_kernels() -> None:
    network, images = student(**DYNAMIC), made.images((16, 16), 5)
    found = specificity(network, images)
    assert [layer.kind for layer in found] == ["kernels", "kernels"]
    for layer in found:
        assert layer.value == pytest.approx(
            by_hand(kernels(network, images, layer)), rel=1e-4, abs=1e-7
        )
        assert layer.value > 1e-3


@pytest.mark.parametrize(
    ("keys", "named", "weight"),
    [(DYNAMIC, "mixture.2", 1e-20), (VIT, "qkv", 1e-12)],
    ids=["dynamic", "attention"],
)
def test_weights_that_are_made_constant_do_not_vary(
    keys: dict[str, object], named: str, weight: float
) -> None:
    network, images = student(**keys), made.images((16, 16), 5)
    assert min(layer.value for layer in specificity(network, images)) > 1e-3
    for name, parameter in network.named_parameters():
        if f"{named}.weight" in name:
            nn.init.zeros_(parameter)  # whatever the image, the same mixture, or the same map
    found = specificity(network, images)
    assert all(layer.value < weight and layer.square.all() for layer in found)


def test_a_plain_convolutional_network_has_exactly_none() -> None:
    network, images = student(model="resnet8"), made.images((16, 16), 3)
    found = specificity(network, images)
    wide = [
        name
        for name, module in network.backbone.named_modules()
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3)
    ]
    assert [layer.name for layer in found] == wide  # and no 1 x 1
    for layer in found:
        kernel = network.backbone.get_submodule(layer.name).weight.double()
        assert (layer.kind, layer.value) == ("fixed", 0)
        assert torch.allclose(layer.square, kernel.square().sum().expand(3))


def test_of_a_hybrid_each_layer_is_told() -> None:
    network = student(**VIT | {"stem": "conv", "position": "conv"})
    found = specificity(network, made.images((16, 16), 5))
    kinds = {layer.name: layer.kind for layer in found}
    assert kinds == {
        "stem.0": "fixed", "stem.3": "fixed", "blocks.0.attention@attention": "attention",
        "local.conv": "fixed", "blocks.1.attention@attention": "attention",
    }  # fmt: skip
    assert [layer.depth for layer in found] == sorted(layer.depth for layer in found)
    assert all((layer.value > 0) == (layer.kind == "attention") for layer in found)


class Conditional(nn.Module):
    """Kernels by image as timm has them, behind an ordinary convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.route = nn.Linear(6, 4)
        self.mixed = CondConv2d(6, 8, 3, padding=1, num_experts=4)
        self.head = nn.Linear(8, made.CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        x = self.mixed(x, self.route(x.mean(dim=(2, 3))).sigmoid())
        logits: Tensor = self.head(x.mean(dim=(2, 3)))
        return logits


@pytest.mark.parametrize("count", [3, 5])  # of 5 in batches of 2 the last comes alone
def test_kernels_by_image_are_found_whoever_wrote_them(count: int) -> None:
    torch.manual_seed(0)
    backbone, images = Conditional(), made.images((16, 16), count)
    network = made.wrapped(backbone, "mine", (16, 16)).eval()
    found = specificity(network, images, batch_size=2)
    assert [(layer.name, layer.kind) for layer in found] == [
        ("stem", "fixed"),
        ("mixed", "kernels"),
    ]
    x = backbone.stem(network.normalised(images))
    routes = backbone.route(x.mean(dim=(2, 3))).sigmoid()
    expected = by_hand([r @ backbone.mixed.weight for r in routes])
    assert found[1].value == pytest.approx(expected, rel=1e-4)


def test_the_same_image_again_does_not_vary() -> None:
    images = made.images((16, 16), 1).expand(4, -1, -1, -1)
    assert all(layer.value < 1e-12 for layer in specificity(student(**VIT), images))


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("mlp", "neither attention nor convolutions"),
        ("row_gru", "neither attention nor convolutions"),
        ("timm/xcit_nano_12_p16_224", "attention is not between"),  # its channels attend
    ],
)
def test_where_nothing_mixes_cells_it_is_not_defined(model: str, said: str) -> None:
    network = made.shared(model) if "/" in model else student(model=model)
    with pytest.raises(UndefinedError, match=said):
        specificity(network, made.images() if "/" in model else made.images((16, 16)))
    with pytest.raises(UndefinedError, match="of one image"):
        specificity(network, made.images(count=1))


def test_nothing_is_changed_by_the_asking() -> None:
    network, images = student(**DYNAMIC | {"drop": 0.5}).train(), made.images((16, 16), 5)
    before = state(network)
    found = specificity(network, images)
    torch.testing.assert_close(state(network), before, rtol=0, atol=0)
    assert network.training
    assert network(images).features is None
    assert not any(module._forward_hooks for module in network.modules())
    for whole, parts in zip(found, specificity(network, images, batch_size=2), strict=True):
        assert torch.allclose(whole.varied, parts.varied, rtol=1e-4)
        assert torch.allclose(whole.square, parts.square, rtol=1e-5)
