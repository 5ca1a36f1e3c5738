from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.errors import IncompatibleError, RecipeError
from distill.models import backbones, cost

SMALL: dict[str, Any] = {"width": 32, "depth": 2, "heads": 4, "mlp_ratio": 2.0, "patch_size": 4}


def vit(image_size: int = 16, num_classes: int = 5, **keys: Any) -> Any:
    model = backbones.build("vit", SMALL | keys, num_classes=num_classes, image_size=image_size)
    for module in model.modules():  # far from the small initial weights, so that all parts matter
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.2)
            nn.init.normal_(module.bias, std=0.2)
    return model.eval()


def patches(images: Tensor, order: Tensor) -> Tensor:
    """Images of 16 px with their sixteen patches of 4 px in another order."""
    columns = F.unfold(images, 4, stride=4)
    return F.fold(columns[:, :, order], 16, 4, stride=4)


def test_is_timm_s_vision_transformer() -> None:
    import timm

    reference = timm.create_model("vit_tiny_patch16_224", num_classes=7, img_size=64).eval()
    ours = backbones.build(
        "vit",
        {"width": 192, "depth": 12, "heads": 3, "mlp_ratio": 4.0, "patch_size": 16, "pool": "cls"},
        num_classes=7,
        image_size=64,
    ).eval()
    state = reference.state_dict()
    for tensor in state.values():
        nn.init.normal_(tensor, std=0.1)
    pairs = {
        "stem.": "patch_embed.proj.",
        "norm.": "norm.",
        "head.": "head.",
        "attention.": "attn.",
        "mlp.0.": "mlp.fc1.",
        "mlp.3.": "mlp.fc2.",
    }

    def theirs(name: str) -> str:
        for mine, other in pairs.items():
            name = name.replace(mine, other) if name.startswith(mine) or "blocks" in name else name
        return name

    position = state.pop("pos_embed")
    mapped = {
        name: state[theirs(name)] for name in ours.state_dict() if name not in ("cls", "position")
    }
    # timm gives the class token a position of its own: one more learned vector on a learned vector.
    mapped |= {"cls": state["cls_token"] + position[:, :1], "position": position[:, 1:]}
    ours.load_state_dict(mapped)
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(images), reference(images), rtol=1e-4, atol=1e-4)
    assert cost.parameters(ours) == cost.parameters(reference) - 192


def test_a_patch_is_one_linear_map_of_its_pixels() -> None:
    model = vit()
    images = torch.rand(2, 3, 16, 16)
    columns = F.unfold(images, 4, stride=4).transpose(1, 2)
    tokens = columns @ model.stem.weight.flatten(1).T + model.stem.bias
    torch.testing.assert_close(model.stem(images).flatten(2).transpose(1, 2), tokens)


@pytest.mark.parametrize(
    ("position", "blind"), [("none", True), ("learned", False), ("sincos", False), ("conv", False)]
)
def test_only_positions_tell_where_a_patch_is(position: str, blind: bool) -> None:
    model = vit(position=position)
    if position == "learned":
        nn.init.normal_(model.position)
    images = torch.rand(2, 3, 16, 16)
    order = torch.randperm(16)
    difference = (model(images) - model(patches(images, order))).abs().max()
    assert (difference < 1e-4) == blind


def test_sincos_is_fixed_and_no_part_of_the_weights() -> None:
    one, two = vit(position="sincos"), vit(position="sincos")
    assert torch.equal(one.waves, two.waves)
    assert not {"waves", "position"} & set(one.state_dict())
    assert one.waves.shape == (1, 16, 32)
    # Patch 6 lies in row 1, column 2; the third frequency of eight is 10000^(-2/8).
    row, column = 1 / 10, 2 / 10
    angles = torch.tensor([column, column, row, row])
    expected = torch.stack([angles[0].sin(), angles[1].cos(), angles[2].sin(), angles[3].cos()])
    torch.testing.assert_close(one.waves[0, 6, [2, 10, 18, 26]], expected)
    assert len({tuple(row) for row in one.waves[0].tolist()}) == 16


@pytest.mark.parametrize(("rows", "columns"), [(8, 8), (24, 24), (16, 24), (4, 40)])
def test_fixed_positions_of_another_grid_lie_between_those_of_the_network_s_own(
    rows: int, columns: int
) -> None:
    model = vit(16, position="sincos")
    images = torch.rand(2, 3, rows, columns)
    x, grid = model.patches(images)
    assert grid == (rows // 4, columns // 4)
    own = x - model.stem(images).flatten(2).transpose(1, 2)
    for i, j in product(range(grid[0]), range(grid[1])):
        row, column = (i + 0.5) * 4 / grid[0] - 0.5, (j + 0.5) * 4 / grid[1] - 0.5
        waves = [
            f(place / 10000 ** (k / 8))
            for place in (column, row)
            for f in (math.sin, math.cos)
            for k in range(8)
        ]
        expected = torch.tensor(waves).expand(2, -1)
        torch.testing.assert_close(own[:, grid[1] * i + j], expected, rtol=0, atol=1e-5)
    assert model(images).shape == (2, 5)


def test_fixed_positions_of_the_network_s_own_grid_are_added_as_they_are() -> None:
    model, images = vit(16, position="sincos"), torch.rand(2, 3, 16, 16)
    x, _ = model.patches(images)
    assert torch.equal(x, model.stem(images).flatten(2).transpose(1, 2) + model.waves)
    middles = [12 * (3 * i + 1) + 3 * j + 1 for i, j in product(range(4), repeat=2)]
    finer, _ = model.patches(torch.zeros(1, 3, 48, 48))
    at_middles = finer[:, middles] - model.stem.bias
    torch.testing.assert_close(at_middles, model.waves, rtol=0, atol=1e-5)


def test_learned_positions_are_interpolated_as_timm_does_it() -> None:
    model = vit(16, width=32, position="learned")
    images = torch.rand(2, 3, 24, 40)
    x, grid = model.patches(images)
    own = x - model.stem(images).flatten(2).transpose(1, 2)
    expected = timm.layers.resample_abs_pos_embed(model.position, [6, 10], [4, 4], 0)
    torch.testing.assert_close(own, expected.expand(2, -1, -1), rtol=0, atol=1e-5)
    assert grid == (6, 10)
    same, _ = model.patches(images[:, :, :16, :16])
    stem = model.stem(images[:, :, :16, :16]).flatten(2).transpose(1, 2)
    assert torch.equal(same, stem + model.position)


def test_conv_position_adds_the_neighbours_and_passes_the_class_token() -> None:
    model = vit(position="conv", pool="cls")
    tokens = torch.randn(2, 17, 32)
    out = model.local(tokens, torch.Size([4, 4]))
    assert torch.equal(out[:, 0], tokens[:, 0])
    grid = tokens[:, 1:].transpose(1, 2).reshape(2, 32, 4, 4)
    near = F.conv2d(grid, model.local.conv.weight, model.local.conv.bias, padding=1, groups=32)
    expected = (grid + near).flatten(2).transpose(1, 2)
    torch.testing.assert_close(out[:, 1:], expected)


def test_conv_position_moves_with_the_tokens_where_there_is_no_border() -> None:
    """Zeros around the grid are all that tells it places apart."""
    local = vit(position="conv").local
    grid = torch.randn(2, 6, 5, 32)

    def added(tokens: Tensor) -> Tensor:
        return local(tokens.flatten(1, 2), (6, 5)).unflatten(1, (6, 5))

    moved = added(grid.roll((1, 2), dims=(1, 2))) - added(grid).roll((1, 2), dims=(1, 2))
    assert moved.abs().max() > 1e-2
    around = nn.Conv2d(32, 32, 3, padding=1, groups=32, padding_mode="circular")
    around.load_state_dict(local.conv.state_dict())
    local.conv = around
    moved = added(grid.roll((1, 2), dims=(1, 2))) - added(grid).roll((1, 2), dims=(1, 2))
    assert moved.abs().max() <= 1e-5


def test_conv_position_stands_behind_the_first_block_alone() -> None:
    model = vit(position="conv", depth=3)
    seen: list[str] = []
    for name in ("blocks.0", "local", "blocks.1", "blocks.2"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.append(name))
    model(torch.rand(1, 3, 16, 16))
    assert seen == ["blocks.0", "local", "blocks.1", "blocks.2"]


def test_mean_pool_has_no_class_token_and_reads_all_patches() -> None:
    model = vit(pool="mean", position="none", depth=1)
    assert "cls" not in dict(model.named_parameters())
    outputs: list[Tensor] = []
    model.norm.register_forward_hook(lambda _, __, out: outputs.append(out))
    logits = model(torch.rand(2, 3, 16, 16))
    assert outputs[0].shape == (2, 16, 32)
    torch.testing.assert_close(logits, model.head(outputs[0].mean(dim=1)))


@pytest.mark.parametrize("patch_size", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_the_stem_makes_one_token_a_patch(stem: str, patch_size: int) -> None:
    model = vit(stem=stem, patch_size=patch_size)
    grid = 16 // patch_size
    assert model.stem(torch.rand(2, 3, 16, 16)).shape == (2, 32, grid, grid)
    assert model(torch.rand(2, 3, 16, 16)).shape == (2, 5)


def test_every_token_sees_every_patch_in_the_first_block() -> None:
    model = vit(depth=1)
    tokens = torch.randn(1, 16, 32, requires_grad=True)
    (gradient,) = torch.autograd.grad(model.blocks[0](tokens, (4, 4))[0, 0].sum(), tokens)
    assert (gradient.abs().sum(dim=-1) > 0).all()


def test_drop_path_skips_whole_samples_and_keeps_the_mean() -> None:
    from distill.models.zoo._layers import DropPath

    layer, x = DropPath(0.25), torch.ones(4000, 2, 3)
    out = layer(x)
    assert torch.equal(out, out[:, :1, :1].expand_as(out))
    torch.testing.assert_close(out.unique(), torch.tensor([0, 4 / 3]))
    assert out.mean().item() == pytest.approx(1, abs=0.05)
    assert torch.equal(layer.eval()(x), x)
    rates = [block.drop[1].rate for block in vit(depth=5, drop_path=0.2).blocks]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])


def test_dropout_acts_in_training_alone() -> None:
    model = vit(drop=0.5)
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(model(images), model(images))
    model.train()
    assert not torch.equal(model(images), model(images))


def test_initial_weights_keep_the_scale_and_the_head_is_not_zero() -> None:
    model = backbones.build("vit", {"pool": "cls"}, num_classes=100, image_size=32)
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert {"head", "blocks.0.attention.qkv", "blocks.8.mlp.3"} <= set(linear)
    for name, module in linear.items():
        expected = (2 / (module.in_features + module.out_features)) ** 0.5
        assert module.weight.std().item() == pytest.approx(expected, rel=0.05), name
        assert not module.bias.any(), name
    for vector in (model.cls, model.position):
        assert vector.std().item() == pytest.approx(0.02, rel=0.2)


@pytest.mark.parametrize(
    ("keys", "error", "words"),
    [
        ({"patch_size": 5}, IncompatibleError, "patches of 5 px do not tile an image of 16 px"),
        ({"heads": 5}, RecipeError, "got 5 heads and width 32"),
        ({"width": 6, "heads": 2, "position": "sincos"}, RecipeError, "divisible by 4, got 6"),
        ({"stem": "conv", "patch_size": 16, "width": 2, "heads": 1}, None, ""),
        ({"drop_path": 1.0}, RecipeError, "must be below 1"),
        ({"position": "rope"}, RecipeError, "vit: position"),
        ({"widht": 3}, RecipeError, "did you mean 'width'"),
    ],
)
def test_dials_that_contradict_one_another_are_refused(
    keys: dict[str, Any], error: type[Exception] | None, words: str
) -> None:
    if error is None:
        assert vit(**keys)(torch.rand(1, 3, 16, 16)).shape == (1, 5)
        return
    with pytest.raises(error, match=words):
        vit(**keys)


def test_a_conv_stem_halves_and_so_needs_a_power_of_two() -> None:
    with pytest.raises(RecipeError, match=r"needs a patch_size of 1, 2, 4, 8, .*, got 3"):
        vit(image_size=12, stem="conv", patch_size=3)
