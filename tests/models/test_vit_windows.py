from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill.models import backbones
from distill.models.network import Network
from distill.models.zoo._windows import WindowAttention

Grid = tuple[int, int]


def attention(grid: Grid, window: int, *, shifted: bool) -> WindowAttention:
    layer = WindowAttention(8, 2, grid=grid, window=window, shifted=shifted)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer.double()


def together(grid: Grid, window: int, shift: int) -> Tensor:
    """Which cells share a window: borders lie at shift, shift + window, ... in both directions."""
    row, column = torch.arange(grid[0] * grid[1]) // grid[1], torch.arange(grid[0] * grid[1])
    column = column % grid[1]
    shifts = [0 if n <= window else shift for n in grid]
    sides = [min(n, window) for n in grid]
    row, column = (
        torch.div(place - s, side, rounding_mode="floor")
        for place, s, side in zip((row, column), shifts, sides, strict=True)
    )
    return (row[:, None] == row) & (column[:, None] == column)


GRIDS = [((8, 8), 4), ((7, 7), 7), ((3, 3), 4), ((5, 9), 4), ((10, 6), 3), ((9, 4), 4), ((5, 5), 2)]


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(("grid", "window"), GRIDS)
def test_tokens_see_all_of_their_window_and_nothing_else(
    grid: Grid, window: int, shifted: bool
) -> None:
    layer = attention(grid, window, shifted=shifted)
    tokens = torch.randn(1, grid[0] * grid[1], 8, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: layer(x, grid)[0].sum(dim=-1), tokens)
    seen = jacobian[:, 0].abs().sum(dim=-1) > 0
    assert torch.equal(seen, together(grid, window, window // 2 if shifted else 0))


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(("grid", "window"), GRIDS)
def test_is_attention_with_a_bias_for_every_offset(grid: Grid, window: int, shifted: bool) -> None:
    layer = attention(grid, window, shifted=shifted)
    count = grid[0] * grid[1]
    tokens = torch.randn(2, count, 8, dtype=torch.float64)
    q, k, v = layer.qkv(tokens).view(2, count, 3, 2, 4).permute(2, 0, 3, 1, 4)
    logits = q @ k.transpose(-2, -1) / 2
    near = together(grid, window, window // 2 if shifted else 0)
    rows, columns = (min(n, window) for n in grid)
    for query, key in near.nonzero().tolist():
        down, right = query // grid[1] - key // grid[1], query % grid[1] - key % grid[1]
        offset = (down + rows - 1) * (2 * columns - 1) + right + columns - 1
        logits[:, :, query, key] += layer.bias_table[offset]
    weights = logits.masked_fill(~near, float("-inf")).softmax(dim=-1)
    expected = layer.proj((weights @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(tokens, grid), expected)


@pytest.mark.parametrize(
    ("grid", "window", "size", "shift"),
    [
        ((8, 8), 4, (4, 4), (2, 2)),
        ((9, 9), 7, (7, 7), (3, 3)),
        ((4, 4), 4, (4, 4), (0, 0)),
        ((3, 3), 7, (3, 3), (0, 0)),
        ((9, 4), 4, (4, 4), (2, 0)),
    ],
)
def test_says_which_windows_it_uses(grid: Grid, window: int, size: Grid, shift: Grid) -> None:
    plain, shifted = (attention(grid, window, shifted=s) for s in (False, True))
    assert (plain.window_size, plain.shift_size) == (size, (0, 0))
    assert (shifted.window_size, shifted.shift_size) == (size, shift)
    assert not {"index", "mask"} & set(shifted.state_dict())


def test_every_second_block_carries_news_across_the_borders() -> None:
    keys = {"width": 16, "depth": 4, "heads": 2, "patch_size": 1, "attention": "window"}
    model: Any = backbones.build("vit", keys, num_classes=3, image_size=8)
    shifts = [block.attention.shift_size for block in model.blocks]
    assert shifts == [(0, 0), (2, 2), (0, 0), (2, 2)]
    tokens = torch.randn(1, 64, 16, requires_grad=True)
    x, reach = tokens, []
    for block in model.blocks[:3]:
        x = block(x, (8, 8))
        (gradient,) = torch.autograd.grad(x[0, 0].sum(), tokens, retain_graph=True)
        reach.append(int((gradient.abs().sum(dim=-1) > 0).sum()))
    # Cell (0, 0) lies in a shifted window of 2 x 2; then in the plain one with (3, 3), to which the
    # shifted windows have brought all that lies up to the far windows.
    assert reach == [16, 16, 64]


@pytest.mark.parametrize("size", [16, 28])
def test_the_maps_of_windows_are_one_map_of_the_grid(
    student: Callable[..., Network], size: int
) -> None:
    keys = {"width": 16, "depth": 2, "heads": 2, "patch_size": 2, "attention": "window"}
    network = student("vit", image_size=size, **keys).eval()
    sites = [site.name for site in network.anatomy().attention]
    network.tap(sites)
    features = network(torch.rand(2, 3, size, size)).features
    grid = (size // 2, size // 2)
    for site, shift in zip(sites, (0, 2), strict=True):
        rows = features[site]
        torch.testing.assert_close(rows.sum(dim=-1), torch.ones_like(rows[..., 0]))
        assert torch.equal(rows[0, 0] > 0, together(grid, 4, shift))
