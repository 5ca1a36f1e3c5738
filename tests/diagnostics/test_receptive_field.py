"""Fields of convolutions that are known, and what networks of each kind may depend on."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill.diagnostics import UndefinedError
from distill.diagnostics.receptive_field import Field, radius, receptive_fields, share
from distill.diagnostics.tapped import opened, tapped
from distill.models.network import Network
from tests.diagnostics.test_equivariance import VIT, state, student
from tests.models import made


def convolutions(count: int, side: int, stride: int = 1, *, padding: int = 0) -> Network:
    """A row of equal convolutions with the same weight everywhere, and a classifier."""
    layers = [nn.Conv2d(3, 3, side, stride, padding, bias=False) for _ in range(count)]
    for layer in layers:
        nn.init.constant_(layer.weight, 0.1)
    row = nn.Sequential(*layers)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, made.CLASSES))
    return made.wrapped(nn.Sequential(row, head), "row", (16, 16)).eval()


def test_nothing_but_its_own_pixel() -> None:
    found = receptive_fields(convolutions(3, 1), made.images((16, 16)))
    assert len(found) == 3
    for one in found:
        assert one.site.grid == (16, 16)
        assert one.radius.tolist() == one.relative.tolist() == [0, 0]
        assert one.share == 1 / 256
        assert one.field[8, 8] == one.field.sum() == 1  # the one behind the middle


@pytest.mark.parametrize("side", [3, 5])
def test_a_row_of_equal_convolutions(side: int) -> None:
    """Each adds the variance of its own extent, (side² − 1) / 12 along both axes."""
    found = receptive_fields(convolutions(3, side, padding=side // 2), made.images((17, 16)))
    assert [one.site.grid for one in found] == [(17, 16)] * 3
    for n, one in enumerate(found, start=1):
        assert one.radius.tolist() == pytest.approx([math.sqrt(n * (side**2 - 1) / 6)] * 2)
        reach = n * (side // 2)
        inside = one.field[8 - reach : 9 + reach, 8 - reach : 9 + reach]
        assert bool((inside > 0).all())
        assert float(inside.sum()) == pytest.approx(1)
        line = torch.ones(side, dtype=torch.float64)
        for _ in range(n - 1):  # the n-fold convolution of a box with itself
            line = nn.functional.conv1d(
                line[None, None], torch.ones(1, 1, side, dtype=torch.float64), padding=side - 1
            )[0, 0]
        assert torch.allclose(inside, line[:, None] * line / line.sum() ** 2)


def test_patches() -> None:
    """The middle of four cells a side is the third, pixels 8 to 11."""
    (found,) = receptive_fields(convolutions(1, 4, 4), made.images((16, 16)))
    expected = torch.zeros(16, 16, dtype=torch.float64)
    expected[8:12, 8:12] = 1 / 16
    assert torch.allclose(found.field, expected)
    assert found.radius.tolist() == pytest.approx([math.sqrt(2.5)] * 2)
    assert found.share == 16 / 256  # 15.2 pixels, of whole ones 16


def test_pure_measures() -> None:
    flat = torch.ones(2, 6, 10, dtype=torch.float64)
    rows, columns = torch.meshgrid(torch.arange(6.0), torch.arange(10.0), indexing="ij")
    expected = ((rows - 3) ** 2 + (columns - 4.5) ** 2).mean().sqrt()
    assert radius(flat, (3, 4.5)).tolist() == pytest.approx([float(expected)] * 2)
    assert radius(7 * flat[0], (3, 4.5)) == pytest.approx(float(expected))
    assert bool(radius(0 * flat, (3, 4.5)).isnan().all())
    assert share(flat[0]) == 57 / 60
    assert share(flat[0], 0.5) == 0.5
    peaks = torch.zeros(10, 10)
    peaks[3, 4], peaks[7, 1], peaks[0, 0] = 90, 4, 6
    assert share(peaks) == 2 / 100
    assert share(peaks, 0.9) == 1 / 100


def by_hand(network: Network, x: Tensor, name: str) -> Tensor:
    """|∂ Σ_c F_c(middle) / ∂ x| summed over colours, each image by itself."""
    copied, gradients = tapped(network, [name]), []
    for image in x.clone().requires_grad_():
        grid = copied(image[None]).features[name][0]
        middle = grid[:, grid.shape[1] // 2, grid.shape[2] // 2].sum()
        gradients += torch.autograd.grad(middle, image)
    return torch.stack(gradients).abs().sum(dim=1).double()


@pytest.mark.parametrize("keys", [{"model": "resnet8"}, VIT | {"pool": "cls"}])
def test_against_the_definition(keys: dict[str, Any]) -> None:
    network, x = student(**keys), made.images((16, 16), 3)
    found = receptive_fields(network, x)
    assert [one.site for one in found] == list(opened(network, x)[1])
    place = torch.arange(16, dtype=torch.float64)
    for one in found:
        g = by_hand(network, x, one.site.name)
        n = one.site.grid[0]
        centre = (n // 2 + 0.5) * 16 / n - 0.5
        squares = (place[:, None] - centre) ** 2 + (place - centre) ** 2
        mass = g.sum(dim=(1, 2))
        expected = ((g * squares).sum(dim=(1, 2)) / mass).sqrt()
        assert torch.allclose(one.radius, expected, rtol=1e-4)
        assert torch.allclose(one.relative, expected / squares.mean().sqrt(), rtol=1e-4)
        field = (g / mass[:, None, None]).mean(dim=0)
        assert torch.allclose(one.field, field, rtol=1e-3, atol=1e-6)
        assert one.share == pytest.approx(share(field), abs=2 / 256)


def extent(one: Field) -> tuple[int, int]:
    """Rows and columns from the first to the last pixel that matters."""
    rows, columns = (one.field > 0).nonzero().T
    return int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1


def test_a_cnn_sees_more_from_layer_to_layer() -> None:
    found = receptive_fields(student(model="resnet20"), made.images((48, 48)))
    means = [float(one.radius.mean()) for one in found]
    assert means == sorted(means)
    assert means[-1] > 3 * means[0]
    # A stem and two layers a block: 3 x 3 cells each, of twice as many pixels in the second stage.
    sides = [extent(one) for one in found[:6]]
    assert sides == [(n, n) for n in (7, 11, 15, 21, 29, 37)]
    assert extent(found[-1]) == (48, 48)


def test_a_vit_sees_everything_from_the_first_block() -> None:
    x = made.images((16, 16))
    first = receptive_fields(student(**VIT), x)[0]
    assert first.site.name == "blocks.0"
    assert bool((first.field > 0).all())
    copied = tapped(student(**VIT), ["blocks.0"])
    x.requires_grad_()
    features = copied(x).features
    assert features is not None
    for token in features["blocks.0"].flatten(2).unbind(dim=2):
        (gradient,) = torch.autograd.grad(token.sum(), x, retain_graph=True)
        patches = nn.functional.avg_pool2d(gradient.abs().sum(dim=1), 4)
        assert bool((patches > 1e-3 * patches.max()).all())


def test_a_window_sees_nothing_outside() -> None:
    """The first block's windows are 4 x 4 patches of a pixel; the second's are shifted by 2."""
    keys = {"depth": 3, "patch_size": 1, "attention": "window", "window": 4, "position": "none"}
    unshifted, shifted, *_ = receptive_fields(student(**VIT | keys), made.images((16, 16)))
    expected = torch.zeros(16, 16, dtype=torch.bool)
    expected[8:12, 8:12] = True  # the middle one is its first
    assert torch.equal(unshifted.field > 0, expected)
    expected[4:12, 4:12] = True  # a shifted window has parts of four
    assert torch.equal(shifted.field > 0, expected)


@pytest.mark.parametrize(
    "model", ["timm/swin_tiny_patch4_window7_224", "timm/pvt_v2_b0", "torchvision/mobilenet_v2",
              "timm/mixer_s32_224", "timm/xcit_nano_12_p16_224"],
)  # fmt: skip
def test_families(model: str) -> None:
    check(made.shared(model), made.images())


@pytest.mark.soak
@pytest.mark.parametrize(
    "model", [m for m in made.FAMILIES if "swinv2" not in m and "v2_t" not in m]
)
def test_all_families(model: str) -> None:
    check(made.shared(model), made.images())


def check(network: Network, x: Tensor) -> None:
    found = receptive_fields(network, x)
    depths = [one.site.depth for one in found]
    assert depths == sorted(depths)
    for one in found:
        assert one.field.shape == x.shape[-2:]
        assert one.field.dtype == torch.float64
        assert float(one.field.sum()) == pytest.approx(1)
        assert bool((one.radius > 0).all())
        assert 0 < one.share <= 0.95 + 1 / one.field.numel()


def test_a_sum_that_says_nothing() -> None:
    """Every branch of Swin v2 ends in a layer norm, which begins with the same weights."""
    with pytest.raises(UndefinedError, match="whose sum depends on the image"):
        receptive_fields(made.shared("timm/swinv2_tiny_window8_256"), made.images())
    with pytest.raises(UndefinedError, match="no grid"):
        receptive_fields(student(model="row_gru"), made.images((16, 16)))
    dead = convolutions(3, 3, padding=1)
    for parameter in dead.backbone.get_submodule("0.1").parameters():
        nn.init.zeros_(parameter)
    found = receptive_fields(dead, made.images((16, 16)))
    assert [one.site.name for one in found] == ["0.0"]


def test_pixels_are_those_of_the_images_given() -> None:
    network = convolutions(1, 2, 2)
    network.input_size = 16
    (found,) = receptive_fields(network, made.images((32, 32)))
    assert found.field.shape == (32, 32)
    assert found.site.grid == (8, 8)
    # Cell 4 of 8 is pixels 16 to 19 of 32; to make them half as many mixes in their neighbours.
    assert float(found.field[16:20, 16:20].sum()) > 0.7
    assert bool((found.radius > math.sqrt(2.5)).all())


def test_nothing_is_changed_by_the_asking() -> None:
    network, x = student(**VIT | {"drop": 0.5}).train(), made.images((16, 16), 5)
    before, cudnn = state(network), torch.backends.cudnn.enabled
    with torch.no_grad():
        found = receptive_fields(network, x)
    torch.testing.assert_close(state(network), before, rtol=0, atol=0)
    assert torch.backends.cudnn.enabled == cudnn
    assert not x.requires_grad
    assert all(parameter.grad is None for parameter in network.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        again = receptive_fields(network, x)
    for whole, parts, same in zip(
        found, receptive_fields(network, x, batch_size=2), again, strict=True
    ):
        assert torch.allclose(parts.field, whole.field, rtol=1e-4, atol=1e-8)
        assert torch.allclose(parts.radius, whole.radius, rtol=1e-4)
        assert torch.equal(same.field, whole.field)
