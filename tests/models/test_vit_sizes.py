"""The published sizes, against timm's."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn

from distill.models import backbones, cost

# timm gives each token in front a position of its own (here it is part of the token), and adds a
# bias to every head's v · r, which softmax takes away again.
SIZES = {
    ("vit_tiny", "cls"): ("deit_tiny_patch16_224", -192),
    ("vit_tiny", "distill"): ("deit_tiny_distilled_patch16_224", -2 * 192),
    ("vit_small", "cls"): ("deit_small_patch16_224", -384),
    ("vit_small", "distill"): ("deit_small_distilled_patch16_224", -2 * 384),
    ("convit_tiny", None): ("convit_tiny", -10 * 4),
    ("swin_tiny", None): ("swin_tiny_patch4_window7_224", 0),
}
MILLIONS = {
    "vit_tiny": 5.717,
    "vit_small": 22.050,
    "convit_tiny": 5.710,
    "swin_tiny": 28.288,
    "crate_tiny": 6.088,
}


@pytest.mark.parametrize(("name", "pool"), SIZES)
def test_has_timm_s_parameters(name: str, pool: str | None) -> None:
    reference, difference = SIZES[name, pool]
    keys = {} if pool is None else {"pool": pool}
    with torch.device("meta"):
        ours = backbones.build(name, keys, num_classes=1000, image_size=224)
        theirs = timm.create_model(reference)
    assert cost.parameters(ours) == cost.parameters(theirs) + difference


@pytest.mark.parametrize("name", MILLIONS)
def test_has_the_published_parameters_and_takes_images_of_224_px(name: str) -> None:
    with torch.device("meta"):
        model = backbones.build(name, {}, num_classes=1000, image_size=224)
        assert model(torch.empty(2, 3, 224, 224)).shape == (2, 1000)
    assert cost.parameters(model) / 1e6 == pytest.approx(MILLIONS[name], abs=0.001)


@pytest.mark.parametrize(
    ("name", "image_size", "patch_size"),
    [
        ("vit_tiny", 224, 16),
        ("vit_tiny", 64, 4),
        ("vit_tiny", 32, 2),
        ("vit_tiny", 28, 2),
        ("vit_tiny", 8, 1),
        ("swin_tiny", 224, 4),
        ("swin_tiny", 64, 1),
    ],
)
def test_patches_shrink_with_the_image(name: str, image_size: int, patch_size: int) -> None:
    with torch.device("meta"):
        model: Any = backbones.build(name, {}, num_classes=3, image_size=image_size)
        given: Any = backbones.build(name, {"patch_size": 4}, num_classes=3, image_size=image_size)
    assert model.stem.kernel_size == (patch_size, patch_size)
    assert given.stem.kernel_size == (4, 4)


def test_is_timm_s_swin_transformer() -> None:
    keys = {
        "width": 24,
        "depth": [2, 4],
        "heads": 3,
        "mlp_ratio": 4.0,
        "attention": "window",
        "position": "none",
    }
    ours = backbones.build("vit", keys, num_classes=7, image_size=32).eval()
    theirs = timm.models.SwinTransformer(
        img_size=32, num_classes=7, embed_dim=24, depths=(2, 4), num_heads=(3, 6), window_size=4
    ).eval()
    # Parameters lie in the same order in both.
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert mine.shape == other.shape
        nn.init.normal_(other, std=0.1)
        mine.data.copy_(other)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-4)


def test_is_timm_s_convit() -> None:
    keys = {"width": 36, "depth": 4, "heads": 9, "mlp_ratio": 4.0, "pool": "cls"}
    ours = backbones.build(
        "vit", keys | {"attention": "gated"}, num_classes=7, image_size=16
    ).eval()
    theirs = timm.models.ConVit(
        img_size=16,
        patch_size=4,
        num_classes=7,
        embed_dim=4,  # of a head
        depth=4,
        num_heads=9,
        local_up_to_layer=2,
        use_pos_embed=True,
    ).eval()
    others = {n: p for n, p in theirs.named_parameters() if not n.endswith("pos_proj.bias")}
    tokens = {"cls": "cls_token", "position": "pos_embed"}
    parts = {
        "stem": "patch_embed.proj",
        "attention.": "attn.",
        "attn.gate": "attn.gating_param",
        "v_position": "pos_proj.weight",
        "mlp.0": "mlp.fc1",
        "mlp.3": "mlp.fc2",
    }
    for name, mine in ours.named_parameters():
        theirs_name = tokens.get(name, name)
        for part, other in parts.items():
            theirs_name = theirs_name.replace(part, other)
        nn.init.normal_(mine, std=0.2)
        others.pop(theirs_name).data.copy_(mine)
    assert not others
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-4)


def test_is_timm_s_distilled_transformer() -> None:
    keys = {"patch_size": 8, "pool": "distill"}
    ours: Any = backbones.build("vit_tiny", keys, num_classes=7, image_size=16).eval()
    theirs: Any = timm.models.VisionTransformerDistilled(
        img_size=16, patch_size=8, num_classes=7, embed_dim=192, depth=12, num_heads=3
    ).eval()
    for tensor in theirs.state_dict().values():
        nn.init.normal_(tensor, std=0.05)
    others = dict(theirs.named_parameters())
    position = others.pop("pos_embed")
    with torch.no_grad():
        others["cls_token"] += position[:, :1]
        others["dist_token"] += position[:, 1:2]
    mine = dict(ours.named_parameters())
    mine.pop("position").data.copy_(position[:, 2:])
    with torch.no_grad():
        position[:, :2] = 0
    for one, (name, other) in zip(mine.values(), others.items(), strict=True):
        assert one.shape == other.shape, name
        one.data.copy_(other)
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-4)
    for model in (ours, theirs):
        model.train().set_distilled_training(True)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-4)
