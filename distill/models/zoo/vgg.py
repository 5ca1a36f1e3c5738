"""VGG for small images: batch normalisation, and one linear layer as the classifier.

Simonyan, Zisserman: Very Deep Convolutional Networks for Large-Scale Image Recognition, ICLR 2015,
arXiv:1409.1556. Shapes and names of modules are those of Tian, Krishnan, Isola: Contrastive
Representation Distillation, ICLR 2020, arXiv:1910.10699.
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from distill.errors import IncompatibleError
from distill.models.zoo._init import he_normal


class _VGG(nn.Module):
    """Five blocks of 64, 128, 256, 512 and 512 channels.

    The first three are halved by max pooling. So is the fourth from 64 px on, where the last block
    would otherwise see more than an 8 x 8 grid.
    """

    def __init__(self, num_classes: int, image_size: int, *, convs: tuple[int, ...]) -> None:
        super().__init__()
        if image_size < 8:
            raise IncompatibleError(
                f"vgg halves its input three times and needs 8 px or more, got {image_size} px",
                hint="set data.image_size to 8 or more",
            )
        self.pools = 4 if image_size >= 64 else 3
        channels = (3, 64, 128, 256, 512, 512)
        for i, count in enumerate(convs):
            self.add_module(f"block{i}", _block(channels[i], channels[i + 1], count))
        self.classifier = nn.Linear(512, num_classes)
        he_normal(self)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B K"]:
        for i in range(5):
            x = F.relu(self.get_submodule(f"block{i}")(x))
            if i < self.pools:
                x = F.max_pool2d(x, 2)
        logits: Tensor = self.classifier(x.mean(dim=(2, 3)))
        return logits


def _block(in_channels: int, channels: int, convs: int) -> nn.Sequential:
    """Convolutions with normalisation; the ReLU behind the last is the network's."""
    layers: list[nn.Module] = []
    for i in range(convs):
        conv = nn.Conv2d(channels if i else in_channels, channels, 3, padding=1)
        layers += [conv, nn.BatchNorm2d(channels), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def vgg8(num_classes: int, image_size: int) -> nn.Module:
    """VGG-8 with batch normalisation: 3.97 M parameters at 100 classes."""
    return _VGG(num_classes, image_size, convs=(1, 1, 1, 1, 1))


def vgg13(num_classes: int, image_size: int) -> nn.Module:
    """VGG-13 with batch normalisation: 9.46 M parameters at 100 classes."""
    return _VGG(num_classes, image_size, convs=(2, 2, 2, 2, 2))
