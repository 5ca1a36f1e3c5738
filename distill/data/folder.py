"""A folder of images with one folder a class: what lies in it, in an order that never changes."""

from __future__ import annotations

import csv
import os
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64
from numpy import ndarray

from distill.data.encoded import Ids
from distill.errors import PreflightError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
_LISTED = 10  # problems that an error names
_LAYOUT = (
    "images lie in train/CLASS/ and test/CLASS/ (or val/CLASS/), "
    "or in CLASS/ with data.split_file saying which is which"
)


class Entry(NamedTuple):
    """An image file."""

    name: str  # relative to the root, with forward slashes
    label: str  # its class folder
    size: int  # bytes


class Images:
    """Image files below a root, in order: an `Encoded` whose names are one string of bytes.

    A million Python objects would take some 300 bytes each, in every process.

    Attributes:
        origin: The root.
        checked: False: a file says nothing of what it was.
        labels: The class folders of the images, in the order in which they come first.

    Args:
        root: What names are relative to.
        entries: The files.
    """

    checked = False

    def __init__(self, root: Path, entries: Iterable[Entry]) -> None:
        names, ends, sizes, numbers = bytearray(), array("q"), array("q"), array("i")
        labels: dict[str, int] = {}
        for entry in entries:
            names += os.fsencode(entry.name)
            ends.append(len(names))
            sizes.append(entry.size)
            numbers.append(labels.setdefault(entry.label, len(labels)))
        self.origin = str(root)
        self.labels = tuple(labels)
        self._names = names
        self._ends, self._sizes = np.asarray(ends), np.asarray(sizes)
        self._numbers = np.asarray(numbers)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, number: int) -> Entry:
        label = self.labels[self._numbers[number]]
        return Entry(self.name(number), label, int(self._sizes[number]))

    def __iter__(self) -> Iterator[Entry]:
        return map(self.__getitem__, range(len(self)))

    def name(self, number: int) -> str:
        """The name of a file below the root."""
        start = self._ends[number - 1] if number else 0
        return os.fsdecode(bytes(self._names[start : self._ends[number]]))

    def read(self, number: int) -> Path:
        """The file."""
        return Path(self.origin, self.name(number))

    def ahead(self, batches: Iterable[Ids]) -> Iterable[Ids]:
        """The batches as they are: a file is there or not."""
        return batches

    def suspects(self, max_pixels: int) -> Sequence[int]:
        """All: nothing is known of a file before it is opened."""
        return range(len(self))

    def sizes(self) -> Int64[ndarray, " N"]:
        """Bytes of every file."""
        return self._sizes

    def classes(self, names: Sequence[str]) -> Int64[ndarray, " N"]:
        """The class of every image as a position in `names`; −1 where it is not there."""
        place = {name: i for i, name in enumerate(names)}
        found: ndarray = np.array([place.get(label, -1) for label in self.labels], np.int64)
        return np.asarray(found[self._numbers])


class Folder(NamedTuple):
    """The classes, sorted, and the image files of both splits, sorted by name."""

    classes: tuple[str, ...]
    train: Images
    test: Images


def scan(root: Path, split_file: str | None, *, labelled: bool = True) -> Folder:
    """The image files below `root`, without opening any.

    Splits are `root/train/CLASS/` and `root/test/CLASS/` (`val` or `validation` where there is no
    `test`), or `root/CLASS/` parted by `split_file`. The classes are those of the training split;
    another split is matched to them by name. Names that start with a dot, and `__MACOSX`, are
    passed over; a class folder may have folders in it.

    Args:
        root: The folder.
        split_file: A CSV file with the header `path,split`, where split is train or test and path
            is relative to `root`; itself relative to `root`.
        labelled: Whether a training split is looked for; without, the classes are the test's.

    Raises:
        PreflightError: If the folder has no such layout, a class folder has no image, or a split
            has a class that the training split lacks.
    """
    if not root.is_dir():
        raise PreflightError(f"{root}: no such folder", hint="see data.root in the recipe")
    if split_file is not None:
        train, test = _split(root / split_file, entries(root, root))
        train = train if labelled else Images(root, ())
    else:
        train = entries(root / "train", root) if labelled else Images(root, ())
        present = [name for name in ("test", "val", "validation") if (root / name).is_dir()]
        if not present:
            raise PreflightError(f"{root}: no test, val or validation folder", hint=_LAYOUT)
        test = entries(root / present[0], root)
    classes = sorted((train or test).labels, key=os.fsencode)
    lacking = set(test.labels) - set(classes)
    unknown = Counter(entry.label for entry in test if entry.label in lacking) if lacking else {}
    if unknown:
        raise PreflightError(
            f"{root}: classes of the test split that the training split lacks: "
            + _listing(f"{name!r} ({count:,} images)" for name, count in unknown.items()),
            hint="class folders are matched by their exact names",
        )
    return Folder(tuple(classes), train, test)


def unlabelled(root: Path) -> Images:
    """The image files anywhere below `root`, sorted by the bytes of their names, without classes.

    Raises:
        PreflightError: If there is none.
    """
    if not root.is_dir():
        raise PreflightError(f"{root}: no such folder", hint="see data.transfer in the recipe")
    files = _files(root, "", set())
    found = Images(root, (Entry(name.removeprefix("/"), "", size) for name, size in files))
    if not found:
        raise PreflightError(
            f"{root}: no image in it", hint=f"known are {' '.join(SUFFIXES)}; see data.transfer"
        )
    return found


def entries(folder: Path, root: Path) -> Images:
    """The images of every class folder in `folder`, sorted by the bytes of their names."""
    if not folder.is_dir():
        raise PreflightError(f"{folder}: no such folder", hint=_LAYOUT)
    resolved = folder.resolve()
    above = {_identity(path) for path in (resolved, *resolved.parents)}
    labels = [item.name for item in _visible(folder) if _is_folder(item)]

    def of_all_classes() -> Iterator[Entry]:
        for label in labels:
            path = folder / label
            _check_class_name(path)
            for name, size in _files(path, path.relative_to(root).as_posix(), above):
                yield Entry(name, label, size)

    images = Images(root, of_all_classes())
    if not images:
        raise PreflightError(f"{folder}: no class folder with an image in it", hint=_LAYOUT)
    if empty := [repr(label) for label in labels if label not in set(images.labels)]:
        raise PreflightError(
            f"{folder}: class folders without an image: {_listing(empty)}",
            hint=f"remove them, or put images there ({' '.join(SUFFIXES)})",
        )
    return images


def _files(folder: Path, prefix: str, above: set[tuple[int, int]]) -> Iterator[tuple[str, int]]:
    """Name and size of the image files in `folder` and below, the names starting with `prefix`.

    They come sorted by the bytes of their names. A link to a folder above itself is not followed.
    """
    identity = _identity(folder)
    if identity in above:
        return
    for item in _visible(folder):
        name = f"{prefix}/{item.name}"
        if _is_folder(item):
            yield from _files(folder / item.name, name, above | {identity})
        elif item.name.lower().endswith(SUFFIXES):
            yield name, _size(item)


def _visible(folder: Path) -> list[os.DirEntry[str]]:
    """What lies in a folder, in the order of the names of all files below it."""
    try:
        with os.scandir(folder) as items:
            found = [i for i in items if not i.name.startswith(".") and i.name != "__MACOSX"]
    except OSError as error:
        raise PreflightError(f"{folder}: {error.strerror}") from None
    return sorted(found, key=lambda i: os.fsencode(i.name + "/" if _is_folder(i) else i.name))


def _is_folder(item: os.DirEntry[str]) -> bool:
    try:
        return item.is_dir()
    except OSError:  # a link that leads in a circle
        return False


def _size(item: os.DirEntry[str]) -> int:
    """Bytes of a file; of a link that leads nowhere 0, so that decoding can name it."""
    try:
        return item.stat().st_size
    except OSError:
        return 0


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _check_class_name(folder: Path) -> None:
    try:
        folder.name.encode()
    except UnicodeEncodeError:
        raise PreflightError(f"{str(folder)!r}: the name of a class must be UTF-8") from None


def _split(path: Path, images: Images) -> tuple[Images, Images]:
    """The images that a split file gives to train and to test; others belong to neither."""
    known = {entry.name for entry in images}
    chosen: dict[str, str] = {}
    problems = []
    for line, name, split in _rows(path):
        if split not in ("train", "test"):
            problems.append(f"line {line}: split must be train or test, got {split!r}")
        elif name not in known:
            problems.append(f"line {line}: no image {name!r} in a class folder")
        elif chosen.setdefault(name, split) != split:
            problems.append(f"line {line}: {name!r} is in both splits")
    if problems:
        raise PreflightError(f"{path}: {_listing(problems)}")
    splits = {
        which: Images(
            Path(images.origin), (entry for entry in images if chosen.get(entry.name) == which)
        )
        for which in ("train", "test")
    }
    if empty := [which for which, found in splits.items() if not found]:
        raise PreflightError(f"{path}: no image for {' and '.join(empty)}")
    return splits["train"], splits["test"]


def _rows(path: Path) -> Iterator[tuple[int, str, str]]:
    """The line, image name and split of every row."""
    try:
        # utf-8-sig: Excel starts a file with a byte-order mark. surrogateescape: names are bytes.
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.DictReader(file)
            if not {"path", "split"} <= set(reader.fieldnames or ()):
                raise PreflightError(f"{path}: the first line must be path,split")
            for row in reader:
                name = PurePosixPath(row["path"] or "").as_posix()  # without a leading ./
                yield reader.line_num, name, (row["split"] or "").strip()
    except csv.Error as error:
        raise PreflightError(f"{path}: not a CSV file: {error}") from None
    except OSError as error:
        if isinstance(error, PreflightError):
            raise
        raise PreflightError(
            f"{path}: {error.strerror}", hint="see data.split_file in the recipe"
        ) from None


def _listing(items: Iterable[str]) -> str:
    items = list(items)
    rest = f" and {len(items) - _LISTED:,} more" if len(items) > _LISTED else ""
    return ", ".join(items[:_LISTED]) + rest
