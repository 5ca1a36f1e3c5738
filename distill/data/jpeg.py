"""Parts of JPEG files, of which no more is decoded than is needed.

Whatever decodes them, pixels are Pillow's: simplejpeg is the same libjpeg-turbo, with the same
exact transform and smooth upsampling.
"""

from __future__ import annotations

import importlib
import io
from collections.abc import Iterator
from contextlib import suppress
from types import ModuleType
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from PIL.ExifTags import Base

turbo: ModuleType | None
try:
    turbo = importlib.import_module("simplejpeg")
except ImportError:  # it is an extra
    turbo = None

# Markers: the second byte of each, after 0xFF.
_BASELINE, _EXTENDED, _PROGRESSIVE = 0xC0, 0xC1, 0xC2
_SCAN, _INTERVAL, _CAMERA = 0xDA, 0xDD, 0xE1
_SKIPPED = {0xC4, 0xDB, 0xFE, *range(0xE0, 0xF0)}  # tables, a comment, what programs add
_END = b"\xff\xd9"
_ADOBE = b"\xff\xee\x00\x0eAdobe"  # 15 bytes after its first one stands 0 for RGB
_MOST_SCANS = 1000  # of a JPEG; encoders write some 10


class Box(NamedTuple):
    """A part of an image, in pixels; right and bottom lie outside of it."""

    left: int
    top: int
    right: int
    bottom: int

    def moved(self, across: int, down: int) -> Box:
        """The same part where the image begins elsewhere."""
        left, top, right, bottom = self
        return Box(left + across, top + down, right + across, bottom + down)


class Jpeg(NamedTuple):
    """A JPEG file whose pixels need no turning.

    Attributes:
        frame: Where in `data` the marker of the frame's header lies.
        scan: Where the first coded tile lies.
        tile: Width and height in pixels of what can be decoded by itself; None: only the whole.
    """

    data: bytes
    width: int
    height: int
    frame: int
    scan: int
    tile: tuple[int, int] | None


def encode(image: Image.Image, *, quality: int) -> bytes:
    """A JPEG file of tiles, of which `pixels` decodes those alone that a box touches."""
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality, restart_marker_blocks=1)
    return stream.getvalue()


def parse(data: bytes) -> Jpeg | None:
    """What the header says; None if this is no JPEG, or something in it is unusual."""
    if has_many_scans(data):
        return None
    frame, interval = 0, 0
    for code, at, length in _segments(data):
        if code in (_BASELINE, _EXTENDED, _PROGRESSIVE):
            frame = at
        elif code == _INTERVAL:
            interval = _number(data, at + 4)
        elif code == _SCAN and frame:
            return _told(data, frame, at, interval)
        elif code == _CAMERA:
            if not _is_upright(data[at + 4 : at + 2 + length]):
                return None
        elif code not in _SKIPPED:
            return None
    return None


def has_many_scans(data: bytes) -> bool:
    """Whether a JPEG was made to be slow.

    Each scan goes through all pixels, were it empty, so that 20 KB can hold minutes.
    """
    frame = 0
    for code, at, _ in _segments(data):
        if code in (_BASELINE, _EXTENDED):
            frame = at
        elif code == _SCAN and frame and data[at + 4] == data[frame + 9]:
            return False  # one scan has all colours, and nothing after it is looked at
    return data.count(bytes((0xFF, _SCAN))) > _MOST_SCANS


def is_common(jpeg: Jpeg) -> bool:
    """Whether any decoder takes it alike: it has an end, and the usual kind of colours."""
    data, frame, scan = jpeg.data, jpeg.frame, jpeg.scan
    adobe = data.find(_ADOBE, 0, scan)
    as_rgb = data[frame + 10 : frame + 17 : 3] == b"RGB"
    return not as_rgb and (adobe < 0 or data[adobe + 15] != 0) and data.rfind(_END) >= scan


def decode(data: bytes) -> UInt8[np.ndarray, "H W 3"] | None:
    """All pixels of a file, straight into an array; None if the extra is not here or has a doubt.

    What it gives is bit by bit what Pillow gives.
    """
    if turbo is None:
        return None
    try:
        pixels: np.ndarray = turbo.decode_jpeg(data, "RGB")
    except ValueError:  # of a warning too: Pillow knows what to say of it
        return None
    return pixels


def pixels(jpeg: Jpeg, box: Box) -> UInt8[np.ndarray, "h w 3"] | None:
    """The pixels of a box; None if there is a doubt about the file."""
    data, left, top = window(jpeg, box) or (jpeg.data, 0, 0)
    found = decode(data)
    if found is None and data is not jpeg.data:
        with suppress(Exception), Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            found = np.array(image.convert("RGB"))
    if found is None:
        return None
    return found[box.top - top : box.bottom - top, box.left - left : box.right - left]


def window(jpeg: Jpeg, box: Box) -> tuple[bytes, int, int] | None:
    """A JPEG of those tiles alone that a box touches, and its left and top in the whole.

    Restart markers part the tiles, so each is decoded without those before it. Inside the box
    pixels are those of the whole.

    Returns:
        None if there are no tiles, or the markers are not where they should be.
    """
    if jpeg.tile is None:
        return None
    data, frame, scan = jpeg.data, jpeg.frame, jpeg.scan
    width, height = jpeg.tile
    across, down = -(-jpeg.width // width), -(-jpeg.height // height)
    coded = np.frombuffer(data, np.uint8)
    marks = np.flatnonzero(coded[scan:-1] == 0xFF) + scan
    marks = marks[coded[marks + 1] & 0xF8 == 0xD0]
    if len(marks) != across * down - 1 or not data.endswith(_END):
        return None
    starts = np.concatenate(([scan], marks + 2, [len(data)]))
    # The colours of a pixel lean on those beside it.
    columns = slice(max(box.left - 1, 0) // width, -(-min(box.right + 1, jpeg.width) // width))
    rows = slice(max(box.top - 1, 0) // height, -(-min(box.bottom + 1, jpeg.height) // height))
    left, top = columns.start * width, rows.start * height
    first = starts[:-1].reshape(down, across)[rows, columns.start].tolist()
    last = starts[1:].reshape(down, across)[rows, columns.stop - 1].tolist()
    high = min(rows.stop * height, jpeg.height) - top
    wide = min(columns.stop * width, jpeg.width) - left
    parts = [data[: frame + 5], high.to_bytes(2), wide.to_bytes(2), data[frame + 9 : scan]]
    parts += [data[start:end] for start, end in zip(first, last, strict=True)]
    found = bytearray().join(parts)
    lengths = np.diff(starts).reshape(down, across)[rows, columns].ravel()
    numbers = scan + np.cumsum(lengths)[:-1] - 1
    np.frombuffer(found, np.uint8)[numbers] = 0xD0 + np.arange(len(numbers)) % 8
    found[-2:] = _END
    return bytes(found), left, top


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, place and length of what comes before the first coded pixels, which is the last."""
    at, code = 2, 0
    while data[:2] == b"\xff\xd8" and at + 12 <= len(data) and data[at] == 0xFF and code != _SCAN:
        code, length = data[at + 1], _number(data, at + 2)
        yield code, at, length
        at += 2 + length


def _told(data: bytes, frame: int, scan: int, interval: int) -> Jpeg | None:
    """What the header of the frame says, where the scan that follows begins at `scan`."""
    height, width, channels = _number(data, frame + 5), _number(data, frame + 7), data[frame + 9]
    if data[frame + 4] != 8 or channels not in (1, 3) or not height or not width:
        return None
    # Blocks of 8 x 8 in a unit of code; those of a single channel are coded one by one.
    factors = data[frame + 11 : frame + 11 + 3 * channels : 3] if channels == 3 else b"\x11"
    across, down = max(each >> 4 for each in factors), max(each & 15 for each in factors)
    tile = None
    one_scan = data[frame + 1] != _PROGRESSIVE and data[scan + 4] == channels
    if interval and one_scan and across and -(-width // (8 * across)) % interval == 0:
        tile = (8 * across * interval, 8 * down)
    return Jpeg(data, width, height, frame, scan + 2 + _number(data, scan + 2), tile)


def _is_upright(segment: bytes) -> bool:
    """Whether EXIF or XMP turns nothing, as far as that is certain."""
    if not segment.startswith(b"Exif\0\0"):
        return b"Orientation" not in segment
    exif = Image.Exif()
    with suppress(Exception):
        exif.load(segment)
        return bool(exif.get(Base.Orientation, 1) == 1)
    return False


def _number(data: bytes, at: int) -> int:
    return data[at] << 8 | data[at + 1]
