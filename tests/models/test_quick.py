"""Networks made quicker say what they said before."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distill import models
from distill.models.network import Network
from distill.models.quick import compile_network, fold, halve
from distill.recipe import Model

FACTS = {
    "classes": tuple("0123456789"),
    "image_size": 32,
    "mean": (0.5, 0.4, 0.6),
    "std": (0.3, 0.25, 0.2),
}


def network(model: str) -> Network:
    """A network whose statistics are those of no fresh one."""
    torch.manual_seed(0)
    found = models.build_student(Model(model=model), **FACTS).eval()
    for module in found.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    return found


@pytest.mark.parametrize(
    ("model", "all_of_them"),
    [
        ("resnet8", True),
        ("mobilenetv2_half", True),
        ("vit", True),  # has none
        ("wrn_16_2", False),  # some normalise before they convolve
        ("timm/densenet121", False),  # what is normalised is joined first
        ("timm/mobilenetv3_small_050", True),  # normalises and activates in one module
        ("timm/repvgg_a0", False),  # has a branch without a convolution
        ("torchvision/shufflenet_v2_x0_5", True),
    ],
)
def test_a_folded_network_says_the_same(model: str, all_of_them: bool) -> None:
    folded = network(model)
    images = torch.rand(4, 3, 32, 32)
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    with torch.no_grad():
        before = folded(images).logits
        found = fold(folded)
        after = folded(images).logits
    left = sum(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert found == norms - left
    assert (found == norms) is all_of_them
    assert found > 0 or norms == 0
    torch.testing.assert_close(after, before, rtol=0, atol=3e-6 * float(before.abs().max()))


def test_a_feature_that_is_read_stays_what_it_is() -> None:
    folded = network("resnet8")
    taps = [name for name in folded.anatomy().sites if "conv" in name][:2]
    assert len(taps) == 2
    folded.tap(taps)
    images = torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        before = folded(images)
        fold(folded)
        after = folded(images)
    assert any(isinstance(module, nn.Identity) for module in folded.modules())
    for tap in taps:
        torch.testing.assert_close(after.read(tap), before.read(tap), rtol=1e-5, atol=1e-5)


class Shared(nn.Module):
    """A convolution whose output is normalised and added, and one that is used twice."""

    def __init__(self, num_classes: int, image_size: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.free = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(4))
        self.head = nn.Linear(8, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.stem(x)
        x = self.norms[0](y) + y
        x = self.norms[1](self.twice(x))
        x = self.norms[2](self.twice(x)).relu()
        x = self.norms[3](self.free(x))
        logits: torch.Tensor = self.head(x.mean(dim=(2, 3)))
        return logits


def test_what_others_read_too_is_left_alone() -> None:
    folded = network("tests.models.test_quick:Shared")
    images = torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        before = folded(images).logits
        assert fold(folded) == 1
        after = folded(images).logits
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)
    backbone = folded.backbone
    assert isinstance(backbone, Shared)
    assert isinstance(backbone.norms[3], nn.Identity)


@pytest.mark.parametrize("model", ["resnet8", "vit", "timm/vit_tiny_patch16_224"])
def test_a_halved_network_says_the_same_bit_by_bit(model: str) -> None:
    halved = network(model)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        before = halved(images).logits
        halve(halved, torch.bfloat16)
        after = halved(images).logits
    assert torch.equal(after, before)
    assert any(p.dtype == torch.bfloat16 for p in halved.parameters())
    assert any(p.dtype == torch.float32 for p in halved.parameters())


def test_equal_blocks_are_compiled_one_by_one_and_other_networks_whole() -> None:
    vit, resnet = network("vit"), network("resnet8")
    compile_network(vit)
    compile_network(resnet)

    def compiled(found: Network) -> set[str]:
        return {n for n, m in found.named_modules() if m._compiled_call_impl is not None}

    assert compiled(vit) == {f"backbone.{site.name}" for site in vit.anatomy().blocks}
    assert len(compiled(vit)) > 1
    assert compiled(resnet) == {""}
