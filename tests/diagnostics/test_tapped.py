"""Taps in a copy that shares its weights, and the few sites that stand for all."""

from __future__ import annotations

import itertools

import pytest
import torch

from distill.diagnostics.tapped import MOST, chosen, opened, tapped
from distill.errors import IncompatibleError
from distill.models.anatomy import ATTENTION
from distill.models.network import Network
from distill.types import Anatomy, Site
from tests.diagnostics.test_equivariance import VIT, state, student
from tests.models import made


def test_the_copy_gives_features_and_the_original_does_not() -> None:
    network = student(**VIT).train()
    before = state(network)
    names = ["pooled", "blocks.0", f"blocks.1.attention{ATTENTION}"]
    copied = tapped(network, names)
    x = made.images((16, 16))
    features = copied(x).features
    assert features is not None
    assert list(features) == names
    assert features["blocks.0"].shape == (2, 24, 4, 4)
    assert network(x).features is None
    torch.testing.assert_close(state(network), before, rtol=0, atol=0)
    assert network.training
    assert not any(module.training for module in copied.modules())
    assert not network.backbone.blocks[0]._forward_hooks  # type: ignore[union-attr, index]
    with pytest.raises(IncompatibleError, match=r"blocks\.7"):
        tapped(network, ["blocks.7"])


def test_the_copy_has_the_same_tensors() -> None:
    network = student(model="resnet8")
    copied = tapped(network, ["layer1"])
    for own, its in ((network.parameters(), copied.parameters()),
                     (network.buffers(), copied.buffers())):  # fmt: skip
        assert all(a is b for a, b in zip(own, its, strict=True))
    x = made.images((16, 16))
    with torch.no_grad():
        next(network.parameters()).mul_(2)
        assert torch.equal(copied(x).logits, network(x).logits)


def test_taps_that_were_there_stay() -> None:
    network = student(model="resnet8")
    network.tap(["layer1"])
    x = made.images((16, 16))
    for _ in range(2):
        features = tapped(network, ["layer2"])(x).features
        assert features is not None
        assert list(features) == ["layer1", "layer2"]
    assert list(network(x).features or {}) == ["layer1"]


def names(sites: tuple[Site, ...]) -> list[str]:
    return [site.name for site in sites]


def test_residual_blocks_stand_between_the_ends_of_stages() -> None:
    small = chosen(student(model="resnet8").anatomy())
    assert names(small) == ["layer1", "layer2", "layer3"]
    twenty = chosen(student(model="resnet20").anatomy())
    assert names(twenty) == [
        f"layer{i}{block}" for i in (1, 2, 3) for block in (".0", ".1", "")
    ]  # fmt: skip


def test_many_are_thinned_out_evenly() -> None:
    for model in ("resnet110", "wrn_40_2"):
        anatomy = student(model=model).anatomy()
        sites = chosen(anatomy)
        assert len(sites) == MOST
        assert set(anatomy.stages) <= set(sites)
        gaps = [b.depth - a.depth for a, b in itertools.pairwise(sites)]
        assert max(gaps) <= 0.16
        assert len(chosen(anatomy, most=5)) == 5
        assert set(anatomy.stages) <= set(chosen(anatomy, most=5))
        assert chosen(anatomy, most=2)[-1] == anatomy.stages[-1]
    deep = student(**{**VIT, "depth": 24})
    places = [int(name.rpartition(".")[2]) for name in names(chosen(deep.anatomy()))]
    assert places[0] == 0
    assert places[-1] == 23
    assert {b - a for a, b in itertools.pairwise(places)} <= {2, 3}


@pytest.mark.parametrize("model", ["timm/swin_tiny_patch4_window7_224", "torchvision/mobilenet_v2",
                                   "timm/levit_128s", "timm/convnext_atto"])  # fmt: skip
def test_families(model: str) -> None:
    check(made.shared(model), made.shared(model).anatomy(made.SQUARE))


@pytest.mark.soak
@pytest.mark.parametrize("model", list(made.FAMILIES))
def test_all_families(model: str) -> None:
    check(made.shared(model), made.shared(model).anatomy(made.SQUARE))


def check(network: Network, anatomy: Anatomy) -> None:
    sites = chosen(anatomy)
    assert 1 <= len(sites) <= MOST
    depths = [site.depth for site in sites]
    assert depths == sorted(set(depths))
    assert set(anatomy.stages) <= set(sites)
    copied, found = opened(network, made.images())
    assert found == sites
    with torch.no_grad():
        features = copied(made.images()).features
    assert features is not None
    assert features["pooled"].shape == (2, anatomy.width)
    for site in sites:
        assert features[site.name].shape == (2, site.channels, *site.grid)


def test_images_of_another_size_than_it_was_built_for() -> None:
    network = student(model="resnet8")
    before = network.anatomy()
    _, sites = opened(network, made.images((24, 40)))
    assert [site.grid for site in sites] == [(24, 40), (12, 20), (6, 10)]
    assert network.anatomy() == before
    network.input_size = 16  # it resizes what it is given
    _, sites = opened(network, made.images((24, 40)))
    assert [site.grid for site in sites] == [(16, 16), (8, 8), (4, 4)]
