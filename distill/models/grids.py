"""Any activation as a grid of features over the image, (B, C, h, w), and tokens that have no place.

Convolutions give (B, C, h, w), some transformers (B, h, w, C), most of them tokens (B, P + h*w, C)
with P of them in front: class, distillation and register tokens. Which of the three an activation
is follows from the image's size alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

from jaxtyping import Float
from torch import Tensor

MOST_PREFIX = 16  # tokens in front of a grid's; networks with registers have up to 9

Size = tuple[int, int]  # rows and columns


class Layout(NamedTuple):
    """How an activation lies in memory."""

    kind: Literal["channels_first", "channels_last", "tokens"]
    channels: int
    grid: Size
    prefix: int = 0  # tokens in front


def layouts(shape: tuple[int, ...], image: Size) -> list[Layout]:
    """The layouts that an activation of this shape may have, likeliest first; else none.

    Args:
        shape: With the batch first.
        image: Rows and columns of the image in pixels.
    """
    found: list[Layout] = []
    if len(shape) == 4:
        _, a, b, c = shape
        found = [Layout("channels_first", a, (b, c)), Layout("channels_last", c, (a, b))]
        found = [layout for layout in found if _fits(layout.grid, image)]
        # Only one of the two has the image's shape to the last cell, or neither or both.
        found.sort(key=lambda layout: not _exact(layout.grid, image))
        if len(found) == 2 and _exact(found[0].grid, image) != _exact(found[1].grid, image):
            del found[1]
    if len(shape) == 3:
        _, tokens, channels = shape
        prefix, grid = token_grid(tokens, image)
        if grid is not None:
            found = [Layout("tokens", channels, grid, prefix)]
    return found


def token_grid(tokens: int, image: Size) -> tuple[int, Size | None]:
    """How many of the tokens are in front, and the grid of the others; None where there is none."""
    for exact in (True, False):
        for prefix in range(min(MOST_PREFIX, tokens - 1) + 1):
            for grid in _factors(tokens - prefix):
                if _fits(grid, image) and (not exact or _exact(grid, image)):
                    return prefix, grid
    return 0, None


def to_grid(x: Tensor, layout: Layout, image: Size) -> Float[Tensor, "B C h w"]:
    """The activation as a grid; tokens in front are left out."""
    match layout.kind:
        case "channels_first":
            return x
        case "channels_last":
            return x.permute(0, 3, 1, 2)
        case "tokens":
            rows, columns = _grid_of(x.shape[1] - layout.prefix, layout, image)
            cells = x[:, layout.prefix :].transpose(1, 2)
            return cells.reshape(*cells.shape[:2], rows, columns)


def _grid_of(cells: int, layout: Layout, image: Size) -> Size:
    """The grid as it was found, or that of an image of another size."""
    if cells == layout.grid[0] * layout.grid[1] and _fits(layout.grid, image):
        return layout.grid
    fitting = [grid for grid in _factors(cells) if _fits(grid, image)]
    return min(fitting, key=lambda grid: not _exact(grid, image))


def _factors(count: int) -> Iterator[Size]:
    return ((rows, count // rows) for rows in range(1, count + 1) if count % rows == 0)


def _fits(grid: Size, image: Size) -> bool:
    """Whether some stride gives this grid, were it rounded up or down."""
    if any(cells > pixels for cells, pixels in zip(grid, image, strict=True)):
        return False
    if image[0] == image[1]:  # equal sides are rounded alike
        return grid[0] == grid[1]
    least = max(pixels / (cells + 1) for cells, pixels in zip(grid, image, strict=True))
    bounds = [p / (c - 1) if c > 1 else float("inf") for c, p in zip(grid, image, strict=True)]
    return least < min(bounds)


def _exact(grid: Size, image: Size) -> bool:
    return grid[0] * image[1] == grid[1] * image[0]
