"""Readers of published data sets in their own file formats."""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from distill.data.download import Remote, fetch
from distill.errors import DamagedError, PreflightError, RecipeError

Triple = tuple[float, float, float]


class Split(NamedTuple):
    """Images and their classes, in the order of the files."""

    pixels: UInt8[np.ndarray, "N H W C"]
    labels: Int[np.ndarray, " N"]


class Official(NamedTuple):
    """A published set; mean and std are those of the training images in [0, 1]."""

    classes: tuple[str, ...]
    mean: Triple
    std: Triple
    train: Split
    test: Split


class Files(NamedTuple):
    """The files of a published set, and where they come from."""

    folder: str  # below data.root
    train: tuple[str, ...]
    test: tuple[str, ...]
    remotes: tuple[Remote, ...]


_ZALANDO = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
FASHION_MNIST = Files(
    folder="FashionMNIST/raw",
    train=("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    test=("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
    remotes=(
        Remote(
            _ZALANDO + "train-images-idx3-ubyte.gz",
            "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        ),
        Remote(
            _ZALANDO + "train-labels-idx1-ubyte.gz",
            "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        ),
        Remote(
            _ZALANDO + "t10k-images-idx3-ubyte.gz",
            "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        ),
        Remote(
            _ZALANDO + "t10k-labels-idx1-ubyte.gz",
            "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        ),
    ),
)
CIFAR10 = Files(
    folder="cifar-10-batches-bin",
    train=tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
    test=("test_batch.bin",),
    remotes=(
        Remote(
            "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
            "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        ),
    ),
)
CIFAR100 = Files(
    folder="cifar-100-binary",
    train=("train.bin",),
    test=("test.bin",),
    remotes=(
        Remote(
            "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
            "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
        ),
    ),
)
_FASHION = "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot"
_CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck"
_CIFAR100 = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus
    butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab
    crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard
    lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom
    oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
    possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake
    spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor
    train trout tulip turtle wardrobe whale willow_tree wolf woman worm
    """


def read(name: str, root: Path | None, *, download: bool) -> Official:
    """The published set `name`, downloaded to `root` first if it is not there and may be.

    Raises:
        RecipeError: If the set has files and no `root` says where.
        PreflightError: If files are missing or cannot be read.
        DamagedError: If a file is not in its format.
    """
    if name == "digits":
        return _digits()
    if root is None:
        raise RecipeError(f"data.root: required for {name}")
    if name == "fashion-mnist":
        return _fashion_mnist(locate(FASHION_MNIST, root, download=download))
    if name == "cifar10":
        return _cifar10(locate(CIFAR10, root, download=download))
    return _cifar100(locate(CIFAR100, root, download=download))


def _digits() -> Official:
    """The 1,797 handwritten digits that lie in this package (digits.LICENSE.txt).

    They come without a split. Here the images of each class go in turn, in the order of the file,
    to train and test; train gets the first, but for class 2, so that it has 900 images and test
    897, and no class differs by more than one. The values 0..16 become round(255 / 16 * value).
    """
    with np.load(Path(__file__).with_name("digits.npz"), allow_pickle=False) as archive:
        values, labels = archive["images"].astype(np.int64), archive["labels"].astype(np.int64)
    pixels = ((values * 255 + 8) // 16).astype(np.uint8)[..., None]
    is_train = np.empty(len(labels), dtype=bool)
    for label in range(10):
        of_class = np.flatnonzero(labels == label)
        is_train[of_class] = np.arange(len(of_class)) % 2 == (label == 2)
    return Official(
        classes=tuple("0123456789"),
        mean=(0.3048,) * 3,
        std=(0.3759,) * 3,
        train=Split(pixels[is_train], labels[is_train]),
        test=Split(pixels[~is_train], labels[~is_train]),
    )


def _fashion_mnist(found: dict[str, Path]) -> Official:
    def split(names: tuple[str, ...], size: int) -> Split:
        images, labels = (found[name] for name in names)
        pixels = _idx(images, most=(size, 28, 28))[..., None]
        return _checked(Split(pixels, _idx(labels, most=(size,)).astype(np.int64)), 10, labels)

    return Official(
        classes=tuple(_FASHION.split(",")),
        mean=(0.2860,) * 3,
        std=(0.3530,) * 3,
        train=split(FASHION_MNIST.train, 60_000),
        test=split(FASHION_MNIST.test, 10_000),
    )


def _cifar10(found: dict[str, Path]) -> Official:
    train, test = ([found[name] for name in names] for names in (CIFAR10.train, CIFAR10.test))
    return Official(
        classes=_class_names(test[0].with_name("batches.meta.txt"), _CIFAR10),
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        train=_cifar(train, num_classes=10, label_bytes=1),
        test=_cifar(test, num_classes=10, label_bytes=1),
    )


def _cifar100(found: dict[str, Path]) -> Official:
    train, test = ([found[name] for name in names] for names in (CIFAR100.train, CIFAR100.test))
    return Official(
        classes=_class_names(test[0].with_name("fine_label_names.txt"), _CIFAR100),
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
        train=_cifar(train, num_classes=100, label_bytes=2),
        test=_cifar(test, num_classes=100, label_bytes=2),
    )


def _cifar(paths: Sequence[Path], *, num_classes: int, label_bytes: int) -> Split:
    """The records of CIFAR's binary files: labels, then planes of red, green and blue.

    The last label byte counts; CIFAR-100 has its coarse label before the fine one.
    """
    record = label_bytes + 3 * 32 * 32
    parts = []
    for path in paths:
        content = _content(path, most=50_000 * record)
        if not content or len(content) % record:
            raise DamagedError(
                f"{path}: {len(content):,} bytes are no whole number of {record}-byte records"
            )
        parts.append(np.frombuffer(content, np.uint8).reshape(-1, record))
    records = np.concatenate(parts)
    planes = records[:, label_bytes:].reshape(-1, 3, 32, 32)
    labels = records[:, label_bytes - 1].astype(np.int64)
    pixels = np.ascontiguousarray(planes.transpose(0, 2, 3, 1))
    return _checked(Split(pixels, labels), num_classes, paths[0])


def _class_names(path: Path, published: str) -> tuple[str, ...]:
    """The class names that stand in `path`, or those published with the set without such a file."""
    names = published.split()
    if path.is_file():
        listed = _content(path, most=100_000).decode(errors="replace").split()
        if len(listed) != len(names):
            raise DamagedError(f"{path}: {len(listed)} class names, expected {len(names)}")
        names = listed
    return tuple(names)


def locate(files: Files, root: Path, *, download: bool) -> dict[str, Path]:
    """The path of every file by name, in `root / files.folder` or in `root`, as it is or as .gz.

    Raises:
        PreflightError: If a file is missing and `download` is off, or downloading failed.
        DamagedError: If a download is not what was published.
    """
    home = root / files.folder
    names = (*files.train, *files.test)
    found = _present(names, home, root)
    if download and len(found) < len(names):
        fetch(files.remotes, home)
        found = _present(names, home, root)
    if missing := [name for name in names if name not in found]:
        raise PreflightError(
            f"{home}: {', '.join(missing)} not there",
            hint=f"`data.download: true` fetches from {files.remotes[0].url.rpartition('/')[0]}/, "
            f"or put the files there",
        )
    return found


def _present(names: Sequence[str], *folders: Path) -> dict[str, Path]:
    found = {}
    for name in names:
        candidates = [folder / (name + suffix) for folder in folders for suffix in ("", ".gz")]
        if present := [path for path in candidates if path.is_file()]:
            found[name] = present[0]
    return found


def _idx(path: Path, *, most: tuple[int, ...]) -> UInt8[np.ndarray, ...]:
    """The bytes of an IDX file: at most `most[0]` rows, their shape exactly `most[1:]`."""
    header = 4 + 4 * len(most)
    content = _content(path, most=header + math.prod(most))
    if len(content) < header or content[:4] != bytes((0, 0, 8, len(most))):
        raise DamagedError(f"{path}: not an IDX file of unsigned bytes in {len(most)} dimensions")
    shape = tuple(int(n) for n in np.frombuffer(content, ">u4", len(most), offset=4))
    if shape[1:] != most[1:] or not shape[0] or len(content) != header + math.prod(shape):
        raise DamagedError(
            f"{path}: {len(content) - header:,} bytes after a header that announces {shape}, "
            f"expected rows of shape {most[1:]}"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy()


def _content(path: Path, *, most: int) -> bytes:
    """All bytes of a file, unpacked if its name ends in .gz; never more than `most`."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read(most + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DamagedError(f"{path}: damaged or cut short: {error}") from None
    except OSError as error:
        raise PreflightError(f"{path}: {error.strerror or error}") from None
    if len(content) > most:
        raise DamagedError(f"{path}: more than the {most:,} bytes of the published file")
    return content


def _checked(split: Split, num_classes: int, path: Path) -> Split:
    if len(split.pixels) != len(split.labels):
        raise DamagedError(f"{path}: {len(split.labels):,} labels for {len(split.pixels):,} images")
    if split.labels.max() >= num_classes:
        raise DamagedError(f"{path}: label {split.labels.max()}, expected 0..{num_classes - 1}")
    return split
