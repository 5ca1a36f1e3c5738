"""The attention maps of any network, caught where they are computed.

Whatever a layer is called and whoever wrote it, its map is the result of a softmax, of PyTorch's
fused attention or of its multi-head attention. Inside of a tapped module those calls are watched;
everywhere else nothing changes. Fused kernels never hold the map: it is computed beside them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from distill.models.grids import Size


class Windows(NamedTuple):
    """How the cells of a grid are dealt out to windows that attend by themselves."""

    size: Size  # of a window, in cells
    shift: Size  # by which the grid is rolled up and left before
    dilated: bool  # a window's cells are spread evenly over the whole grid
    early: bool  # it is rolled before it is padded, not after

    def cells(self, grid: Size) -> Tensor:
        """Which cell each window's tokens are, (windows, tokens); −1 where it is padding."""
        height, width = self.size
        index = torch.arange(grid[0] * grid[1]).reshape(grid)
        if self.early:
            index = index.roll((-self.shift[0], -self.shift[1]), dims=(0, 1))
        index = F.pad(index, (0, -grid[1] % width, 0, -grid[0] % height), value=-1)
        padded = index.shape
        if not self.early:
            shifts = [
                -shift if n > side else 0  # one window needs no shift, and gets none
                for shift, n, side in zip(self.shift, padded, self.size, strict=True)
            ]
            index = index.roll(shifts, dims=(0, 1))
        if self.dilated:
            steps = padded[0] // height, padded[1] // width
            parts = index.reshape(height, steps[0], width, steps[1]).permute(1, 3, 0, 2)
        else:
            parts = index.reshape(-1, height, padded[1] // width, width).permute(0, 2, 1, 3)
        return parts.reshape(-1, height * width)


class Watch(TorchFunctionMode):
    """Hand every map that is computed while it is on to `seen`.

    Args:
        seen: Called with the map, (..., A, Q, K), every row of which sums to 1.
        dropped: Called with what goes into a dropout: the map, where a layer mixes several.
    """

    def __init__(self, seen: Callable[[Tensor], None], dropped: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.seen, self.dropped = seen, dropped

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run `func`, and look at what it was given and gave."""
        kwargs = dict(kwargs or {})
        if func is F.multi_head_attention_forward:
            kwargs |= {"need_weights": True, "average_attn_weights": False}
            out, weights = func(*args, **kwargs)
            self.seen(weights)  # type: ignore[arg-type]  # None without need_weights
            return out, None
        out = func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            self.seen(_rows(*args, **kwargs))
        elif func in _SOFTMAXES:
            dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
            if out.ndim >= 4 and dim in (-1, out.ndim - 1):
                self.seen(out)
        elif func is F.dropout and args[0].ndim >= 4:
            self.dropped(args[0])
        return out


_SOFTMAXES = (F.softmax, torch.softmax, Tensor.softmax)


def _rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The map of fused attention: softmax(scale · Q Kᵀ + mask), with its arguments."""
    # Halves would lose the map; and there is no autocast where there are no values.
    exact = nullcontext() if query.is_meta else torch.autocast(query.device.type, enabled=False)
    with exact:
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        if enable_gqa:
            key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
        logits = (query.float() * scale) @ key.float().transpose(-2, -1)
        if is_causal:
            attn_mask = torch.ones_like(logits, dtype=torch.bool).tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            logits = logits.masked_fill(~attn_mask, float("-inf"))
        elif attn_mask is not None:
            logits = logits + attn_mask
        return logits.softmax(dim=-1)


def windows(modules: Sequence[nn.Module], tokens: int) -> Windows | None:
    """How a layer deals out cells, read off the modules around it, innermost first.

    Swin's layers and ours say `window_size` and `shift_size`, Twins' say `ws`, MaxViT's that they
    partition. None where nobody says, or says 0: the layer attends globally. A layer that shifts by
    itself, torchvision's or ours, pads before; where the block around it does, timm's, it is padded
    behind.

    Args:
        modules: The one that makes the map, and those around it.
        tokens: Of a window; one that is partitioned evenly is a square if nobody says more.
    """
    size = shift = None
    dilated = False
    for module in modules:
        kind = getattr(module, "partition_type", None)
        size = size or getattr(module, "window_size", None) or getattr(module, "ws", None)
        if kind is not None or hasattr(module, "partition_block"):
            size = size or getattr(module, "partition_size", None) or math.isqrt(tokens)
            dilated = kind == "grid" or getattr(module, "partition_block", None) is False
        shift = shift or getattr(module, "shift_size", None)
    if size is None or 0 in _pair(size):
        return None
    early = not hasattr(modules[0], "shift_size")
    return Windows(_pair(size), _pair(shift or 0), dilated, early)


def _pair(value: Any) -> Size:
    both = (value, value) if isinstance(value, int) else tuple(value)
    return int(both[0]), int(both[1])


def spread(maps: Float[Tensor, "W A n n"], cells: Tensor, count: int) -> Float[Tensor, "B A N N"]:
    """Windows' maps as maps over all `count` cells: 0 between cells of different windows.

    What went to padding is shared out among the rest of its row.

    Args:
        maps: Of all windows of a sample, then those of the next; (B, windows, A, n, n) likewise.
        cells: As `Windows.cells` gives them.
        count: Cells of the grid.
    """
    num_windows, tokens = cells.shape
    maps = maps.reshape(-1, num_windows, *maps.shape[-3:])
    batch, _, heads = maps.shape[:3]
    place = torch.where(cells < 0, count, cells)  # padding goes to a cell that is cut off
    whole = maps.new_zeros(batch, heads, count + 1, count + 1)
    rows = place[:, :, None].expand(-1, -1, tokens)
    columns = place[:, None, :].expand(-1, tokens, -1)
    whole[:, :, rows, columns] = maps.transpose(1, 2)
    whole = whole[:, :, :count, :count]
    return whole / whole.sum(dim=-1, keepdim=True).clamp_min(1e-12)
