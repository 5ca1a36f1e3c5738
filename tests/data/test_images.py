"""Every image file is decoded as tabled, or refused by name."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hostile import huge, png
from pictures import encoded, photo
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

from distill.data.images import BadImageError, check_header, decode, evaluation_view
from distill.errors import PreflightError

MAX_PIXELS = 64_000_000


def pixels(path: Path) -> np.ndarray:
    image = decode(path, max_pixels=MAX_PIXELS)
    assert image.mode == "RGB"
    return np.asarray(image)


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


RGB = np.asarray(photo(60, 30))
GRAY = np.asarray(photo(60, 30).convert("L"))
RAMP = np.arange(0, 65536, 16, dtype=np.uint16).reshape(32, 128)
RAMP8 = np.round(RAMP / 257).astype(np.uint8)
FOUR = np.array([[0, 1, 2, 3]], dtype=np.uint8)


def three(gray: np.ndarray) -> np.ndarray:
    return np.repeat(gray[..., None], 3, axis=2)


def on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return np.round(colour * share + 255 * (1 - share))


def palette(colours: list[int], **options: object) -> bytes:
    image = Image.fromarray(FOUR, "L").copy()
    image = Image.frombytes("P", image.size, image.tobytes())
    image.putpalette(colours)
    return encoded(image, options.pop("kind", "PNG"), **options)


FOUR_COLOURS = [255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9]
ALPHA = np.linspace(0, 255, 1800).reshape(30, 60).astype(np.uint8)
RGBA = Image.fromarray(np.dstack([RGB, ALPHA]))
LA = Image.merge("LA", (Image.fromarray(GRAY), Image.fromarray(ALPHA)))
SECOND = photo(60, 30, seed=9)
DEEP_RGB = (RGB.astype(np.uint16) * 257).astype(">u2")

# name, content, expected pixels, largest difference allowed
DECODED: dict[str, tuple[bytes, np.ndarray, int]] = {
    "rgb.png": (encoded(photo(60, 30), "PNG"), RGB, 0),
    "rgb.bmp": (encoded(photo(60, 30), "BMP"), RGB, 0),
    "rgb.ppm": (encoded(photo(60, 30), "PPM"), RGB, 0),
    "rgb.tiff": (encoded(photo(60, 30), "TIFF"), RGB, 0),
    "lzw.tif": (encoded(photo(60, 30), "TIFF", compression="tiff_lzw"), RGB, 0),
    "lossless.webp": (encoded(photo(60, 30), "WEBP", lossless=True), RGB, 0),
    "lossy.webp": (encoded(photo(60, 30), "WEBP", quality=95), RGB, 24),
    "rgb.jpg": (encoded(photo(60, 30), "JPEG", quality=98, subsampling=0), RGB, 6),
    "progressive.jpg": (
        encoded(photo(60, 30), "JPEG", quality=98, subsampling=0, progressive=True), RGB, 6),
    "png named.jpg": (encoded(photo(60, 30), "PNG"), RGB, 0),
    "gray.png": (encoded(Image.fromarray(GRAY), "PNG"), three(GRAY), 0),
    "gray.jpg": (encoded(Image.fromarray(GRAY), "JPEG", quality=98), three(GRAY), 4),
    "bilevel.png": (
        encoded(Image.fromarray(GRAY > 128), "PNG"), three((GRAY > 128) * np.uint8(255)), 0),
    "cmyk.jpg": (
        encoded(Image.new("CMYK", (60, 30), (0, 255, 255, 0)), "JPEG", quality=98),
        np.full((30, 60, 3), (255, 0, 0)), 3),
    "palette.png": (palette(FOUR_COLOURS), np.reshape(FOUR_COLOURS, (1, 4, 3)), 0),
    "palette with a hole.png": (
        palette(FOUR_COLOURS, transparency=1),
        np.array([[[255, 0, 0], [255, 255, 255], [0, 0, 255], [9, 9, 9]]]), 0),
    "palette with alpha.png": (
        palette(FOUR_COLOURS, transparency=bytes((0, 255, 128, 255))),
        np.array([[[255, 255, 255], [0, 255, 0], [127, 127, 255], [9, 9, 9]]]), 1),
    "palette with a hole.gif": (
        palette(FOUR_COLOURS, kind="GIF", transparency=1),
        np.array([[[255, 0, 0], [255, 255, 255], [0, 0, 255], [9, 9, 9]]]), 0),
    "rgba.png": (encoded(RGBA, "PNG"), on_white(RGB, ALPHA), 1),
    "rgba.webp": (encoded(RGBA, "WEBP", lossless=True, exact=True), on_white(RGB, ALPHA), 1),
    "la.png": (encoded(LA, "PNG"), on_white(three(GRAY), ALPHA), 1),
    "gray with a key.png": (
        encoded(Image.fromarray(FOUR), "PNG", transparency=2),
        three(np.array([[0, 1, 255, 3]])), 0),
    "rgb with a key.png": (
        encoded(Image.new("RGB", (2, 1), (4, 5, 6)), "PNG", transparency=(4, 5, 6)),
        np.full((1, 2, 3), 255), 0),
    "16 bit.png": (encoded(Image.fromarray(RAMP), "PNG"), three(RAMP8), 0),
    "16 bit.tiff": (encoded(Image.fromarray(RAMP), "TIFF"), three(RAMP8), 0),
    "16 bit big-endian.tiff": (
        encoded(Image.frombytes("I;16B", (128, 32), RAMP.astype(">u2").tobytes()), "TIFF"),
        three(RAMP8), 0),
    "16 bit.pgm": (
        b"P5 128 32 65535\n" + RAMP.astype(">u2").tobytes(), three(RAMP8), 0),
    "16 bit rgb.png": (
        png(60, 30, depth=16, colour=2, raw=b"".join(b"\0" + row.tobytes() for row in DEEP_RGB)),
        RGB, 1),
    "animated.gif": (
        encoded(photo(60, 30), "GIF", save_all=True, append_images=[SECOND]),
        np.asarray(photo(60, 30).quantize(256).convert("RGB")), 40),
    "animated.webp": (
        encoded(photo(60, 30), "WEBP", save_all=True, append_images=[SECOND], lossless=True),
        RGB, 0),
    "animated.png": (
        encoded(photo(60, 30), "PNG", save_all=True, append_images=[SECOND]), RGB, 0),
    "pages.tiff": (encoded(photo(60, 30), "TIFF", save_all=True, append_images=[SECOND]), RGB, 0),
    "damaged exif.png": (encoded(photo(60, 30), "PNG", exif=b"Exif\0\0MM\0*\0\0"), RGB, 0),
    "1x1.png": (encoded(photo(1, 1), "PNG"), np.asarray(photo(1, 1)), 0),
    "5000x1.png": (encoded(photo(5000, 1), "PNG"), np.asarray(photo(5000, 1)), 0),
    "[red] \n\u00e9 e\u0301 '.png": (encoded(photo(60, 30), "PNG"), RGB, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", DECODED)
def test_decoded(tmp_path: Path, name: str) -> None:
    content, expected, tolerance = DECODED[name]
    path = written(tmp_path / name, content)
    check_header(path, max_pixels=MAX_PIXELS)
    found = pixels(path)
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).max() <= tolerance
    assert path.read_bytes() == content


# name, content, what the message says of it
REFUSED: dict[str, tuple[bytes, str]] = {
    "truncated.jpg": (encoded(photo(60, 30), "JPEG")[:-2], "truncated"),
    "half.jpg": (encoded(photo(60, 30), "JPEG")[:500], "[Tt]runcated"),
    "half.png": (encoded(photo(60, 30), "PNG")[:1000], "truncated"),
    "half.webp": (encoded(photo(60, 30), "WEBP")[:200], "decoder"),
    "half.gif": (encoded(photo(60, 30), "GIF")[:1000], "truncated"),
    "flipped.png": (  # the table of codes in the compressed stream
        bytes(b ^ (i == 300) for i, b in enumerate(encoded(photo(60, 30), "PNG"))), "stream"),
    "empty.jpg": (b"", "empty"),
    "text.jpg": (b"see the other folder\n", "no image"),
    "page.jpg": (b"<!DOCTYPE html><html><body>404</body></html>", "no image"),
    "AppleDouble.jpg": (b"\0\5\x16\7\0\2\0\0Mac OS X        " + bytes(50), "no image"),
    "program.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image"),
    "float.tiff": (
        encoded(Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)), "TIFF"),
        "float pixels"),
    "32 bit.tiff": (
        encoded(Image.fromarray(np.arange(64, dtype=np.int32).reshape(8, 8)), "TIFF"),
        "32-bit integer"),
    "70 megapixels.png": (huge(10_000, 7_000), "10,000 x 7,000 pixels"),
    "100 megapixels.png": (huge(10_000, 10_000), "pixels"),
    "196 megapixels.png": (huge(14_000, 14_000), "pixels"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path: Path, name: str) -> None:
    content, what = REFUSED[name]
    path = written(tmp_path / name, content)
    with pytest.raises(BadImageError, match=what) as error:
        decode(path, max_pixels=MAX_PIXELS)
    assert str(error.value).startswith(f"{path}: ")
    assert isinstance(error.value, PreflightError)
    assert path.read_bytes() == content


@pytest.mark.parametrize("name", ["70 megapixels.png", "100 megapixels.png", "196 megapixels.png"])
def test_too_large_is_told_from_the_header(tmp_path: Path, name: str) -> None:
    path = written(tmp_path / name, REFUSED[name][0][:60])  # no pixels follow
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as outside of these tests
        with pytest.raises(BadImageError, match="pixels"):
            decode(path, max_pixels=MAX_PIXELS)
        with pytest.raises(BadImageError, match="pixels"):
            check_header(path, max_pixels=MAX_PIXELS)


def test_max_pixels_is_a_limit_of_the_recipe(tmp_path: Path) -> None:
    path = written(tmp_path / "a.png", encoded(photo(60, 30), "PNG"))
    assert decode(path, max_pixels=1800).size == (60, 30)
    with pytest.raises(BadImageError, match=r"60 x 30 pixels.* allows 1,799"):
        decode(path, max_pixels=1799)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("PNG", {"compress_level": 0}),
        ("WEBP", {"lossless": True}),
        ("GIF", {}),
        ("BMP", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("PPM", {}),
    ],
)
def test_cut_short_anywhere(tmp_path: Path, kind: str, options: dict[str, object]) -> None:
    """A file without its end is refused, unless every pixel is there."""
    content = encoded(photo(23, 17), kind, **options)
    whole = pixels(written(tmp_path / "whole", content))
    path = tmp_path / "cut"
    refused = 0
    for length in range(0, len(content), 3):
        try:
            found = pixels(written(path, content[:length]))
        except BadImageError:
            refused += 1
        else:
            assert np.array_equal(found, whole), f"{length} of {len(content)} bytes"
    assert refused >= len(range(0, len(content), 3)) - 10


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_damage_never_ends_in_another_error(tmp_path: Path, kind: str) -> None:
    content = encoded(photo(23, 17), kind)
    rng = np.random.default_rng(0)
    outcomes = set()
    for _ in range(150):
        damaged = bytearray(content)
        for place in rng.integers(0, len(damaged), 3):
            damaged[place] ^= int(rng.integers(1, 256))
        path = written(tmp_path / "damaged", bytes(damaged))
        try:
            outcomes.add(decode(path, max_pixels=100_000).mode)
        except BadImageError as error:
            outcomes.add(str(error).startswith(f"{path}: "))
    assert outcomes <= {"RGB", True}
    assert True in outcomes


TURNED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: x.transpose(1, 0, 2)[:, ::-1],
    7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
    8: lambda x: x.transpose(1, 0, 2)[::-1],
}


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", TURNED)
def test_exif_orientation(tmp_path: Path, kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 98, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    content = encoded(photo(60, 30), kind, exif=exif, **options)
    found = pixels(written(tmp_path / "turned", content))
    expected = TURNED[orientation](RGB)
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).max() <= (6 if kind == "JPEG" else 0)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "link.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    (tmp_path / "folder.jpg").mkdir()
    for name in ("pipe.jpg", "link.jpg", "loop.jpg", "folder.jpg", "missing.jpg"):
        with pytest.raises(BadImageError, match=f"{name}: not a file"):
            decode(tmp_path / name, max_pixels=MAX_PIXELS)


@pytest.mark.parametrize("width_height", [(50, 37), (37, 50), (64, 64), (30, 51), (3, 5), (100, 9)])
@pytest.mark.parametrize(("size", "crop"), [(32, 1.0), (28, 0.875), (48, 0.9), (7, 1 / 3)])
def test_evaluation_view_is_resize_then_centre_crop(
    width_height: tuple[int, int], size: int, crop: float
) -> None:
    image = photo(*width_height)
    resize = v2.Resize(round(size / crop), interpolation=InterpolationMode.BILINEAR)
    expected = np.asarray(v2.CenterCrop(size)(resize(image)))
    found = evaluation_view(image, size=size, crop=crop)
    assert found.shape == (size, size, 3)
    assert found.dtype == np.uint8
    assert np.abs(found.astype(int) - expected).max() <= 1  # one pass over the box, not two


def test_evaluation_view_leaves_an_image_of_its_size_alone() -> None:
    image = photo(32, 32)
    assert np.array_equal(evaluation_view(image, size=32, crop=1.0), np.asarray(image))


@pytest.mark.parametrize("width_height", [(1, 1), (5000, 1), (1, 5000)])
def test_evaluation_view_of_extreme_shapes(width_height: tuple[int, int]) -> None:
    view = evaluation_view(Image.new("RGB", width_height, (10, 20, 30)), size=224, crop=0.875)
    assert view.shape == (224, 224, 3)
    assert (view == (10, 20, 30)).all()
