"""Decoded on the training device, pixels are nearly exact, and odd files are exactly so."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from photographs import FOLDER
from pictures import encoded, photo
from PIL import Image

from distill.data import datasets, images, jpeg, on_device
from distill.data.augment import build
from distill.data.loader import Loader
from distill.data.on_device import DeviceDecoder
from distill.data.workers import Decoder, Files, Request
from distill.errors import PreflightError
from distill.recipe import Data, Recipe

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
MAX_PIXELS = 10**6
SIZE = 48
with Image.open(FOLDER / "flower.png") as _flower:
    FLOWER = _flower.convert("RGB")


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def as_adobe(kind: int) -> bytes:
    """A JPEG whose colours are what Adobe's marker says: 0 is RGB, 1 the usual kind."""
    plain = encoded(FLOWER, "JPEG", keep_rgb=kind == 0)
    start = plain.index(b"\xff\xdb")
    marker = b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0" + bytes([kind])
    return plain[:2] + marker + plain[start:]


PLAIN: dict[str, bytes] = {
    f"{name} {subsampling}": encoded(FLOWER, "JPEG", quality=90, subsampling=subsampling, **options)
    for name, options in {
        "baseline": {}, "progressive": {"progressive": True},
        "tiles": {"restart_marker_blocks": 1}, "restarts": {"restart_marker_rows": 1},
    }.items()
    for subsampling in (0, 1, 2)
} | {
    "gray": encoded(FLOWER.convert("L"), "JPEG"),
    "adobe": as_adobe(1),
    "upright": encoded(FLOWER, "JPEG", exif=turned(1)),
    "a colour profile": encoded(FLOWER, "JPEG", icc_profile=bytes(70_000)),
    "something after the end": encoded(FLOWER, "JPEG") + bytes(9),
    "small": encoded(photo(7, 5), "JPEG"),
    "a pixel": encoded(photo(1, 1), "JPEG"),
}  # fmt: skip
ODD: dict[str, bytes] = {
    "png": encoded(FLOWER, "PNG"),
    "transparent": encoded(FLOWER.convert("RGBA"), "WEBP", lossless=True),
    "turned": encoded(FLOWER, "JPEG", exif=turned(6)),
    "cmyk": encoded(FLOWER.convert("CMYK"), "JPEG"),
    "rgb": encoded(FLOWER, "JPEG", keep_rgb=True),
    "adobe's rgb": as_adobe(0),
}
_PLAIN = PLAIN["baseline 2"]
BAD: dict[str, bytes] = {
    "truncated": _PLAIN[:-2],
    "half": _PLAIN[: len(_PLAIN) // 2],
    "half of the tiles": PLAIN["tiles 2"][: len(PLAIN["tiles 2"]) // 2],
    "no scan": _PLAIN[:300],
    "empty": b"",
    "text": b"see the other folder\n",
    "too large": encoded(photo(1200, 900), "JPEG"),
    "half a png": ODD["png"][:1000],
}
# Sound by its header, so that the device is asked first.
BAD["no tables"] = _PLAIN.replace(b"\xff\xdb", b"\xff\xef")


class Shelf:
    """Images in memory, by number."""

    origin = "shelf"

    def __init__(self, files: dict[str, bytes]) -> None:
        self._names, self._files = list(files), list(files.values())

    def __len__(self) -> int:
        return len(self._files)

    def name(self, number: int) -> str:
        return self._names[number]

    def read(self, number: int) -> bytes:
        return self._files[number]

    def ahead(self, batches: Iterable[np.ndarray]) -> Iterable[np.ndarray]:
        return batches

    def suspects(self, max_pixels: int) -> list[int]:
        return []


def decoder(files: dict[str, bytes]) -> Decoder:
    [cut] = build(Data(name="digits", augment=["resized_crop"]).augment, seed=0)
    return Decoder(Shelf(files), size=SIZE, crop=1.0, cut=cut, max_pixels=MAX_PIXELS)


def both(
    files: dict[str, bytes], *, views: int = 6, device: torch.device = CPU
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Exact pixels and the device's, (views, S, S, 3) each, by name."""
    exact = decoder(files)
    ids, numbers = (column.ravel() for column in np.indices((len(files), views)))
    request = Request(ids, numbers)
    there = DeviceDecoder(exact, device)
    found = there.finish(there(request), device)
    assert found.shape == (len(ids), 3, SIZE, SIZE)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert found.dtype == torch.uint8
    assert found.device == device
    pairs = zip(
        exact(request).split(views), found.permute(0, 2, 3, 1).cpu().split(views), strict=True
    )
    return {
        name: (one.numpy().astype(int), other.numpy().astype(int))
        for name, (one, other) in zip(files, pairs, strict=True)
    }


def test_pixels_are_nearly_exact() -> None:
    """Off the edges, where Pillow also looks beside the box, by rounding alone."""
    for name, (exact, found) in both(PLAIN).items():
        levels = np.abs(exact - found)
        if name in ("small", "a pixel"):  # little but edges
            assert levels.mean() < 4, name
            continue
        assert levels.mean() < 0.25, name
        assert levels[:, 4:-4, 4:-4].max() <= 2, name
        assert levels.any(), f"{name}: the device was not asked"


def test_an_odd_file_is_exact() -> None:
    for name, (exact, found) in both(ODD).items():
        assert exact.std() > 10, name
        assert np.array_equal(exact, found), name


def test_what_shrinks_more_than_the_device_can_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_device, "_MOST_SHRINK", 0)
    for name, (exact, found) in both(PLAIN).items():
        assert np.array_equal(exact, found), name


def test_what_the_device_refuses_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """nvJPEG says of a whole batch that something in it is wrong."""
    from torchvision import io as torchvision_io

    decode, asked = torchvision_io.decode_jpeg, []

    def choosy(files: list[torch.Tensor], **options: Any) -> list[torch.Tensor]:
        asked.append(len(files))
        if any(header_of(file).height > 100 and header_of(file).tile is None for file in files):
            raise RuntimeError("Error while decoding JPEG images: Unknown chroma subsampling")
        return decode(files, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torchvision_io, "decode_jpeg", choosy)
        for name, (exact, found) in both(PLAIN).items():
            accepted = name.startswith(("tiles", "restarts")) or name in ("small", "a pixel")
            assert np.array_equal(exact, found) != accepted or name == "a pixel", name
    assert asked == [1, len(PLAIN)] + [1] * len(PLAIN)


def test_a_picture_smaller_than_its_header_says_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import io as torchvision_io

    decode = torchvision_io.decode_jpeg
    smaller = lambda files, **options: [f[:, :9, :9] for f in decode(files, **options)]  # noqa: E731
    monkeypatch.setattr(torchvision_io, "decode_jpeg", smaller)
    exact, found = both({"a": _PLAIN})["a"]
    assert np.array_equal(exact, found)


def header_of(file: torch.Tensor) -> jpeg.Jpeg:
    header = jpeg.parse(file.numpy().tobytes())
    assert header is not None
    return header


@pytest.mark.parametrize("fault", BAD)
def test_a_fault_has_the_same_sentence(fault: str) -> None:
    files = {"good.jpg": _PLAIN, "bad.jpg": BAD[fault]}
    with pytest.raises(images.BadImageError, match=r"shelf/bad\.jpg: ") as expected:
        images.decode(BAD[fault], max_pixels=MAX_PIXELS, name="shelf/bad.jpg")
    with pytest.raises(images.BadImageError) as found:
        both(files)
    assert str(found.value) == str(expected.value)


def test_damage_never_ends_in_another_error() -> None:
    rng = np.random.default_rng(0)
    outcomes = {"refused": 0, "accepted": 0}
    for options in ({}, {"restart_marker_blocks": 1}, {"progressive": True}):
        content = encoded(photo(23, 17), "JPEG", **options)
        for _ in range(60):
            damaged = bytearray(content)
            for place in rng.integers(0, len(content), 3):
                damaged[place] ^= int(rng.integers(1, 256))
            try:
                both({"a.jpg": bytes(damaged)}, views=1)
                outcomes["accepted"] += 1
            except PreflightError:
                outcomes["refused"] += 1
    assert min(outcomes.values()) > 20


def test_many_large_files_are_decoded_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an image that is large by itself, too; nothing depends on what comes together."""
    together = both(PLAIN)
    monkeypatch.setattr(on_device, "_MOST_PIXELS", 2 * FLOWER.width * FLOWER.height - 1)
    for name, (_, found) in both(PLAIN).items():
        assert np.array_equal(found, together[name][1]), name


def test_tiles_are_sent_where_the_box_is_and_a_file_once() -> None:
    there = DeviceDecoder(decoder({"a": PLAIN["tiles 2"]}), CPU)
    whole = len(PLAIN["tiles 2"])
    views = np.arange(20)
    once = [there(Request(np.zeros(1, int), views[n : n + 1])).coded.numel() for n in views]
    assert min(once) < whole / 4
    assert there(Request(np.zeros(20, int), views)).coded.numel() == whole


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty images of two classes: ordinary JPEGs, JPEGs in tiles, turned ones and PNGs."""
    root = tmp_path_factory.mktemp("images")
    kinds = [PLAIN["baseline 2"], PLAIN["tiles 2"], ODD["turned"], PLAIN["gray"], ODD["png"]]
    for split, number in itertools.product(("train", "test"), range(20)):
        path = root / split / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(kinds[number % len(kinds)])
    return root


def recipe(folder: Path, **keys: Any) -> Data:
    arguments = {"augment": ["resized_crop", "flip"], "image_size": 24, "decoder": "gpu"} | keys
    return Data(name="folder", root=str(folder), **arguments)


def epoch(data: Data, *, workers: int = 0) -> list[Any]:
    loader = Loader(
        datasets.load(data), data, batch_size=6, train_seed=0, device=CPU, workers=workers
    )
    try:
        return list(loader.epoch(0))
    finally:
        loader.close()


@pytest.mark.parametrize("keys", [{}, {"mixup": 0.8, "cutmix": 1.0}])
def test_batches_are_the_same_for_any_workers_and_nearly_exact(
    folder: Path, keys: dict[str, float]
) -> None:
    first, second, exact = (
        epoch(recipe(folder, **keys)),
        epoch(recipe(folder, **keys), workers=2),
        epoch(recipe(folder, **keys, decoder="exact")),
    )
    assert len(first) == 3
    for one, other, true in zip(first, second, exact, strict=True):
        for found in (other, true):
            assert torch.equal(one.ids, found.ids)
            assert torch.equal(one.labels, found.labels)
        assert torch.equal(one.images, other.images)
        assert 0 < (one.images - true.images).abs().mean() * 255 < 1


def test_a_missing_file_is_the_error_that_names_it(tmp_path: Path) -> None:
    class Folder(Shelf):
        def read(self, number: int) -> Path:  # type: ignore[override]
            return tmp_path / "gone.jpg"

    exact = decoder({"a": b""})
    exact.files = Folder({"a": b""})
    files = Files(exact.files, DeviceDecoder(exact, CPU), device=CPU, workers=0)
    with pytest.raises(PreflightError, match=r"gone\.jpg: not a file"):
        next(files.batches([np.zeros(1, int)], [np.zeros(1, int)]))


def test_without_a_decoder_there_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else every file would be decoded twice, and nobody would know why it takes so long."""
    from torchvision import io as torchvision_io

    def none(*_: object, **__: object) -> None:
        raise RuntimeError("decode_jpegs_cuda: torchvision not compiled with nvJPEG support\nat 0x")

    monkeypatch.setattr(torchvision_io, "decode_jpeg", none)
    with pytest.raises(PreflightError, match=r"not compiled with nvJPEG support$") as found:
        DeviceDecoder(decoder(PLAIN), CPU)
    assert found.value.hint == "--set data.decoder=fast"


def test_it_is_told_where_it_is_slow() -> None:
    assert len(on_device.slow("gpu", CPU)) == 1
    assert on_device.slow("gpu", CUDA) == on_device.slow("fast", CPU) == []


def test_it_is_a_part_of_what_identifies_a_run(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "data: {name: digits, decoder: gpu}\nstudent: {model: resnet8}\n"
        "objective: [{term: ce}]\noptimizer: {lr: 0.1}\ntrain: {epochs: 1, batch_size: 16}\n"
    )
    assert Recipe.load(path).identity()["data"]["decoder"] == "gpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_agrees_with_the_cpu() -> None:
    """Its decoder rounds and upsamples colours in its own way."""
    here, there = both(PLAIN | ODD), both(PLAIN | ODD, device=CUDA)
    again = both(PLAIN | ODD, device=CUDA)
    for name, (_, found) in there.items():
        levels = np.abs(here[name][1] - found)
        # It repeats colours of every second pixel where the CPU's draws a line between them: of a
        # photograph of 7 x 5 pixels, made seven times as large, little else is seen.
        most = 12 if name == "small" else 2 if name in PLAIN else 1e-9
        assert levels.mean() < most, name
        assert np.array_equal(found, again[name][1]), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_nothing_that_is_still_read_is_written_over() -> None:
    """Batches that are freed while a busy stream has yet to read them."""
    exact = decoder(PLAIN)
    there = DeviceDecoder(exact, CUDA)
    ids = np.arange(len(PLAIN))
    made = [there(Request(ids, np.full(len(ids), view))) for view in range(4)]
    expected = [there.finish(one, CUDA).sum(dtype=torch.int64).item() for one in made]
    heavy = torch.randn(4096, 4096, device=CUDA)
    sums = []
    for one in made * 10:
        for _ in range(20):
            heavy = (heavy @ heavy).clamp(-1, 1)
        sums.append(there.finish(one, CUDA).sum(dtype=torch.int64))
    assert [total.item() for total in sums] == expected * 10
