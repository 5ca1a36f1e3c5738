"""Published sets: right pixels and labels, or a refusal that names the file."""

from __future__ import annotations

import gzip
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from distill.data import datasets, official
from distill.data.datasets import Dataset
from distill.errors import DamagedError, IncompatibleError, PreflightError, RecipeError
from distill.recipe import Data

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (30, 28, 28), dtype=np.uint8)
LABELS = np.arange(30, dtype=np.uint8) % 10
COLOURS = RNG.integers(0, 256, (30, 3, 32, 32), dtype=np.uint8)


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_fashion_mnist(folder: Path, *, packed: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, rows in (("train", slice(0, 20)), ("t10k", slice(20, 30))):
        for kind, array in (("images-idx3", IMAGES[rows]), ("labels-idx1", LABELS[rows])):
            content, name = idx(array), f"{prefix}-{kind}-ubyte"
            if packed:
                content, name = gzip.compress(content), name + ".gz"
            (folder / name).write_bytes(content)


def write_cifar(folder: Path, files: dict[str, slice], *labels: np.ndarray) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    planes = COLOURS.reshape(30, -1)
    records = np.concatenate([*(column[:, None] for column in labels), planes], axis=1)
    for name, rows in files.items():
        (folder / name).write_bytes(records[rows].astype(np.uint8).tobytes())


def write_cifar10(folder: Path) -> None:
    files = {f"data_batch_{i + 1}.bin": slice(4 * i, 4 * i + 4) for i in range(5)}
    write_cifar(folder, files | {"test_batch.bin": slice(20, 30)}, LABELS)


def load(**settings: object) -> Dataset:
    return datasets.load(Data.model_validate(settings))


def test_digits_are_those_of_scikit_learn() -> None:
    """The file is `np.savez_compressed("digits.npz", images=images, labels=target)`, in uint8."""
    published = load_digits()
    with np.load(Path(official.__file__).with_name("digits.npz")) as shipped:
        assert np.array_equal(shipped["images"], published.images)
        assert np.array_equal(shipped["labels"], published.target)


def test_digits_split() -> None:
    found = load(name="digits")
    published = load_digits()
    assert (len(found.train), len(found.test)) == (900, 897)
    counts = [np.bincount(source.labels, minlength=10) for source in (found.train, found.test)]
    assert np.abs(counts[0] - counts[1]).max() <= 1
    # Merged again class by class, both splits give the images in the order of the file.
    for label in range(10):
        of_class = published.images[published.target == label]
        train, test = (s.pixels[s.labels == label] for s in (found.train, found.test))
        merged = np.empty((len(of_class), 8, 8, 1), np.uint8)
        merged[int(label == 2) :: 2], merged[int(label != 2) :: 2] = train, test
        assert np.array_equal(merged[..., 0], np.round(of_class * 255 / 16))


def test_digits_statistics() -> None:
    found = load(name="digits")
    scaled = found.train.pixels / 255
    assert found.mean == (round(scaled.mean(), 4),) * 3
    assert found.std == (round(scaled.std(), 4),) * 3
    assert (found.image_size, found.classes, found.bad) == (8, tuple("0123456789"), ())


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("folder", ["FashionMNIST/raw", "."])
def test_fashion_mnist(tmp_path: Path, folder: str, packed: bool) -> None:
    write_fashion_mnist(tmp_path / folder, packed=packed)
    found = load(name="fashion-mnist", root=str(tmp_path))
    assert np.array_equal(found.train.pixels, IMAGES[:20, :, :, None])
    assert np.array_equal(found.test.pixels, IMAGES[20:, :, :, None])
    assert np.array_equal(found.train.labels, LABELS[:20])
    assert found.train.labels.dtype == np.int64
    assert (found.image_size, found.classes[0], found.classes[9]) == (
        28,
        "T-shirt/top",
        "Ankle boot",
    )


@pytest.mark.parametrize("folder", ["cifar-10-batches-bin", "."])
def test_cifar10(tmp_path: Path, folder: str) -> None:
    write_cifar10(tmp_path / folder)
    found = load(name="cifar10", root=str(tmp_path))
    assert np.array_equal(found.train.pixels, COLOURS[:20].transpose(0, 2, 3, 1))
    assert np.array_equal(found.test.pixels, COLOURS[20:].transpose(0, 2, 3, 1))
    assert np.array_equal(found.test.labels, LABELS[20:])
    assert found.classes[:2] == ("airplane", "automobile")
    assert found.train.pixels.flags.c_contiguous
    assert found.train.pixels.flags.writeable


def test_cifar100_has_the_fine_labels(tmp_path: Path) -> None:
    fine = np.arange(30) * 3
    files = {"train.bin": slice(0, 20), "test.bin": slice(20, 30)}
    write_cifar(tmp_path / "cifar-100-binary", files, LABELS, fine)
    found = load(name="cifar100", root=str(tmp_path))
    assert np.array_equal(found.train.labels, fine[:20])
    assert np.array_equal(found.train.pixels, COLOURS[:20].transpose(0, 2, 3, 1))
    assert len(set(found.classes)) == 100
    assert list(found.classes) == sorted(found.classes)


def test_class_names_of_the_files_are_used(tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    names = tmp_path / "batches.meta.txt"
    names.write_text("a b c d e f g h i j\n\n")
    assert load(name="cifar10", root=str(tmp_path)).classes == tuple("abcdefghij")
    names.write_text("a b\n")
    with pytest.raises(DamagedError, match=r"batches.meta.txt: 2 class names, expected 10"):
        load(name="cifar10", root=str(tmp_path))


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("fashion-mnist", "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images"),
        ("cifar10", "data_batch_1.bin, data_batch_2.bin"),
        ("cifar100", "train.bin, test.bin not there"),
    ],
)
def test_missing_files_are_named(tmp_path: Path, name: str, missing: str) -> None:
    with pytest.raises(PreflightError, match=missing) as error:
        load(name=name, root=str(tmp_path))
    assert str(tmp_path) in str(error.value)
    assert "data.download: true" in error.value.hint
    with pytest.raises(RecipeError, match=f"data.root: required for {name}"):
        load(name=name)


IDX3 = idx(IMAGES[:20])


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("train-images-idx3-ubyte", b"", "not an IDX file"),
        ("train-images-idx3-ubyte", b"<html>not found</html>", "not an IDX file"),
        ("train-images-idx3-ubyte", idx(LABELS), "not an IDX file"),
        ("train-images-idx3-ubyte", IDX3[:-1], "announces"),
        ("train-images-idx3-ubyte", IDX3 + b"\0", "announces"),
        ("train-images-idx3-ubyte", IDX3[:4] + b"\xff\xff\xff\xff" + IDX3[8:], "announces"),
        ("train-images-idx3-ubyte", idx(IMAGES[:, :27]), "announces"),
        ("train-images-idx3-ubyte", idx(IMAGES[:0]), "announces"),
        ("train-labels-idx1-ubyte", idx(LABELS[:19]), "19 labels for 20 images"),
        ("train-labels-idx1-ubyte", idx(np.full(20, 10, np.uint8)), "label 10, expected 0..9"),
        ("t10k-labels-idx1-ubyte", idx(np.zeros(10_001, np.uint8)), "more than"),
    ],
)
def test_damaged_idx(tmp_path: Path, name: str, content: bytes, what: str) -> None:
    write_fashion_mnist(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DamagedError, match=what) as error:
        load(name="fashion-mnist", root=str(tmp_path))
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    "content",
    [gzip.compress(IDX3)[:-9], b"no gzip", gzip.compress(IDX3)[:4]],
    ids=["cut", "no gzip", "a header's part"],  # gzip notes the second, another in each process
)
def test_damaged_gzip(tmp_path: Path, content: bytes) -> None:
    write_fashion_mnist(tmp_path, packed=True)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(content)
    with pytest.raises(DamagedError, match=r"train-images-idx3-ubyte.gz: damaged or cut short"):
        load(name="fashion-mnist", root=str(tmp_path))


def test_gzip_is_never_unpacked_past_the_published_size(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path, packed=True)
    bomb = gzip.compress(bytes(100_000_000), 1)
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(bomb)
    tracemalloc.start()
    with pytest.raises(DamagedError, match="more than the 60,008 bytes"):
        load(name="fashion-mnist", root=str(tmp_path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 60_000_000  # the images alone may have 47 million bytes


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "0 bytes are no whole number"),
        (bytes(3072), "3,072 bytes are no whole number of 3073-byte records"),
        (b"\x0a" + bytes(3072), "label 10"),
    ],
)
def test_damaged_cifar(tmp_path: Path, content: bytes, what: str) -> None:
    write_cifar10(tmp_path)
    (tmp_path / "data_batch_1.bin").write_bytes(content)
    with pytest.raises(DamagedError, match=what):
        load(name="cifar10", root=str(tmp_path))


def test_images_in_memory_are_resized_once() -> None:
    stored, found = load(name="digits"), load(name="digits", image_size=20, eval_crop=0.8)
    assert found.train.pixels.shape == (900, 20, 20, 1)
    for i in (0, 450, 899):
        image = Image.fromarray(stored.train.pixels[i, :, :, 0])
        larger = image.resize((25, 25), Image.Resampling.BILINEAR).crop((2, 2, 22, 22))
        difference = found.train.pixels[i, :, :, 0].astype(int) - np.asarray(larger)
        assert np.abs(difference).max() <= 1
    assert found.fingerprint == stored.fingerprint


@pytest.mark.parametrize("size", [10_000_000, 10**12])
def test_images_that_do_not_fit_in_memory(size: int) -> None:
    with pytest.raises(PreflightError, match="do not fit in memory"):
        load(name="digits", image_size=size)


def test_root_in_the_home_of_nobody() -> None:
    with pytest.raises(RecipeError, match=r"data.root: ~no-such-user/x: no such home directory"):
        load(name="cifar10", root="~no-such-user/x")


def test_ids_follow_the_recipe() -> None:
    found = load(name="digits", val=0.1, fraction=0.5, seed=3)
    assert len(found.val_ids) == pytest.approx(90, abs=5)
    assert len(found.train_ids) == pytest.approx(405, abs=5)
    assert len(np.intersect1d(found.val_ids, found.train_ids)) == 0
    whole = load(name="digits")
    assert np.array_equal(whole.train_ids, np.arange(900))
    assert len(whole.val_ids) == 0


def test_fingerprint_changes_with_every_part(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path)
    first = load(name="fashion-mnist", root=str(tmp_path)).fingerprint
    assert load(name="fashion-mnist", root=str(tmp_path), val=0.2).fingerprint == first
    found = {first}
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        path = tmp_path / f"{name}-ubyte"
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        found.add(load(name="fashion-mnist", root=str(tmp_path)).fingerprint)
        path.write_bytes(content)
    assert len(found) == 5
    assert all(len(fingerprint) == 64 for fingerprint in found)


def test_imports_no_torch() -> None:
    code = "import sys, distill.data.datasets; print({'torch', 'torchvision'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_classes_that_are_left_out_are_trained_on_by_nobody() -> None:
    whole, part = load(name="digits", val=0.1), load(name="digits", val=0.1, omit=["3", "8"])
    assert set(part.train.labels[part.train_ids]) == set(range(10)) - {3, 8}
    kept = ~np.isin(whole.train.labels[whole.train_ids], [3, 8])
    np.testing.assert_array_equal(part.train_ids, whole.train_ids[kept])
    np.testing.assert_array_equal(part.val_ids, whole.val_ids)  # choices are for all classes
    assert part.classes == whole.classes
    with pytest.raises(IncompatibleError, match="no class 'thre'"):
        load(name="digits", omit=["thre"])
    with pytest.raises(IncompatibleError, match="leaves no image"):
        load(name="digits", omit=[str(i) for i in range(10)])


def test_a_set_of_the_hub_without_the_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(PreflightError, match="hf/a/b: needs a package") as error:
        datasets.load(Data(name="hf/a/b"))
    assert error.value.hint == 'pip install ".[hf]"'


@pytest.mark.parametrize("name", ["hf/a/b", "hf/a-b/c.d", "hf/mnist", "hf/a/b/config"])
def test_names_of_the_hub(name: str) -> None:
    assert Data.model_validate({"name": name}).name == name


@pytest.mark.parametrize("name", ["hf/", "hf/a/b/c/d", "hf//x", "hub/a/b", 7])
def test_names_that_are_none(name: object) -> None:
    with pytest.raises(ValueError, match="Input should be"):
        Data.model_validate({"name": name})
