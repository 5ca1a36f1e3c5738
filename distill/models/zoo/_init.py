"""The initial weights that the CIFAR networks of the distillation literature share."""

from __future__ import annotations

from torch import nn


def he_normal(network: nn.Module) -> None:
    """Draw every convolution's weights from N(0, 2 / fan_out), in place.

    fan_out is output channels times kernel area, of all groups together. Biases become zero.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
