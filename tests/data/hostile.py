"""Image files that were made to do harm, or that chance made so."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence

import numpy as np
from pictures import encoded, photo
from PIL import Image

PHOTO = photo(60, 30)
JPEG = encoded(PHOTO, "JPEG")
MEGABYTE = 10**6


def png(
    width: int,
    height: int,
    *,
    depth: int = 8,
    colour: int = 0,
    raw: bytes | None = None,
    more: Sequence[tuple[bytes, bytes]] = (),
) -> bytes:
    """A PNG of given header, scan lines (each with its filter byte) and chunks before them."""

    def chunk(name: bytes, content: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + crc

    if raw is None:
        raw = bytes((1 + width) * height)
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = ((b"IHDR", header), *more, (b"IDAT", zlib.compress(raw)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def huge(width: int, height: int) -> bytes:
    """A true black and white PNG of that size; black costs nothing."""
    raw = (b"\0" + bytes(-(-width // 8))) * height
    return png(width, height, depth=1, raw=raw)


def tiff(*tags: tuple[int, int, int], end: int, data: bytes) -> bytes:
    """A TIFF of these tags (number, count, value or place), then where the next ones lie."""
    entries = [struct.pack("<HHII", tag, 4, count, value) for tag, count, value in tags]
    head = b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries))
    return head + b"".join(entries) + struct.pack("<I", end) + data


def gray_tiff(*tags: tuple[int, int, int], end: int = 0, data: bytes = bytes(64)) -> bytes:
    """A gray TIFF of 8 x 8 pixels, one strip of which lies behind its tags."""
    basic = {256: 8, 257: 8, 258: 8, 259: 1, 262: 1, 273: 0, 277: 1, 278: 8, 279: len(data)}
    given = {tag: (count, value) for tag, count, value in tags}
    every = {tag: (1, value) for tag, value in basic.items()} | given
    if 322 in given:
        del every[273], every[278], every[279]
    start = 8 + 2 + 12 * len(every) + 4
    for tag in (273, 324):
        if tag in every:
            every[tag] = (1, start)
    return tiff(*((tag, *every[tag]) for tag in sorted(every)), end=end, data=data)


def overlapping(count: int, size: int) -> bytes:
    """EXIF of so many tags, each of which claims the same bytes for its own."""
    entries = [struct.pack("<HHII", 1000 + i, 7, size, 8) for i in range(count)]
    head = b"II*\0\x08\0\0\0" + struct.pack("<H", count)
    return (head + b"".join(entries) + bytes(4)).ljust(size + 8, b"\0")


def with_exif(exif: bytes) -> bytes:
    """A JPEG with EXIF in as many segments as it takes."""
    segments = []
    for start in range(0, len(exif), 65_000):
        part = b"Exif\0\0" + exif[start : start + 65_000]
        segments.append(b"\xff\xe1" + struct.pack(">H", len(part) + 2) + part)
    return JPEG[:2] + b"".join(segments) + JPEG[2:]


def of_size(width: int, height: int) -> bytes:
    """A JPEG whose header says that size, and which has the pixels of 60 x 30."""
    frame = JPEG.index(b"\xff\xc0")
    return JPEG[: frame + 5] + struct.pack(">HH", height, width) + JPEG[frame + 9 :]


def of_scans(side: int, scans: int) -> bytes:
    """A progressive JPEG of that many scans over nothing."""
    content = encoded(Image.new("L", (16, 16)), "JPEG", progressive=True)
    frame = content.index(b"\xff\xc2")
    content = content[: frame + 5] + struct.pack(">HH", side, side) + content[frame + 9 :]
    last = content[content.rindex(b"\xff\xda") : -2]
    return content[:-2] + last * scans + content[-2:]


def patched(content: bytes, at: int, value: bytes) -> bytes:
    """The content with other bytes at a place."""
    return content[:at] + value + content[at + len(value) :]


def _tile() -> bytes:
    """A TIFF of 8 x 8 pixels, whose only tile has 81 million."""
    data = zlib.compress(bytes(9000 * 9000), 9)
    tags = ((259, 1, 8), (322, 1, 9000), (323, 1, 9000), (324, 1, 0), (325, 1, len(data)))
    return gray_tiff(*tags, data=data)


_FRAME = struct.pack("<HHHH", 0, 0, 65_535, 65_535)
_WEBP = encoded(PHOTO, "WEBP", save_all=True, append_images=[photo(60, 30, 3)])
_BOMB = zlib.compress(bytes(30 * MEGABYTE), 9)
_CARD = b"SIMPLE  =                    T".ljust(80) + b"NAXIS   =                    0".ljust(80)

# Other formats that Pillow would open, whatever the name of the file says.
OTHERS: dict[str, bytes] = {
    "icon.png": encoded(PHOTO, "ICO"),
    "targa.png": encoded(PHOTO, "TGA"),
    "paintbrush.jpg": encoded(PHOTO, "PCX"),
    "silicon graphics.png": encoded(PHOTO, "SGI"),
    "direct draw.png": encoded(PHOTO, "DDS"),
    "jpeg 2000.jpg": encoded(PHOTO, "JPEG2000"),
    "bitmap.png": encoded(PHOTO.convert("1"), "XBM"),
    "photoshop.jpg": b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 8, 8, 8, 3) + bytes(300),
    "fits.png": (_CARD + b"END".ljust(80)).ljust(2880) + bytes(2880),
    "document.jpg": encoded(PHOTO, "PDF"),
    "drawing.png": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc"/></svg>',
    "program.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "program of a preview.jpg": b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 32, 50) + bytes(90),
}

# What the message says of each.
BOMBS: dict[str, tuple[bytes, str]] = {
    "colour profile.png": (png(8, 8, more=[(b"iCCP", b"x\0\0" + _BOMB)]), "Decompressed"),
    "text.png": (png(8, 8, more=[(b"zTXt", b"x\0\0" + _BOMB)]), "Decompressed"),
    "international text.png": (
        png(8, 8, more=[(b"iTXt", b"x\0\1\0\0\0" + _BOMB)]), "Decompressed"),
    "texts.png": (
        png(8, 8, more=[
            (b"zTXt", b"%d\0\0" % i + zlib.compress(bytes(MEGABYTE))) for i in range(100)]),
        "Too much memory"),
    "tile.tiff": (_tile(), "9,000 x 9,000 pixels"),
    "scans.jpg": (of_scans(8000, 2000), "so many scans"),
    "64k.jpg": (of_size(65_535, 65_535), "pixels"),
    "no height.jpg": (of_size(60, 0), "no image"),
    "no width.png": (png(0, 8, raw=b""), "no image"),
    "2147483656 wide.png": (png(2**31 + 8, 8, raw=b""), "pixels"),
    "negative width.bmp": (
        patched(encoded(PHOTO, "BMP"), 18, struct.pack("<i", -60)), "pixels"),
    "least height.bmp": (
        patched(encoded(PHOTO, "BMP"), 22, struct.pack("<i", -(2**31))), "pixels"),
    "frame.gif": (
        b"GIF89a\x08\0\x08\0\0\0\0," + _FRAME + b"\0\x08\x02\x4c\x01\0;", "pixels"),
    "canvas.webp": (patched(_WEBP, _WEBP.index(b"VP8X") + 12, b"\xff\x3f\0\xff\x3f\0"), "pixels"),
    "header.pgm": (b"P5 65535 65535 255\n", "pixels"),
    "no pixels.pgm": (b"P2 7000 7000 255\n1 2 3", "not enough"),
    "number.pgm": (b"P2 " + b"9" * 100_000 + b" 1 255\n", "too long"),
    "range.pgm": (b"P5 8 8 99999999\n" + bytes(200), "maxval"),
    "negative.pgm": (b"P5 -5 5 255\n" + bytes(99), "no image"),
}  # fmt: skip

BLACK = np.zeros((8, 8, 3), np.uint8)

# Of these the pixels are sound.
HARMLESS: dict[str, tuple[bytes, np.ndarray]] = {
    "directories in a circle.tiff": (gray_tiff(end=8), BLACK),
    "tags of the same bytes.tiff": (
        gray_tiff(*((2000 + i, 250_000, 8) for i in range(2000)), data=bytes(MEGABYTE)), BLACK),
    "a strip too long.tiff": (
        gray_tiff((259, 1, 8), (278, 1, 2**31 - 1), data=zlib.compress(bytes(MEGABYTE))), BLACK),
    "exif of the same bytes.png": (
        png(8, 8, more=[(b"eXIf", overlapping(20_000, MEGABYTE))]), BLACK),
    "exif of the same bytes.webp": (
        encoded(PHOTO, "WEBP", lossless=True, exif=b"Exif\0\0" + overlapping(9000, 200_000)),
        np.asarray(PHOTO)),
    "exif of the same bytes.jpg": (
        with_exif(overlapping(20_000, MEGABYTE)), np.asarray(Image.open(io.BytesIO(JPEG)))),
    "many chunks.png": (png(8, 8, more=[(b"teSt", b"")] * 50_000), BLACK),
    "claims frames.png": (
        png(8, 8, more=[(b"acTL", struct.pack(">II", 2**31 - 1, 0))]), BLACK),
    "negative height.bmp": (
        patched(encoded(Image.new("RGB", (60, 30)), "BMP"), 22, struct.pack("<i", -30)),
        np.asarray(Image.new("RGB", (60, 30)))),
}  # fmt: skip
