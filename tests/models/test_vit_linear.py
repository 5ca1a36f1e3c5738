from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from distill.models import backbones, cost
from distill.models.zoo._linear import Structured, linear

STRUCTURES = ["low_rank", "kron", "monarch", "btt"]
SHAPES = [(16, 16), (16, 48), (48, 16), (24, 36), (12, 8)]


def make(structure: str, d_in: int, d_out: int, rank: int | None = None) -> Structured:
    layer = linear(d_in, d_out, structure=structure, rank=rank)
    assert isinstance(layer, Structured)
    return layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize(("d_in", "d_out"), SHAPES)
def test_is_the_product_with_its_matrix(structure: str, d_in: int, d_out: int, bias: bool) -> None:
    layer = linear(d_in, d_out, structure=structure, rank=None, bias=bias)
    assert isinstance(layer, Structured)
    vector = torch.zeros(d_out)
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
        vector = layer.bias
    x = torch.randn(3, 7, d_in)
    matrix = layer.materialise()
    assert matrix.shape == (d_out, d_in)
    torch.testing.assert_close(layer(x), x @ matrix.T + vector, rtol=1e-5, atol=1e-5)


def test_costs_what_the_paper_says() -> None:
    d = 64
    dense = d * d
    expected = {"low_rank": 2 * d**1.5, "kron": 2 * d, "monarch": dense / 2, "btt": 2 * d**1.5}
    for structure, count in expected.items():
        assert cost.parameters(make(structure, d, d)) - d == count, structure
    assert cost.parameters(make("btt", d, d, rank=3)) - d == 6 * d**1.5
    assert cost.parameters(make("low_rank", d, d, rank=5)) - d == 10 * d


def test_low_rank_has_the_rank_that_was_asked_for() -> None:
    matrix = make("low_rank", 24, 16, rank=5).double().materialise()
    assert torch.linalg.matrix_rank(matrix) == 5
    assert torch.linalg.matrix_rank(make("btt", 24, 16).double().materialise()) == 16


def test_a_tensor_train_of_equal_blocks_is_a_kronecker_product() -> None:
    layer: Any = make("btt", 12, 24)
    a, b = torch.randn(4, 3), torch.randn(6, 4)
    with torch.no_grad():
        layer.u.copy_(a.expand_as(layer.u[:, 0])[:, None])
        layer.v.copy_(b.expand_as(layer.v[:, :, 0])[:, :, None])
    torch.testing.assert_close(layer.materialise(), torch.kron(a, b))


def test_monarch_deals_every_block_out_to_all_blocks() -> None:
    layer: Any = make("monarch", 32, 32)
    nn.init.ones_(layer.v)
    with torch.no_grad():
        layer.u[1:] = 0
    matrix = layer.materialise()
    assert not matrix[:, 8:].any()  # of the input the first block alone is read
    assert matrix[:, :8].any(dim=1).all()  # and every output hears of it


@pytest.mark.parametrize("structure", ["kron", "monarch", "btt"])
def test_keeps_the_scale_at_first(structure: str) -> None:
    out = make(structure, 256, 256)(torch.randn(64, 256))
    assert out.square().mean().sqrt().item() == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_cores_begin_at_the_paper_s_spread(structure: str) -> None:
    def spread(d_in: int, d_out: int) -> float:
        return float(d_in**-0.5 * min(1, (d_out / d_in) ** 0.5))

    # 256 channels are a table of 16 x 16, 1024 one of 32 x 32; four blocks have 64 and 256.
    cores = {
        "low_rank": [(1024, 16), (16, 256)],
        "kron": [(32, 16), (32, 16)],
        "monarch": [(256, 64), (64, 64)],
        "btt": [(32, 16), (32, 16)],
    }
    layer: Any = make(structure, 1024, 256)
    for core, (d_in, d_out) in zip((layer.u, layer.v), cores[structure], strict=True):
        assert core.std().item() == pytest.approx(spread(d_in, d_out), rel=0.15)
    assert not layer.bias.any()


@pytest.mark.parametrize("structure", STRUCTURES)
def test_stands_for_every_map_in_attention_and_mlp(structure: str) -> None:
    keys = {"width": 32, "depth": 2, "heads": 4, "linear": structure}
    model = backbones.build("vit", keys, num_classes=3, image_size=16).eval()
    images = torch.rand(2, 3, 16, 16)
    expected = model(images)
    structured = {n: m for n, m in model.named_modules() if isinstance(m, Structured)}
    maps = ("attention.qkv", "attention.proj", "mlp.0", "mlp.3")
    assert [*structured] == [f"blocks.{i}.{name}" for i in (0, 1) for name in maps]
    for name, module in structured.items():
        matrix = module.materialise()
        dense = nn.Linear(matrix.shape[1], matrix.shape[0])
        dense.weight, dense.bias = nn.Parameter(matrix), nn.Parameter(module.bias.clone())
        model.set_submodule(name, dense)
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)
