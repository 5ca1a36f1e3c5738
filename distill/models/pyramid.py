"""A network as the backbone of a detector or a segmenter: images in, maps at several strides out.

Li, Mao, Girshick, He: Exploring Plain Vision Transformer Backbones for Object Detection, 2022,
arXiv:2203.16527, for networks with one grid.
Lin, Dollár, Girshick, He, Hariharan, Belongie: Feature Pyramid Networks for Object Detection, 2017,
arXiv:1612.03144, for networks with stages.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, final

from jaxtyping import Float
from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork

from distill.errors import IncompatibleError
from distill.models.grids import Size
from distill.models.network import Network
from distill.types import Site

CHANNELS = 256  # of every map, as in both papers
LEVELS = 4  # stages that are used, from the coarsest; published backbones have strides 4 to 32


@final
class Pyramid(nn.Module):
    """Four maps from one grid alone, at a quarter, half, once and twice its stride."""

    def __init__(self, width: int, *, channels: int = CHANNELS) -> None:
        """Build the layers, with torch's own initial weights as published.

        Args:
            width: Channels of the grid, at least 4.
            channels: Of each map.
        """
        super().__init__()
        half, quarter = width // 2, width // 4
        scales: list[tuple[int, list[nn.Module]]] = [
            (
                quarter,
                [_doubled(width, half), LayerNorm2d(half), nn.GELU(), _doubled(half, quarter)],
            ),
            (half, [_doubled(width, half)]),
            (width, []),
            # Published for even grids: of an odd one, the last cells are kept rather than dropped.
            (width, [nn.MaxPool2d(2, ceil_mode=True)]),
        ]
        self.levels = nn.ModuleList(
            nn.Sequential(
                *scaling,
                nn.Conv2d(own, channels, 1, bias=False),
                LayerNorm2d(channels),
                nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                LayerNorm2d(channels),
            )
            for own, scaling in scales
        )

    def forward(self, grid: Float[Tensor, "B D h w"]) -> tuple[Float[Tensor, "B C _ _"], ...]:
        """The maps, the finest first: 4h x 4w, 2h x 2w, h x w, and half of it rounded up."""
        return tuple(level(grid) for level in self.levels)


@final
class PyramidBackbone(nn.Module):
    """A network and the layers that make maps of its grids.

    It takes images in [0, 1] and gives the maps by the names "0", "1", ..., the finest first. That,
    and `out_channels`, is what torchvision's detectors ask of a backbone; their own normalisation
    is to be the identity, image_mean 0 and image_std 1. For a network that takes images of one size
    alone they have `fixed_size`.

    What the network computes behind those grids, such as its logits, gets no gradient; of an
    exported program, `run_decompositions` takes it out.

    Attributes:
        network: Shares its parameters and buffers with the one it was made from.
        neck: Makes the maps.
        out_channels: Of each map.
        strides: Pixels between two cells of each map.
    """

    def __init__(
        self,
        network: Network,
        neck: Pyramid | FeaturePyramidNetwork,
        taps: Sequence[str],
        *,
        channels: int,
        strides: Sequence[float],
    ) -> None:
        """Put them together; `pyramid` chooses what fits.

        Args:
            network: Gives `taps`.
            neck: Takes the one grid, or all of them by name.
            taps: Of the grids, the finest first.
            channels: Of each map.
            strides: Of the maps in pixels.
        """
        super().__init__()
        self.network = network
        self.neck = neck
        self.out_channels = channels
        self.strides = tuple(strides)
        self._taps = tuple(taps)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> dict[str, Float[Tensor, "B C _ _"]]:
        """The maps of images in [0, 1]."""
        features = self.network(images).features
        if isinstance(self.neck, Pyramid):
            maps = self.neck(features[self._taps[0]])
        else:
            maps = self.neck({tap: features[tap] for tap in self._taps}).values()
        return {str(i): level for i, level in enumerate(maps)}


def pyramid(
    network: Network, *, channels: int = CHANNELS, image: Size | None = None
) -> PyramidBackbone:
    """The network with maps at several strides, from its last grid or from those of its stages.

    A network with one grid, such as a ViT, gets a `Pyramid`: four maps at a quarter, half, once and
    twice the stride s of the last block. One with stages gets lateral 1 x 1 convolutions, sums from
    the coarsest downwards and a 3 x 3 convolution each: maps at its own strides, of the last four
    stages where there are more.

    Args:
        network: Any. It is not changed, and gets no tap; but its parameters and buffers are those
            of the backbone too, and learn with it.
        channels: Of each map.
        image: Rows and columns of the images in pixels; left out: as the network takes them.

    Returns:
        On the device of the network and in its mode. The new layers are drawn from torch's global
        generator.

    Raises:
        IncompatibleError: If the network has no grid of more than one cell.
    """
    same: dict[int, Any] = {id(t): t for t in (*network.parameters(), *network.buffers())}
    own = copy.deepcopy(network, same)
    sites = stages(own, image)[-LEVELS:]
    own.tap([site.name for site in sites])
    strides = [stride(site, image or _size(own)) for site in sites]
    neck: Pyramid | FeaturePyramidNetwork
    if len(sites) == 1:
        neck = Pyramid(sites[0].channels, channels=channels)
        strides = [strides[0] * scale for scale in (0.25, 0.5, 1.0, 2.0)]
    else:
        neck = FeaturePyramidNetwork([site.channels for site in sites], channels)
    made = PyramidBackbone(
        own,
        neck.to(network.mean.device),
        [site.name for site in sites],
        channels=channels,
        strides=strides,
    )
    return made.train(network.training)


def stages(network: Network, image: Size | None = None) -> list[Site]:
    """The grids that are of use to a detector, the finest first.

    Of a network with stages the end of each, of one with a single grid its last block.

    Args:
        network: Any.
        image: Rows and columns of the images in pixels; left out: as the network takes them.

    Raises:
        IncompatibleError: If the network has no grid of more than one cell.
    """
    anatomy = network.anatomy(_size(network) if network.input_size or image is None else image)
    sites = [site for site in anatomy.stages if math.prod(site.grid) > 1]
    if not sites:
        raise IncompatibleError(
            f"{network.model}: has no grid of features over the image",
            hint="larger images leave more of one where all was pooled to a single cell",
        )
    return sites


def stride(site: Site, image: Size) -> float:
    """Pixels between two cells, of the images that are given: the network may resize them."""
    return math.sqrt(math.prod(image) / math.prod(site.grid))


def _size(network: Network) -> Size:
    side = network.input_size or network.description.image_size
    return side, side


def _doubled(width: int, channels: int) -> nn.Module:
    """Two by two cells of each."""
    return nn.ConvTranspose2d(width, channels, 2, stride=2)
