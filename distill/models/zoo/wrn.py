"""Wide residual networks.

Zagoruyko, Komodakis: Wide Residual Networks, BMVC 2016, arXiv:1605.07146. Modules carry the names
of the checkpoints of Tian, Krishnan, Isola: Contrastive Representation Distillation, ICLR 2020,
arXiv:1910.10699.
"""

from __future__ import annotations

from collections import OrderedDict

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from distill.models.zoo._init import he_normal
from distill.models.zoo._preactivation import PreactivationBlock


class _WideResNet(nn.Module):
    """Three stages of (depth − 4) / 6 blocks each, at strides 1, 2 and 4."""

    def __init__(self, num_classes: int, *, depth: int, widen: int) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.block1 = _stage(16, 16 * widen, stride=1, blocks=blocks)
        self.block2 = _stage(16 * widen, 32 * widen, stride=2, blocks=blocks)
        self.block3 = _stage(32 * widen, 64 * widen, stride=2, blocks=blocks)
        self.bn1 = nn.BatchNorm2d(64 * widen)
        self.fc = nn.Linear(64 * widen, num_classes)
        he_normal(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B K"]:
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        logits: Tensor = self.fc(F.relu(self.bn1(x)).mean(dim=(2, 3)))
        return logits


def _stage(in_channels: int, channels: int, *, stride: int, blocks: int) -> nn.Sequential:
    layers = nn.Sequential(
        PreactivationBlock(in_channels, channels, stride),
        *(PreactivationBlock(channels, channels, 1) for _ in range(blocks - 1)),
    )
    return nn.Sequential(OrderedDict(layer=layers))


def wrn_16_2(num_classes: int, image_size: int) -> nn.Module:
    """WRN-16-2: 0.70 M parameters at 100 classes."""
    return _WideResNet(num_classes, depth=16, widen=2)


def wrn_40_1(num_classes: int, image_size: int) -> nn.Module:
    """WRN-40-1: 0.57 M parameters at 100 classes."""
    return _WideResNet(num_classes, depth=40, widen=1)


def wrn_40_2(num_classes: int, image_size: int) -> nn.Module:
    """WRN-40-2: 2.26 M parameters at 100 classes."""
    return _WideResNet(num_classes, depth=40, widen=2)
