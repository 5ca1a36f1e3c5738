"""Networks that stand for a bias: attention at a stage's end, convolutions, rows, or nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.data import datasets
from distill.errors import RecipeError
from distill.models import backbones, cost
from distill.models.network import Network
from distill.recipe import Data

# Parameters at 32 px and 100 classes, and at 224 px and 1000 classes.
PARAMETERS = {
    "alternet_18": (9_499_063, 9_968_803),  # its authors' network
    "convnext_atto": (3_405_180, 3_695_520),
    "convnext_femto": (4_869_556, 5_217_784),
    "row_gru": (99_684, 436_968),
    "mlp": (878_180, 38_858_216),
}

each = pytest.mark.parametrize("name", PARAMETERS)


def build(name: str, image_size: int = 28, num_classes: int = 5, **keys: Any) -> Any:
    return backbones.build(name, keys, num_classes=num_classes, image_size=image_size)


def spread_out(model: nn.Module) -> Any:
    """With statistics of its own and factors near 1, so that every part of the network matters."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, mean=float(name.endswith(("weight", "factor"))), std=0.2)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.2)
    return model.eval()


@each
def test_parameters(name: str) -> None:
    with torch.device("meta"):
        small, large = build(name, 32, 100), build(name, 224, 1000)
        assert large(torch.empty(2, 3, 224, 224)).shape == (2, 1000)
    assert (cost.parameters(small), cost.parameters(large)) == PARAMETERS[name]


@each
@pytest.mark.parametrize("size", [28, 32])
def test_every_parameter_learns(name: str, size: int) -> None:
    model = build(name, size)
    logits = model(torch.rand(3, 3, size, size))
    assert logits.shape == (3, 5)
    assert logits.isfinite().all()
    logits.square().sum().backward()
    for part, parameter in model.named_parameters():
        assert parameter.grad is not None, part
        assert parameter.grad.isfinite().all(), part
        assert parameter.grad.any(), part


@each
def test_a_sample_s_logits_are_its_own(name: str) -> None:
    model = spread_out(build(name))
    images = torch.rand(8, 3, 28, 28)
    before = model(images)
    images[7] = images[7].flip(1)
    after = model(images)
    torch.testing.assert_close(after[:7], before[:7], rtol=0, atol=1e-5)
    assert (after[7] - before[7]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["alternet_18", "convnext_atto", "mlp"])
def test_compiles_to_one_graph(name: str) -> None:
    model = spread_out(build(name))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    images = torch.rand(2, 3, 28, 28)
    torch.testing.assert_close(compiled(images), model(images), rtol=1e-4, atol=1e-4)


@each
def test_half_precision_says_the_same(name: str) -> None:
    model = spread_out(build(name))
    images = torch.rand(2, 3, 28, 28)
    expected = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images)
    assert (logits.float() - expected).norm() < 0.1 * expected.norm()


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    """256 training images, standardised, and their labels."""
    data = datasets.load(Data(name="digits"))
    pixels = torch.tensor(data.train.pixels[:256]).movedim(-1, 1).expand(-1, 3, -1, -1)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data.mean, data.std))
    return (pixels / 255 - mean) / std, torch.tensor(data.train.labels[:256])


@each
def test_learns_the_digits(name: str, digits: tuple[Tensor, Tensor]) -> None:
    images, labels = digits
    model = build(name, 8, 10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(24):
        rows = torch.arange(32 * step, 32 * step + 32) % 256
        loss = F.cross_entropy(model(images[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        right = model.eval()(images).argmax(dim=1) == labels
    assert right.float().mean() > 0.6


def test_attention_is_the_last_block_of_all_stages_but_the_first() -> None:
    model = build("alternet_18", 32)
    found = [[hasattr(block, "attention") for block in stage] for stage in model.stages]
    assert found == [[False, False], [False, True], [False, True], [False, True]]
    attention = [stage[1].attention for stage in model.stages[1:]]
    assert [layer.heads for layer in attention] == [6, 12, 24]
    assert [layer.qkv.out_features for layer in attention] == [3 * 64 * a for a in (6, 12, 24)]


@pytest.mark.parametrize(
    ("size", "keys", "windows"),
    [
        (32, {}, [4, 4, 4]),
        (16, {}, [4, 4, 2]),
        (224, {}, [7, 7, 7]),
        (32, {"window": 16}, [16, 8, 4]),
    ],
)
def test_windows_follow_the_image(size: int, keys: dict[str, int], windows: list[int]) -> None:
    with torch.device("meta"):
        model = build("alternet_18", size, **keys)
    attention = [stage[1].attention for stage in model.stages[1:]]
    assert [layer.window_size for layer in attention] == [(n, n) for n in windows]
    assert {layer.shift_size for layer in attention} == {(0, 0)}


@pytest.mark.parametrize(("size", "side"), [(63, 63), (64, 16), (224, 56)])
def test_large_images_go_through_a_stem_of_stride_four(size: int, side: int) -> None:
    with torch.device("meta"):
        model = build("alternet_18", size)
        assert model.stem(torch.empty(1, 3, size, size)).shape == (1, 64, side, side)


def together(grid: tuple[int, int], window: int) -> Tensor:
    """Which cells share a window."""
    row, column = (torch.arange(n) // window for n in grid)
    place = (100 * row[:, None] + column).flatten()
    return place[:, None] == place


@pytest.mark.parametrize(("size", "grid"), [(16, (8, 8)), (28, (14, 14)), (18, (9, 9))])
def test_cells_see_all_of_their_window_and_nothing_else(size: int, grid: tuple[int, int]) -> None:
    layer = build("alternet_18", size).stages[1][1].attention.double()
    x = torch.randn(1, 128, *grid, dtype=torch.float64, requires_grad=True)
    out = layer(x).flatten(2)[0].sum(dim=0)
    near = together(grid, 4)
    for cell in {0, 3, 4, 5 * grid[1] + 2, grid[0] * grid[1] - 1}:
        (gradient,) = torch.autograd.grad(out[cell], x, retain_graph=True)
        seen = gradient[0].abs().sum(dim=0).flatten() > 0
        assert torch.equal(seen, near[cell])


@pytest.mark.parametrize("grid", [(14, 14), (9, 6)])  # the one it is built for, and another
def test_is_attention_with_a_bias_for_every_offset(grid: tuple[int, int]) -> None:
    layer = build("alternet_18", 28).stages[1][1].attention.double()
    nn.init.normal_(layer.bias_table)
    x = torch.randn(2, 128, *grid, dtype=torch.float64)
    count = grid[0] * grid[1]
    q, k, v = layer.qkv(x.flatten(2).mT).view(2, count, 3, 6, 64).permute(2, 0, 3, 1, 4)
    row, column = torch.arange(count) // grid[1], torch.arange(count) % grid[1]
    down, right = row[:, None] - row, column[:, None] - column
    offset = (down.clamp(-3, 3) + 3) * 7 + right.clamp(-3, 3) + 3
    logits = q @ k.mT / 8 + layer.bias_table[offset]
    weights = logits.masked_fill(~together(grid, 4), float("-inf")).softmax(dim=-1)
    expected = layer.proj((weights @ v).transpose(1, 2).flatten(2)).mT.unflatten(2, grid)
    torch.testing.assert_close(layer(x), expected)


def test_its_maps_are_one_map_of_the_grid(student: Callable[..., Network]) -> None:
    network = student("alternet_18", image_size=28).eval()
    sites = network.anatomy().attention
    network.tap([site.name for site in sites])
    features = network(torch.rand(2, 3, 28, 28)).features
    assert features is not None
    assert [site.heads for site in sites] == [6, 12, 24]
    for site, side in zip(sites, (14, 7, 4), strict=True):
        rows = features[site.name]
        assert rows.shape == (2, site.heads, side**2, side**2)
        torch.testing.assert_close(rows.sum(dim=-1), torch.ones_like(rows[..., 0]))
        assert torch.equal(rows[0, 0] > 0, together((side, side), 4))


@pytest.mark.parametrize("name", ["convnext_atto", "convnext_femto"])
def test_is_timm_s_convnext(name: str) -> None:
    with torch.device("meta"):
        whole = timm.create_model(name)
        assert cost.parameters(build(name, 224, 1000)) == cost.parameters(whole)
    ours, theirs = spread_out(build(name, 64)), timm.create_model(name, num_classes=5).eval()
    for scale in (True, False):  # beside those of LayerScale all lie in the same order
        mine = [p for part, p in ours.named_parameters() if part.endswith("factor") == scale]
        others = [p for part, p in theirs.named_parameters() if part.endswith("gamma") == scale]
        for one, other in zip(mine, others, strict=True):
            other.data.copy_(one.view_as(other))
    images = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("size", "keys", "patch_size"),
    [(224, {}, 4), (64, {}, 4), (32, {}, 2), (28, {}, 2), (8, {}, 1), (32, {"patch_size": 1}, 1)],
)
def test_patches_of_the_stem_shrink_with_the_image(
    size: int, keys: dict[str, int], patch_size: int
) -> None:
    with torch.device("meta"):
        model = build("convnext_atto", size, **keys)
        assert model.stem(torch.empty(1, 3, size, size)).shape[2:] == (size // patch_size,) * 2


def test_no_pixel_is_left_out_where_patches_do_not_fit() -> None:
    images = torch.rand(1, 3, 31, 31, requires_grad=True)  # on 16, 8, 4, 2 cells
    build("convnext_atto", 31)(images).square().sum().backward()
    assert images.grad is not None
    assert images.grad.abs().sum(dim=(0, 1)).all()


def test_blocks_begin_as_the_identity_and_are_skipped_the_more_the_later() -> None:
    model = build("convnext_femto", 32, drop_path=0.22)
    blocks = [block for stage in model.stages for block in stage if hasattr(block, "drop")]
    assert [block.drop.rate for block in blocks] == pytest.approx([0.02 * i for i in range(12)])
    assert [len(stage) for stage in model.stages] == [2, 4, 8, 4]  # with norm and merging
    for block in blocks:
        assert block.scale.factor.eq(1e-6).all()


@pytest.mark.parametrize("name", ["convnext_atto", "convnext_femto"])
def test_a_last_block_that_is_always_skipped_is_refused(name: str) -> None:
    with pytest.raises(RecipeError, match=f"{name}: drop_path must be below 1"):
        build(name, drop_path=1.0)


def test_rows_are_read_in_order_and_the_last_state_answers() -> None:
    model = spread_out(build("row_gru", 8, width=6)).double()
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    weights = dict(model.gru.named_parameters())
    state = torch.zeros(2, 6, dtype=torch.float64)
    for row in range(8):
        numbers = torch.cat([images[:, channel, row] for channel in range(3)], dim=1)
        new = numbers @ weights["weight_ih_l0"].T + weights["bias_ih_l0"]
        old = state @ weights["weight_hh_l0"].T + weights["bias_hh_l0"]
        reset, keep = (new + old)[:, :12].sigmoid().chunk(2, dim=1)
        state = keep * state + (1 - keep) * (new[:, 12:] + reset * old[:, 12:]).tanh()
    torch.testing.assert_close(model(images), model.head(state))
    shuffled = images[:, :, torch.tensor([1, 0, 2, 3, 4, 5, 6, 7])]
    assert (model(shuffled) - model(images)).abs().max() > 1e-3


def test_states_begin_to_be_carried_on_at_their_length() -> None:
    gates = build("row_gru", 8).gru.weight_hh_l0.chunk(3)
    for gate in gates:
        torch.testing.assert_close(gate @ gate.T, torch.eye(128), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["row_gru", "mlp"])
def test_every_one_of_several_layers_learns(name: str) -> None:
    shallow, deep = build(name, depth=1), build(name, depth=3)
    deep(torch.rand(3, 3, 28, 28)).square().sum().backward()
    assert all(parameter.grad.any() for parameter in deep.parameters())
    weights = [sum(p.ndim == 2 for p in model.parameters()) for model in (shallow, deep)]
    assert weights == {"row_gru": [3, 7], "mlp": [2, 4]}[name]


def test_to_an_mlp_pixels_are_in_no_order() -> None:
    model = spread_out(build("mlp", 8))
    images, order = torch.rand(2, 3, 8, 8), torch.randperm(192)
    expected = model(images)
    shuffled = images.flatten(1)[:, order].view_as(images)
    assert (model(shuffled) - expected).abs().max() > 1e-3
    first = model.layers[0][0].weight
    with torch.no_grad():
        first.copy_(first[:, order])
    torch.testing.assert_close(model(shuffled), expected)


def test_an_mlp_keeps_the_scale_through_its_layers() -> None:
    hidden = build("mlp", 16, width=512, depth=6).layers(torch.randn(64, 768))
    assert 0.5 < hidden.square().mean() < 2
