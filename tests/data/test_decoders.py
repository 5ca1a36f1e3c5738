"""Parts of images are what Pillow has there, whatever decodes them and however little of them."""

from __future__ import annotations

import hashlib
import itertools
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from photographs import FOLDER
from pictures import encoded, photo
from PIL import Image

from distill.data import datasets, images, jpeg
from distill.data.augment.resized_crop import ResizedCrop, scaled
from distill.data.datasets import Dataset
from distill.data.jpeg import Box
from distill.data.loader import Loader
from distill.data.pixels import Views
from distill.errors import PreflightError
from distill.recipe import Data, Recipe

CPU = torch.device("cpu")
MAX_PIXELS = 10**6


@pytest.fixture(params=["with the extra", "without"])
def _decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "without":
        monkeypatch.setattr(jpeg, "turbo", None)
    elif jpeg.turbo is None:
        pytest.skip("the extra `fast` is not installed")


def noisy(width: int, height: int) -> Image.Image:
    """A picture with edges and fine grain, where a wrong neighbour shows."""
    grain = np.random.default_rng(0).integers(0, 60, (height, width, 3))
    return Image.fromarray((np.asarray(photo(width, height)) * 0.75 + grain).astype(np.uint8))


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def xmp(orientation: int) -> bytes:
    return f'<x:xmpmeta><rdf tiff:Orientation="{orientation}"/></x:xmpmeta>'.encode()


SIZES = ((90, 70), (64, 48), (33, 17), (7, 100), (1, 1))
ZOO: dict[str, bytes] = {
    f"{width}x{height} {('444', '422', '420')[subsampling]} {restart}"
    f"{' progressive' if progressive else ''}": encoded(
        noisy(width, height), "JPEG", quality=85, subsampling=subsampling,
        progressive=progressive, **restart,
    )
    for (width, height), subsampling, progressive, restart in itertools.product(
        SIZES, (0, 1, 2), (False, True),
        ({}, {"restart_marker_blocks": 1}, {"restart_marker_blocks": 2},
         {"restart_marker_rows": 1}, {"restart_marker_blocks": 7}),
    )
} | {
    "gray": encoded(noisy(90, 70).convert("L"), "JPEG"),
    "gray in tiles": encoded(noisy(90, 70).convert("L"), "JPEG", restart_marker_blocks=3),
    "cmyk": encoded(noisy(90, 70).convert("CMYK"), "JPEG"),
    "rgb": encoded(noisy(90, 70), "JPEG", keep_rgb=True, restart_marker_blocks=1),
    "a comment": encoded(noisy(90, 70), "JPEG", comment=b"\xff\xd0 \xff\xc0 \xff\xda"),
    "a colour profile": encoded(noisy(90, 70), "JPEG", icc_profile=bytes(70_000)),
    "two pictures": encoded(
        noisy(90, 70), "MPO", save_all=True, append_images=[photo(90, 70)],
        restart_marker_blocks=1),
    "something after the end": encoded(noisy(90, 70), "JPEG", restart_marker_blocks=1) + b"\0\xff",
    "damaged exif": encoded(noisy(90, 70), "JPEG", exif=b"Exif\0\0MM\0*\0\0"),
    "png": encoded(noisy(90, 70), "PNG"),
    "transparent": encoded(noisy(90, 70).convert("RGBA"), "WEBP", lossless=True),
    "16 bit": encoded(Image.fromarray(np.arange(6300, dtype=np.uint16).reshape(70, 90)), "PNG"),
} | {
    f"exif {n}": encoded(noisy(90, 70), "JPEG", exif=turned(n), restart_marker_blocks=1)
    for n in range(10)
} | {
    f"xmp {n}": encoded(noisy(90, 70), "JPEG", xmp=xmp(n)) for n in (1, 6)
} | {
    "xmp that turns nothing": encoded(noisy(90, 70), "JPEG", xmp=b"<x:xmpmeta/>"),
}  # fmt: skip


def all_of_it(width: int, height: int) -> Box:
    return Box(0, 0, width, height)


def boxes(width: int, height: int) -> Iterator[Box]:
    """The whole image and some boxes in it."""
    yield all_of_it(width, height)
    if min(width, height) >= 48:  # edges where those of tiles are
        yield Box(16, 16, 32, 32)
    rng = np.random.default_rng(width * height)
    for _ in range(12):
        left, right = sorted(rng.choice(width + 1, 2, replace=False).tolist())
        top, bottom = sorted(rng.choice(height + 1, 2, replace=False).tolist())
        yield Box(left, top, right, bottom)


@pytest.mark.usefixtures("_decoder")
def test_a_part_is_bit_by_bit_what_pillow_has_there() -> None:
    for name, content in ZOO.items():
        whole = np.asarray(images.decode(content, max_pixels=MAX_PIXELS))
        for box in boxes(*whole.shape[1::-1]):
            shapes = []

            def choose(width: int, height: int, box: Box = box, shapes: Any = shapes) -> Box:
                shapes.append((height, width, 3))
                return box

            found = images.part(content, choose, max_pixels=MAX_PIXELS)
            expected = whole[box.top : box.bottom, box.left : box.right]
            assert np.array_equal(found, expected), (name, box)
            assert set(shapes) == {whole.shape}, name


def test_the_extra_is_asked_wherever_it_can_help() -> None:
    """Else the comparison above would compare Pillow with Pillow."""
    plain = [name for name in ZOO if jpeg.parse(ZOO[name])]
    assert len(plain) > 150
    assert {"gray", "rgb", "a comment", "two pictures", "exif 1", "xmp that turns nothing"} <= {
        *plain
    }
    assert not {"cmyk", "png", "exif 6", "xmp 6", "damaged exif"} & {*plain}
    if jpeg.turbo is None:
        pytest.skip("the extra `fast` is not installed")
    for name in plain:
        found, whole = jpeg.decode(ZOO[name]), images.decode(ZOO[name], max_pixels=MAX_PIXELS)
        assert np.array_equal(found, whole), name


def test_a_file_of_tiles_is_decoded_where_the_box_is() -> None:
    image = noisy(340, 256)
    content = jpeg.encode(image, quality=90)
    header = jpeg.parse(content)
    assert header is not None
    assert header[1:3] == (340, 256)
    assert header.tile == (16, 16)
    whole = images.decode(content, max_pixels=MAX_PIXELS)
    assert np.array_equal(whole, images.decode(encoded(image, "JPEG", quality=90),
                                               max_pixels=MAX_PIXELS))  # fmt: skip
    found = jpeg.window(header, Box(100, 100, 150, 140))
    assert found is not None
    cut, left, top = found
    assert (left, top) == (96, 96)
    assert images.check_header(cut, max_pixels=MAX_PIXELS) == (64, 48)
    assert len(cut) < len(content) / 10
    assert cut.endswith(b"\xff\xd9")
    assert jpeg.turbo is None or jpeg.decode(cut) is not None  # without any doubt


def test_without_tiles_or_with_one_missing_there_is_no_window() -> None:
    box = Box(10, 10, 20, 20)
    content = jpeg.encode(noisy(90, 70), quality=90)
    marker = content.index(b"\xff\xd3")
    for altered in (
        encoded(noisy(90, 70), "JPEG"),
        encoded(noisy(90, 70), "JPEG", restart_marker_blocks=7),  # 6 blocks are a row
        content[:marker] + content[marker + 2 :],
        content[:-2],
        content[:3000],
    ):
        header = jpeg.parse(altered)
        assert header is not None
        assert jpeg.window(header, box) is None


PLAIN = encoded(noisy(90, 70), "JPEG")
TILED = encoded(noisy(90, 70), "JPEG", restart_marker_blocks=1)
FAULTS: dict[str, bytes] = {
    "truncated": PLAIN[:-2],
    "half": PLAIN[: len(PLAIN) // 2],
    "half of the tiles": TILED[: len(TILED) // 2],
    "the header alone": PLAIN[:300],
    "no pixels": PLAIN[:2] + b"\xff\xd9",
    "empty": b"",
    "text": b"see the other folder\n",
    "too large": encoded(photo(1200, 900), "JPEG"),
    "half a png": encoded(noisy(90, 70), "PNG")[:1000],
}


@pytest.mark.usefixtures("_decoder")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_has_the_same_sentence(tmp_path: Path, fault: str) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(FAULTS[fault])
    for source, name in ((path, ""), (FAULTS[fault], "shard.tar/a.jpg")):
        with pytest.raises(images.BadImageError) as expected:
            images.decode(source, max_pixels=MAX_PIXELS, name=name)
        with pytest.raises(images.BadImageError) as found:
            images.part(source, all_of_it, max_pixels=MAX_PIXELS, name=name)
        assert str(found.value) == str(expected.value)


@pytest.mark.usefixtures("_decoder")
def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.jpg"):
        with pytest.raises(images.BadImageError, match=f"{path}: not a file"):
            images.part(path, all_of_it, max_pixels=MAX_PIXELS)


def outcome(call: Callable[..., Any], *arguments: Any) -> np.ndarray | str:
    """Its pixels, or what it says of them."""
    try:
        return np.asarray(call(*arguments, max_pixels=MAX_PIXELS))
    except PreflightError as error:
        return str(error)


@pytest.mark.usefixtures("_decoder")
def test_damage_never_ends_in_another_error() -> None:
    """Damage that is accepted is what Pillow makes of it, where the whole is decoded."""
    rng = np.random.default_rng(0)
    outcomes = {"refused": 0, "accepted": 0}
    for restart, _ in itertools.product(({}, {"restart_marker_blocks": 1}), range(150)):
        content = bytearray(encoded(photo(23, 17), "JPEG", **restart))
        for place in rng.integers(0, len(content), 3):
            content[place] ^= int(rng.integers(1, 256))
        whole = outcome(images.decode, bytes(content))
        found = outcome(images.part, bytes(content), all_of_it)
        outcomes["refused" if isinstance(found, str) else "accepted"] += 1
        if isinstance(found, str) or not restart:
            assert np.array_equal(found, whole)
    assert min(outcomes.values()) > 20


def test_fast_is_nearly_exact() -> None:
    """Inside it differs by rounding alone; at the edge Pillow sees pixels beside the box."""
    with Image.open(FOLDER / "flower.png") as flower:
        image = flower.convert("RGB")
    crop = ResizedCrop()
    for uniforms in np.random.default_rng(0).random((40, crop.num_draws)):
        exact = crop.cut(image, uniforms, size=96).astype(int)
        fast = scaled(images.cropped(image, lambda w, h: crop.box(uniforms, w, h)), size=96)  # noqa: B023
        assert fast.shape == exact.shape
        assert fast.dtype == np.uint8
        difference = np.abs(fast - exact)
        assert difference[4:-4, 4:-4].max() <= 2
        assert difference.mean() < 0.1
    flat = np.broadcast_to(np.uint8([10, 20, 30]), (3, 50, 3)).copy()
    assert (scaled(flat, size=64) == (10, 20, 30)).all()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty images of two classes: ordinary JPEGs, JPEGs in tiles, turned ones and PNGs."""
    root = tmp_path_factory.mktemp("images")
    kinds = [ZOO[f"exif {n}"] for n in (1, 6)]
    kinds += [encoded(noisy(80, 60), "JPEG"), jpeg.encode(noisy(70, 90), quality=90), ZOO["png"]]
    for number in range(20):
        path = root / "train" / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(kinds[number % len(kinds)])
    shutil.copytree(root / "train", root / "test")
    return root


def recipe(folder: Path, **keys: Any) -> Data:
    arguments = {"augment": ["resized_crop", "flip"], "image_size": 24} | keys
    return Data(name="folder", root=str(folder), **arguments)


def digests(dataset: Dataset, data: Data, workers: int) -> list[str]:
    loader = Loader(
        dataset, data, batch_size=6, train_seed=0, device=CPU, workers=workers, audience="both"
    )
    found = []
    for batch in itertools.chain(loader.epoch(0), loader.epoch(1)):
        # Student and teacher are shown the same.
        assert batch.shown is None or torch.equal(batch.shown, batch.images)
        found.append(hashlib.sha256(batch.images.contiguous().numpy().tobytes()).hexdigest())
    loader.close()
    return found


def test_views_are_the_same_for_any_workers_and_with_and_without_the_extra(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for keys in ({}, {"mixup": 0.8, "cutmix": 1.0}):
        exact, fast = recipe(folder, **keys), recipe(folder, decoder="fast", **keys)
        dataset = datasets.load(fast)
        first = digests(dataset, fast, 0)
        assert len(first) == len({*first}) == 6
        assert digests(dataset, fast, 2) == first
        assert not {*digests(dataset, exact, 0)} & {*first}
        with monkeypatch.context() as patch:
            patch.setattr(jpeg, "turbo", None)
            assert digests(dataset, fast, 0) == first


@pytest.mark.parametrize("mixup", [0.0, 0.8])
@pytest.mark.parametrize("decoder", ["fast", "gpu"])
def test_a_view_is_the_same_whatever_else_is_asked_for(
    folder: Path, decoder: str, mixup: float
) -> None:
    """Of files that are decoded once for several views, too."""
    data = recipe(folder, decoder=decoder, mixup=mixup)
    dataset = datasets.load(data)
    positions, numbers = (column.ravel() for column in np.indices((len(dataset.train_ids), 3)))
    views = Views(dataset, data, device=CPU)
    found = {}
    for batch, which in views.single(positions, numbers, batch_size=16):
        found |= dict(zip(which.tolist(), batch.images, strict=True))
    assert len(found) == 60
    for one in (3, 16, 47):
        [(batch, _)] = views.single(positions[[one]], numbers[[one]], batch_size=2)
        assert torch.equal(batch.images[0], found[one])
    views.close()


def test_evaluation_and_images_in_memory_are_exact(folder: Path) -> None:
    exact, fast = (recipe(folder, decoder=which, augment=[]) for which in ("exact", "fast"))
    one, other = datasets.load(exact), datasets.load(fast)
    assert one.test.pixels is not None
    assert other.test.pixels is not None
    assert np.array_equal(one.test.pixels, other.test.pixels)


def test_a_bad_file_is_the_error_that_names_it(folder: Path, tmp_path: Path) -> None:
    data = recipe(folder, decoder="fast")
    dataset = datasets.load(data)
    root = shutil.copytree(folder, tmp_path / "copy")
    moved = datasets.load(recipe(root, decoder="fast"))
    (root / "train" / "a" / "2.jpg").write_bytes(FAULTS["half"])
    loader = Loader(replace(dataset, train=moved.train), data, batch_size=4, train_seed=0,
                    device=CPU)  # fmt: skip
    with pytest.raises(PreflightError, match=r"a/2\.jpg: .*[Tt]runcated"):
        list(loader.epoch(0))
    loader.close()


def test_the_default_is_left_out_of_what_identifies_a_run(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "data: {name: digits}\nstudent: {model: resnet8}\nobjective: [{term: ce}]\n"
        "optimizer: {lr: 0.1}\ntrain: {epochs: 1, batch_size: 16}\n"
    )
    assert "decoder" not in Recipe.load(path).identity()["data"]
    changed = Recipe.load(path, ["data.decoder=fast"])
    assert changed.identity()["data"]["decoder"] == "fast"
