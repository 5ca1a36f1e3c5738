"""Image files as upright RGB pixels, whatever was stored; a damaged file is an error by name."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import TILELENGTH, TILEWIDTH, TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from distill.data import jpeg
from distill.data.jpeg import Box
from distill.errors import PreflightError

# How a file becomes pixels. What was computed from them belongs to one version: raise it with any
# change of decoder, colours, orientation or resizing.
VERSION = 1

# What a file may hold, whatever its name. Pillow knows more, one of which (EPS) starts a program.
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", TiffImageFile.format, WebPImageFile.format)

_ADVICE = (
    "mend or remove it; `distill check RECIPE --data --manifest FILE` finds all such files, and "
    "with `data.manifest: FILE` and `data.on_bad_image: skip` training goes without them"
)
MOST_BYTES = 2**30  # of a file; one with more is refused before it is read into memory

# Pillow warns of odd EXIF without the file's name; a file is used or refused, whoever asks Python
# to take warnings for errors.
warnings.filterwarnings("ignore", module=r"PIL\.")


class BadImageError(PreflightError):
    """The file can be read, but it holds no image that can be used."""

    def __init__(self, message: str, *, hint: str = _ADVICE) -> None:
        super().__init__(message, hint=hint)


class About(NamedTuple):
    """What an image is stored as."""

    width: int  # pixels, as stored
    height: int
    format: str  # as Pillow names it, such as JPEG
    mode: str  # likewise, such as RGB or CMYK
    animated: bool  # or of several pages


def decode(source: Path | bytes, *, max_pixels: int, name: str = "") -> Image.Image:
    """The image in a file as upright RGB with 8 bits a channel.

    EXIF orientation is applied, transparency lies on white, an animation gives its first frame,
    16-bit gray is divided by 257. The format is told from the content, not from the name.

    Args:
        source: A JPEG, PNG, WebP, BMP, GIF, TIFF or PNM file, or the bytes of one.
        max_pixels: An image of more pixels is refused by its header, before it is decoded.
        name: What errors call it, where it is bytes.

    Raises:
        BadImageError: If it is no image, cut short, damaged, too large, or has no known range.
        PreflightError: If the file cannot be read.
    """
    data = stored(source)
    with _opened(data or source, max_pixels, _called(source, name)) as image:
        return _whole(image, data)


def inspect(source: Path | bytes, *, max_pixels: int, name: str) -> tuple[About, Image.Image]:
    """What an image is stored as, and what `decode` gives; raises as that does."""
    data = stored(source)
    with _opened(data or source, max_pixels, _called(source, name)) as image:
        width, height, mode = *image.size, image.mode
        pixels = _whole(image, data)
        animated = bool(getattr(image, "is_animated", False))
        return About(width, height, str(image.format), mode, animated), pixels


def part(
    source: Path | bytes,
    choose: Callable[[int, int], Box],
    *,
    max_pixels: int,
    name: str = "",
) -> UInt8[np.ndarray, "h w 3"]:
    """A box of the image that `decode` gives; no more is decoded than is needed.

    Args:
        source: As `decode` takes it.
        choose: Called with the image's width and height.
        max_pixels: As `decode` takes it.
        name: What errors call it, where it is bytes.

    Raises:
        BadImageError: As `decode` does, but for damage outside of the box, which may go unseen.
        PreflightError: If the file cannot be read.
    """
    data = stored(source)
    header = jpeg.parse(data)
    if header and header.width * header.height <= max_pixels:
        found = jpeg.pixels(header, choose(header.width, header.height))
        if found is not None:
            return found
    whole = decode(data or source, max_pixels=max_pixels, name=_called(source, name))
    return cropped(whole, choose)


def stored(source: Path | bytes) -> bytes:
    """The bytes of an image; none where they cannot be read, and `decode` says what is wrong."""
    if isinstance(source, bytes):
        return source
    with suppress(OSError):
        return source.read_bytes() if source.is_file() and not _is_too_long(source) else b""
    return b""


def cropped(image: Image.Image, choose: Callable[[int, int], Box]) -> UInt8[np.ndarray, "h w 3"]:
    """A box of an image, chosen from its width and height."""
    return np.array(image.crop(choose(*image.size)))


def check_header(source: Path | bytes, *, max_pixels: int, name: str = "") -> tuple[int, int]:
    """Width and height as stored; raises as `decode` would, as far as the first bytes tell."""
    with _opened(source, max_pixels, name) as image:
        return image.size


def evaluation_view(
    image: Image.Image, *, size: int, crop: float
) -> UInt8[np.ndarray, "size size *C"]:
    """The centre of an image: its shorter side scaled to round(size / crop), then size x size cut.

    Bilinear with antialias. Only what is kept is computed, so that a long strip costs no more
    than a square.

    Args:
        image: RGB or gray.
        size: Pixels of the result's sides.
        crop: Part of the shorter side that is kept, in (0, 1].
    """
    shorter, target = min(image.size), round(size / crop)
    spans = []
    for length in image.size:
        scaled = target * length // shorter
        start = round((scaled - size) / 2)
        spans.append((start * length / scaled, min((start + size) * length / scaled, length)))
    (left, right), (top, bottom) = spans
    box = (left, top, right, bottom)
    return np.array(image.resize((size, size), Image.Resampling.BILINEAR, box))


@contextmanager
def _opened(source: Path | bytes, max_pixels: int, name: str) -> Iterator[Image.Image]:
    """An image whose header was read; every way in which Pillow can fail becomes one error."""
    path = _called(source, name)
    try:
        if isinstance(source, Path) and not source.is_file():  # a pipe would wait for a writer
            raise BadImageError(f"{path}: not a file")
        if _is_too_long(source):
            raise BadImageError(f"{path}: more than {MOST_BYTES:,} bytes, which no photograph has")
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        with Image.open(file, formats=_FORMATS) as image:
            width, height = image.size
            if isinstance(image, TiffImageFile):  # a tile is decoded whole, however large it is
                width = max(width, image.tag_v2.get(TILEWIDTH, 0))
                height = max(height, image.tag_v2.get(TILELENGTH, 0))
            if width * height > max_pixels:
                raise BadImageError(
                    f"{path}: {width:,} x {height:,} pixels, data.max_pixels allows {max_pixels:,}"
                )
            yield image
    except (PreflightError, MemoryError):
        raise
    except UnidentifiedImageError:
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        what = "no image" if size else "empty"
        raise BadImageError(f"{path}: {what}") from None
    except OSError as error:
        if error.errno is not None:  # the disk or the network failed, not the image
            raise PreflightError(f"{path}: {error.strerror}") from None
        raise BadImageError(f"{path}: {error}") from None
    # Decoders meet damaged bytes with nearly every exception there is, and a huge image with a
    # warning where warnings are errors.
    except Exception as error:
        raise BadImageError(f"{path}: {error or type(error).__name__}") from None


def _is_too_long(source: Path | bytes) -> bool:
    """Whether it is no photograph, by its length alone."""
    length = len(source) if isinstance(source, bytes) else source.stat().st_size
    return length > MOST_BYTES


def _called(source: Path | bytes, name: str) -> str:
    """What errors call the file."""
    return name if isinstance(source, bytes) else str(source)


def _whole(image: Image.Image, data: bytes) -> Image.Image:
    """An opened image, decoded, upright and RGB; `data` is its file."""
    if image.format in ("JPEG", "MPO") and jpeg.has_many_scans(data):
        raise ValueError("a JPEG of so many scans would take minutes to decode")
    image.load()
    with suppress(Exception):  # the pixels are sound; EXIF that cannot be read turns nothing
        ImageOps.exif_transpose(image, in_place=True)
    return _rgb(image)


def _rgb(image: Image.Image) -> Image.Image:
    mode = image.mode
    if mode.startswith("I;16") or (mode == "I" and image.format == "PPM"):
        values = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if mode in ("I", "F"):
        kind = "32-bit integer" if mode == "I" else "float"
        raise ValueError(f"{kind} pixels of unknown range: save it with 8 or 16 bits a channel")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image if mode == "RGB" else image.convert("RGB")
