"""Maps of heat by hand, and pictures that show them."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distill.diagnostics import UndefinedError
from distill.diagnostics.rollout import overlay, rolled, rollout, saliency
from distill.diagnostics.tapped import tapped
from distill.models.network import Network
from distill.report.colours import _oklab, luminance
from tests.diagnostics.test_equivariance import VIT, state, student
from tests.models import made

REGISTERS = "timm/vit_medium_patch16_reg4_gap_256"
DEEP = VIT | {"depth": 3}  # fewer are no row
SMALL = {"depth": 3, "embed_dim": 24, "num_heads": 2}


def rows(count: int, tokens: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (2, 3, tokens, tokens)
    return [
        torch.randn(shape, dtype=torch.float64, generator=generator).softmax(dim=-1)
        for _ in range(count)
    ]


def product(maps: list[Tensor], image: int) -> Tensor:
    """The definition, one image at a time."""
    tokens = maps[-1].shape[-1]
    whole = torch.eye(tokens, dtype=torch.float64)
    for each in maps:
        step = torch.eye(tokens, dtype=torch.float64)
        front = tokens - each.shape[-1]
        step[front:, front:] = 0.5 * each[image].double().mean(dim=0) + 0.5 * torch.eye(
            tokens - front, dtype=torch.float64
        )
        whole = step @ whole
    return whole


def test_rolled() -> None:
    maps = rows(4, 7)
    found = rolled(maps)
    assert torch.allclose(found, torch.stack([product(maps, 0), product(maps, 1)]))
    assert torch.allclose(found.sum(dim=-1), torch.ones(2, 7, dtype=torch.float64))
    assert torch.allclose(rolled(maps[:1]), (maps[0].mean(dim=1) + torch.eye(7)) / 2)
    # In order: the last block's comes first in the product.
    assert not torch.allclose(found, rolled(maps[::-1]))


def test_who_looks_at_itself_alone_stays() -> None:
    itself = torch.eye(5).expand(2, 3, 5, 5)
    assert torch.equal(rolled([itself] * 3), torch.eye(5, dtype=torch.float64).expand(2, 5, 5))
    # All look at the first: half of what is left goes there in every block.
    first = torch.zeros(1, 1, 4, 4)
    first[..., 0] = 1
    expected = torch.tensor([7 / 8, 0, 0, 1 / 8], dtype=torch.float64)
    assert torch.allclose(rolled([first] * 3)[0, 3], expected)


def test_tokens_that_join_later() -> None:
    maps = [*rows(2, 4), *rows(2, 6)]
    found = rolled(maps)
    assert torch.allclose(found, torch.stack([product(maps, 0), product(maps, 1)]))
    assert torch.allclose(found.sum(dim=-1), torch.ones(2, 6, dtype=torch.float64))


def rolled_by_hand(network: Network, x: Tensor, read: list[int]) -> Tensor:
    """The mean of some rows, over the cells."""
    sites = network.anatomy((x.shape[-2], x.shape[-1])).attention
    with torch.no_grad():
        features: dict[str, Tensor] = tapped(network, [site.name for site in sites])(x).features
    last, heat = sites[-1], []
    for i in range(len(x)):
        row = product(list(features.values()), i)[read, last.prefix :].mean(dim=0)
        heat.append((row / row.sum()).reshape(last.queries))
    return torch.stack(heat)


@pytest.mark.parametrize(
    ("keys", "read"),
    [
        (DEEP, list(range(16))),
        (DEEP | {"pool": "cls"}, [0]),
        (DEEP | {"pool": "distill"}, [0, 1]),
        (DEEP | {"depth": 4, "attention": "gated", "heads": 4, "pool": "cls"}, [0]),
        (DEEP | {"attention": "window", "window": 2, "position": "none"}, list(range(16))),
    ],
    ids=["mean", "cls", "distill", "gated", "window"],
)
def test_it_is_of_what_the_classifier_reads(keys: dict[str, Any], read: list[int]) -> None:
    network, x = student(**keys), made.images((16, 16), 3)
    expected = rolled_by_hand(network, x, read)
    assert torch.allclose(rollout(network, x), expected, rtol=1e-5)
    assert torch.allclose(expected.sum(dim=(1, 2)), torch.ones(3, dtype=torch.float64))
    if read == [0]:
        others = rolled_by_hand(network, x, list(range(1, 17)))
        assert not torch.allclose(others, expected, rtol=1e-5)
    for module in network.modules():  # whatever its weights
        if isinstance(module, nn.Linear) and module.out_features == 5:
            nn.init.zeros_(module.weight)
    assert torch.allclose(rollout(network, x), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("model", "keys", "read"),
    [
        (REGISTERS, SMALL, list(range(4, 28))),  # registers in front, and no one reads them
        ("timm/deit_tiny_distilled_patch16_224", SMALL, [0, 1]),
        ("torchvision/vit_b_16", {}, [0]),
    ],
)
def test_others_networks(model: str, keys: dict[str, Any], read: list[int]) -> None:
    image = made.SQUARE if model in made.SQUARE_ONLY else made.WIDE
    network, x = made.network(model, image, **keys), made.images(image)
    expected = rolled_by_hand(network, x, read)
    assert expected.shape[1:] == (4, image[1] // 16)
    assert torch.allclose(rollout(network, x), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("torchvision/resnet18", "no attention maps"),
        ("timm/swin_tiny_patch4_window7_224", "no row of blocks"),
        ("timm/pvt_v2_b0", "no row of blocks"),
        ("timm/pit_ti_224", "no row of blocks"),
    ],
)
def test_networks_without_a_rollout(model: str, reason: str) -> None:
    with pytest.raises(UndefinedError, match=reason):
        rollout(made.shared(model), made.images())


class Linear(nn.Module):
    """Logits are linear in the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 6 * 8, made.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(x.flatten(1))
        return logits


def test_the_saliency_of_a_linear_network_is_its_weights() -> None:
    torch.manual_seed(0)
    network, x = made.wrapped(Linear(), "linear", (6, 8)).eval(), made.images((6, 8), 4)
    predicted = network(x).logits.argmax(dim=1)
    assert len(set(predicted.tolist())) > 1
    weight: Tensor = network.backbone.head.weight  # type: ignore[union-attr, assignment]
    weights = weight.unflatten(1, (3, 6, 8)).abs() / 0.25  # type: ignore[no-untyped-call]
    found = saliency(network, x)
    assert torch.allclose(found, weights.amax(dim=1)[predicted].double())


@pytest.mark.parametrize("model", ["resnet8", "row_gru", "swin_tiny"])
def test_saliency(model: str) -> None:
    network = student(model=model, **({"patch_size": 2, "window": 2} if "swin" in model else {}))
    x = made.images((16, 16), 3)
    expected = []
    for image in x:
        pixels = image[None].clone().requires_grad_()
        logits = network(pixels).logits[0]
        logits[int(logits.argmax())].backward()
        assert pixels.grad is not None
        expected.append(pixels.grad[0].abs().max(dim=0).values)
    found = saliency(network, x)
    assert found.shape == (3, 16, 16)
    assert torch.allclose(found, torch.stack(expected).double(), rtol=1e-3, atol=1e-6)


def test_cudnn_has_no_part_in_a_recurrent_networks_gradient() -> None:
    enabled: list[bool] = []
    for model in ("row_gru", "resnet8"):
        network = student(model=model)
        network.register_forward_hook(lambda *_: enabled.append(torch.backends.cudnn.enabled))
        before = torch.backends.cudnn.enabled
        saliency(network, made.images((16, 16)))
        assert torch.backends.cudnn.enabled == before
    assert enabled == [False, True]


def test_nothing_is_changed_by_the_asking() -> None:
    network, x = student(**DEEP | {"pool": "cls", "drop": 0.5}).train(), made.images((16, 16), 5)
    before = state(network)
    with torch.no_grad():
        found = rollout(network, x), saliency(network, x)
    torch.testing.assert_close(state(network), before, rtol=0, atol=0)
    assert not x.requires_grad
    assert all(parameter.grad is None for parameter in network.parameters())
    parts = rollout(network, x, batch_size=2), saliency(network, x, batch_size=2)
    with torch.autocast("cpu", torch.bfloat16):
        again = rollout(network, x), saliency(network, x)
    for whole, part, same in zip(found, parts, again, strict=True):
        assert torch.allclose(part, whole, rtol=1e-4, atol=1e-8)
        assert torch.equal(same, whole)


def hexes(picture: np.ndarray) -> list[str]:
    return [f"#{r:02x}{g:02x}{b:02x}" for r, g, b in picture.reshape(-1, 3)]


def test_a_picture_gets_lighter_in_even_steps_where_it_is_hot() -> None:
    """In any colour vision: by lightness alone."""
    image = np.full((8, 256, 3), 128, np.uint8)
    picture = overlay(image, np.linspace(0, 1, 256)[None])
    assert picture.shape == (224, 28 * 256, 3)
    assert picture.dtype == np.uint8
    colours = hexes(picture[0, 14 : 28 * 253 : 28 * 8])
    lights = [luminance(colour) for colour in colours]
    assert lights == sorted(set(lights))
    steps = [float(np.linalg.norm(np.subtract(_oklab(a), _oklab(b)))) for a, b in pairwise(colours)]
    assert max(steps) < 2.5 * min(steps)


def test_heat_lies_over_the_place_it_is_of() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (28, 28, 3), dtype=np.uint8)
    heat = np.zeros((4, 4))
    heat[1, 2] = 5.0
    picture = overlay(image, heat)
    assert picture.shape == (224, 224, 3)
    cells = picture.reshape(4, 56, 4, 56, 3).astype(int)
    yellow = (cells[..., 1] - cells[..., 2]).mean(axis=(1, 3))  # more green than blue
    assert np.unravel_index(yellow.argmax(), yellow.shape) == (1, 2)
    assert yellow[1, 2] > 20
    assert (np.delete(yellow.ravel(), 6) < 0).all()
    # Of the image the grey is left: a pixel is a square, and its colour is no matter.
    assert np.array_equal(picture[:8, :8], np.broadcast_to(picture[0, 0], (8, 8, 3)))
    grey = np.repeat((image @ [0.299, 0.587, 0.114])[..., None], 3, axis=2).round().astype(np.uint8)
    assert np.abs(overlay(grey, heat).astype(int) - picture).max() <= 1


def test_pictures_of_any_heat_and_size() -> None:
    image = np.full((32, 48, 3), 200, np.uint8)
    none, same = overlay(image, np.zeros((2, 3))), overlay(image, np.full((2, 3), 0.1))
    assert none.shape == same.shape == (224, 336, 3)
    assert len(np.unique(none.reshape(-1, 3), axis=0)) == 1
    assert luminance(hexes(none)[0]) < luminance(hexes(same)[0])  # that is hot all over
    single = np.zeros((32, 48))
    single[3, 4] = 1
    assert luminance(hexes(overlay(image, single))[(3 * 7 + 3) * 336 + 4 * 7 + 3]) > 0.5
    assert overlay(np.zeros((224, 300, 3), np.uint8), np.eye(7)).shape == (224, 300, 3)
    for side in (8, 28, 32, 64):
        assert len(overlay(np.zeros((side, side, 3), np.uint8), np.eye(4))) >= 3 * side
    heat = np.random.default_rng(0).random((4, 4))
    assert np.array_equal(overlay(image, heat), overlay(image, 1000 * heat))
