"""Where everything lies in a cache, what each file holds, and what the whole was made from.

manifest.json                         what it was made from; the same bytes from every writer
samples.safetensors                   which sample each row is
canaries.safetensors                  some views, by the checksum of their pixels, and answers
views/v0000/u00000.safetensors        a unit: a block of rows of one view
test/u00000.safetensors               the test split as it is evaluated; likewise val/
index.json                            written last: the cache is complete
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from annotated_types import Ge
from pydantic import BaseModel, ConfigDict, model_validator

from distill import jsonio
from distill.component import Count
from distill.errors import DamagedError, IdentityError
from distill.identity import require_known

MANIFEST, INDEX = "manifest.json", "index.json"
SAMPLES, CANARIES = "samples.safetensors", "canaries.safetensors"

FORMAT = 1
MOST_INT8 = 4096  # classes up to which a byte a class is the default
MOST_ROWS = 65_536
MOST_UNITS = 1_000_000  # of a cache: 300 views of 100 million images are half as many
UNIT_BYTES = 16_384_000  # object stores and parallel file systems like files of this size
_MULTIPLE = 256  # rows

_Model = TypeVar("_Model", bound=BaseModel)

# Bytes of a number by the name that safetensors gives its type.
_WIDTH = {"U8": 1, "U16": 2, "F16": 2, "F32": 4, "I64": 8, "U32": 4}


class Column(NamedTuple):
    """What is kept of every row under one name."""

    name: str
    dtype: Literal["U8", "U16", "F16", "F32", "I64", "U32"]
    shape: tuple[int, ...]  # of a row

    @property
    def width(self) -> int:
        """Bytes of a number."""
        return _WIDTH[self.dtype]

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.width * math.prod(self.shape)


class Unit(NamedTuple):
    """A file of rows, made at once or not at all."""

    part: str  # "views/v0007", "test" or "val"
    block: int
    start: int  # first row
    rows: int

    @property
    def name(self) -> str:
        """The file, relative to the cache."""
        return f"{self.part}/u{self.block:05d}.safetensors"


class Manifest(BaseModel):
    """What a cache was made from, and how it is cut into files."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    identity: dict[str, Any]  # all that decides what is in it
    about: dict[str, Any]  # the teacher's name, parameters and FLOPs
    num_classes: Count
    views: Count  # of every training image; more can be added later
    samples: Count  # training images, the rows of a view
    samples_sha256: str  # of their file
    test: Annotated[int, Ge(0)]  # images of the test split
    val: Annotated[int, Ge(0)]  # images held out from training
    unit_rows: Count
    columns: tuple[Column, ...]  # of a view
    eval_rows: Count
    eval_columns: tuple[Column, ...]

    @model_validator(mode="after")
    def _of_a_size_that_is(self) -> Manifest:
        rows = self.views * -(-self.samples // self.unit_rows)
        rows += -(-(self.test + self.val) // self.eval_rows)
        sizes = [size for c in (*self.columns, *self.eval_columns) for size in c.shape]
        if rows > MOST_UNITS or not self.columns or any(size < 0 for size in sizes):
            raise ValueError(f"{rows:,} units")
        if not isinstance(self.identity.get("codec"), str):
            raise ValueError("no codec")
        return self

    @property
    def id(self) -> str:
        """SHA-256 of the identity, as 64 hex digits."""
        return hashlib.sha256(_canonical(self.identity)).hexdigest()

    @property
    def codec(self) -> str:
        """How the logits of the views are kept."""
        return str(self.identity["codec"])

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of a view."""
        return sum(column.row_bytes for column in self.columns)

    def lists(self, samples: bytes | None) -> bool:
        """Whether this is the file of samples that the cache was begun with."""
        return samples is not None and hashlib.sha256(samples).hexdigest() == self.samples_sha256

    def columns_of(self, unit: Unit) -> tuple[Column, ...]:
        """What a unit holds."""
        return self.columns if unit.part.startswith("views/") else self.eval_columns

    def units(self, views: int | None = None) -> list[Unit]:
        """All units: those of evaluation, then view by view, of the first `views` views."""
        found = [*_blocks("test", self.test, self.eval_rows)]
        found += _blocks("val", self.val, self.eval_rows)
        for view in range(self.views if views is None else views):
            found += self.units_of(view)
        return found

    def units_of(self, view: int) -> list[Unit]:
        """The units of one view."""
        return [*_blocks(view_part(view), self.samples, self.unit_rows)]

    def size_of(self, unit: Unit) -> int:
        """Bytes of a unit's file."""
        blank = dict.fromkeys((column.name for column in self.columns_of(unit)), 0)
        rows = sum(column.row_bytes for column in self.columns_of(unit)) * unit.rows
        return len(self.header(unit, blank)) + rows

    def header(self, unit: Unit, checksums: Mapping[str, int]) -> bytes:
        """How a unit's safetensors file begins; it follows from the content's checksums alone.

        Args:
            unit: The unit.
            checksums: CRC-32 of every column's bytes.
        """
        about = {
            "cache": self.id,
            "unit": unit.name,
            "crc32": {name: f"{value:08x}" for name, value in checksums.items()},
        }
        tensors: dict[str, Any] = {}
        offset = 0
        for column in self.columns_of(unit):
            end = offset + column.row_bytes * unit.rows
            shape = [unit.rows, *column.shape]
            tensors[column.name] = {
                "dtype": column.dtype,
                "shape": shape,
                "data_offsets": [offset, end],
            }
            offset = end
        metadata = {"distill": json.dumps(about, sort_keys=True)}
        text = json.dumps({"__metadata__": metadata, **tensors}).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def checksums(self, unit: Unit, head: bytes) -> dict[str, int]:
        """The checksums that the first bytes of a unit's file state.

        Raises:
            DamagedError: If the file is not this unit of this cache, to the byte.
        """
        try:
            length = int.from_bytes(head[:8], "little")
            about = jsonio.load(jsonio.load(head[8 : 8 + length])["__metadata__"]["distill"])
            found = {name: int(value, 16) for name, value in about["crc32"].items()}
            sound = found.keys() == {column.name for column in self.columns_of(unit)}
            sound &= all(0 <= value < 2**32 for value in found.values())
            if about["cache"] != self.id:
                what = "belongs to another cache"
            elif sound and self.header(unit, found) == head[: 8 + length]:
                return found
            else:
                what = "is altered"
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            what = "is no header of a unit"
        raise DamagedError(f"{unit.name}: its header {what}")


class Index(BaseModel):
    """What a complete cache consists of."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    cache: str  # the manifest's id
    views: Count
    files: dict[str, str]  # CRC-32 of all but the units, as 8 hex digits
    units: dict[str, dict[str, str]]  # and of every column of every unit
    scores: dict[str, dict[str, float]]  # the teacher's on the test and validation split


def columns(codec: str, num_classes: int) -> tuple[Column, ...]:
    """What a codec keeps of each row of logits.

    `int8` is a byte a class and the row's own scale; `fp16` two bytes a class; `topk:K` keeps
    the K greatest. Sizes for 1,000 classes: 1,004, 2,004 and 4 K + 4 bytes. Wide numbers come
    first, so that all are aligned.
    """
    if codec == "int8":
        row = (num_classes,)
        return Column("scale", "F16", ()), Column("top", "F16", ()), Column("q", "U8", row)
    if codec == "fp16":
        return Column("lse", "F32", ()), Column("logp", "F16", (num_classes,))
    kept = (min(num_kept(codec), num_classes),)
    number: Literal["U16", "U32"] = "U16" if num_classes <= 2**16 else "U32"
    return Column("lse", "F32", ()), Column("ids", number, kept), Column("logp", "F16", kept)


def num_kept(codec: str) -> int:
    """K of `topk:K`."""
    return int(codec.partition(":")[2])


def resolve(codec: str, num_classes: int) -> str:
    """The codec that `auto` means for this many classes."""
    if codec != "auto":
        return codec
    return "int8" if num_classes <= MOST_INT8 else "topk:100"


def rows_for(row_bytes: int, most: int = MOST_ROWS) -> int:
    """Rows of a unit of about 16 MB, a multiple of 256 between 256 and 65,536, or `most`."""
    rows = min(UNIT_BYTES // row_bytes, most, MOST_ROWS) // _MULTIPLE * _MULTIPLE
    return max(rows, _MULTIPLE)


def view_part(view: int) -> str:
    """The folder of a view's units."""
    return f"views/v{view:04d}"


def checksum(data: bytes | memoryview) -> int:
    """CRC-32."""
    return zlib.crc32(data)


def seal(model: BaseModel) -> bytes:
    """The model as JSON that vouches for its own bytes."""
    data = model.model_dump(mode="json")
    return _canonical({**data, "crc32": f"{checksum(_canonical(data)):08x}"})


def manifest(data: bytes, origin: str) -> Manifest:
    """The manifest that `seal` wrote.

    Raises:
        DamagedError: If one byte of it is another.
        IdentityError: If a newer version wrote it.
    """
    return _unseal(Manifest, data, f"{origin}/{MANIFEST}")


def index(data: bytes, origin: str) -> Index:
    """The index that `seal` wrote.

    Raises:
        DamagedError: If one byte of it is another.
        IdentityError: If a newer version wrote it.
    """
    return _unseal(Index, data, f"{origin}/{INDEX}")


def _unseal(model: type[_Model], data: bytes, origin: str) -> _Model:
    try:
        found = jsonio.mapping(data)
        if _canonical(found) != data:
            raise ValueError("altered")
        stated = found.pop("crc32")
        if stated != f"{checksum(_canonical(found)):08x}":
            raise ValueError("altered")
        require_known(found["format"], FORMAT, origin)
        return model.model_validate(found)
    except IdentityError:
        raise
    # pydantic's errors are ValueErrors: a sealed file in the place of another.
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DamagedError(
            f"{origin}: its content changed after it was written",
            hint="make the cache again in another folder, or copy it again",
        ) from None


def _canonical(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, sort_keys=True, indent=1) + "\n").encode()


def _blocks(part: str, samples: int, rows: int) -> Iterator[Unit]:
    for block, start in enumerate(range(0, samples, rows)):
        yield Unit(part, block, start, min(rows, samples - start))
