"""Any network becomes a backbone with maps at several strides, and stays what it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign

from distill.errors import IncompatibleError
from distill.models.network import Network
from distill.models.pyramid import Pyramid, PyramidBackbone, pyramid
from distill.models.taps import classifier
from tests.models import made

Student = Callable[..., Network]
VIT: dict[str, Any] = {"model": "vit", "width": 24, "depth": 3, "heads": 2, "patch_size": 4}


def shapes(maps: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(one.shape) for name, one in maps.items()}


def halved(count: int, channels: int, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    """Four maps, each half of the one before, rounded up."""
    grids = [(-(-rows // 2**i), -(-columns // 2**i)) for i in range(4)]
    return {str(i): (count, channels, *grid) for i, grid in enumerate(grids)}


@pytest.mark.parametrize("size", [32, 28])
def test_one_grid_gives_four_maps(student: Student, size: int) -> None:
    found = pyramid(student(**VIT, image_size=size), channels=8)
    assert isinstance(found.neck, Pyramid)
    assert (found.out_channels, found.strides) == (8, (1, 2, 4, 8))
    maps = found(made.images((size, size)))
    assert list(maps) == ["0", "1", "2", "3"]
    assert shapes(maps) == halved(2, 8, size, size)  # 28 px: 7 cells, and 4 of twice the stride


def test_stages_give_a_map_each(student: Student) -> None:
    found = pyramid(student("resnet20"), channels=8)
    assert isinstance(found.neck, FeaturePyramidNetwork)
    assert found.strides == (1, 2, 4)
    for rows, columns in ((16, 16), (24, 40)):
        expected = {str(i): (2, 8, rows // 2**i, columns // 2**i) for i in range(3)}
        maps = found(made.images((rows, columns)))
        assert list(maps) == ["0", "1", "2"]
        assert shapes(maps) == expected


def test_windows_give_a_map_a_stage(student: Student) -> None:
    found = pyramid(student("swin_tiny", image_size=32), channels=8)
    assert found.strides == (1, 2, 4, 8)
    assert shapes(found(made.images((32, 32)))) == halved(2, 8, 32, 32)


@pytest.mark.parametrize(
    "model",
    ["timm/swin_tiny_patch4_window7_224", "timm/vit_tiny_patch16_224", "torchvision/resnet18"],
)
@pytest.mark.parametrize("size", [(64, 64), (64, 96)])
def test_foreign_networks_have_strides_4_to_32(model: str, size: tuple[int, int]) -> None:
    found = pyramid(made.shared(model, size), channels=8, image=size)
    assert found.strides == (4, 8, 16, 32)
    assert shapes(found(made.images(size))) == halved(2, 8, size[0] // 4, size[1] // 4)


def test_of_many_stages_the_last_four_are_used() -> None:
    network = made.shared("timm/mobilenetv3_small_050")
    assert len(network.anatomy((64, 64)).stages) == 5
    found = pyramid(network, channels=8)
    assert found.strides == (4, 8, 16, 32)
    assert shapes(found(made.images())) == halved(2, 8, 16, 16)


def test_a_stage_of_one_cell_is_left_out() -> None:
    found = pyramid(made.shared("torchvision/resnet18"), channels=8, image=(32, 32))
    assert found.strides == (2, 4, 8, 16)  # at 64 px these are 4, 8, 16, 32


def test_strides_are_those_of_the_images_that_are_given() -> None:
    network = copy.deepcopy(made.shared("timm/vit_tiny_patch16_224"))
    network.input_size = 64  # other images are resized to it
    found = pyramid(network, channels=8, image=(128, 128))
    assert found.strides == (8, 16, 32, 64)
    assert shapes(found(made.images((128, 128)))) == halved(2, 8, 16, 16)


def test_the_maps_of_one_grid_are_those_of_its_last_block(student: Student) -> None:
    network = student(**VIT).eval()
    found, x = pyramid(network, channels=8), made.images((16, 16))
    tapped = copy.deepcopy(network)
    tapped.tap(["blocks.2"])
    grid = tapped(x).features["blocks.2"]
    levels: Any = found.neck.levels
    four, two, one, half = levels

    def norm(layer: Any, x: Tensor) -> Any:
        gaps = x - x.mean(dim=1, keepdim=True)
        spread = gaps.square().mean(dim=1, keepdim=True).add(1e-6).sqrt()
        return gaps / spread * layer.weight[:, None, None] + layer.bias[:, None, None]

    def ended(layers: Any, x: Tensor) -> Any:
        x = norm(layers[1], F.conv2d(x, layers[0].weight))
        return norm(layers[3], F.conv2d(x, layers[2].weight, padding=1))

    def doubled(layer: Any, x: Tensor) -> Any:
        cells = torch.einsum("nihw,iopq->nohpwq", x, layer.weight)
        return cells.flatten(4).flatten(2, 3) + layer.bias[:, None, None]

    quartered = doubled(four[3], F.gelu(norm(four[1], doubled(four[0], grid))))
    expected = {
        "0": ended(four[4:], quartered),
        "1": ended(two[1:], doubled(two[0], grid)),
        "2": ended(one, grid),
        "3": ended(half[1:], grid.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).amax(dim=(3, 5))),
    }
    torch.testing.assert_close(found(x), expected, rtol=1e-4, atol=1e-5)


def test_the_maps_of_stages_are_sums_from_the_coarsest_down(student: Student) -> None:
    network = student("resnet8").eval()
    found, x = pyramid(network, channels=8), made.images((16, 16))
    tapped = copy.deepcopy(network)
    names = ["layer1", "layer2", "layer3"]
    tapped.tap(names)
    features = tapped(x).features
    neck: Any = found.neck
    expected, above = {}, None
    for i in (2, 1, 0):
        lateral = neck.inner_blocks[i](features[names[i]])
        above = (
            lateral
            if above is None
            else lateral + above.repeat_interleave(2, 2).repeat_interleave(2, 3)
        )
        expected[str(i)] = neck.layer_blocks[i](above)
    torch.testing.assert_close(found(x), expected)


@pytest.mark.parametrize("model", ["vit", "resnet8"])
def test_the_network_is_as_it_was(student: Student, model: str) -> None:
    network = student(**VIT) if model == "vit" else student(model)
    network.eval().requires_grad_(False)
    x = made.images((16, 16))
    before, answer = copy.deepcopy(network.state_dict()), network(x).logits
    found = pyramid(network)
    found(x)
    assert found.network is not network
    assert network(x).features is None
    assert torch.equal(network(x).logits, answer)
    assert not any(module._forward_hooks for module in network.modules())
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)
    assert not network.training
    assert not any(module.training for module in found.modules())
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert all(parameter.requires_grad for parameter in found.neck.parameters())


@pytest.mark.parametrize("model", ["vit", "resnet8"])
def test_its_tensors_are_the_backbones_too(student: Student, model: str) -> None:
    network = student(**VIT) if model == "vit" else student(model)
    found = pyramid(network)
    assert found.training
    own, given = (
        {**dict(one.named_parameters()), **dict(one.named_buffers())}
        for one in (found.network, network)
    )
    assert own.keys() == given.keys()
    assert all(own[name] is given[name] for name in given)
    x = made.images((16, 16))
    before = network.eval()(x).logits
    step = torch.optim.SGD(found.parameters(), lr=0.1)
    sum(one.square().mean() for one in found(x).values()).backward()
    step.step()
    assert not torch.equal(network(x).logits, before)  # it learned, running statistics included


def test_taps_that_a_network_has_stay_its_own(student: Student) -> None:
    network = student(**VIT)
    network.tap(["blocks.0", "blocks.2"])
    found, x = pyramid(network, channels=8), made.images((16, 16))
    assert shapes(found(x)) == halved(2, 8, 16, 16)
    assert list(network(x).features) == ["blocks.0", "blocks.2"]


@pytest.mark.parametrize("model", ["vit", "resnet8", "swin_tiny"])
def test_the_first_layer_learns(student: Student, model: str) -> None:
    network = student(**VIT) if model == "vit" else student(model)
    found = pyramid(network, channels=8)
    first = next(m for m in found.network.modules() if isinstance(m, nn.Conv2d))
    maps = found(made.images((16, 16)))
    draw = torch.Generator().manual_seed(2)
    # Not their sums: behind a norm those are the same for any features.
    values = [(one * torch.rand(one.shape, generator=draw)).sum() for one in maps.values()]
    for value in values:
        (slope,) = torch.autograd.grad(value, first.weight, retain_graph=True)
        assert bool(slope.isfinite().all() & slope.any())
    sum(values).backward()
    assert all(one.grad is not None for one in found.neck.parameters())
    assert classifier(found.network.backbone, 4).weight.grad is None


def test_the_same_seed_gives_the_same_layers(student: Student) -> None:
    network = student(**VIT)
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(pyramid(network).neck.state_dict())
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
    assert all(key.startswith("levels.") for key in states[0])


def test_there_is_nothing_to_make_one_of(student: Student) -> None:
    with pytest.raises(IncompatibleError, match="mlp: has no grid") as caught:
        pyramid(student("mlp"))
    assert "larger images" in caught.value.hint
    with pytest.raises(IncompatibleError, match="has no grid"):
        pyramid(student(**VIT | {"patch_size": 16}))  # one cell


@pytest.mark.parametrize("model", ["vit", "resnet8", "timm/vit_tiny_patch16_224"])
def test_an_exported_one_takes_any_number_of_images(student: Student, model: str) -> None:
    if model.startswith("timm/"):
        network, size, classes = made.network(model, depth=3), made.SQUARE, made.CLASSES
    else:
        network, size, classes = student(**VIT if model == "vit" else {"model": model}), (16, 16), 4
    found = pyramid(network, channels=8).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    shapes = ({0: batch},)
    program = torch.export.export(found, (made.images(size),), dynamic_shapes=shapes)
    program = program.run_decompositions({})
    for count in (1, 3):
        x = made.images(size, count)
        torch.testing.assert_close(program.module()(x), found(x), rtol=1e-4, atol=1e-5)
    values = [node.meta["val"] for node in program.graph.nodes if node.op == "call_function"]
    assert not [
        one for one in values if isinstance(one, Tensor) and one.shape[1:] == (classes,)
    ]  # logits


IDENTITY: dict[str, Any] = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}


def anchors(backbone: PyramidBackbone) -> AnchorGenerator:
    sizes = tuple((int(8 * stride),) for stride in backbone.strides)
    return AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))


def retina(backbone: PyramidBackbone, **sizes: Any) -> Any:
    return RetinaNet(backbone, 3, anchor_generator=anchors(backbone), **IDENTITY, **sizes)


def faster(backbone: PyramidBackbone, **sizes: Any) -> Any:
    names = [str(i) for i in range(len(backbone.strides))]
    return FasterRCNN(
        backbone,
        3,
        rpn_anchor_generator=anchors(backbone),
        box_roi_pool=MultiScaleRoIAlign(names, output_size=3, sampling_ratio=2),
        **IDENTITY,
        **sizes,
    )


@pytest.mark.parametrize("detector", [retina, faster])
@pytest.mark.parametrize("model", ["vit", "resnet8"])
def test_a_detector_learns_with_it(
    student: Student, detector: Callable[..., Any], model: str
) -> None:
    network = student(**VIT, image_size=32) if model == "vit" else student(model, image_size=32)
    sizes = {"fixed_size": (32, 32)} if model == "vit" else {"min_size": 32, "max_size": 64}
    whole = detector(pyramid(network, channels=8), **sizes)
    shown = [*made.images((32, 32), 1), *made.images((32, 48), 1)]
    boxes = {"boxes": torch.tensor([[4.0, 4, 20, 24]]), "labels": torch.tensor([1])}
    before = copy.deepcopy(network.state_dict())
    step = torch.optim.SGD(whole.parameters(), lr=0.01)
    losses = whole(shown, [boxes, boxes])
    total = sum(losses.values())
    assert bool(total.isfinite())
    total.backward()
    step.step()
    first = next(name for name, _ in network.named_parameters() if name.endswith("weight"))
    assert not torch.equal(network.state_dict()[first], before[first])
    answers = whole.eval()(shown)
    assert [set(answer) for answer in answers] == [{"boxes", "labels", "scores"}] * 2
