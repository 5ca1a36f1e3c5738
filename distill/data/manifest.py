"""What a manifest says of images: found once by reading every byte, and held against them later.

A file of JSON lines. The first says how many images of each split follow, the last is the SHA-256
of all lines before it; each between them is a `Row`. It decides what is refused, and nothing that
is computed: whatever was made of the same images without one is the same.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, BinaryIO, Literal

import numpy as np
from annotated_types import Ge, Lt
from jaxtyping import Int64, UInt8
from numpy import ndarray
from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

from distill import storage
from distill.data import images
from distill.data.encoded import Encoded, Ids, Split
from distill.data.images import BadImageError
from distill.errors import DamagedError, IdentityError, PreflightError
from distill.identity import require_known

_FORMAT = 1
_MOST_LINE = 2**16  # bytes; a name has 4,096 at most, and JSON writes a byte of it as six
_MOST_BYTES = 2**33  # some 30 million images
_MOST_FAULTS = 100_000  # after which no further one is looked for
_LISTED = 10  # differences that an error names
_MAKE = "`distill check RECIPE --data` makes it"

_Size = Annotated[int, Ge(0), Lt(2**62)]
_Side = Annotated[int, Ge(0), Lt(2**31)]


class Row(BaseModel):
    r"""An image.

    Attributes:
        split: Of the recipe; `transfer` are the images of `data.transfer`.
        name: Below the place of the images; what is no UTF-8 in it is written as \udcNN.
        label: The name of its class; None where it is not known.
        size: Bytes.
        sha256: Of the bytes.
        width: Pixels, as stored; 0 where it is bad.
        height: Likewise.
        format: Such as JPEG; empty where it is bad.
        mode: Such as RGB, CMYK or I;16.
        animated: Whether it has several frames or pages, of which the first is used.
        pixels: The first 64 bits of the SHA-256 of width, height and upright RGB pixels.
        bad: Why it cannot be used.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    split: Literal["train", "test", "transfer"]
    name: str
    label: str | None
    size: _Size
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    width: _Side
    height: _Side
    format: str
    mode: str
    animated: bool
    pixels: Annotated[str, StringConstraints(pattern=r"^([0-9a-f]{16})?$")]
    bad: str | None


class _Head(BaseModel):
    """The first line."""

    model_config = ConfigDict(extra="forbid", strict=True)

    format: int
    max_pixels: _Size
    images: dict[Literal["train", "test", "transfer"], _Size]


class Recorded:
    """Images whose bytes are held against a manifest as they are read: an `Encoded` itself.

    Attributes:
        origin: Where they lie.
        checked: True.

    Args:
        files: The images.
        path: The manifest.
        sha256: Of each image.
        bad: Why those that are bad cannot be used.
    """

    checked = True

    def __init__(
        self, files: Encoded, path: Path, sha256: UInt8[ndarray, "N 32"], bad: dict[int, str]
    ) -> None:
        self.origin = files.origin
        self._files, self._path, self._sha256, self._bad = files, path, sha256, bad

    def __len__(self) -> int:
        return len(self._files)

    @property
    def ends(self) -> Int64[ndarray, " S"]:
        """How many images there are up to the end of every shard, where they lie in shards."""
        ends: ndarray = getattr(self._files, "ends")  # noqa: B009 (of Tars alone)
        return ends

    def name(self, number: int) -> str:
        """The name of an image below `origin`."""
        return self._files.name(number)

    def read(self, number: int) -> Path | bytes:
        """The bytes of an image, which are those that the manifest was made of.

        Raises:
            BadImageError: If the manifest says that it cannot be used.
            DamagedError: If they are others.
            PreflightError: If it cannot be read.
        """
        place = f"{self.origin}/{self.name(number)}"
        if (why := self._bad.get(number)) is not None:
            raise BadImageError(f"{place}: {why}")
        source = self._files.read(number)
        if self._files.checked:  # a pack's checksum has been looked at
            return source
        data = images.stored(source)
        if not data:
            return source  # whoever decodes it says what is wrong
        if hashlib.sha256(data).digest() != self._sha256[number].tobytes():
            raise DamagedError(
                f"{place}: its content is not what {self._path} says",
                hint=f"put the file back as it was; or accept it: remove the manifest, and {_MAKE}",
            )
        return data

    def ahead(self, batches: Iterable[Ids]) -> Iterable[Ids]:
        """These batches of numbers, which are to be read: what takes time may begin."""
        return self._files.ahead(batches)

    def suspects(self, max_pixels: int) -> Sequence[int]:
        """Those that the manifest says are bad; no other needs to be opened."""
        return sorted(self._bad)

    def sizes(self) -> Int64[ndarray, " N"]:
        """Bytes of every image."""
        return self._files.sizes()

    def altered(self, sums: UInt8[ndarray, "N 32"]) -> list[str]:
        """The images of the manifest whose bytes have other sums than it says."""
        known = self._sha256.any(axis=1)
        other = np.flatnonzero(known & (self._sha256 != sums).any(axis=1))
        return [f"{self.name(i)} has other content" for i in other.tolist()]


def recorded(
    path: Path, splits: Mapping[str, Split], classes: Sequence[str], *, max_pixels: int
) -> dict[str, Split]:
    """These splits, every image of which is the one that a manifest names.

    No image is opened: names, sizes and classes are compared, the content when it is read.

    Args:
        path: The manifest; what it says of other splits is passed over.
        splits: By their names in it.
        classes: Names of the labels.
        max_pixels: The recipe's, which must be that which it was made with.

    Raises:
        PreflightError: If there is no manifest, or it cannot be read.
        DamagedError: If it is altered, or the images are not those that it names.
        IdentityError: If a newer version wrote it.
    """
    found, faults = match(path, splits, classes, max_pixels=max_pixels)
    require_none(path, faults)
    return found


def match(
    path: Path, splits: Mapping[str, Split], classes: Sequence[str], *, max_pixels: int
) -> tuple[dict[str, Split], list[str]]:
    """These splits as `recorded` gives them, and what is different, a sentence an image."""
    numbers: dict[str, dict[str, int]] = {
        name: {written(split.files.name(i)): i for i in range(len(split.files))}
        for name, split in splits.items()
    }
    sizes = {name: split.files.sizes() for name, split in splits.items()}
    seen = {name: np.zeros(len(split.files), bool) for name, split in splits.items()}
    sums = {name: np.zeros((len(split.files), 32), np.uint8) for name, split in splits.items()}
    bad: dict[str, dict[int, str]] = {name: {} for name in splits}
    faults: list[str] = []
    for row in rows(path, max_pixels=max_pixels):
        if row.split not in splits:
            continue
        place, number = f"{row.split} image {row.name}", numbers[row.split].get(row.name)
        if number is None:
            faults.append(f"{place} is missing")
            if len(faults) > _MOST_FAULTS:
                break
            continue
        if seen[row.split][number]:
            raise _damaged(path, f"names {place} twice")
        seen[row.split][number] = True
        size, label = int(sizes[row.split][number]), label_of(splits[row.split], number, classes)
        if size not in (row.size, -1):
            faults.append(f"{place} has {size:,} bytes, and had {row.size:,}")
            continue
        if label != row.label:
            faults.append(f"{place} is of class {label!r}, and was of {row.label!r}")
        sums[row.split][number] = np.frombuffer(bytes.fromhex(row.sha256), np.uint8)
        if row.bad is not None:
            bad[row.split][number] = row.bad
    for name, there in seen.items():
        files = splits[name].files
        faults += [f"{name} image {files.name(int(i))} was added" for i in np.flatnonzero(~there)]
    found = {
        name: split._replace(files=Recorded(split.files, path, sums[name], bad[name]))
        for name, split in splits.items()
    }
    return found, faults


def require_none(path: Path, faults: Sequence[str]) -> None:
    """Refuse images that differ from a manifest.

    Raises:
        DamagedError: If there are any faults; it lists the first.
    """
    if faults:
        more = [f"and {len(faults) - _LISTED:,} more"] if len(faults) > _LISTED else []
        head = f"{path}: images that are not what it says: {len(faults):,}"
        raise DamagedError(
            "\n  ".join([head, *faults[:_LISTED], *more]),
            hint=f"put them back as they were; or accept them: remove the manifest, and {_MAKE}",
        )


@contextmanager
def writing(
    path: Path, *, max_pixels: int, images: Mapping[str, int]
) -> Generator[Callable[[Row], None]]:
    """A function that adds a row to a manifest, which is at `path` when all are there.

    Raises:
        PreflightError: If it cannot be written.
    """
    digest = hashlib.sha256()
    with storage.writing(path) as file:

        def line(entry: BaseModel) -> None:
            text = entry.model_dump_json().encode() + b"\n"
            digest.update(text)
            file.write(text)

        line(_Head(format=_FORMAT, max_pixels=max_pixels, images=dict(images)))  # type: ignore[arg-type]
        yield line
        file.write(b'{"sha256":"%s"}\n' % digest.hexdigest().encode())


def rows(path: Path, *, max_pixels: int) -> Iterator[Row]:
    """What a manifest says, image by image; it is sound when the last was asked for.

    Raises:
        PreflightError: If there is none, or it cannot be read.
        DamagedError: If it is altered or cut short.
        IdentityError: If a newer version wrote it, or it was made with another `max_pixels`.
    """
    try:
        with path.open("rb") as file:
            yield from _rows(path, file, max_pixels)
    except OSError as error:
        if isinstance(error, PreflightError):
            raise
        raise PreflightError(
            f"{path}: {error.strerror}", hint=f"see data.manifest in the recipe; {_MAKE}"
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        raise _damaged(path, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _rows(path: Path, file: BinaryIO, max_pixels: int) -> Iterator[Row]:
    if os.fstat(file.fileno()).st_size > _MOST_BYTES:
        raise _damaged(path, f"more than {_MOST_BYTES:,} bytes")
    digest = hashlib.sha256()

    def line() -> bytes:
        text = file.readline(_MOST_LINE)
        digest.update(text)
        if not text.endswith(b"\n"):
            raise _damaged(path, "cut short, or a line without an end")
        return text

    first = line()
    version = re.match(rb'{"format":(\d{1,9})\b', first)
    require_known(int(version[1]) if version else None, _FORMAT, str(path))
    head = _Head.model_validate_json(first)
    if head.max_pixels != max_pixels:
        raise IdentityError(
            f"{path}: made with data.max_pixels {head.max_pixels:,}, the recipe has "
            f"{max_pixels:,}: other images count as bad",
            hint=f"remove the manifest, and {_MAKE}",
        )
    for _ in range(sum(head.images.values())):
        yield Row.model_validate_json(line())
    end = b'{"sha256":"%s"}\n' % digest.hexdigest().encode()
    if file.read(len(end) + 1) != end:
        raise _damaged(path, "its lines are not those that were written")


def _damaged(path: Path, what: str) -> DamagedError:
    return DamagedError(f"{path}: {what}", hint=f"remove the manifest, and {_MAKE}")


def written(name: str) -> str:
    """A name as a manifest has it, which is UTF-8."""
    return name.encode(errors="backslashreplace").decode()


def label_of(split: Split, number: int, classes: Sequence[str]) -> str | None:
    """The name of an image's class; None where it is not known."""
    label = int(split.labels[number])
    return None if label < 0 else classes[label]
