"""Residual networks for small images.

He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition, CVPR 2016, arXiv:1512.03385
(section 4.2), with projection shortcuts. The x4 variants are those of Tian, Krishnan, Isola:
Contrastive Representation Distillation, ICLR 2020, arXiv:1910.10699; modules carry the names of
that paper's checkpoints.
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from distill.models.zoo._init import he_normal


class _Block(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False),
                nn.BatchNorm2d(channels),
            )

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.downsample(x))


class _ResNet(nn.Module):
    """Three stages of (depth − 2) / 6 blocks each, at strides 1, 2 and 4."""

    def __init__(self, num_classes: int, *, depth: int, width: int, stem: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, stem, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        blocks = (depth - 2) // 6
        self.layer1 = _stage(stem, width, stride=1, blocks=blocks)
        self.layer2 = _stage(width, 2 * width, stride=2, blocks=blocks)
        self.layer3 = _stage(2 * width, 4 * width, stride=2, blocks=blocks)
        self.fc = nn.Linear(4 * width, num_classes)
        he_normal(self)

    def forward(self, x: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B K"]:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.fc(x.mean(dim=(2, 3)))
        return logits


def _stage(in_channels: int, channels: int, *, stride: int, blocks: int) -> nn.Sequential:
    return nn.Sequential(
        _Block(in_channels, channels, stride),
        *(_Block(channels, channels, 1) for _ in range(blocks - 1)),
    )


def resnet8(num_classes: int, image_size: int) -> nn.Module:
    """ResNet-8: 0.08 M parameters at 100 classes."""
    return _ResNet(num_classes, depth=8, width=16, stem=16)


def resnet14(num_classes: int, image_size: int) -> nn.Module:
    """ResNet-14: 0.18 M parameters at 100 classes."""
    return _ResNet(num_classes, depth=14, width=16, stem=16)


def resnet20(num_classes: int, image_size: int) -> nn.Module:
    """ResNet-20: 0.28 M parameters at 100 classes."""
    return _ResNet(num_classes, depth=20, width=16, stem=16)


def resnet32(num_classes: int, image_size: int) -> nn.Module:
    """ResNet-32: 0.47 M parameters at 100 classes."""
    return _ResNet(num_classes, depth=32, width=16, stem=16)


def resnet44(num_classes: int, image_size: int) -> nn.Module:
    """ResNet-44: 0.67 M parameters at 100 classes."""
    return _ResNet(num_classes, depth=44, width=16, stem=16)


def resnet56(num_classes: int, image_size: int) -> nn.Module:
    """ResNet-56: 0.86 M parameters at 100 classes."""
    return _ResNet(num_classes, depth=56, width=16, stem=16)


def resnet110(num_classes: int, image_size: int) -> nn.Module:
    """ResNet-110: 1.74 M parameters at 100 classes."""
    return _ResNet(num_classes, depth=110, width=16, stem=16)


def resnet8x4(num_classes: int, image_size: int) -> nn.Module:
    """ResNet-8, four times as wide: 1.23 M parameters at 100 classes."""
    return _ResNet(num_classes, depth=8, width=64, stem=32)


def resnet32x4(num_classes: int, image_size: int) -> nn.Module:
    """ResNet-32, four times as wide: 7.43 M parameters at 100 classes."""
    return _ResNet(num_classes, depth=32, width=64, stem=32)
