from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distill.errors import IncompatibleError
from distill.models.network import Description, Network, probe

Build = Callable[..., Network]
MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.1)


def described(**keys: Any) -> Description:
    known: dict[str, Any] = {
        "model": "resnet8",
        "arguments": {},
        "num_classes": 3,
        "classes": ("a", "b", "c"),
        "image_size": 16,
        "input_size": None,
        "mean": MEAN,
        "std": STD,
    }
    return Description(**known | keys)


class Remember(nn.Module):
    """Keeps the images it was given; its logits are their channels' means."""

    def forward(self, images: Tensor) -> Tensor:
        self.images = images
        return images.mean(dim=(2, 3))


def triangle(old: int, new: int) -> np.ndarray:
    """Weights (new, old) of bilinear resizing that averages when it shrinks, in float64.

    The centre of output pixel i lies at (i + 1/2) · old/new; a triangle of half-width
    max(old/new, 1) around it weighs the input pixels, and the weights sum to one.
    """
    scale = old / new
    centres = (np.arange(new) + 0.5) * scale
    distance = np.abs(np.arange(old) + 0.5 - centres[:, None]) / max(scale, 1.0)
    weights = np.maximum(0.0, 1.0 - distance)
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("size", [8, 16, 28, 40])
def test_resizes_then_normalises(size: int) -> None:
    backbone = Remember()
    images = torch.rand(2, 3, size, size)
    Network(backbone, described(input_size=16))(images)
    w = triangle(size, 16)
    resized = np.einsum("ih,bchw,jw->bcij", w, images.double().numpy(), w)
    mean, std = (np.array(values).reshape(1, 3, 1, 1) for values in (MEAN, STD))
    expected = (resized - mean) / std
    np.testing.assert_allclose(backbone.images.numpy(), expected, rtol=0, atol=2e-5)


def test_without_an_input_size_images_come_as_they_are() -> None:
    backbone = Remember()
    Network(backbone, described())(torch.rand(1, 3, 40, 40))
    assert backbone.images.shape == (1, 3, 40, 40)


def test_a_selection_gives_logits_and_names_in_its_order() -> None:
    network = Network(Remember(), described(), selection=(2, 0))
    plain = Network(Remember(), described())
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(network(images).logits, plain(images).logits[:, [2, 0]])
    assert network.classes == ("c", "a")
    assert plain.classes == ("a", "b", "c")


def test_the_state_holds_the_backbone_alone(student: Build) -> None:
    network = student()
    assert set(network.state_dict()) == {
        f"backbone.{name}" for name in network.backbone.state_dict()
    }


@pytest.mark.parametrize(
    ("model", "keys", "convolutional"),
    [
        ("resnet8", {}, True),
        ("shufflenetv2", {}, True),
        ("vit", {}, False),
        ("vit", {"stem": "conv"}, True),
    ],
)
def test_tells_a_convolutional_network(
    student: Build, model: str, keys: dict[str, Any], convolutional: bool
) -> None:
    assert student(model, **keys).is_convolutional is convolutional


@pytest.mark.parametrize(("model", "keys"), [("resnet8", {}), ("vit", {"position": "conv"})])
def test_compiles_to_one_graph(student: Build, model: str, keys: dict[str, Any]) -> None:
    network = student(model, **keys)
    images = torch.rand(2, 3, 16, 16)
    network.eval()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images).logits, network(images).logits)
    network.train()
    compiled(images).logits.sum().backward()
    assert all(p.grad is not None for p in network.parameters())


def test_resizing_and_selection_compile_to_one_graph() -> None:
    network = Network(nn.Sequential(Remember()), described(input_size=8), selection=(1, 0))
    images = torch.rand(2, 3, 16, 16)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images).logits, network(images).logits)


@pytest.mark.parametrize("model", ["resnet8", "vit"])
def test_runs_under_autocast_and_channels_last(student: Build, model: str) -> None:
    network = student(model).eval()
    images = torch.rand(4, 3, 16, 16)
    expected = network(images).logits
    network.to(memory_format=torch.channels_last)
    last = network(images.to(memory_format=torch.channels_last)).logits
    torch.testing.assert_close(last, expected, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = network(images).logits
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), expected, rtol=0.1, atol=0.1)


class Wrong(nn.Module):
    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, images: Tensor) -> Any:
        return self.answer(images)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda x: x.mean(dim=(1, 2, 3)), r"returns \(1,\) for one image, expected .*\(1, 3\)"),
        (lambda x: x.mean(dim=(2, 3))[:, :2], r"returns \(1, 2\) for one image"),
        (lambda x: (x, x), "returns tuple for one image"),
        (lambda x: x.view(1, 5), r"does not take images of 16 px: .*\[1, 5\]"),
    ],
)
def test_a_backbone_that_gives_no_logits_is_refused(answer: Any, words: str) -> None:
    with pytest.raises(IncompatibleError, match=words):
        probe(Network(Wrong(answer), described()), 16)


def test_probing_leaves_the_network_as_it_was(student: Build) -> None:
    network = student()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network.train()
    probe(network, 16)
    assert network.training
    assert all(torch.equal(before[name], t) for name, t in network.state_dict().items())
    assert all(p.device.type == "cpu" for p in network.parameters())
