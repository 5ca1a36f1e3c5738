"""What holds for a vision transformer whatever its dials say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill.errors import RecipeError
from distill.models import backbones

SMALL: dict[str, Any] = {"width": 32, "depth": 3, "heads": 4, "patch_size": 4}
DIALS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sincos": {"position": "sincos"},
    "conv": {"position": "conv", "stem": "conv", "pool": "cls"},
    "none": {"position": "none"},
    "distill": {"pool": "distill", "position": "conv"},
    "pixels": {"patch_size": 1, "depth": 1},
    "layer_scale": {"layer_scale": 0.1},
    "window": {"attention": "window"},
    "window 3 with padding": {"attention": "window", "window": 3, "patch_size": 2},
    "gated": {"attention": "gated"},
    "gated, class token": {"attention": "gated", "pool": "cls", "position": "none"},
    "gated, both tokens": {"attention": "gated", "pool": "distill", "position": "conv"},
    "stages": {"depth": [1, 2, 1]},
    "stages, conv": {"depth": [2, 1], "position": "conv", "stem": "conv"},
    "swin": {"depth": [2, 2, 2], "attention": "window", "patch_size": 2, "position": "none"},
    "dynamic_conv": {"mixer": "dynamic_conv"},
    "dynamic_conv in stages": {"mixer": "dynamic_conv", "depth": [1, 1], "linear": "btt"},
    "crate": {"mixer": "crate", "pool": "cls"},
    "crate in stages": {"mixer": "crate", "depth": [1, 1], "position": "conv"},
    "low_rank": {"linear": "low_rank", "rank": 3},
    "kron": {"linear": "kron"},
    "monarch": {"linear": "monarch"},
    "btt": {"linear": "btt", "attention": "window", "depth": [1, 1]},
}

each = pytest.mark.parametrize("keys", DIALS.values(), ids=DIALS)


def vit(image_size: int = 16, num_classes: int = 5, **keys: Any) -> Any:
    return backbones.build("vit", SMALL | keys, num_classes=num_classes, image_size=image_size)


def spread_out(model: nn.Module) -> nn.Module:
    """Far from the small initial weights, so that every part of the network matters."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


@each
@pytest.mark.parametrize("size", [28, 32])
def test_every_parameter_learns(keys: dict[str, Any], size: int) -> None:
    model = vit(size, **keys)
    logits = model(torch.rand(3, 3, size, size))
    assert logits.shape == (3, 5)
    logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@each
def test_a_sample_s_logits_are_its_own(keys: dict[str, Any]) -> None:
    model = spread_out(vit(**keys))
    images = torch.rand(8, 3, 16, 16)
    before = model(images)
    images[7] += 1
    after = model(images)
    torch.testing.assert_close(after[:7], before[:7], rtol=0, atol=1e-6)
    assert (after[7] - before[7]).abs().max() > 1e-3


@each
def test_the_same_seed_gives_the_same_weights(keys: dict[str, Any]) -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(vit(**keys).state_dict())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


@pytest.mark.parametrize(
    "name", ["none", "window", "gated", "swin", "dynamic_conv in stages", "crate"]
)
def test_what_is_learned_at_one_size_is_used_at_another(name: str) -> None:
    keys = DIALS[name] | {"position": "conv"}
    small, large = vit(40, **keys), vit(48, **keys)
    spread_out(large).load_state_dict(spread_out(small).state_dict())
    images = torch.rand(2, 3, 48, 48)
    torch.testing.assert_close(small(images), large(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["swin", "gated, both tokens", "dynamic_conv"])
def test_compiles_to_one_graph(name: str) -> None:
    model = spread_out(vit(28, **DIALS[name] | {"width": 16}))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    images = torch.rand(2, 3, 28, 28)
    torch.testing.assert_close(compiled(images), model(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["swin", "gated", "dynamic_conv", "crate", "btt"])
def test_half_precision_says_the_same(name: str) -> None:
    model = spread_out(vit(28, **DIALS[name]))
    images = torch.rand(2, 3, 28, 28)
    expected = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images)
    assert (logits.float() - expected).norm() < 0.1 * expected.norm()


def test_pixels_are_tokens_in_no_order() -> None:
    model: Any = spread_out(vit(8, patch_size=1))
    images, order = torch.rand(2, 3, 8, 8), torch.randperm(64)
    expected = model(images)
    shuffled = images.flatten(2)[:, :, order].unflatten(2, (8, 8))
    assert (model(shuffled) - expected).abs().max() > 1e-3
    with torch.no_grad():
        model.position.copy_(model.position[:, order])
    torch.testing.assert_close(model(shuffled), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("keys", [{}, {"linear": "btt"}, {"mixer": "crate"}])
def test_without_positions_the_order_of_tokens_is_theirs_alone(keys: dict[str, Any]) -> None:
    model = spread_out(vit(position="none", **keys))
    tokens, order = torch.randn(2, 16, 32), torch.randperm(16)
    block: Any = model.blocks[0]  # type: ignore[index]
    torch.testing.assert_close(
        block(tokens[:, order], (4, 4)), block(tokens, (4, 4))[:, order], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("keys", [{"attention": "window"}, {"attention": "gated"}])
def test_windows_and_gates_know_a_patch_s_neighbours(keys: dict[str, Any]) -> None:
    model = spread_out(vit(position="none", **keys))
    tokens, order = torch.randn(2, 16, 32), torch.randperm(16)
    block: Any = model.blocks[0]  # type: ignore[index]
    assert (block(tokens[:, order], (4, 4)) - block(tokens, (4, 4))[:, order]).abs().max() > 1e-3


def test_layer_scale_is_a_factor_on_every_branch() -> None:
    model: Any = spread_out(vit(layer_scale=0.1, depth=1))
    block = model.blocks[0]
    tokens = torch.randn(2, 16, 32)
    one = tokens + block.scale1.factor * block.attention(block.norm1(tokens), (4, 4))
    two = one + block.scale2.factor * block.mlp(block.norm2(one))
    torch.testing.assert_close(block(tokens, (4, 4)), two)
    assert vit(layer_scale=0.1).blocks[0].scale2.factor.eq(0.1).all()
    assert not [name for name in vit().state_dict() if "scale" in name]


def test_the_distillation_token_has_a_classifier_of_its_own() -> None:
    model: Any = spread_out(vit(pool="distill"))
    images = torch.rand(2, 3, 16, 16)
    tokens: list[Tensor] = []
    model.norm.register_forward_hook(lambda _, __, out: tokens.append(out))
    logits = model(images)
    assert tokens[0].shape == (2, 18, 32)
    apart = model.head(tokens[0][:, 0]), model.head_dist(tokens[0][:, 1])
    torch.testing.assert_close(logits, (apart[0] + apart[1]) / 2)

    model.train()
    torch.testing.assert_close(model(images), logits)  # nobody asked for the two by themselves
    model.set_distilled_training(True)
    torch.testing.assert_close(model(images), apart)
    torch.testing.assert_close(model.eval()(images), logits)
    model.train().set_distilled_training(False)
    torch.testing.assert_close(model(images), logits)
    assert not hasattr(vit(pool="cls"), "head_dist")


def test_conv_positions_pass_both_tokens() -> None:
    model: Any = spread_out(vit(pool="distill", position="conv"))
    tokens = torch.randn(2, 18, 32)
    out = model.local(tokens, (4, 4))
    assert torch.equal(out[:, :2], tokens[:, :2])
    assert not torch.isclose(out[:, 2:], tokens[:, 2:]).all(dim=-1).any()


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"depth": []}, "depth is an empty list"),
        ({"depth": [1, 1], "pool": "cls"}, "needs pool mean, got pool cls"),
        ({"depth": [1, 1], "attention": "gated"}, "goes with attention global or window"),
        ({"window": 8}, "got window 8 with attention global"),
        ({"attention": "window", "pool": "distill"}, "a class token lies in no window"),
        ({"attention": "window", "mixer": "crate"}, "needs mixer attention, got mixer crate"),
        ({"attention": "gated", "mixer": "dynamic_conv"}, "attention gated needs mixer attention"),
        ({"attention": "gated", "width": 32, "heads": 8}, "1, 4, 9 or 16 of them, got 8"),
        ({"attention": "gated", "pool": "cls", "depth": 1}, "needs depth 2 or more"),
        ({"attention": "gated", "linear": "btt"}, "needs linear dense, got btt"),
        ({"mixer": "dynamic_conv", "pool": "cls"}, "needs pool mean, got pool cls"),
        ({"mixer": "crate", "linear": "kron"}, "needs linear dense, got kron"),
        ({"mixer": "crate", "layer_scale": 0.1}, "takes no layer_scale, got 0.1"),
        ({"rank": 2}, "got rank 2 with linear dense"),
        ({"linear": "monarch", "rank": 2}, "got rank 2 with linear monarch"),
        ({"linear": "low_rank", "rank": 32}, "a rank of 32 is not low"),
        ({"linear": "monarch", "width": 30, "heads": 2}, "to divide the width and the MLP"),
    ],
)
def test_dials_that_would_do_nothing_or_contradict_are_refused(
    keys: dict[str, Any], words: str
) -> None:
    with pytest.raises(RecipeError, match=words):
        vit(**keys)


def test_every_contradiction_is_told_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        vit(window=8, rank=2, heads=5)
    assert [line.partition(":")[0] for line in str(caught.value).splitlines()] == ["vit"] * 3
