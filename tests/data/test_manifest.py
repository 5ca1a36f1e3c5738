"""Images are those that were looked at once, or a sentence names the one that is not."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hostile import JPEG
from photographs import FOLDER
from pictures import encoded as encode
from pictures import fingerprint, folder, photo
from PIL import Image
from shards import shards

from distill.data import datasets, encoded, images
from distill.data.datasets import Dataset
from distill.data.images import BadImageError
from distill.data.loader import Loader
from distill.data.manifest import Recorded
from distill.data.packed import Settings
from distill.data.survey import Survey, survey
from distill.engine.machine import StopRequest
from distill.errors import DamagedError, IdentityError, PreflightError
from distill.pack import pack
from distill.recipe import Data, Recipe
from tests.promises import Measured

TRAIN = tuple(f"train/{c}/{i}.png" for c in ("bee", "cat") for i in range(3))
TEST = ("test/bee/3.png", "test/cat/3.png")
CROP = ["resized_crop"]


def data(root: Path, name: str = "folder", **keys: object) -> Data:
    return Data.model_validate({"name": name, "root": str(root), "image_size": 8, **keys})


def looked_at(data: Data, path: Path, workers: int = 0) -> Survey:
    """Write a manifest, or compare it."""
    return survey(data, path, workers=workers)


def held(root: Path, path: Path, name: str = "folder", **keys: object) -> Dataset:
    return datasets.load(data(root, name, manifest=str(path), **keys))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return folder(tmp_path / "photos", *TRAIN, *TEST)


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_told_of_images(root: Path, tmp_path: Path, workers: int) -> None:
    more = {
        "train/bee/again.png": (root / TRAIN[0]).read_bytes(),
        "train/cat/again.bmp": encode(photo(20, 16, 1), "BMP"),  # the pixels of train/bee/1.png
        "test/cat/known.tif": encode(photo(20, 16, 4), "TIFF"),  # of train/cat/1.png
        "train/cat/ink.jpg": encode(Image.new("CMYK", (30, 30)), "JPEG"),
        "train/cat/deep.png": encode(Image.fromarray(np.uint16([[9, 9], [9, 8]])), "PNG"),
        "train/cat/moving.gif": encode(
            photo(9, 9), "GIF", save_all=True, append_images=[photo(9, 9, 7)]
        ),
        "train/cat/half.jpg": JPEG[:-2],
        "train/cat/none.jpg": b"",
        "test/bee/page.jpg": b"<html>",
    }
    for name, content in more.items():
        (root / name).write_bytes(content)
    before = fingerprint(root)
    path = tmp_path / "images.jsonl"
    found = looked_at(data(root), path, workers)
    assert fingerprint(root) == before
    assert found.images == {"train": 13, "test": 4}
    assert found.size == sum(p.stat().st_size for p in root.rglob("*") if p.is_file())
    half, none = found.bad["train"]
    assert half.startswith("train/cat/half.jpg: image file is truncated")
    assert none == "train/cat/none.jpg: empty"
    assert found.bad["test"] == ["test/bee/page.jpg: no image"]
    assert set(found.repeated) == {
        ("train/bee/again.png", "train/bee/0.png"),
        ("train/cat/again.bmp", "train/bee/1.png"),
    }
    assert found.relabelled == [("train/cat/again.bmp", "train/bee/1.png")]
    assert found.leaked == [("test/cat/known.tif", "train/cat/1.png")]
    assert found.small == 1
    assert found.needed == 8
    assert found.animated == 1
    assert found.kinds["JPEG CMYK"] == found.kinds["PNG I;16"] == found.kinds["GIF P"] == 1
    assert found.classes == {"bee": 4, "cat": 7}
    assert found.changed == []
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 1 + 17 + 1
    for row in lines[1:-1]:
        content = (root / row["name"]).read_bytes()
        assert row["sha256"] == hashlib.sha256(content).hexdigest()
        assert (row["size"], row["split"]) == (len(content), row["name"].partition("/")[0])
        assert row["label"] == row["name"].split("/")[1]
    assert looked_at(data(root), path, workers).changed == []


def test_it_decides_nothing_but_what_is_refused(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "images.jsonl"
    looked_at(data(root), path)
    for augment in ([], CROP):
        plain, checked = (
            datasets.load(data(root, augment=augment)),
            held(root, path, augment=augment),
        )
        assert (plain.content, plain.fingerprint) == (checked.content, checked.fingerprint)
        batches = []
        for dataset in (plain, checked):
            loader = Loader(
                dataset, data(root, augment=augment), batch_size=2, train_seed=0,
                device=torch.device("cpu"),
            )  # fmt: skip
            batches.append(torch.cat([batch.images for batch in loader.epoch(0)]))
            loader.close()
        assert torch.equal(*batches)
    recipe = {
        "data": data(root).model_dump(),
        "student": {"model": "resnet8"},
        "objective": [{"term": "ce"}],
        "optimizer": {"lr": 0.1},
        "train": {"epochs": 1, "batch_size": 2},
    }
    digest = Recipe.model_validate(recipe).digest()
    recipe["data"] |= {"manifest": str(path), "max_bad": 0.5}
    assert Recipe.model_validate(recipe).digest() == digest


def change(root: Path, what: str) -> None:
    match what:
        case "missing":
            (root / TRAIN[1]).unlink()
        case "added":
            shutil.copy(root / TRAIN[1], root / "train/bee/new.png")
        case "longer":
            (root / TRAIN[1]).write_bytes((root / TRAIN[1]).read_bytes() + b"\0")
        case "test image":
            (root / TEST[0]).rename(root / "test/bee/4.png")


@pytest.mark.parametrize(
    ("what", "names"),
    [
        ("missing", ["train image train/bee/1.png is missing"]),
        ("added", ["train image train/bee/new.png was added"]),
        ("longer", ["train image train/bee/1.png has 744 bytes, and had 743"]),
        ("test image", ["test/bee/3.png is missing", "test/bee/4.png was added"]),
    ],
)
def test_images_that_differ_are_refused_by_name(
    root: Path, tmp_path: Path, what: str, names: list[str]
) -> None:
    path = tmp_path / "images.jsonl"
    looked_at(data(root), path)
    before = path.read_bytes()
    change(root, what)
    with pytest.raises(DamagedError) as error:
        held(root, path, augment=CROP)
    for name in names:
        assert name in str(error.value)
    assert str(error.value).splitlines()[0].endswith(f": {len(names)}")
    told = looked_at(data(root), path).changed
    assert len(told) == len(names)
    assert path.read_bytes() == before


def test_classes_that_were_renamed_are_refused(root: Path, tmp_path: Path) -> None:
    """Shards have numbers for classes: who permutes the list of names changes what all say."""
    place = shards(tmp_path / "tars")
    (place / "classes.txt").write_text("bee\ncat\n")
    path = tmp_path / "images.jsonl"
    looked_at(data(place, "webdataset"), path)
    assert held(place, path, "webdataset").classes == ("bee", "cat")
    (place / "classes.txt").write_text("cat\nbee\n")
    with pytest.raises(DamagedError, match="is of class 'cat', and was of 'bee'"):
        held(place, path, "webdataset")


@pytest.mark.promise("R17")
@pytest.mark.parametrize("flips", [100, pytest.param(3000, marks=pytest.mark.soak)])
def test_a_flipped_bit_in_a_photograph_is_found(
    tmp_path: Path, flips: int, measured: Measured
) -> None:
    root = folder(tmp_path / "photos", *TRAIN, *TEST)
    with Image.open(FOLDER / "flower.png") as flower:
        content = encode(flower.convert("RGB"), "JPEG", quality=90)
    for name in (TRAIN[0], TRAIN[1], TEST[0]):
        (root / name).write_bytes(content)
    path = tmp_path / "images.jsonl"
    looked_at(data(root), path)
    plain, checked = datasets.load(data(root, augment=CROP)), held(root, path, augment=CROP)
    draw, silent, found = np.random.default_rng(0), 0, 0
    for _ in range(flips):
        damaged = bytearray(content)
        damaged[draw.integers(len(content))] ^= 1 << int(draw.integers(8))
        (root / TRAIN[1]).write_bytes(damaged)
        assert plain.train.files is not None
        assert checked.train.files is not None
        try:
            encoded.decode(plain.train.files, 1, max_pixels=10**6)
            silent += 1
        except BadImageError:
            pass
        for call in (encoded.decode, partial(encoded.part, choose=lambda w, h: (0, 0, w, h))):
            with pytest.raises(DamagedError, match=r"train/bee/1\.png: its content is not what"):
                call(checked.train.files, 1, max_pixels=10**6)
        found += 1
    assert silent > flips / 3
    measured(
        "flipped bits in a photograph, with a manifest",
        f"{found} of {flips} found; without, {silent} pass as an image",
    )


@pytest.mark.parametrize(("workers", "decoder"), [(0, "exact"), (2, "fast")])
def test_training_stops_at_an_image_that_changed(
    root: Path, tmp_path: Path, workers: int, decoder: str
) -> None:
    path = tmp_path / "images.jsonl"
    looked_at(data(root), path)
    recipe = data(root, augment=CROP, decoder=decoder, manifest=str(path))
    dataset = datasets.load(recipe)
    content = bytearray((root / TRAIN[4]).read_bytes())
    content[-6] ^= 1  # a checksum that Pillow does not look at
    (root / TRAIN[4]).write_bytes(content)
    loader = Loader(
        dataset, recipe, batch_size=2, train_seed=0, device=torch.device("cpu"), workers=workers
    )
    with pytest.raises(DamagedError, match=r"train/cat/1\.png: its content is not what"):
        list(loader.epoch(0))
    loader.close()
    with pytest.raises(DamagedError, match=r"train/cat/1\.png: its content is not what"):
        held(root, path)  # into memory
    assert looked_at(data(root), path).changed == ["train image train/cat/1.png has other content"]


def test_bad_images_that_are_listed_are_not_looked_for_again(root: Path, tmp_path: Path) -> None:
    (root / TRAIN[1]).write_bytes((root / TRAIN[1]).read_bytes()[:-30])  # its header is sound
    path = tmp_path / "images.jsonl"
    assert len(looked_at(data(root), path).bad["train"]) == 1
    with pytest.raises(PreflightError, match=r"cannot be used: 1\n.*train/bee/1.png: .*truncated"):
        held(root, path, augment=CROP)
    keys = {"augment": CROP, "on_bad_image": "skip", "max_bad": 0.5}
    assert datasets.load(data(root, **keys)).bad == ()  # nobody knows yet
    found = held(root, path, **keys)
    assert found.bad == (TRAIN[1],)
    assert found.train_ids.tolist() == [0, 2, 3, 4, 5]
    (root / TRAIN[2]).write_bytes(bytes((root / TRAIN[2]).stat().st_size))
    assert held(root, path, **keys).bad == (TRAIN[1],)  # no header was read


def test_in_shards_rows_and_a_pack(tmp_path: Path) -> None:
    hf = pytest.importorskip("datasets")
    place = shards(tmp_path / "tars")
    path = tmp_path / "tars.jsonl"
    looked_at(data(place, "webdataset"), path)
    found = held(place, path, "webdataset", augment=CROP, shuffle_shards=1)
    loader = Loader(
        found, data(place, "webdataset", augment=CROP, shuffle_shards=1), batch_size=2,
        train_seed=0, device=torch.device("cpu"),
    )  # fmt: skip
    assert len(list(loader.epoch(0))) == 3
    loader.close()
    shard = place / "train-1.tar"
    content = bytearray(shard.read_bytes())
    content[content.index(b"IDAT") + 40] ^= 4
    status = shard.stat()
    shard.write_bytes(content)
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))  # as a disk's own fault leaves it
    with pytest.raises(DamagedError, match=r"train-1\.tar/s0003: its content is not what"):
        held(place, path, "webdataset")

    rows = {
        "image": [{"bytes": encode(photo(9, 9, i), "PNG"), "path": None} for i in range(4)],
        "label": [0, 1, 0, 1],
    }
    features = hf.Features({"image": hf.Image(), "label": hf.ClassLabel(names=["bee", "cat"])})
    split = hf.Dataset.from_dict(rows, features=features)
    hf.DatasetDict(train=split, test=split.select([0, 1])).save_to_disk(str(tmp_path / "rows"))
    path = tmp_path / "rows.jsonl"
    told = looked_at(data(tmp_path / "rows", "hf"), path)
    assert told.leaked == [("test/0", "train/0"), ("test/1", "train/1")]
    assert len(held(tmp_path / "rows", path, "hf").train) == 4

    recipe = Recipe.model_validate(
        {"data": data(folder(tmp_path / "photos", *TRAIN, *TEST)).model_dump(),
         "student": {"model": "resnet8"}, "objective": [{"term": "ce"}], "optimizer": {"lr": 0.1},
         "train": {"epochs": 1, "batch_size": 1}}
    )  # fmt: skip
    pack(recipe, tmp_path / "pack", Settings(size=8), workers=0, stop=StopRequest())
    path = tmp_path / "pack.jsonl"
    looked_at(data(tmp_path / "pack", "webdataset"), path)
    files = held(tmp_path / "pack", path, "webdataset").train.files
    assert isinstance(files, Recorded)
    assert isinstance(files.read(0), bytes)


def test_images_without_labels(tmp_path: Path) -> None:
    root = folder(tmp_path / "set", *TRAIN, *TEST)
    other = folder(tmp_path / "other", *(f"{i}.png" for i in range(9)))
    path = tmp_path / "images.jsonl"
    found = looked_at(data(root, transfer=str(other)), path)
    assert found.images == {"transfer": 9, "test": 2}
    assert found.classes == {"bee": 0, "cat": 0}
    assert len(found.leaked) == 2
    assert len(held(root, path, transfer=str(other)).train) == 9
    (other / "4.png").write_bytes(b"x")
    with pytest.raises(DamagedError, match=r"transfer image 4\.png has 1 bytes"):
        held(root, path, transfer=str(other))


def test_names_of_any_bytes(tmp_path: Path) -> None:
    odd = ["line\nbreak", "caf\u00e9", "cafe\u0301", os.fsdecode(b"\xff"), "\\udcff", "n" * 250]
    root = folder(tmp_path / "photos", *(f"train/bee/{name}.png" for name in odd), *TEST[:1])
    path = tmp_path / "images.jsonl"
    looked_at(data(root), path)
    path.read_text(encoding="utf-8")
    with pytest.raises(DamagedError, match="twice"):  # two names that look the same on paper
        held(root, path)
    (root / "train/bee/\\udcff.png").unlink()
    path.unlink()
    looked_at(data(root), path)
    assert len(held(root, path).train) == 5


def test_a_manifest_is_read_strictly(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "images.jsonl"
    with pytest.raises(PreflightError, match="No such file") as error:
        held(root, path)
    assert "distill check RECIPE --data" in error.value.hint
    looked_at(data(root), path)
    whole = path.read_bytes()
    with pytest.raises(IdentityError, match=r"made with data\.max_pixels 64,000,000"):
        held(root, path, max_pixels=1000)
    for at in range(0, len(whole), 11):
        path.write_bytes(whole[:at] + bytes((whole[at] ^ 4,)) + whole[at + 1 :])
        with pytest.raises((DamagedError, IdentityError)) as damage:
            held(root, path, augment=CROP)
        assert str(damage.value).startswith(str(path))
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        with pytest.raises(DamagedError, match=r"images\.jsonl: "):
            held(root, path, augment=CROP)
    path.write_bytes(whole + b"\n")
    with pytest.raises(DamagedError, match="not those that were written"):
        held(root, path, augment=CROP)
    path.write_bytes(b"[" * 10**6)
    with pytest.raises(DamagedError, match="a line without an end"):
        held(root, path, augment=CROP)
    path.write_bytes(whole.replace(b'"format":1', b'"format":2', 1))
    with pytest.raises(IdentityError, match="written by a newer version"):
        held(root, path, augment=CROP)
    path.unlink()
    path.mkdir()
    with pytest.raises(PreflightError, match="Is a directory"):
        held(root, path)


@pytest.mark.promise("R17")
def test_what_it_costs(tmp_path: Path, measured: Measured) -> None:
    """The hash beside decoding, of a photograph of usual size."""
    with Image.open(FOLDER / "flower.png") as flower:
        large = flower.convert("RGB").resize((500, 375), Image.Resampling.BICUBIC)
    content = encode(large, "JPEG", quality=90)

    def least(call: Callable[[], Any]) -> float:
        times = []
        for _ in range(30):
            began = time.perf_counter()
            call()
            times.append(time.perf_counter() - began)
        return min(times)

    decoding = least(lambda: images.decode(content, max_pixels=10**6))
    hashing = least(lambda: hashlib.sha256(content).digest())
    assert hashing < decoding / 4
    measured(
        "SHA-256 of a photograph, beside decoding it",
        f"{hashing / decoding:.1%} ({len(content) / 1e3:.0f} KB, {decoding * 1e3:.1f} ms)",
    )
