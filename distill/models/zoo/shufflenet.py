"""ShuffleNet V1 and V2 for small images.

Zhang, Zhou, Lin, Sun: ShuffleNet: An Extremely Efficient Convolutional Neural Network for Mobile
Devices, CVPR 2018, arXiv:1707.01083. Ma, Zhang, Zheng, Sun: ShuffleNet V2: Practical Guidelines for
Efficient CNN Architecture Design, ECCV 2018, arXiv:1807.11164. The 1 x 1 stem without pooling and
the names of modules are those of the distillation literature (Tian, Krishnan, Isola, ICLR 2020,
arXiv:1910.10699).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def _shuffle(x: Float[Tensor, "B C H W"], groups: int) -> Float[Tensor, "B C H W"]:
    """Deal the channels of each group out over all groups."""
    return torch.unflatten(x, 1, (groups, -1)).transpose(1, 2).flatten(1, 2)


def _conv(
    in_channels: int, channels: int, kernel: int, *, stride: int = 1, groups: int = 1
) -> nn.Conv2d:
    return nn.Conv2d(
        in_channels,
        channels,
        kernel,
        stride=stride,
        padding=kernel // 2,
        groups=groups,
        bias=False,
    )


class _GroupBlock(nn.Module):
    """V1. With stride 2 the pooled input is joined to the output, else it is added."""

    def __init__(self, in_channels: int, channels: int, stride: int, groups: int) -> None:
        super().__init__()
        branch = channels - in_channels if stride == 2 else channels
        hidden = branch // 4
        self.stride = stride
        self.groups = 1 if in_channels == 24 else groups  # the stem's 24 channels are too few
        self.conv1 = _conv(in_channels, hidden, 1, groups=self.groups)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = _conv(hidden, hidden, 3, stride=stride, groups=hidden)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.conv3 = _conv(hidden, branch, 1, groups=groups)
        self.bn3 = nn.BatchNorm2d(branch)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        y = _shuffle(F.relu(self.bn1(self.conv1(x))), self.groups)
        y = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(y)))))
        if self.stride == 2:
            return F.relu(torch.cat([y, F.avg_pool2d(x, 3, stride=2, padding=1)], dim=1))
        return F.relu(y + x)


class _ShuffleNetV1(nn.Module):
    def __init__(self, num_classes: int, *, channels: tuple[int, ...], groups: int) -> None:
        super().__init__()
        self.conv1 = _conv(3, 24, 1)
        self.bn1 = nn.BatchNorm2d(24)
        self.layer1 = _group_stage(24, channels[0], blocks=4, groups=groups)
        self.layer2 = _group_stage(channels[0], channels[1], blocks=8, groups=groups)
        self.layer3 = _group_stage(channels[1], channels[2], blocks=4, groups=groups)
        self.linear = nn.Linear(channels[2], num_classes)

    def forward(self, x: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B K"]:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(x.mean(dim=(2, 3)))
        return logits


def _group_stage(in_channels: int, channels: int, *, blocks: int, groups: int) -> nn.Sequential:
    return nn.Sequential(
        _GroupBlock(in_channels, channels, 2, groups),
        *(_GroupBlock(channels, channels, 1, groups) for _ in range(blocks - 1)),
    )


class _SplitBlock(nn.Module):
    """V2, stride 1: half of the channels pass untouched."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = _conv(half, half, 1)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = _conv(half, half, 3, groups=half)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = _conv(half, half, 1)
        self.bn3 = nn.BatchNorm2d(half)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        untouched, y = x.chunk(2, dim=1)
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(y)))))
        y = F.relu(self.bn3(self.conv3(y)))
        return _shuffle(torch.cat([untouched, y], dim=1), 2)


class _DownBlock(nn.Module):
    """V2, stride 2: both branches read all channels."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = _conv(in_channels, in_channels, 3, stride=2, groups=in_channels)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv2 = _conv(in_channels, half, 1)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = _conv(in_channels, half, 1)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = _conv(half, half, 3, stride=2, groups=half)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = _conv(half, half, 1)
        self.bn5 = nn.BatchNorm2d(half)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        left = F.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        right = self.bn4(self.conv4(F.relu(self.bn3(self.conv3(x)))))
        right = F.relu(self.bn5(self.conv5(right)))
        return _shuffle(torch.cat([left, right], dim=1), 2)


class _ShuffleNetV2(nn.Module):
    def __init__(self, num_classes: int, *, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.conv1 = _conv(3, 24, 1)
        self.bn1 = nn.BatchNorm2d(24)
        self.layer1 = _split_stage(24, channels[0], blocks=3)
        self.layer2 = _split_stage(channels[0], channels[1], blocks=7)
        self.layer3 = _split_stage(channels[1], channels[2], blocks=3)
        self.conv2 = _conv(channels[2], channels[3], 1)
        self.bn2 = nn.BatchNorm2d(channels[3])
        self.linear = nn.Linear(channels[3], num_classes)

    def forward(self, x: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B K"]:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(F.relu(self.bn2(self.conv2(x))).mean(dim=(2, 3)))
        return logits


def _split_stage(in_channels: int, channels: int, *, blocks: int) -> nn.Sequential:
    return nn.Sequential(
        _DownBlock(in_channels, channels), *(_SplitBlock(channels) for _ in range(blocks))
    )


def shufflenetv1(num_classes: int, image_size: int) -> nn.Module:
    """ShuffleNet V1 with 3 groups: 0.95 M parameters at 100 classes."""
    return _ShuffleNetV1(num_classes, channels=(240, 480, 960), groups=3)


def shufflenetv2(num_classes: int, image_size: int) -> nn.Module:
    """ShuffleNet V2 at width 1: 1.36 M parameters at 100 classes."""
    return _ShuffleNetV2(num_classes, channels=(116, 232, 464, 1024))
