"""Images with a shared border of zeros, of which any window is one strided copy."""

from __future__ import annotations

from typing import TypeVar

from jaxtyping import Int, UInt8
from numpy import ndarray
from torch import Tensor

Integers = TypeVar("Integers", ndarray, Tensor)


class Canvas:
    """uint8 images laid out so that a window may reach `padding` pixels beyond its image.

    Neighbours share their borders: to the right of an image's row lies the border that is left of
    the next row, and below an image the one that is above the next. A window of the image's size
    at any offset is therefore an overlapping strided view, and a batch of windows one
    `index_select` of it, which copies row by row.

    Args:
        images: Images, channels last.
        padding: Width of the border in pixels.
        mirrored: Whether windows of the images flipped left to right are held too.
    """

    def __init__(
        self, images: UInt8[Tensor, "N H W C"], *, padding: int, mirrored: bool = False
    ) -> None:
        self._num, height, width, channels = images.shape
        self._height, self._width = height + padding, width + padding
        self.padding = padding
        copies = 2 if mirrored else 1
        rows = copies * self._num * self._height + padding
        pixels = images.new_zeros(rows * self._width + padding, channels)
        strides = (self._height * self._width * channels, self._width * channels, channels, 1)
        first = (padding * self._width + padding) * channels
        inside = pixels.as_strided((copies * self._num, height, width, channels), strides, first)
        inside[: self._num] = images
        if mirrored:
            inside[self._num :] = images.flip(2)
        last = (rows - self._height - padding) * self._width
        num_windows = last + 2 * padding * (self._width + 1) + 1
        shape = (num_windows, height, width, channels)
        self._windows = pixels.as_strided(shape, (channels, *strides[1:]))

    def offsets(
        self, images: Integers, top: Integers | int, left: Integers | int, flip: Integers | int = 0
    ) -> Integers:
        """Where in the canvas windows begin.

        Args:
            images: Numbers of images.
            top: Rows between the border's first and the window's, in 0 … 2 · padding.
            left: The same for columns.
            flip: 1 to read from the mirrored image, at its own `left`.
        """
        return ((images + flip * self._num) * self._height + top) * self._width + left

    def windows(self, offsets: Int[Tensor, " B"]) -> UInt8[Tensor, "B C H W"]:
        """The windows at `offsets`, in channels_last memory."""
        return self._windows.index_select(0, offsets).permute(0, 3, 1, 2)
