"""A convolutional network built as transformers are.

Liu et al.: A ConvNet for the 2020s, CVPR 2022, arXiv:2201.03545. Depths and widths of the two sizes
are timm's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from distill.component import Count, Fraction
from distill.errors import RecipeError
from distill.models.zoo._layers import EPS, DropPath, LayerScale

_DEPTHS = (2, 2, 6, 2)


class _Norm(nn.LayerNorm):
    """LayerNorm over the channels of every cell."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=EPS)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class _Patches(nn.Conv2d):
    """A linear map of every patch; zeros complete those at the right and lower border."""

    def __init__(self, in_channels: int, channels: int, side: int) -> None:
        super().__init__(in_channels, channels, side, stride=side)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        down, right = (-n % side for n, side in zip(x.shape[2:], self.kernel_size, strict=True))
        return super().forward(F.pad(x, (0, right, 0, down)))


class _Block(nn.Module):
    """x + mlp(norm(depthwise 7 x 7 convolution(x))), the MLP four times as wide in its middle."""

    def __init__(self, channels: int, drop_path: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=EPS)
        self.mlp = nn.Sequential(
            nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels)
        )
        self.scale = LayerScale(channels, 1e-6)  # the paper's
        self.drop = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        y = self.conv(x).movedim(1, -1)
        y = self.scale(self.mlp(self.norm(y)))
        x = x + self.drop(y.movedim(-1, 1))
        return x


class _ConvNeXt(nn.Module):
    """Four stages, between which 2 x 2 cells become one.

    Every weight begins as a truncated normal of 0.02 and every bias as zero, as in the paper: norms
    make up for the scale between stages, and blocks begin as the identity whatever is in them.
    """

    def __init__(
        self, num_classes: int, *, widths: Sequence[int], patch_size: int, drop_path: float
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(_Patches(3, widths[0], patch_size), _Norm(widths[0]))
        self.stages = nn.ModuleList()
        for i, (depth, width) in enumerate(zip(_DEPTHS, widths, strict=True)):
            first = sum(_DEPTHS[:i])
            rates = [drop_path * j / (sum(_DEPTHS) - 1) for j in range(first, first + depth)]
            merge = [_Norm(widths[i - 1]), _Patches(widths[i - 1], width, 2)] if i else []
            self.stages.append(nn.Sequential(*merge, *(_Block(width, rate) for rate in rates)))
        self.norm = nn.LayerNorm(widths[-1], eps=EPS)
        self.head = nn.Linear(widths[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B K"]:
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        logits: Tensor = self.head(self.norm(x.mean(dim=(2, 3))))
        return logits


def convnext_atto(
    num_classes: int,
    image_size: int,
    *,
    patch_size: Count | None = None,
    drop_path: Fraction = 0.0,
) -> nn.Module:
    """ConvNeXt-Atto: 3.70 M parameters at 224 px and 1000 classes.

    Args:
        num_classes: Logits a sample.
        image_size: Side of the images in pixels.
        patch_size: Side of the stem's patches in pixels; left out: 4 from 64 px on, 2 from 28 px
            on, else 1, so that 14 or more of them lie along a side of all but tiny images.
        drop_path: Probability of skipping a block in the last; it grows linearly from 0 in the
            first.

    Raises:
        RecipeError: If drop_path is 1.
    """
    return _build("atto", num_classes, image_size, (40, 80, 160, 320), patch_size, drop_path)


def convnext_femto(
    num_classes: int,
    image_size: int,
    *,
    patch_size: Count | None = None,
    drop_path: Fraction = 0.0,
) -> nn.Module:
    """ConvNeXt-Femto: 5.22 M parameters at 224 px and 1000 classes.

    Its arguments are those of `convnext_atto`.
    """
    return _build("femto", num_classes, image_size, (48, 96, 192, 384), patch_size, drop_path)


def _build(
    size: str,
    num_classes: int,
    image_size: int,
    widths: Sequence[int],
    patch_size: int | None,
    drop_path: float,
) -> nn.Module:
    if drop_path == 1:
        raise RecipeError(
            f"convnext_{size}: drop_path must be below 1, or the last block is never trained"
        )
    usual = 4 if image_size >= 64 else 2 if image_size >= 28 else 1
    return _ConvNeXt(
        num_classes, widths=widths, patch_size=patch_size or usual, drop_path=drop_path
    )
