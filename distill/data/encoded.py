"""Images as they are stored, whatever they are stored in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Int64, UInt8
from PIL import Image

from distill.data import images
from distill.data.jpeg import Box

Ids = Int64[np.ndarray, " b"]


class Encoded(Protocol):
    """Encoded images by number, one a sample.

    Every process that decodes images holds one of these: it is made of arrays, not of an object an
    image, can be pickled, and opens its files when the first image is read.

    Attributes:
        origin: Where they lie, as a user names it.
        checked: Whether reading an image finds that a byte of it was altered.
    """

    origin: str
    checked: bool

    def __len__(self) -> int: ...

    def name(self, number: int) -> str:
        """The name of an image below `origin`."""
        ...

    def read(self, number: int) -> Path | bytes:
        """The image, or the file of its own that it is.

        Raises:
            PreflightError: If it cannot be read.
            DamagedError: If it is not what was written, where that can be told.
        """
        ...

    def ahead(self, batches: Iterable[Ids]) -> Iterable[Ids]:
        """These batches of numbers, which are to be read: what takes time may begin."""
        ...

    def suspects(self, max_pixels: int) -> Sequence[int]:
        """The images that may be bad, for all that is known without opening any of them."""
        ...

    def sizes(self) -> Int64[np.ndarray, " N"]:
        """Bytes of every image; −1 where that is not known without opening it."""
        ...


class Split(NamedTuple):
    """Images with a class each.

    Attributes:
        files: The images.
        labels: Class of every image; −1 where it is not known.
        content: What tells these images from others, in parts.
    """

    files: Encoded
    labels: Int64[np.ndarray, " N"]
    content: Iterable[str | bytes]


class Stored(NamedTuple):
    """A set of images with classes that somebody keeps in files, and where."""

    origin: str
    classes: tuple[str, ...]
    train: Split
    test: Split


def decode(files: Encoded, number: int, *, max_pixels: int) -> Image.Image:
    """An image as upright RGB, as `images.decode` gives it.

    Raises:
        BadImageError: If it is no usable image.
        PreflightError: If it cannot be read.
        DamagedError: If it is not what was written, where that can be told.
    """
    source = files.read(number)
    return images.decode(source, max_pixels=max_pixels, name=_place(files, number))


def part(
    files: Encoded, number: int, choose: Callable[[int, int], Box], *, max_pixels: int
) -> UInt8[np.ndarray, "h w 3"]:
    """A box of an image, as `images.part` gives it; raises as `decode` does."""
    source = files.read(number)
    return images.part(source, choose, max_pixels=max_pixels, name=_place(files, number))


def check_header(files: Encoded, number: int, *, max_pixels: int) -> tuple[int, int]:
    """Width and height as stored; raises as `decode` would, as far as the header tells."""
    source = files.read(number)
    return images.check_header(source, max_pixels=max_pixels, name=_place(files, number))


def _place(files: Encoded, number: int) -> str:
    return f"{files.origin}/{files.name(number)}"
