"""What lies in tar shards of images: found once by their headers, and kept in a file.

An index file has a section for every shard, then a JSON object that says which, then the length of
that object in 8 bytes, the CRC-32 of all before in 4, and four that tell the kind of file. A
section is a record an image (`RECORD`), then the keys of its images one after the other. A record
is read when its image is: nothing of the index stays in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy import ndarray
from pydantic import BaseModel

from distill import jsonio, storage
from distill.data import images
from distill.data._tar import Archive, Member
from distill.data.folder import SUFFIXES
from distill.data.shelf import File
from distill.errors import DamagedError, IdentityError, PreflightError
from distill.identity import require_known

RECORD = np.dtype(
    [
        ("offset", "<u8"),  # of the image in its shard
        ("size", "<u4"),  # bytes
        ("crc32", "<u4"),  # of the image, where the index is that of a pack
        ("key_end", "<u4"),  # in the keys of the section
        ("label", "<i4"),
        ("width", "<u2"),  # pixels, as its header says; 0 where it is no image
        ("height", "<u2"),  # likewise; MOST_PIXELS stands for more
    ]
)
MOST_PIXELS = 2**16 - 1

_FORMAT = 1
_MAGIC = b"idx\n"
_TAIL = struct.Struct("<QI4s")
_HEADS = (4096, 65_536)  # bytes of an image in which its header is looked for, before all are read
_ANY_SIZE = 2**62  # pixels
_MOST_LABEL = 2**20  # bytes
_CHUNK = 2**20  # bytes read at once


class Section(NamedTuple):
    """The images of a shard."""

    records: ndarray
    keys: bytes

    def to_bytes(self) -> bytes:
        """As it stands in an index."""
        return self.records.tobytes() + self.keys

    @classmethod
    def from_bytes(cls, data: bytes, images: int) -> Section:
        """What `to_bytes` gave for so many images."""
        size = images * RECORD.itemsize
        return cls(np.frombuffer(data[:size], RECORD), data[size:])


class Shard(NamedTuple):
    """A shard, and where its section stands in the index."""

    name: str
    size: int  # bytes
    changed: int  # nanoseconds; 0 where it says nothing: in a pack, whose images have checksums
    images: int
    keys: int  # bytes
    start: int

    @property
    def end(self) -> int:
        """Where the next section begins."""
        return self.start + self.images * RECORD.itemsize + self.keys


class _About(BaseModel):
    """The object at the end of an index."""

    checked: bool
    content: str
    shards: list[Shard]


class Index(NamedTuple):
    """The index of a split."""

    path: Path
    shards: tuple[Shard, ...]
    checked: bool  # whether it has checksums of the images
    content: str  # SHA-256 of the keys, sizes and checksums of the images

    def describes(self, files: Mapping[str, File]) -> bool:
        """Whether these are its shards in order, as far as names, sizes and times tell."""
        known = [(shard.name, File(shard.size, shard.changed)) for shard in self.shards]
        return known == list(files.items())

    def sections(self) -> Iterator[Section]:
        """One shard after the other.

        Raises:
            PreflightError: If it cannot be read.
        """
        try:
            with self.path.open("rb") as file:
                for shard in self.shards:
                    yield Section.from_bytes(file.read(shard.end - shard.start), shard.images)
        except OSError as error:
            raise PreflightError(f"{self.path}: {error.strerror}") from None


def scan(path: Path, name: str = "") -> Section:
    """The images of a shard, found by the headers of its members.

    A sample is what members with the same name up to the first dot hold, one after the other: an
    image, and its class as a number in `.cls` or under `label` in `.json`.

    Args:
        path: The shard.
        name: What errors call it; left out: its path.

    Raises:
        DamagedError: If the shard is cut short or altered.
        PreflightError: If it cannot be read, or a sample lacks its image or class or has two.
    """
    name = name or str(path)
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise PreflightError(f"{name}: {error.strerror}") from None
    try:
        archive = Archive(descriptor, name)
        rows, keys, seen = [], bytearray(), set[str]()
        for key, parts in _samples(archive.members()):
            if key in seen:
                raise PreflightError(
                    f"{name}: a second sample {key!r}; the members of a sample stand together"
                )
            seen.add(key)
            if (sample := _sample(archive, f"{name}: {key}", parts)) is None:
                continue
            member, label = sample
            keys += os.fsencode(key)
            width, height = _sides(archive, member)
            rows.append((member.offset, member.size, 0, len(keys), label, width, height))
        return Section(np.array(rows, RECORD), bytes(keys))
    except OSError as error:
        if isinstance(error, PreflightError):
            raise
        raise PreflightError(f"{name}: {error.strerror}") from None
    finally:
        os.close(descriptor)


def _samples(members: Iterable[Member]) -> Iterator[tuple[str, dict[str, list[Member]]]]:
    """Key and members of every sample, the members by what follows the first dot of their names."""
    at, parts = "", dict[str, list[Member]]()
    for member in members:
        folder, slash, base = member.name.removeprefix("./").rpartition("/")
        stem, _, suffix = base.partition(".")
        if not stem or not suffix:
            continue
        if (key := folder + slash + stem) != at:
            if parts:
                yield at, parts
            at, parts = key, {}
        parts.setdefault(suffix.lower(), []).append(member)
    if parts:
        yield at, parts


def _sample(
    archive: Archive, name: str, parts: dict[str, list[Member]]
) -> tuple[Member, int] | None:
    """The image and the class of a sample; None if it has neither."""
    found = [member for suffix in SUFFIXES for member in parts.get(suffix[1:], ())]
    label = _label(archive, name, parts)
    if not found and label is None:
        return None
    if len(found) != 1:
        raise PreflightError(
            f"{name}: {len(found) or 'no'} image{'s' if found else ''} in a sample",
            hint=f"one member of a sample ends in {' '.join(SUFFIXES)}",
        )
    if label is None:
        raise PreflightError(
            f"{name}: a sample without a class",
            hint='its number is what NAME.cls holds, or stands under "label" in NAME.json',
        )
    if found[0].size > images.MOST_BYTES:
        raise PreflightError(f"{name}: {found[0].size:,} bytes, which no photograph has")
    return found[0], label


def _label(archive: Archive, name: str, parts: dict[str, list[Member]]) -> int | None:
    for suffix in ("cls", "json"):
        for member in parts.get(suffix, ()):
            try:
                text = archive.read(member.offset, min(member.size, _MOST_LABEL))
                value = int(text) if suffix == "cls" else jsonio.mapping(text).get("label")
                if value is None:
                    continue
                if type(value) is not int or not 0 <= value < 2**31:
                    raise ValueError
                return value
            except ValueError:
                raise PreflightError(f"{name}.{suffix}: no class number from 0") from None
    return None


def _sides(archive: Archive, member: Member) -> tuple[int, int]:
    """Width and height of an image; (0, 0) if its header cannot be read."""
    for size in (*_HEADS, member.size):
        try:
            data = archive.read(member.offset, min(size, member.size))
            sides = images.check_header(data, max_pixels=_ANY_SIZE)
        except images.BadImageError:
            if size >= member.size:
                break
        else:
            return min(sides[0], MOST_PIXELS), min(sides[1], MOST_PIXELS)
    return 0, 0


def write(
    path: Path, sections: Iterable[Section], files: Mapping[str, File], *, checked: bool
) -> Index:
    """Make an index at `path`, section by section, so that it is whole or not there.

    Args:
        path: The file; its folder must be there.
        sections: What lies in every shard.
        files: The shards, in the same order.
        checked: Whether the records have checksums.

    Raises:
        PreflightError: If it cannot be written.
    """
    found: list[Shard] = []
    crc, content = 0, hashlib.sha256()
    with storage.writing(path) as file:
        for (name, known), section in zip(files.items(), sections, strict=True):
            data, start = section.to_bytes(), found[-1].end if found else 0
            counts = len(section.records), len(section.keys)
            found.append(Shard(name, known.size, known.changed, *counts, start))
            file.write(data)
            crc = zlib.crc32(data, crc)
            content.update(section.keys)
            for field in ("size", "crc32", "key_end"):
                content.update(section.records[field].tobytes())
        about = {
            "format": _FORMAT,
            "checked": checked,
            "content": content.hexdigest(),
            "shards": found,
        }
        text = json.dumps(about).encode()
        file.write(text + _TAIL.pack(len(text), zlib.crc32(text, crc), _MAGIC))
    return Index(path, tuple(found), checked, content.hexdigest())


def read(path: Path) -> Index | None:
    """The index at `path`; None if there is none.

    Raises:
        DamagedError: If a byte of it is another than was written.
        IdentityError: If a newer version wrote it.
        PreflightError: If it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return _read(path, file)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise PreflightError(f"{path}: {error.strerror}") from None
    except IdentityError:
        raise
    except (ValueError, KeyError, TypeError, struct.error):
        raise DamagedError(
            f"{path}: its content changed after it was written",
            hint="remove it: it is made again from the shards; of a pack, `distill pack` makes it",
        ) from None


def _read(path: Path, file: BinaryIO) -> Index:
    end = file.seek(0, os.SEEK_END) - _TAIL.size
    file.seek(max(end, 0))
    length, stated, magic = _TAIL.unpack(file.read())
    if magic != _MAGIC or length > end:
        raise ValueError("no index")
    file.seek(end - length)
    about = jsonio.mapping(file.read(length))
    file.seek(0)
    crc = 0
    while size := min(_CHUNK, end - file.tell()):
        crc = zlib.crc32(file.read(size), crc)
    if crc != stated:
        raise ValueError("altered")
    require_known(about["format"], _FORMAT, str(path))
    found = jsonio.checked(_About, about)
    shards = tuple(found.shards)
    if any(not 0 <= number < 2**63 for shard in shards for number in shard[1:]):
        raise ValueError("sizes that no file has")
    starts = (0, *(shard.end for shard in shards))
    if any(shard.start != start for shard, start in zip(shards, starts, strict=False)):
        raise ValueError("sections that do not follow each other")
    if starts[-1] != end - length:
        raise ValueError("sections that are not all there")
    return Index(path, shards, found.checked, found.content)
