"""A vision transformer whose inductive biases are dials, and published networks made with them.

Dosovitskiy et al.: An Image is Worth 16x16 Words, ICLR 2021, arXiv:2010.11929. The distillation
token is Touvron et al.: DeiT, ICML 2021, arXiv:2012.12877. The conv position is the position
encoding generator of Chu et al.: CPVT, ICLR 2023, arXiv:2102.10882. The default size is that of
Lee, Lee, Song: Vision Transformer for Small-Size Datasets, 2021, arXiv:2112.13492. Patches of one
pixel are Nguyen et al.: An Image is Worth More Than 16x16 Patches, ICLR 2025, arXiv:2406.09415.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from distill.component import Count, Fraction, NonNegative, Positive
from distill.models.zoo._block import row
from distill.models.zoo._dials import Blocks, Tokens, refuse_contradictions
from distill.models.zoo._layers import EPS, LocalPosition
from distill.models.zoo._stages import Pyramid
from distill.models.zoo._tokens import Tokenised


def vit(
    num_classes: int,
    image_size: int,
    *,
    width: Count = 192,
    depth: Count | list[Count] = 9,
    heads: Count = 12,
    mlp_ratio: Positive = 2.0,
    patch_size: Count = 4,
    position: Literal["learned", "sincos", "conv", "none"] = "learned",
    pool: Literal["mean", "cls", "distill"] = "mean",
    stem: Literal["patch", "conv"] = "patch",
    mixer: Literal["attention", "dynamic_conv", "crate"] = "attention",
    attention: Literal["global", "window", "gated"] = "global",
    window: Count = 4,
    linear: Literal["dense", "low_rank", "kron", "monarch", "btt"] = "dense",
    rank: Count | None = None,
    layer_scale: NonNegative = 0.0,
    drop: Fraction = 0.0,
    drop_path: Fraction = 0.0,
) -> nn.Module:
    """A vision transformer whose inductive biases are dials.

    Args:
        num_classes: Logits a sample.
        image_size: Side of the images in pixels.
        width: Channels of a token; in the first stage where there are several.
        depth: Blocks. A list has those of each stage: between stages four patches become one,
            width and heads double.
        heads: Attention heads; they divide the width. The mixer dynamic_conv has none.
        mlp_ratio: Hidden channels of a block's MLP over the width. The mixer crate has no MLP.
        patch_size: Side of a patch in pixels; 1 makes every pixel a token.
        position: What tells a token where it is: a learned vector, fixed sines and cosines, a 3 x 3
            depthwise convolution behind the first block (of every stage), or nothing.
        pool: What the classifier reads: the mean of all patches, a token of its own, or that and a
            distillation token with a second classifier; the logits are the mean of the two.
        stem: How pixels become tokens: one linear map a patch, or overlapping 3 x 3 convolutions.
        mixer: What mixes tokens: attention, 3 x 3 convolutions whose kernels follow from the image,
            or CRATE's attention with one map for queries, keys and values, and a sparse code
            instead of the MLP.
        attention: To all tokens, inside of windows that shift, or ConViT's, which begins as a
            convolution in all but the last two blocks; class tokens join behind it.
        window: Patches along a side of attention window's windows.
        linear: The matrices in attention and MLP: dense, or of a structure that costs less.
        rank: Of linear low_rank (left out: the square root of the channels) and btt (1).
        layer_scale: What a learned factor on every branch begins at, such as 1e-4; 0: no factor.
        drop: Dropout of tokens and of each branch, a probability.
        drop_path: Probability of skipping a branch in the last block; it grows linearly from 0 in
            the first.

    Raises:
        IncompatibleError: If patches do not tile the image.
        RecipeError: If the dials contradict one another.
    """
    tokens = Tokens(image_size, patch_size, width, position, pool, stem, drop)
    blocks = Blocks(
        heads, mlp_ratio, mixer, attention, window, linear, rank, layer_scale, drop, drop_path
    )
    refuse_contradictions(depth, tokens, blocks)
    if isinstance(depth, list):
        return Pyramid(num_classes, depth, tokens, blocks)
    return _ViT(num_classes, depth, tokens, blocks)


def vit_tiny(
    num_classes: int,
    image_size: int,
    *,
    patch_size: Count | None = None,
    pool: Literal["mean", "cls", "distill"] = "cls",
    drop_path: Fraction = 0.0,
) -> nn.Module:
    """DeiT-Tiny: 5.72 M parameters at 224 px and 1000 classes, 5.91 M with pool distill.

    Args:
        num_classes: Logits a sample.
        image_size: Side of the images in pixels.
        patch_size: As in `vit`; left out: 16 px at 224 px, and smaller with the image.
        pool: As in `vit`.
        drop_path: As in `vit`.
    """
    return vit(
        num_classes,
        image_size,
        width=192,
        depth=12,
        heads=3,
        mlp_ratio=4.0,
        patch_size=patch_size or _patch_size(image_size, 14),
        pool=pool,
        drop_path=drop_path,
    )


def vit_small(
    num_classes: int,
    image_size: int,
    *,
    patch_size: Count | None = None,
    pool: Literal["mean", "cls", "distill"] = "cls",
    drop_path: Fraction = 0.0,
) -> nn.Module:
    """DeiT-Small: 22.05 M parameters at 224 px and 1000 classes, 22.44 M with pool distill.

    Its arguments are those of `vit_tiny`.
    """
    return vit(
        num_classes,
        image_size,
        width=384,
        depth=12,
        heads=6,
        mlp_ratio=4.0,
        patch_size=patch_size or _patch_size(image_size, 14),
        pool=pool,
        drop_path=drop_path,
    )


def convit_tiny(
    num_classes: int,
    image_size: int,
    *,
    patch_size: Count | None = None,
    drop_path: Fraction = 0.0,
) -> nn.Module:
    """ConViT-Tiny: 5.71 M parameters at 224 px and 1000 classes.

    D'Ascoli et al., ICML 2021, arXiv:2103.10697. Its arguments are those of `vit_tiny`.
    """
    return vit(
        num_classes,
        image_size,
        width=192,
        depth=12,
        heads=4,
        mlp_ratio=4.0,
        patch_size=patch_size or _patch_size(image_size, 14),
        pool="cls",
        attention="gated",
        drop_path=drop_path,
    )


def crate_tiny(
    num_classes: int, image_size: int, *, patch_size: Count | None = None, drop_path: Fraction = 0.0
) -> nn.Module:
    """CRATE-Tiny: 6.09 M parameters at 224 px and 1000 classes.

    Yu et al., NeurIPS 2023, arXiv:2306.01129. Its arguments are those of `vit_tiny`.
    """
    return vit(
        num_classes,
        image_size,
        width=384,
        depth=12,
        heads=6,
        patch_size=patch_size or _patch_size(image_size, 14),
        pool="cls",
        mixer="crate",
        drop_path=drop_path,
    )


def swin_tiny(
    num_classes: int,
    image_size: int,
    *,
    patch_size: Count | None = None,
    window: Count = 7,
    drop_path: Fraction = 0.0,
) -> nn.Module:
    """Swin-Tiny: 28.29 M parameters at 224 px and 1000 classes.

    Liu et al., ICCV 2021, arXiv:2103.14030.

    Args:
        num_classes: Logits a sample.
        image_size: Side of the images in pixels.
        patch_size: As in `vit`; left out: 4 px at 224 px, and smaller with the image.
        window: As in `vit`.
        drop_path: As in `vit`.
    """
    return vit(
        num_classes,
        image_size,
        width=96,
        depth=[2, 2, 6, 2],
        heads=3,
        mlp_ratio=4.0,
        patch_size=patch_size or _patch_size(image_size, 56),
        position="none",
        attention="window",
        window=window,
        drop_path=drop_path,
    )


def _patch_size(image_size: int, least: int) -> int:
    """The largest power of 2 that leaves `least` patches along a side, or 1."""
    return 1 << max((image_size // least).bit_length() - 1, 0)


class _ViT(Tokenised):
    """One row of blocks; what the classifier reads is the mean token or a class token."""

    def __init__(self, num_classes: int, depth: int, tokens: Tokens, blocks: Blocks) -> None:
        super().__init__(tokens, norm=False)
        width, grid = tokens.width, (tokens.side, tokens.side)
        self.local = LocalPosition(width) if tokens.position == "conv" else None
        # Only patches have an offset to one another. The last two blocks are ordinary, as in ConViT
        # with its ten of twelve.
        self.gated = max(depth - 2, 1) if blocks.attention == "gated" else 0
        rates = blocks.rates(depth)
        self.blocks = row(blocks, width, blocks.heads, grid, rates=rates, gated=self.gated)
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.head = nn.Linear(width, num_classes)
        if self.dist is not None:
            self.head_dist = nn.Linear(width, num_classes)
        self.distilled_training = False
        self.initialise()

    def set_distilled_training(self, enable: bool = True) -> None:
        """In training, return the logits of class token and distillation token as a tuple."""
        self.distilled_training = enable

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Tensor | tuple[Tensor, Tensor]:
        x, grid = self.patches(images)
        x = self.drop(x if self.gated else self._join(x))
        for i, block in enumerate(self.blocks):
            if 0 < i == self.gated:
                x = self._join(x)
            x = block(x, grid)
            if i == 0 and self.local is not None:
                x = self.local(x, grid)
        x = self.norm(x)
        logits: Tensor = self.head(x.mean(dim=1) if self.cls is None else x[:, 0])
        if self.dist is None:
            return logits
        distilled: Tensor = self.head_dist(x[:, 1])
        if self.training and self.distilled_training:
            return logits, distilled
        return (logits + distilled) / 2

    def _join(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B n D"]:
        """Put the class and distillation tokens in front."""
        tokens = [t.expand(x.shape[0], -1, -1) for t in (self.cls, self.dist) if t is not None]
        return torch.cat([*tokens, x], dim=1) if tokens else x
