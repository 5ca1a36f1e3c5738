"""Files that do harm are met the same way wherever they lie and whoever decodes them."""

from __future__ import annotations

import os
import re
import resource
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hostile import BOMBS, HARMLESS, OTHERS
from pictures import encoded as encode
from pictures import fingerprint, photo
from PIL import Image
from shards import tar
from test_images import DECODED, REFUSED, RGB, TURNED

from distill.data import datasets, encoded, images, stored
from distill.data.datasets import Dataset
from distill.data.encoded import Encoded
from distill.data.jpeg import Box
from distill.data.loader import Loader
from distill.data.packed import Settings
from distill.data.workers import in_processes
from distill.engine.machine import StopRequest
from distill.errors import PreflightError
from distill.pack import pack
from distill.recipe import Data, Recipe
from tests.promises import Measured

# Pillow warns of what it passes over, which is no error outside of tests.
pytestmark = pytest.mark.filterwarnings("ignore")

MAX_PIXELS = 64_000_000
SUFFIXES = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "TIFF": "tif", "GIF": "gif", "BMP": "bmp"}


class Case(NamedTuple):
    """A file, and its pixels with the tolerance of each, or what is said of it."""

    content: bytes
    pixels: np.ndarray | None
    tolerance: int
    what: str


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(photo(60, 30), "PNG", exif=exif)


TABLE: dict[str, Case] = {
    **{name: Case(content, *expected, "") for name, (content, *expected) in DECODED.items()},
    **{f"turned {n}.png": Case(turned(n), turn(RGB), 0, "") for n, turn in TURNED.items()},
    **{name: Case(content, pixels, 0, "") for name, (content, pixels) in HARMLESS.items()},
    **{name: Case(content, None, 0, what) for name, (content, what) in REFUSED.items()},
    **{name: Case(content, None, 0, what) for name, (content, what) in BOMBS.items()},
    **{name: Case(content, None, 0, "no image") for name, content in OTHERS.items()},
}
GOOD = [name for name, case in TABLE.items() if case.pixels is not None]
WHOLE = encode(photo(60, 30), "PNG")


def test_the_table_has_every_kind_of_harm() -> None:
    assert len(TABLE) > 90
    assert len(GOOD) > 50


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of all files, and of one that is sound to be tested with."""
    folder = tmp_path_factory.mktemp("hostile")
    for name, case in TABLE.items():
        path = folder / "train" / "all" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(case.content)
    (folder / "test" / "all").mkdir(parents=True)
    (folder / "test" / "all" / "whole.png").write_bytes(WHOLE)
    return folder


def data(root: Path, name: str = "folder", **keys: object) -> Data:
    keys = {"image_size": 8, "augment": ["resized_crop"], "on_bad_image": "skip"} | keys
    return Data.model_validate({"name": name, "root": str(root), "max_bad": 1.0, **keys})


def all_of_it(width: int, height: int) -> Box:
    return Box(0, 0, width, height)


def outcome(files: Encoded, fast: bool, number: int) -> np.ndarray | str:
    """The pixels of an image, or the sentence that refuses it."""
    try:
        if fast:
            return encoded.part(files, number, all_of_it, max_pixels=MAX_PIXELS)
        return np.asarray(encoded.decode(files, number, max_pixels=MAX_PIXELS))
    except PreflightError as error:
        return str(error)


def agree(files: Encoded, names: list[str], fast: bool, workers: int) -> int:
    """How many images are as tabled; none may differ."""
    found = in_processes(partial(outcome, files, fast), range(len(files)), workers=workers)
    for number, (name, one) in enumerate(zip(names, found, strict=True)):
        case = TABLE[name]
        if case.pixels is None:
            assert isinstance(one, str), name
            assert one.startswith(f"{files.origin}/{files.name(number)}: "), one
            assert re.search(case.what, one), one
        else:
            assert not isinstance(one, str), one
            assert one.shape == case.pixels.shape, name
            assert np.abs(one.astype(int) - case.pixels).max() <= case.tolerance, name
    return len(names)


def in_folder(root: Path, place: Path) -> tuple[Encoded, list[str]]:
    found = stored.load(data(root))
    assert found is not None
    files = found.train.files
    return files, [files.name(i).removeprefix("train/all/") for i in range(len(files))]


def in_shards(root: Path, place: Path) -> tuple[Encoded, list[str]]:
    members = {}
    for number, (name, case) in enumerate(TABLE.items()):
        members[f"{number:03d}.{name.rpartition('.')[2]}"] = case.content
        members[f"{number:03d}.cls"] = b"0"
    tar(place / "train.tar", members)
    tar(place / "test.tar", {"0.png": WHOLE, "0.cls": b"0"})
    found = stored.load(data(place, "webdataset"))
    assert found is not None
    return found.train.files, list(TABLE)


def in_rows(root: Path, place: Path) -> tuple[Encoded, list[str]]:
    hf = pytest.importorskip("datasets")
    features = hf.Features({"image": hf.Image(), "label": hf.ClassLabel(names=["all"])})

    def rows(*contents: bytes) -> object:
        stored = [{"bytes": content, "path": None} for content in contents]
        columns = {"image": stored, "label": [0] * len(stored)}
        return hf.Dataset.from_dict(columns, features=features)

    every = rows(*(case.content for case in TABLE.values()))
    hf.DatasetDict(train=every, test=rows(WHOLE)).save_to_disk(str(place))
    found = stored.load(data(place, "hf"))
    assert found is not None
    return found.train.files, list(TABLE)


@pytest.mark.promise("R17")
@pytest.mark.parametrize("container", [in_folder, in_shards, in_rows])
def test_files_are_as_tabled_wherever_they_lie_and_whoever_decodes_them(
    root: Path,
    tmp_path: Path,
    container: Callable[[Path, Path], tuple[Encoded, list[str]]],
    measured: Measured,
) -> None:
    before = fingerprint(root)
    files, names = container(root, tmp_path / "set")
    written = fingerprint(tmp_path)
    for fast, workers in ((False, 0), (True, 0), (False, 2), (True, 2)):
        right = agree(files, names, fast, workers)
    what = {in_folder: "a folder", in_shards: "tar shards", in_rows: "Hugging Face rows"}
    measured(f"hostile files in {what[container]}", f"{right} of {len(TABLE)} as tabled, 4 times")
    assert fingerprint(root) == before
    assert fingerprint(tmp_path) == written


@pytest.mark.promise("R17")
def test_in_memory_and_in_a_pack_the_same_files_are_bad(
    root: Path, tmp_path: Path, measured: Measured
) -> None:
    before = fingerprint(root)
    loaded = datasets.load(data(root, augment=[]))
    assert {name.removeprefix("train/all/") for name in loaded.bad} == {*TABLE} - {*GOOD}
    assert loaded.train.pixels is not None
    assert loaded.train.files is not None
    assert not loaded.train.pixels[np.setdiff1d(np.arange(len(TABLE)), loaded.train_ids)].any()
    recipe = Recipe.model_validate(
        {"data": data(root).model_dump(), "student": {"model": "resnet8"},
         "objective": [{"term": "ce"}], "optimizer": {"lr": 0.1},
         "train": {"epochs": 1, "batch_size": 1}}
    )  # fmt: skip
    told = pack(recipe, tmp_path / "pack", Settings(size=32), workers=0, stop=StopRequest())
    assert told["splits"]["train"]["bad"] == len(TABLE) - len(GOOD)
    packed = datasets.load(data(tmp_path / "pack", "webdataset"))
    assert packed.train_ids.tolist() == loaded.train_ids.tolist()
    measured("hostile files in memory and in a pack", f"the same {len(loaded.bad)} are bad")
    assert fingerprint(root) == before


@pytest.mark.parametrize("decoder", ["exact", "fast"])
def test_a_worker_that_meets_a_bad_file_names_it(tmp_path: Path, decoder: str) -> None:
    names = ("truncated.jpg", "flipped.png")  # whose headers are sound
    for i, name in enumerate(names):
        for split, number in (("train", 0), ("train", 1), ("test", 0)):
            path = tmp_path / str(i) / split / "all" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(WHOLE)
        (tmp_path / str(i) / "train" / "all" / name).write_bytes(TABLE[name].content)
        recipe = data(tmp_path / str(i), decoder=decoder, on_bad_image="error")
        loader = Loader(
            datasets.load(recipe),
            recipe,
            batch_size=1,
            train_seed=0,
            device=torch.device("cpu"),
            workers=2,
        )
        with pytest.raises(PreflightError, match=f"{i}/train/all/{name}: .*{TABLE[name].what}"):
            list(loader.epoch(0))
        loader.close()


def within(limit: int, content: bytes) -> float:
    """Seconds that a file takes, whatever comes of it, in a process with little more memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + limit
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))
    began = time.monotonic()
    for call in (images.check_header, images.decode, partial(images.part, choose=all_of_it)):
        with suppress(images.BadImageError):
            call(content, max_pixels=MAX_PIXELS, name="a")
    return time.monotonic() - began


@pytest.mark.promise("R17")
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is counted otherwise")
def test_no_bomb_takes_much_memory_or_time(measured: Measured) -> None:
    bombs = {name: content for name, (content, *_) in (BOMBS | HARMLESS).items()}
    bombs |= {name: TABLE[name].content for name in TABLE if "megapixels" in name}
    seconds = list(in_processes(partial(within, 2**28), list(bombs.values()), workers=1))
    assert max(seconds) < 20, list(bombs)[int(np.argmax(seconds))]
    measured("bombs in files of up to 1 MB", f"{len(bombs)} of {len(bombs)} within 256 MB")


@pytest.mark.promise("R17")
@pytest.mark.parametrize("flips", [200, pytest.param(5000, marks=pytest.mark.soak)])
def test_no_flipped_bit_ends_a_process(flips: int, measured: Measured) -> None:
    """A decoder that crashed would end the worker, and that is an error here."""
    done = 0
    for kind in SUFFIXES:
        options = {"JPEG": {"restart_marker_blocks": 1}, "WEBP": {"lossless": True}}.get(kind, {})
        whole = encode(photo(60, 30), kind, **options)
        found = list(in_processes(partial(_flipped, whole), range(flips), workers=2))
        assert {len(one) for one in found} == {2}
        done += len(found)
    measured("files with a flipped bit, six formats", f"{done:,}, 0 processes died")


def _flipped(whole: bytes, seed: int) -> tuple[str, str]:
    draw = np.random.default_rng(seed)
    content = bytearray(whole)
    content[draw.integers(len(content))] ^= 1 << int(draw.integers(8))
    found = []
    for call in (images.decode, partial(images.part, choose=all_of_it)):
        try:
            call(bytes(content), max_pixels=10**6, name="a")
        except images.BadImageError as error:
            found.append(str(error))
        else:
            found.append("accepted")
    return found[0], found[1]


def test_no_file_starts_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow would start one for PostScript, whatever the name of the file."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "gs"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    path = tmp_path / "photo.jpg"
    path.write_bytes(encode(photo(60, 30), "EPS"))
    for call in (images.decode, images.check_header, partial(images.part, choose=all_of_it)):
        with pytest.raises(images.BadImageError, match="no image"):
            call(path, max_pixels=MAX_PIXELS)
    assert not (tmp_path / "started").exists()
    with suppress(OSError), Image.open(path) as image:
        image.load()
    assert (tmp_path / "started").exists(), "this test proves nothing"


def test_what_is_no_file_of_its_own_is_refused_or_passed_over(tmp_path: Path) -> None:
    here = tmp_path / "train" / "all"
    for split, name in (("train", "a.png"), ("train", "b.png"), ("test", "a.png")):
        (tmp_path / split / "all").mkdir(parents=True, exist_ok=True)
        (tmp_path / split / "all" / name).write_bytes(WHOLE)
    (here / "._a.jpg").write_bytes(TABLE["AppleDouble.jpg"].content)
    (here / "folder.jpg").mkdir()
    (here / "circle").symlink_to(tmp_path)
    os.mkfifo(here / "pipe.png")
    (here / "device.png").symlink_to("/dev/zero")
    (here / "nowhere.png").symlink_to("nothing")
    (here / "itself.png").symlink_to("itself.png")
    (here / "of 3 GB.png").touch()
    os.truncate(here / "of 3 GB.png", 3 * 10**9)
    bad = ("device.png", "itself.png", "nowhere.png", "of 3 GB.png", "pipe.png")
    for decoder, augment in (
        ("exact", []),
        ("exact", ["resized_crop"]),
        ("fast", ["resized_crop"]),
    ):
        found = datasets.load(data(tmp_path, decoder=decoder, augment=augment))
        assert found.bad == tuple(f"train/all/{name}" for name in bad)
        assert len(found.train) == 7
    assert found.train.files is not None
    for number in range(2, 7):
        for fast in (False, True):
            said = outcome(found.train.files, fast, number)
            assert isinstance(said, str)
            assert re.search(": not a file$|: more than 1,073,741,824 bytes", said)


def test_names_of_any_bytes(tmp_path: Path) -> None:
    names = [
        b"spaces and [brackets]", b"line\nbreak", b"\x1b[31mred\x1b[0m", "caf\u00e9".encode(),
        "cafe\u0301".encode(), b"\xff\xfe", b"n" * 251, b"$(touch x)`y`", b"'\"", b"-rf", b"%s%n",
    ]  # fmt: skip
    for split in ("train", "test"):
        (tmp_path / split / "all").mkdir(parents=True)
        for name in names:
            (tmp_path / split / "all" / os.fsdecode(name + b".png")).write_bytes(WHOLE)
    before = fingerprint(tmp_path)
    for augment in ([], ["resized_crop"]):
        found: Dataset = datasets.load(data(tmp_path, augment=augment))
        assert len(found.train) == len(names)
        assert not found.bad
    assert fingerprint(tmp_path) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is closed to root")
def test_a_folder_that_is_closed_is_a_sentence(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / split / "all").mkdir(parents=True)
        (tmp_path / split / "all" / "a.png").write_bytes(WHOLE)
    (tmp_path / "train" / "all").chmod(0o400)
    try:
        with pytest.raises(PreflightError, match=r"a\.png: Permission denied"):
            datasets.load(data(tmp_path))
    finally:
        (tmp_path / "train" / "all").chmod(0o700)
        shutil.rmtree(tmp_path / "train")


def test_a_name_that_is_too_long_for_the_disk_is_a_sentence() -> None:
    """A row of somebody's set may name any file."""
    with pytest.raises(PreflightError, match="File name too long"):
        images.decode(Path("n" * 300 + ".png"), max_pixels=MAX_PIXELS)
