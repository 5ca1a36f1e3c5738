"""A network to which an image is a list of numbers in no order: the control without any structure.

Every pixel has weights of its own, so that a permutation of all images' pixels changes nothing but
the order of the first layer's columns.
"""

from __future__ import annotations

from itertools import pairwise

from jaxtyping import Float
from torch import Tensor, nn

from distill.component import Count


class _MLP(nn.Module):
    """Linear maps with ReLUs between them.

    Weights begin as N(0, 2 / fan_in), so that the scale survives the ReLUs (He et al., ICCV 2015,
    arXiv:1502.01852); the classifier, behind which there is no ReLU, as N(0, 1 / fan_in).
    """

    def __init__(self, num_classes: int, inputs: int, *, width: int, depth: int) -> None:
        super().__init__()
        sizes = [inputs, *[width] * depth]
        self.layers = nn.Sequential(
            *(nn.Sequential(nn.Linear(*pair), nn.ReLU()) for pair in pairwise(sizes))
        )
        self.head = nn.Linear(width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)
        nn.init.kaiming_normal_(self.head.weight, nonlinearity="linear")

    def forward(self, x: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B K"]:
        logits: Tensor = self.head(self.layers(x.flatten(1)))
        return logits


def mlp(num_classes: int, image_size: int, *, width: Count = 256, depth: Count = 2) -> nn.Module:
    """All pixels, and linear maps with ReLUs: 0.88 M parameters at 32 px and 100 classes.

    Args:
        num_classes: Logits a sample.
        image_size: Side of the images in pixels; no other size can be taken.
        width: Channels of a hidden layer.
        depth: Hidden layers.
    """
    return _MLP(num_classes, 3 * image_size**2, width=width, depth=depth)
