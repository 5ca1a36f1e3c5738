"""Shards of a pack: from images as they are stored to tars of smaller ones.

What a shard holds follows from the source and the settings, so whoever makes it writes the same
bytes.
"""

from __future__ import annotations

import tarfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
from jaxtyping import Int64
from numpy import ndarray
from PIL import Image

from distill import storage
from distill.component import Count
from distill.data import encoded, images, jpeg, tar_index
from distill.data.encoded import Encoded
from distill.data.tars import TRAIN
from distill.recipe import Data

_SAMPLED = 64  # images of a split by which the size of all is told
_BLOCK = 512


class Settings(NamedTuple):
    """What becomes of an image."""

    size: int = 256  # pixels of the shorter side, where it has more
    format: Literal["jpeg", "raw"] = "jpeg"
    quality: int = 90  # of JPEG
    shard_bytes: int = 2**27

    def identity(self) -> dict[str, Any]:
        """All that decides the bytes of a shard."""
        found = self._asdict()
        if self.format == "raw":
            del found["quality"]
        return found


class Source(NamedTuple):
    """A split of the images to be packed."""

    files: Encoded
    labels: Int64[ndarray, " N"]


class Shard(NamedTuple):
    """A shard to be made."""

    split: str
    number: int
    images: range

    @property
    def name(self) -> str:
        """The file."""
        return f"{self.split}-{self.number:05d}.tar"

    @property
    def section(self) -> str:
        """The file that holds its section, until there is an index."""
        return f".{self.name.removesuffix('.tar')}.section"


class Plan(NamedTuple):
    """How a split is cut, told by some of its images."""

    images_a_shard: Count
    bytes_an_image: Count


def plan(source: Source, split: str, data: Data, settings: Settings) -> Plan:
    """How a split should be cut, so that shards are about as large as asked for.

    Raises:
        PreflightError: If one of the images that are looked at is bad, and may not be skipped.
    """
    count = len(source.labels)
    some = np.unique(np.linspace(0, count - 1, _SAMPLED).astype(int)).tolist()
    sizes = [len(_encoded(source.files, i, split, data, settings)) for i in some]
    mean = sum(4 * _BLOCK + size for size in sizes) // len(sizes)  # two headers, two last blocks
    return Plan(max(1, settings.shard_bytes // mean), mean)


def cut(split: str, count: int, images_a_shard: int) -> list[Shard]:
    """The shards of a split of so many images."""
    starts = range(0, count, images_a_shard)
    ranges = (range(start, min(start + images_a_shard, count)) for start in starts)
    return [Shard(split, number, each) for number, each in enumerate(ranges)]


def make(
    out: Path, data: Data, settings: Settings, sources: dict[str, Source], shard: Shard
) -> None:
    """Write a shard to `out`, and before it what an index says of it.

    Raises:
        PreflightError: If an image is bad and may not be skipped, or the disk is full.
    """
    files, labels = sources[shard.split]
    suffix = "ppm" if settings.format == "raw" else "jpg"
    sums = []
    with storage.staged(out) as aside:
        with (aside / shard.name).open("wb") as file:
            for number in shard.images:
                image = _encoded(files, number, shard.split, data, settings)
                sums.append(zlib.crc32(image))
                _add(file, f"{number:08d}.{suffix}", image)
                _add(file, f"{number:08d}.cls", str(labels[number]).encode())
            file.write(bytes(2 * _BLOCK))
        section = tar_index.scan(aside / shard.name)
        section.records["crc32"] = sums
        (aside / shard.section).write_bytes(section.to_bytes())
        storage.publish(aside, out, first=shard.section)


def _encoded(files: Encoded, number: int, split: str, data: Data, settings: Settings) -> bytes:
    """What is packed of an image; of a bad one that may be skipped, nothing."""
    try:
        image = encoded.decode(files, number, max_pixels=data.max_pixels)
    except images.BadImageError as error:
        if split == TRAIN and data.on_bad_image == "skip":
            return b""
        raise images.BadImageError(
            str(error),
            hint="mend or remove it, or leave bad training images out: "
            "--set data.on_bad_image=skip",
        ) from None
    shorter = min(image.size)
    if shorter > settings.size:
        width, height = (round(side * settings.size / shorter) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    if settings.format == "raw":
        return f"P6\n{image.width} {image.height}\n255\n".encode() + image.tobytes()
    return jpeg.encode(image, quality=settings.quality)


def _add(file: BinaryIO, name: str, content: bytes) -> None:
    """A member, without owner or time: the same bytes whoever writes it, and when."""
    about = tarfile.TarInfo(name)
    about.size = len(content)
    file.write(about.tobuf(tarfile.USTAR_FORMAT))
    file.write(content)
    file.write(bytes(-len(content) % _BLOCK))
