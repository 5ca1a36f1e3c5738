"""What a vision transformer's dials say, and which of them contradict one another."""

from __future__ import annotations

import math
from typing import NamedTuple

from distill.errors import IncompatibleError, RecipeError
from distill.models.zoo._linear import MONARCH_BLOCKS

WINDOW = 4  # patches along a side; the default


class Tokens(NamedTuple):
    """How an image becomes tokens, and tokens become one vector."""

    image_size: int
    patch_size: int
    width: int
    position: str
    pool: str
    stem: str
    drop: float

    @property
    def side(self) -> int:
        """Patches along a side of the image."""
        return self.image_size // self.patch_size


class Blocks(NamedTuple):
    """What blocks are made of."""

    heads: int
    mlp_ratio: float
    mixer: str
    attention: str
    window: int
    linear: str
    rank: int | None
    layer_scale: float
    drop: float
    drop_path: float

    def hidden(self, width: int) -> int:
        """Channels in the middle of an MLP."""
        return round(width * self.mlp_ratio)

    def rates(self, depth: int) -> list[float]:
        """Each block's probability of skipping a branch: from 0 to drop_path in equal steps."""
        return [self.drop_path * i / max(depth - 1, 1) for i in range(depth)]


def refuse_contradictions(depth: int | list[int], tokens: Tokens, blocks: Blocks) -> None:
    """Refuse dials that contradict one another, or of which one would do nothing.

    Raises:
        IncompatibleError: If patches do not tile the image.
        RecipeError: If dials contradict one another; every contradiction has its sentence.
    """
    size, patch = tokens.image_size, tokens.patch_size
    if size % patch:
        sizes = [p for p in range(1, size + 1) if size % p == 0]
        raise IncompatibleError(
            f"vit: patches of {patch} px do not tile an image of {size} px",
            hint=f"set patch_size to one of {', '.join(map(str, sizes))}",
        )
    found = [*_of_tokens(tokens, blocks), *_of_stages(depth, tokens, blocks)]
    found += [*_of_attention(depth, tokens, blocks), *_of_maps(tokens, blocks)]
    if found:
        raise RecipeError("\n".join(f"vit: {sentence}" for sentence in found))


def _of_tokens(tokens: Tokens, blocks: Blocks) -> list[str]:
    width, patch = tokens.width, tokens.patch_size
    found = {
        f"heads must divide the width, got {blocks.heads} heads and width {width}": (
            blocks.mixer != "dynamic_conv" and width % blocks.heads
        ),
        f"position sincos needs a width divisible by 4, got {width}": (
            tokens.position == "sincos" and width % 4
        ),
        "stem conv halves the image and needs a patch_size of 1, 2, 4, 8, ..., "
        f"got {patch}": tokens.stem == "conv" and patch & (patch - 1),
        "drop_path must be below 1, or the last block is never trained": blocks.drop_path == 1,
    }
    return [sentence for sentence, wrong in found.items() if wrong]


def _of_stages(depth: int | list[int], tokens: Tokens, blocks: Blocks) -> list[str]:
    if isinstance(depth, int):
        return []
    found = {
        "depth is an empty list; give the blocks of each stage, such as [2, 2, 6, 2]": not depth,
        f"a list as depth merges patches and needs pool mean, got pool {tokens.pool}: a class "
        "token has no neighbours to be merged with": tokens.pool != "mean",
        "a list as depth goes with attention global or window; gated attention is for patches "
        "that stay what they are": blocks.attention == "gated",
    }
    return [sentence for sentence, wrong in found.items() if wrong]


def _of_attention(depth: int | list[int], tokens: Tokens, blocks: Blocks) -> list[str]:
    mixer, kind, pool = blocks.mixer, blocks.attention, tokens.pool
    gated = kind == "gated"
    found = {
        f"window is the side of attention window's windows, got window {blocks.window} with "
        f"attention {kind}": blocks.window != WINDOW and kind != "window",
        f"attention {kind} needs mixer attention, got mixer {mixer}": (
            kind != "global" and mixer != "attention"
        ),
        f"attention window needs pool mean, got pool {pool}: a class token lies in no window": (
            kind == "window" and pool != "mean"
        ),
        f"mixer dynamic_conv needs pool mean, got pool {pool}: a convolution brings nothing to a "
        "class token": mixer == "dynamic_conv" and pool != "mean",
        "heads of gated attention begin as the offsets of a square kernel, so there are 1, 4, 9 "
        f"or 16 of them, got {blocks.heads}": gated
        and math.isqrt(blocks.heads) ** 2 != blocks.heads,
        f"pool {pool} with attention gated needs depth 2 or more: the token joins behind the gated "
        "blocks": gated and pool != "mean" and depth == 1,
    }
    return [sentence for sentence, wrong in found.items() if wrong]


def _of_maps(tokens: Tokens, blocks: Blocks) -> list[str]:
    kind, rank, width = blocks.linear, blocks.rank, tokens.width
    hidden = blocks.hidden(width)
    found = {
        f"rank is for linear low_rank and btt, got rank {rank} with linear {kind}": (
            rank is not None and kind not in ("low_rank", "btt")
        ),
        f"a rank of {rank} is not low for a width of {width} and {hidden} channels in the MLP": (
            kind == "low_rank" and rank is not None and rank >= min(width, hidden)
        ),
        f"linear monarch needs {MONARCH_BLOCKS} to divide the width and the MLP's channels, got "
        f"{width} and {hidden}": kind == "monarch"
        and (width % MONARCH_BLOCKS or hidden % MONARCH_BLOCKS),
        f"attention gated begins with the identity as a map and needs linear dense, got {kind}": (
            blocks.attention == "gated" and kind != "dense"
        ),
        f"mixer crate has a dictionary for an MLP and needs linear dense, got {kind}": (
            blocks.mixer == "crate" and kind != "dense"
        ),
        "mixer crate has one branch alone and takes no layer_scale, "
        f"got {blocks.layer_scale}": blocks.mixer == "crate" and blocks.layer_scale,
    }
    return [sentence for sentence, wrong in found.items() if wrong]
