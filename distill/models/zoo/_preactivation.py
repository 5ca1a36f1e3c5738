"""The residual block with normalisation and ReLU in front of each convolution.

He, Zhang, Ren, Sun: Identity Mappings in Deep Residual Networks, ECCV 2016, arXiv:1603.05027. Its
modules carry the names of the checkpoints of Tian, Krishnan, Isola: Contrastive Representation
Distillation, ICLR 2020, arXiv:1910.10699.
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class PreactivationBlock(nn.Module):
    """Pre-activation: where the shape changes, the shortcut starts behind the first ReLU."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.convShortcut = (
            nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False)
            if in_channels != channels
            else None
        )

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        active = F.relu(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(active)
        y: Tensor = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return y + shortcut
