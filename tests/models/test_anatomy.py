"""What is found in a network is what its authors say is there, and lies where it says."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill import component
from distill.errors import IncompatibleError
from distill.models.anatomy import Examined, examine
from distill.models.grids import Size
from tests.models import made
from tests.models.made import CLASSES, FAMILIES, SQUARE, WIDE

# Channels and cells along a side of every stage, blocks, tokens in front, and layers of attention,
# at the size that the weights were published for.
EXPECTED: dict[str, tuple[str, int, int, int]] = {
    "timm/resnet18": ("64:112 64:56 128:28 256:14 512:7", 0, 0, 0),
    "timm/resnetv2_50": ("64:112 256:56 512:28 1024:14 2048:7", 0, 0, 0),
    "timm/convnext_atto": ("40:56 80:28 160:14 320:7", 0, 0, 0),
    "timm/mobilenetv3_large_100": ("16:112 24:56 40:28 112:14 960:7", 0, 0, 0),
    "timm/efficientnet_b0": ("16:112 24:56 40:28 112:14 320:7", 0, 0, 0),
    "timm/efficientvit_b0": ("8:112 16:56 32:28 64:14 128:7", 0, 0, 0),
    "timm/regnety_002": ("32:112 24:56 56:28 152:14 368:7", 0, 0, 0),
    "timm/densenet121": ("64:112 256:56 512:28 1024:14 1024:7", 0, 0, 0),
    "timm/vgg11_bn": ("64:224 128:112 256:56 512:28 512:14 512:7", 0, 0, 0),
    "timm/repvgg_a0": ("48:112 48:56 96:28 192:14 1280:7", 0, 0, 0),
    "timm/ghostnet_100": ("16:112 24:56 40:28 112:14 960:7", 0, 0, 0),
    "timm/dla34": ("16:224 32:112 64:56 128:28 256:14 512:7", 0, 0, 0),
    "timm/cspresnet50": ("64:128 128:64 256:32 512:16 1024:8", 0, 0, 0),
    "timm/edgenext_xx_small": ("24:64 48:32 88:16 168:8", 0, 0, 0),
    "timm/poolformer_s12": ("64:56 128:28 320:14 512:7", 0, 0, 0),
    "timm/mambaout_femto": ("24:112 48:56 96:28 192:14 288:7", 0, 0, 0),
    "timm/focalnet_tiny_srf": ("96:56 192:28 384:14 768:7", 0, 0, 0),
    "timm/convmixer_768_32": ("768:32", 32, 0, 0),
    "timm/vit_tiny_patch16_224": ("192:14", 12, 1, 12),
    "timm/deit_tiny_distilled_patch16_224": ("192:14", 12, 2, 12),
    "timm/vit_small_patch14_reg4_dinov2": ("384:37", 12, 5, 12),
    "timm/vit_base_patch32_siglip_256": ("768:8", 12, 0, 12),  # its head has 64 tokens of 64
    "timm/beit_base_patch16_224": ("768:14", 12, 1, 12),
    "timm/eva02_tiny_patch14_224": ("192:16", 12, 1, 12),
    "timm/cait_xxs24_224": ("192:14", 24, 0, 24),  # its class token joins behind them
    "timm/convit_tiny": ("192:14", 12, 1, 12),
    "timm/pit_ti_224": ("64:27 128:14 256:7", 0, 0, 12),
    "timm/levit_128s": ("16:112 32:56 64:28 128:14 256:7 384:4", 0, 0, 11),
    "timm/pvt_v2_b0": ("32:56 64:28 160:14 256:7", 0, 0, 8),
    "timm/twins_svt_small": ("64:56 128:28 256:14 512:7", 0, 0, 18),
    "timm/swin_tiny_patch4_window7_224": ("96:56 192:28 384:14 768:7", 0, 0, 12),
    "timm/swinv2_tiny_window8_256": ("96:64 192:32 384:16 768:8", 0, 0, 12),
    "timm/davit_tiny": ("96:56 192:28 384:14 768:7", 0, 0, 6),  # and 6 between channels
    "timm/maxvit_tiny_tf_224": ("64:112 64:56 128:28 256:14 512:7", 0, 0, 22),
    "timm/coatnet_0_rw_224": ("64:112 96:56 192:28 384:14 768:7", 0, 0, 9),
    "timm/mvitv2_tiny": ("96:56 192:28 384:14 768:7", 0, 0, 10),
    "timm/hieradet_small": ("96:64 192:32 384:16 768:8", 0, 0, 14),
    "timm/xcit_nano_12_p16_224": ("128:14", 12, 0, 0),  # attention between channels alone
    "timm/mixer_s16_224": ("512:14", 8, 0, 0),
    "timm/mobilevit_xxs": ("16:128 24:64 48:32 64:16 80:8", 0, 0, 0),
    "timm/volo_d1_224": ("64:112 192:28 384:14", 0, 0, 14),
    "timm/tnt_s_patch16_224": ("384:14", 0, 1, 12),  # pixels inside of patches are no grid
    "torchvision/swin_t": ("96:56 192:28 384:14 768:7", 0, 0, 12),
    "torchvision/swin_v2_t": ("96:56 192:28 384:14 768:7", 0, 0, 12),
    "torchvision/vit_b_16": ("768:14", 12, 1, 12),
    "torchvision/maxvit_t": ("64:112 64:56 128:28 256:14 512:7", 0, 0, 22),
    "torchvision/convnext_tiny": ("96:56 192:28 384:14 768:7", 0, 0, 0),
    "torchvision/resnet18": ("64:112 64:56 128:28 256:14 512:7", 0, 0, 0),
    "torchvision/mobilenet_v2": ("32:112 24:56 32:28 96:14 1280:7", 0, 0, 0),
    "torchvision/densenet121": ("64:112 256:56 512:28 1024:14 1024:7", 0, 0, 0),
    "torchvision/squeezenet1_1": ("64:111 128:55 256:27 512:13", 0, 0, 0),
}
# Those whose like is above or below are for a long run.
SELDOM = (
    "timm/resnet18",
    "timm/regnety_002",
    "timm/vgg11_bn",
    "timm/dla34",
    "timm/cspresnet50",
    "timm/poolformer_s12",
    "timm/focalnet_tiny_srf",
    "timm/coatnet_0_rw_224",
    "timm/swinv2_tiny_window8_256",
    "timm/mvitv2_tiny",
    "torchvision/swin_v2_t",
    "torchvision/densenet121",
)
# timm names another end of the last stage: before a layer that widens it, or behind.
NAMED_OTHERWISE = ("timm/ghostnet_100", "timm/mobilevit_xxs")


def without_values(model: str) -> tuple[nn.Module, Size]:
    """The model as it is published, on the meta device, and the size of its images."""
    from torchvision.models import get_model

    library, _, name = model.partition("/")
    with torch.device("meta"):
        if library == "torchvision":
            return get_model(name, num_classes=CLASSES), (224, 224)
        import timm

        built = timm.create_model(name, num_classes=CLASSES)
        side = timm.get_pretrained_cfg(name).input_size[-1]
    return built, (side, side)


def intermediates(module: Any, images: Tensor) -> list[Tensor]:
    """What timm itself says the network computes on its way; of a stride the last."""
    known = inspect.signature(module.forward_intermediates).parameters
    keys = {"norm": False} if "norm" in known else {}
    with torch.no_grad():
        grids = module.forward_intermediates(
            images, intermediates_only=True, output_fmt="NCHW", **keys
        )
    return [grid if isinstance(grid, Tensor) else grid[0] for grid in grids]


def last_of_each_stride(grids: list[Tensor]) -> list[Tensor]:
    return list({tuple(grid.shape[2:]): grid for grid in grids}.values())


def described(found: Examined) -> tuple[str, int, int, int]:
    assert all(site.grid[0] == site.grid[1] for site in found.stages)
    stages = " ".join(f"{site.channels}:{site.grid[0]}" for site in found.stages)
    return stages, len(found.blocks), found.stages[-1].prefix, len(found.attention)


@pytest.mark.parametrize(
    "model",
    [pytest.param(m, marks=[pytest.mark.soak] if m in SELDOM else []) for m in EXPECTED],
)
def test_stages_blocks_and_layers_of_attention(model: str) -> None:
    module, image = without_values(model)
    grids = []
    if hasattr(module, "forward_intermediates") and model not in NAMED_OTHERWISE:
        grids = intermediates(module.eval(), torch.empty(1, 3, *image, device="meta"))
    found = examine(module, image)
    assert described(found) == EXPECTED[model]
    shapes = {(site.channels, *site.grid) for site in found.stages}
    assert {tuple(grid.shape[1:]) for grid in last_of_each_stride(grids)} <= shapes
    if found.blocks and grids:
        assert len(found.blocks) == len(grids)
    assert [site.name for site in found.sites.values()] == list(found.sites)
    for row in (found.stages, found.blocks, found.attention):
        depths = [site.depth for site in row]
        assert depths == sorted(depths)
        assert all(0 < depth <= 1 for depth in depths)
    for site in (*found.stages, *found.blocks):
        assert found.sites[site.name] == site
        assert site.stride == pytest.approx(image[0] / site.grid[0])


@pytest.mark.parametrize("image", [SQUARE, WIDE])
@pytest.mark.parametrize(
    ("model", "beyond"),
    [
        ("timm/resnet10t", 2),  # at stride 2 timm means the activation behind the stem
        ("timm/convnext_atto", 0),
        ("timm/efficientnet_lite0", 0),
        ("timm/regnetx_002", 0),
        ("timm/mambaout_femto", 0),
        ("timm/vit_tiny_patch16_224", 0),
        ("timm/deit_tiny_distilled_patch16_224", 0),
        ("timm/beit_base_patch16_224", 0),
        ("timm/swin_tiny_patch4_window7_224", 0),
        ("timm/pvt_v2_b0", 0),
        ("timm/twins_svt_small", 0),
        ("timm/pit_ti_224", 0),
        ("timm/maxvit_tiny_tf_224", 0),
        ("timm/mixer_s32_224", 0),
    ],
)
def test_a_tap_gives_what_timm_gives_there(model: str, beyond: int, image: Size) -> None:
    network = made.network(model, image)
    anatomy = network.anatomy(image)
    sites = anatomy.blocks or anatomy.stages
    network.tap([site.name for site in sites])
    images = made.images(image)
    with torch.no_grad():
        features = network(images).features
    assert features is not None
    expected = intermediates(network.backbone, (images - network.mean) / network.std)
    if not anatomy.blocks:
        expected = last_of_each_stride(expected)
    expected = [grid for grid in expected if grid.shape[2] * beyond < image[0]]
    assert len(expected) >= 3
    for grid, site in zip(reversed(expected), reversed(sites), strict=False):
        assert features[site.name].shape == (len(images), site.channels, *site.grid)
        torch.testing.assert_close(features[site.name], grid, rtol=1e-5, atol=1e-5)


ZOO = ("resnet8", "wrn_16_2", "vgg8", "mobilenetv2_half", "shufflenetv1", "shufflenetv2")
NOT_YET = "timm/levit_128s"  # its initial attention is even: a change is everywhere the same


@pytest.mark.parametrize("model", [*(m for m in FAMILIES if m != NOT_YET), *ZOO])
def test_a_cell_shows_what_lies_there_in_the_image(model: str) -> None:
    """Where a part of the image is changed, there the grids change most, to half a cell."""
    height = 64 if model in ZOO else 128
    image = (height, height if model in made.SQUARE_ONLY else height * 3 // 2)
    network = made.network(model, image)
    anatomy = network.anatomy(image)
    sites = anatomy.blocks or anatomy.stages
    network.tap([site.name for site in sites])
    images, side = made.images(image, 4), height // 4
    for row, column in ((side // 2, image[1] - 3 * side // 2), (5 * side // 2, side // 2)):
        other = images.clone()
        other[:, :, row : row + side, column : column + side] = made.images((side, side), 4)
        with torch.no_grad():
            one, two = network(images).features, network(other).features
        assert one is not None
        assert two is not None
        for site in sites:
            change = (one[site.name] - two[site.name]).square().sum(dim=1).mean(dim=0)
            assert change.shape == site.grid
            strongest = divmod(int(change.argmax()), site.grid[1])
            for begin, cell, n, m in zip((row, column), strongest, image, site.grid, strict=True):
                stride = n / m
                assert begin - 1.5 * stride < cell * stride < begin + side + 0.5 * stride, site


NO_GRID = ("mlp", "row_gru")  # what they compute has lost its place in the image


@pytest.mark.parametrize("name", sorted(component.find("models.zoo")))
def test_every_network_of_ours_is_seen_through(name: str) -> None:
    with torch.device("meta"):
        network = made.network(name, (32, 32))
    anatomy = network.anatomy()
    assert anatomy.model == name
    assert bool(anatomy.blocks or len(anatomy.stages) >= 3) is (name not in NO_GRID)
    assert anatomy.width > 0
    sites = (*anatomy.stages, *anatomy.blocks)
    network.tap(["pooled", *(site.name for site in (*sites, *anatomy.attention))])
    with torch.no_grad():
        features = network(torch.empty(2, 3, 32, 32, device="meta")).features
    assert features is not None
    assert features["pooled"].shape == (2, anatomy.width)
    for site in sites:
        assert features[site.name].shape == (2, site.channels, *site.grid)
    for layer in anatomy.attention:
        tokens = [layer.prefix + math.prod(grid) for grid in (layer.queries, layer.keys)]
        assert features[layer.name].shape == (2, layer.heads, *tokens)


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        ("timm/swin_tiny_patch4_window7_224", "channels_last"),
        ("timm/convnext_tiny", "channels_first"),
    ],
)
def test_a_cube_lies_as_others_of_its_class(model: str, kind: str) -> None:
    """At 384 px both have 96 channels on a grid of 96 x 96 cells."""
    with torch.device("meta"):
        module = made.backbone(model, (384, 384))
    found = examine(module, (384, 384))
    first = found.stages[0]
    assert (first.channels, first.grid) == (96, (96, 96))
    assert found.layouts[first.name].kind == kind


def test_tokens_without_an_order_are_no_grid() -> None:
    """Hiera's are dealt out anew, so that what looks like a grid is none."""
    with torch.device("meta"):
        module = made.backbone("timm/hiera_tiny_224", (224, 224))
    found = examine(module, (224, 224))
    assert (found.sites, found.stages, found.blocks, found.attention) == ({}, (), (), ())


class Encoder(nn.Module):
    """A user's own: PyTorch's layers, a class token, and an order of its own in `forward`."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(24, CLASSES)
        self.cls = nn.Parameter(torch.randn(1, 1, 24))
        self.steps = nn.ModuleList(
            nn.TransformerEncoderLayer(24, 3, 48, dropout=0.0, batch_first=True) for _ in range(4)
        )
        self.patches = nn.Conv2d(3, 24, 16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1)
        for step in self.steps:
            x = step(x)
        logits: Tensor = self.head(x[:, 0])
        return logits


class Parallel(nn.Module):
    """A user's own: a dictionary of convolutions, rows and columns at strides of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(
            {
                "a": nn.Conv2d(3, 8, 7, 4),
                "b": nn.Conv2d(8, 16, 3, 2),
                "c": nn.Conv2d(16, 16, 3, padding=1),
            }
        )
        self.out = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts.values():
            x = part(x).relu()
        logits: Tensor = self.out(x.mean(dim=(2, 3)))
        return logits


def test_a_network_of_the_users_own() -> None:
    found = examine(Parallel().to("meta"), WIDE)
    assert [(s.name, s.channels, s.grid) for s in found.stages] == [
        ("parts.a", 8, (15, 23)),
        ("parts.c", 16, (7, 11)),
    ]
    network = made.wrapped(Encoder().eval().requires_grad_(False), "own:encoder", WIDE)
    anatomy = network.anatomy(WIDE)
    assert [site.name for site in anatomy.blocks] == [f"steps.{i}" for i in range(4)]
    assert {(s.channels, s.grid, s.prefix) for s in anatomy.blocks} == {(24, (4, 6), 1)}
    assert [s.name for s in anatomy.attention] == [
        f"steps.{i}.self_attn@attention" for i in range(4)
    ]
    images = made.images(WIDE)
    plain = network(images).logits  # PyTorch has one kernel for such a whole layer
    network.tap(["steps.3", "steps.3@prefix", "steps.3.self_attn@attention"])
    logits, features, *_ = network(images)
    torch.testing.assert_close(logits, plain)
    assert features is not None
    assert features["steps.3"].shape == (2, 24, 4, 6)
    torch.testing.assert_close(network.backbone.head(features["steps.3@prefix"][:, 0]), logits)
    maps = features["steps.3.self_attn@attention"]
    assert maps.shape == (2, 3, 25, 25)
    torch.testing.assert_close(maps.sum(dim=-1), torch.ones(2, 3, 25))


def test_a_network_without_a_grid_is_no_fault() -> None:
    flat = nn.Sequential(
        nn.Flatten(), nn.Linear(3 * 16 * 16, 24), nn.ReLU(), nn.Linear(24, CLASSES)
    )
    network = made.wrapped(flat, "own:flat", (16, 16))
    anatomy = network.anatomy((16, 16))
    assert (anatomy.stages, anatomy.blocks, anatomy.attention) == ((), (), ())
    assert anatomy.width == 24
    with pytest.raises(IncompatibleError, match="no module 'fc' in Sequential"):
        network.tap(["fc"])


def test_looking_through_a_network_leaves_it_as_it_was() -> None:
    network = made.network("timm/resnet10t").train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network.anatomy(WIDE)
    assert network.training
    assert all(torch.equal(before[name], t) for name, t in network.state_dict().items())
    for module in network.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


@pytest.mark.parametrize("model", ["timm/resnet10t", "timm/pvt_v2_b0"])
def test_another_size_of_image_is_looked_at_anew(model: str) -> None:
    network = made.network(model, SQUARE)
    assert network.anatomy().stages[-1].grid == (2, 2)
    assert network.anatomy(WIDE).stages[-1].grid == (2, 3)
    last = network.anatomy().stages[-1]
    assert last.grid == (2, 3)
    network.tap([last.name])
    for image, grid in ((WIDE, (2, 3)), ((96, 64), (3, 2)), ((96, 128), (3, 4))):
        features = network(made.images(image)).features
        assert features is not None
        assert features[last.name].shape == (2, last.channels, *grid)
