"""Masks lie on the images they belong to, and what is no mask is refused by name."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from photographs import photographs
from pictures import encoded, photo
from PIL import Image
from torch import Tensor

from distill.data import datasets, images
from distill.data.masks import automatic, load, otsu
from distill.errors import PreflightError
from distill.recipe import Data

MAX_PIXELS = 100_000


def plain_otsu(levels: np.ndarray) -> tuple[int, float]:
    """The definition, threshold by threshold."""
    x = levels.astype(np.float64)
    best, threshold = 0.0, 0
    for k in range(255):
        low, high = x[x <= k], x[x > k]
        if len(low) and len(high):
            share = len(low) / len(x)
            between = share * (1 - share) * (low.mean() - high.mean()) ** 2
            if between > best * (1 + 1e-12):
                best, threshold = between, k
    return threshold, best / x.var() if x.var() else 0.0


def histograms() -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    two = np.where(draw.random(400) < 0.3, draw.normal(60, 15, 400), draw.normal(190, 20, 400))
    one = np.zeros(400)
    one[7] = 255
    return [
        *(draw.integers(0, 256, 400) for _ in range(8)),
        draw.integers(100, 104, 400),
        two.clip(0, 255).round(),
        np.abs(draw.normal(0, 50, 400)).clip(0, 255).round(),
        np.zeros(400),
        np.full(400, 255),
        np.full(400, 77),
        one,
        255 - one,
        np.arange(400) % 2 * 255,
        np.arange(400) % 2 + 254,
        np.arange(400) % 3 * 100,
    ]


def test_otsu_is_as_defined() -> None:
    levels = np.stack(histograms()).astype(np.int64)
    thresholds, measures = otsu(torch.from_numpy(levels))
    expected = [plain_otsu(row) for row in levels]
    assert thresholds.tolist() == [threshold for threshold, _ in expected]
    np.testing.assert_allclose(measures, [measure for _, measure in expected], atol=1e-12)


@pytest.mark.parametrize(("low", "high"), [(0, 255), (0, 1), (254, 255), (10, 200)])
def test_two_levels_are_parted_wholly_at_the_lower(low: int, high: int) -> None:
    threshold, measure = otsu(torch.tensor([low] * 999 + [high])[None])
    assert threshold.tolist() == [low]
    assert float(measure) == pytest.approx(1, abs=1e-12)


def test_a_large_image_loses_no_digits() -> None:
    levels = torch.zeros(1, 2**24, dtype=torch.int64)
    assert float(otsu(levels + 255)[1]) == 0
    levels[0, :5] = 1
    assert float(otsu(levels)[1]) == pytest.approx(1, abs=1e-9)


def digits() -> Tensor:
    pixels = datasets.load(Data.model_validate({"name": "digits"})).test.pixels
    assert pixels is not None
    return torch.from_numpy(pixels[:100]).permute(0, 3, 1, 2).expand(-1, 3, -1, -1) / 255


def discs(background: float, disc: float, *, count: int = 3) -> tuple[Tensor, Tensor]:
    """Discs on a plain background, with a little noise."""
    rows, columns = torch.meshgrid(torch.arange(20), torch.arange(20), indexing="ij")
    masks = torch.stack([(rows - 9 - i) ** 2 + (columns - 9) ** 2 < 30 for i in range(count)])
    noise = torch.rand(count, 3, 20, 20, generator=torch.Generator().manual_seed(0)) * 0.1
    return torch.where(masks[:, None], disc, background) + noise, masks


@pytest.mark.parametrize(("background", "disc"), [(0.1, 0.8), (0.8, 0.1), (0.0, 0.3)])
def test_what_the_border_is_not_is_foreground(background: float, disc: float) -> None:
    shown, masks = discs(background, disc)
    found = automatic(shown)
    assert found is not None
    assert found.dtype == torch.bool
    assert torch.equal(found, masks)


def test_light_is_weighted_as_the_eye_does() -> None:
    _, masks = discs(0.0, 0.0)
    blue, green = torch.tensor([[0.0, 0, 0.9], [0.0, 0.6, 0]])[:, :, None, None]
    shown = torch.where(masks[:, None], green, blue)
    shown[..., 1:4, 1:4] = 0  # by the mean of the channels, blue would be farther from it
    found = automatic(shown)
    assert found is not None
    assert torch.equal(found, masks)


def test_the_foreground_of_digits_is_the_digit() -> None:
    shown = digits()
    masks = automatic(shown)
    assert masks is not None
    light = shown[:, 0]
    assert 0.2 < float(masks.double().mean()) < 0.5
    assert bool((light[masks].mean() > 0.6) & (light[~masks].mean() < 0.15))
    each = [(light[i][masks[i]].min(), light[i][~masks[i]].max()) for i in range(len(light))]
    assert sum(ink > paper for ink, paper in each) >= 98  # strokes that leave the image are more


def test_without_a_plain_background_there_are_no_masks() -> None:
    draw = torch.Generator().manual_seed(0)
    gray = torch.rand(40, 1, 32, 32, generator=draw).expand(-1, 3, -1, -1)
    assert automatic(gray) is None
    assert automatic(torch.rand(40, 3, 32, 32, generator=draw)) is None
    smooth = F.interpolate(gray[:, :, :4, :4], (32, 32), mode="bicubic", antialias=True)
    assert automatic(smooth.clamp(0, 1)) is None
    assert automatic(photographs(32)) is None
    assert automatic(torch.full((3, 3, 8, 8), 0.4)) is None  # nothing is on it
    halves = torch.zeros(3, 3, 8, 8)
    halves[..., 4:] = 1
    assert automatic(halves) is None  # two levels, but each of them has half of the border


def test_a_mask_does_not_depend_on_other_images() -> None:
    shown = digits()
    together = automatic(shown)
    assert together is not None
    # The shares of colours are drawn, so that the sums are rounded.
    colours = torch.rand(3, 1, 1, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.5
    coloured = automatic(shown * colours)
    assert coloured is not None
    for masks, seen in ((together, shown), (coloured, shown * colours)):
        for i in (0, 17, 99):
            others = automatic(seen[[i, *range(20, 60)]])
            assert others is not None
            assert torch.equal(others[0], masks[i])
    blank = torch.zeros(101, 3, 8, 8)
    assert automatic(torch.cat([shown, blank])) is None  # whether there are any does


def written(folder: Path, **masks: Image.Image) -> list[str]:
    """Masks as PNGs; the names of their images."""
    for name, mask in masks.items():
        (folder / f"{name}.png").write_bytes(encoded(mask, "PNG"))
    return [f"{name}.jpg" for name in masks]


def loaded(folder: Path, names: list[str], size: int = 8, crop: float = 1.0) -> np.ndarray:
    found: np.ndarray = load(folder, names, size=size, crop=crop, max_pixels=MAX_PIXELS).numpy()
    return found


SIZES = [(40, 40), (41, 37), (37, 41), (90, 23), (23, 90), (64, 32)]


@pytest.mark.parametrize("size", [8, 15])
@pytest.mark.parametrize("crop", [1.0, 0.875, 0.6])
def test_a_mask_lies_where_its_image_does(tmp_path: Path, size: int, crop: float) -> None:
    grays = [photo(*sides, seed=i).convert("L") for i, sides in enumerate(SIZES)]
    masks = {f"{i}": gray.point(lambda v: 255 * (v > 127)) for i, gray in enumerate(grays)}
    found = loaded(tmp_path, written(tmp_path, **masks), size, crop)
    for gray, mask, one in zip(grays, masks.values(), found, strict=True):
        # Were the image the mask itself, they would be the same to the last pixel.
        assert np.array_equal(one, images.evaluation_view(mask, size=size, crop=crop) >= 128)
        view = images.evaluation_view(gray, size=size, crop=crop)
        expected = view > 127
        padded = np.pad(expected, 1, mode="edge")
        around = np.lib.stride_tricks.sliding_window_view(padded, (3, 3))
        inside = around.all(axis=(2, 3)) | ~around.any(axis=(2, 3))  # no border runs through it
        assert np.array_equal(one[inside], expected[inside])
        assert (one != expected).mean() < 0.15


def test_masks_are_found_in_the_folders_of_their_images(tmp_path: Path) -> None:
    for i, name in enumerate(("cat/1", "dog/1", "dog/deep/1.small")):
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(Image.new("L", (4, 4), 255 * (i == 1)), "PNG"))
    names = ["dog/1.jpeg", "cat/1.png", "dog/deep/1.small.webp", "dog/1.BMP"]
    assert loaded(tmp_path, names)[:, 0, 0].tolist() == [True, False, False, True]


def test_half_of_a_pixel_is_enough(tmp_path: Path) -> None:
    pixels = np.zeros((8, 8), np.uint8)
    pixels[:, 1::2] = 255
    mask = Image.fromarray(pixels)
    assert loaded(tmp_path, written(tmp_path, a=mask), size=8)[0, 0].tolist() == [False, True] * 4
    pixels[:, 4:] = 0
    assert loaded(tmp_path, written(tmp_path, b=Image.fromarray(pixels)), size=1).sum() == 0
    pixels[:] = 255
    pixels[:4] = 0
    assert loaded(tmp_path, written(tmp_path, c=Image.fromarray(pixels)), size=1).sum() == 1


FOUND = np.zeros((8, 8), bool)
FOUND[2:6, 3:] = True


def from_values(array: np.ndarray, mode: str = "L") -> Image.Image:
    array = np.ascontiguousarray(array, np.uint8)
    return Image.frombytes(mode, (array.shape[1], array.shape[0]), array.tobytes())


def with_palette(values: np.ndarray, colours: list[int]) -> Image.Image:
    image = from_values(values, "P")
    image.putpalette(colours)
    return image


def coloured(colour: tuple[int, ...]) -> np.ndarray:
    pixels: np.ndarray = FOUND[..., None] * np.array(colour)
    return pixels


ORIENTED = Image.Exif()
ORIENTED[0x0112] = 3  # upside down

MASKS = {
    "black and white": from_values(FOUND * 255),
    "0 and 1": from_values(FOUND * 1),
    "one bit": Image.fromarray(FOUND),
    "dark and light": from_values(np.where(FOUND, 128, 127 * (FOUND.sum() == 0))),
    "a palette": with_palette(FOUND * 1, [0, 0, 0, 9, 0, 0]),
    "a palette of classes": with_palette(
        FOUND * np.arange(1, 9)[:, None], [0, 0, 0, *range(1, 25)]
    ),
    "a palette that is not black at first": with_palette(FOUND * 2, [255, 255, 255, 0, 0, 0]),
    "a palette with a hole": with_palette(FOUND * 1, [0, 0, 0, 9, 0, 0]),
    "red": from_values(coloured((200, 0, 0)), "RGB"),
    "white": from_values(coloured((255, 255, 255)), "RGB"),
    "0 and 1 in colours": from_values(coloured((1, 1, 1)), "RGB"),
    "blue, opaque": from_values(
        np.dstack([coloured((0, 0, 255)), np.full(FOUND.shape, 255)]), "RGBA"
    ),
    "gray, opaque": from_values(np.dstack([FOUND * 255, np.full(FOUND.shape, 255)]), "LA"),
}


@pytest.mark.parametrize("kind", MASKS)
def test_every_kind_of_mask_is_understood(kind: str, tmp_path: Path) -> None:
    options = {"transparency": 0} if "hole" in kind else {}
    (tmp_path / "a.png").write_bytes(encoded(MASKS[kind], "PNG", **options))
    assert np.array_equal(loaded(tmp_path, ["a.jpg"])[0], FOUND)


def test_a_mask_is_turned_as_its_image_is(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(MASKS["red"], "PNG", exif=ORIENTED))
    assert np.array_equal(loaded(tmp_path, ["a.jpg"])[0], FOUND[::-1, ::-1])


def test_a_mask_may_be_all_of_one_kind(tmp_path: Path) -> None:
    names = written(tmp_path, a=Image.new("L", (8, 8), 0), b=Image.new("L", (8, 8), 1))
    names += written(tmp_path, c=Image.new("L", (8, 8), 255))
    assert loaded(tmp_path, names).mean(axis=(1, 2)).tolist() == [0, 1, 1]


OUTLINED = np.where(FOUND, 15, 0)  # a class's number, and 255 around it
OUTLINED[2, 3:] = 255

REFUSED = {
    "transparent": (
        encoded(Image.new("RGBA", (8, 8), (255, 0, 0, 0)), "PNG"), "opaque colours, this is RGBA"),
    "cut out": (
        encoded(from_values(np.dstack([coloured((255, 0, 0)), FOUND * 255]), "RGBA"), "PNG"),
        "opaque colours, this is RGBA"),
    "partly transparent gray": (
        encoded(Image.new("LA", (8, 8), (255, 254)), "PNG"), "opaque colours, this is LA"),
    "16 bits": (encoded(Image.fromarray(FOUND * np.uint16(65535)), "PNG"), "this is I;16"),
    "numbers of classes": (encoded(from_values(FOUND * 3), "PNG"), "more of it is dark gray"),
    "a trimap": (encoded(from_values(FOUND * 2 + 1), "PNG"), "more of it is dark gray"),
    "numbers with outlines": (encoded(from_values(OUTLINED), "PNG"), "more of it is dark gray"),
    "dark colours": (
        encoded(from_values(coloured((64, 0, 0)), "RGB"), "PNG"), "more of it is dark gray"),
    "empty": (b"", "empty"),
    "text": (b"no image at all", "no image"),
    "cut short": (encoded(photo(60, 60).convert("L"), "PNG")[:600], "truncated"),
    "jpeg": (encoded(Image.new("L", (8, 8)), "JPEG"), "not a PNG"),
    "too large": (encoded(Image.new("1", (1000, 101)), "PNG"), "data.max_pixels allows 100,000"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_mask_is_refused(kind: str, tmp_path: Path) -> None:
    names = written(tmp_path, good=MASKS["red"])
    content, what = REFUSED[kind]
    (tmp_path / "bad.png").write_bytes(content)
    with pytest.raises(PreflightError, match=what) as caught:
        loaded(tmp_path, [*names, "bad.jpg"])
    text = str(caught.value)
    assert text.startswith(f"{tmp_path}: masks that cannot be used: 1\n  {tmp_path / 'bad.png'}: ")
    assert "good" not in text
    assert "its image's width and height" in caught.value.hint


def test_damaged_bytes_are_refused_or_read_but_never_a_crash(tmp_path: Path) -> None:
    whole = encoded(MASKS["a palette of classes"], "PNG", exif=ORIENTED)
    for at in range(8, len(whole)):
        (tmp_path / "a.png").write_bytes(whole[:at] + bytes([whole[at] ^ 0x5A]) + whole[at + 1 :])
        try:
            assert loaded(tmp_path, ["a.jpg"]).shape == (1, 8, 8)
        except PreflightError as error:
            assert "a.png: " in str(error)  # noqa: PT017


@pytest.mark.parametrize(("count", "more"), [(1, ""), (10, ""), (11, "1"), (1200, "1,190")])
def test_at_most_ten_are_named(count: int, more: str, tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    names = ["folder.jpg", *(f"{i}.jpg" for i in range(count - 1))]
    with pytest.raises(PreflightError, match="cannot be used") as caught:
        loaded(tmp_path, names + written(tmp_path, good=MASKS["red"]))
    first, *lines = str(caught.value).split("\n  ")
    assert first == f"{tmp_path}: masks that cannot be used: {count:,}"
    named = [f"{(tmp_path / name).with_suffix('.png')}: not a file" for name in names[:10]]
    assert lines == [*named, *([f"and {more} more"] if more else [])]


def test_masks_of_another_size_are_refused(tmp_path: Path) -> None:
    drawn, shown = tmp_path / "masks", tmp_path / "images"
    for folder in (drawn, shown):
        folder.mkdir()
    names = written(drawn, same=Image.new("1", (6, 4)), turned=Image.new("1", (4, 6)))
    names += written(drawn, less=Image.new("1", (6, 3)))
    for name in names:
        (shown / name).write_bytes(encoded(photo(6, 4), "PNG"))
    (shown / "turned.jpg").write_bytes(encoded(photo(6, 4), "JPEG", exif=turned()))

    def both(*names: str) -> Tensor:
        return load(drawn, names, size=2, crop=1.0, max_pixels=MAX_PIXELS, images=shown)

    assert both("same.jpg", "turned.jpg").shape == (2, 2, 2)  # upright, the image is 4 x 6
    with pytest.raises(PreflightError) as caught:
        both(*names)
    lines = str(caught.value).split("\n  ")
    assert lines[1:] == [f"{shown / 'less.jpg'}: its mask has 6 x 3 pixels, the image 6 x 4"]
    (shown / "same.jpg").write_bytes(b"")
    with pytest.raises(PreflightError, match=r"same\.jpg: empty"):
        both("same.jpg")


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter
    return exif


HOSTILE = [
    "a.tar.jpg", "with space .jpg", "-rf.jpg", "*.jpg", "%s{0}.jpg", "a\nb.jpg", "\u202egpj.jpg",
    "猫/é.jpg", "no suffix", ".hidden.jpg", "\udcff.jpg", "a;b'\"$(c).jpg",
]  # fmt: skip


def test_names_may_be_anything(tmp_path: Path) -> None:
    for i, name in enumerate(HOSTILE):
        path = (tmp_path / name).with_suffix(".png")
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encoded(Image.new("L", (2, 2), 255 * (i % 2)), "PNG"))
    found = loaded(tmp_path, HOSTILE, size=1).ravel()
    assert found.tolist() == [bool(i % 2) for i in range(len(HOSTILE))]
    with pytest.raises(PreflightError, match="12"):
        loaded(tmp_path / "none", HOSTILE)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_mask_that_may_not_be_read_is_no_bad_mask(tmp_path: Path) -> None:
    names = written(tmp_path, a=MASKS["red"])
    (tmp_path / "a.png").chmod(0)
    with pytest.raises(PreflightError, match="Permission denied"):
        loaded(tmp_path, names)
