"""MobileNetV2 for small images.

Sandler, Howard, Zhu, Zhmoginov, Chen: MobileNetV2: Inverted Residuals and Linear Bottlenecks,
CVPR 2018, arXiv:1801.04381. Strides, widths and names of modules are those of the distillation
literature (Tian, Krishnan, Isola, ICLR 2020, arXiv:1910.10699): T = 6, W = 0.5.
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from distill.models.zoo._init import he_normal

# Expansion, output channels at width 1, blocks, stride of the first block.
_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class _Block(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.residual = stride == 1 and in_channels == channels
        self.conv = nn.Sequential(
            nn.Conv2d(in_channels, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU(),
            nn.Conv2d(hidden, hidden, 3, stride=stride, padding=1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU(),
            nn.Conv2d(hidden, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        y: Tensor = self.conv(x)
        return x + y if self.residual else y


class _MobileNetV2(nn.Module):
    def __init__(self, num_classes: int, *, width: float) -> None:
        super().__init__()
        channels = int(32 * width)
        self.conv1 = nn.Sequential(
            nn.Conv2d(3, channels, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(channels)
        )
        stages = []
        for expansion, full, count, stride in _STAGES:
            out = int(full * width)
            blocks = [_Block(channels, out, stride, expansion)]
            blocks += [_Block(out, out, 1, expansion) for _ in range(count - 1)]
            stages.append(nn.Sequential(*blocks))
            channels = out
        self.blocks = nn.Sequential(*stages)
        self.conv2 = nn.Sequential(nn.Conv2d(channels, 1280, 1, bias=False), nn.BatchNorm2d(1280))
        head = nn.Linear(1280, num_classes)
        self.classifier = nn.Sequential(head)
        he_normal(self)
        nn.init.normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)

    def forward(self, x: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B K"]:
        x = self.blocks(F.relu(self.conv1(x)))
        logits: Tensor = self.classifier(F.relu(self.conv2(x)).mean(dim=(2, 3)))
        return logits


def mobilenetv2_half(num_classes: int, image_size: int) -> nn.Module:
    """MobileNetV2 at half width: 0.81 M parameters at 100 classes."""
    return _MobileNetV2(num_classes, width=0.5)
