from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from distill.models import backbones
from distill.models.zoo._crate import CrateBlock, Ista, SubspaceAttention
from distill.models.zoo._dynamic_conv import DynamicConv


def dynamic() -> DynamicConv:
    layer = DynamicConv(8)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


def test_dynamic_convolution_has_kernels_for_every_sample() -> None:
    layer = dynamic()
    tokens = torch.randn(3, 12, 8)
    mixture = layer.mixture(tokens.mean(dim=1)).softmax(dim=-1)
    kernels = layer.kernels(tokens)
    value = layer.value(tokens).transpose(1, 2).unflatten(2, (4, 3))
    for i in range(3):
        kernel = sum(mixture[i, k] * layer.weight[k] for k in range(4))
        assert isinstance(kernel, torch.Tensor)
        torch.testing.assert_close(kernels[i], kernel)
        one = F.conv2d(value[i : i + 1], kernel[:, None], padding=1, groups=8)
        expected = layer.proj(one.flatten(2).transpose(1, 2))
        torch.testing.assert_close(layer(tokens, (4, 3))[i : i + 1], expected)


def test_only_a_dynamic_convolution_follows_the_image() -> None:
    layer, tokens = dynamic(), torch.randn(16, 12, 8)
    assert layer.kernels(tokens).var(dim=0).mean() > 1e-3
    nn.init.zeros_(layer.mixture[2].weight)  # whatever the image, the same mixture
    assert layer.kernels(tokens).var(dim=0).max() < 1e-12


def test_dynamic_convolution_keeps_the_scale_at_first() -> None:
    layer = DynamicConv(64)
    nn.init.orthogonal_(layer.value.weight)
    nn.init.orthogonal_(layer.proj.weight)
    nn.init.zeros_(layer.value.bias)
    nn.init.zeros_(layer.proj.bias)
    out = layer(torch.randn(8, 400, 64), (20, 20))
    assert 0.85 < out.square().mean().sqrt().item() < 1.15


def test_dynamic_convolution_sees_the_nearest_neighbours_and_the_mean() -> None:
    layer = dynamic()
    tokens = torch.randn(1, 25, 8, requires_grad=True)
    nn.init.zeros_(layer.mixture[2].weight)
    (gradient,) = torch.autograd.grad(layer(tokens, (5, 5))[0, 12].sum(), tokens)
    near = [6, 7, 8, 11, 12, 13, 16, 17, 18]
    assert gradient.abs().sum(dim=-1)[0].nonzero().flatten().tolist() == near


def test_crate_s_attention_has_one_map_for_queries_keys_and_values() -> None:
    layer = SubspaceAttention(6, 2).double()
    maps = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    assert maps == {"u.weight": (6, 6), "proj.weight": (6, 6), "proj.bias": (6,)}
    tokens = torch.randn(2, 5, 6, dtype=torch.float64)
    u = tokens @ layer.u.weight.T
    heads = []
    for part in u.split(3, dim=-1):
        rows = (part @ part.transpose(1, 2) / 3**0.5).softmax(dim=-1)
        heads.append(rows @ part)
    torch.testing.assert_close(layer(tokens), layer.proj(torch.cat(heads, dim=-1)))


def test_crate_s_second_half_is_a_step_of_shrinkage() -> None:
    layer = Ista(6).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    d = layer.d
    for row, out in zip(x, layer(x), strict=True):
        step = row + 0.1 * (d.T @ (row - d @ row)) - 0.1 * 0.1
        torch.testing.assert_close(out, step.clamp_min(0))
    # With the identity as dictionary there is nothing to explain, and values only shrink.
    nn.init.eye_(layer.d)
    torch.testing.assert_close(layer(x), (x - 0.01).clamp_min(0))


def test_crate_s_sparse_code_takes_the_place_of_what_it_codes() -> None:
    block = CrateBlock(6, 2, drop=0.0, drop_path=0.0)
    tokens = torch.randn(2, 9, 6)
    z = tokens + block.attention(block.norm1(tokens))
    torch.testing.assert_close(block(tokens, (3, 3)), block.ista(block.norm2(z)))
    keys = {"width": 32, "depth": 2, "heads": 4, "mixer": "crate"}
    model: Any = backbones.build("vit", keys, num_classes=3, image_size=16)
    assert [type(b) for b in model.blocks] == [CrateBlock, CrateBlock]
    x, grid = model.patches(torch.rand(2, 3, 16, 16))
    for b in model.blocks:
        x = b(x, grid)
        assert x.min() == 0
