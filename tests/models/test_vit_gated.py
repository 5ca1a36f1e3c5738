from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill.models import backbones
from distill.models.network import Network
from distill.models.zoo._gated import GatedAttention


def offsets(heads: int) -> list[tuple[float, float]]:
    """Rows and columns of a square kernel, from its middle."""
    side = round(heads**0.5)
    steps = [i - (side - 1) / 2 for i in range(side)]
    return [(down, right) for down in steps for right in steps]


def maps(layer: GatedAttention, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """What the layer mixes its values with."""
    seen: list[Tensor] = []
    handle = layer.attn_drop.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    layer(tokens, grid)
    handle.remove()
    return seen[0]


def test_heads_begin_as_the_cells_of_a_kernel() -> None:
    layer = GatedAttention(18, 9)
    rows = maps(layer, torch.zeros(1, 30, 18), (5, 6))[0]  # all contents alike: positions decide
    for head, (down, right) in enumerate(offsets(9)):
        for row in range(1, 4):
            for column in range(1, 5):
                key = (row + int(down)) * 6 + column + int(right)
                assert rows[head, row * 6 + column].argmax() == key


@pytest.mark.parametrize("heads", [1, 4, 9, 16])
def test_positions_are_a_softmax_of_the_distance_to_each_head_s_offset(heads: int) -> None:
    layer = GatedAttention(heads * 2, heads)
    nn.init.constant_(layer.gate, 100.0)  # nothing but positions
    rows = maps(layer, torch.randn(2, 12, heads * 2), (4, 3))
    for head, (down, right) in enumerate(offsets(heads)):
        for query in range(12):
            distances = torch.tensor(
                [
                    (key // 3 - query // 3 - down) ** 2 + (key % 3 - query % 3 - right) ** 2
                    for key in range(12)
                ]
            )
            torch.testing.assert_close(rows[1, head, query], (-distances).softmax(dim=0))


def test_the_gate_begins_with_positions_and_can_close() -> None:
    layer = GatedAttention(8, 4)
    assert layer.gate.sigmoid().tolist() == pytest.approx([0.7310586] * 4)
    assert torch.equal(layer.v.weight, torch.eye(8))
    tokens = torch.randn(2, 9, 8)
    mixed = maps(layer, tokens, (3, 3))
    torch.testing.assert_close(mixed.sum(dim=-1), torch.ones(2, 4, 9))
    nn.init.constant_(layer.gate, 100.0)
    position = maps(layer, tokens, (3, 3))
    nn.init.constant_(layer.gate, -100.0)
    content = maps(layer, tokens, (3, 3))
    torch.testing.assert_close(mixed, 0.7310586 * position + 0.2689414 * content)
    q, k = layer.qk(tokens).view(2, 9, 2, 4, 2).permute(2, 0, 3, 1, 4)
    torch.testing.assert_close(content, (q @ k.transpose(-2, -1) / 2**0.5).softmax(dim=-1))


def test_the_network_keeps_the_local_beginning() -> None:
    keys = {"width": 32, "depth": 12, "heads": 4, "attention": "gated", "pool": "distill"}
    model: Any = backbones.build("vit", keys, num_classes=3, image_size=16)
    kinds = [isinstance(block.attention, GatedAttention) for block in model.blocks]
    assert kinds == [True] * 10 + [False] * 2
    for block in model.blocks[:10]:
        assert torch.equal(block.attention.v.weight, torch.eye(32))
        assert block.attention.gate.eq(1).all()
        assert block.attention.v_position[:, 2].eq(-1).all()
    seen: list[int] = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1]))
    model(torch.rand(2, 3, 16, 16))
    assert seen == [16] * 10 + [18] * 2


@pytest.mark.parametrize(("depth", "gated"), [(1, 1), (2, 1), (3, 1), (4, 2)])
def test_at_least_one_block_is_gated(depth: int, gated: int) -> None:
    keys = {"width": 16, "depth": depth, "heads": 4, "attention": "gated"}
    model = backbones.build("vit", keys, num_classes=3, image_size=16)
    assert sum(isinstance(module, GatedAttention) for module in model.modules()) == gated


def test_its_map_is_the_mixed_one(student: Callable[..., Network]) -> None:
    keys = {"width": 36, "depth": 3, "heads": 9, "patch_size": 2, "attention": "gated"}
    network = student("vit", pool="cls", **keys).eval()
    layer: Any = network.backbone.get_submodule("blocks.0.attention")
    nn.init.constant_(layer.gate, 100.0)
    sites = network.anatomy().attention
    assert [site.prefix for site in sites] == [0, 1, 1]
    network.tap([site.name for site in sites])
    features = network(torch.rand(2, 3, 16, 16)).features
    expected = layer._scores((8, 8)).softmax(dim=-1).expand(2, -1, -1, -1)
    torch.testing.assert_close(features[sites[0].name], expected)
