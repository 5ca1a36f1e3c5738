"""Data sets: images and labels in a fixed order, and which of them are trained on."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from jaxtyping import Int64, UInt8
from PIL import Image

from distill import component
from distill.data import controls, encoded, images, official, splits, stored
from distill.data.encoded import Encoded, Split, Stored
from distill.data.official import Triple
from distill.data.stored import sha256
from distill.errors import IncompatibleError, PreflightError
from distill.recipe import Data

T = TypeVar("T")

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)
IMAGE_SIZE = 224  # pixels; what most pretrained networks were trained at
_MEMORY = 2**30  # bytes of decoded images up to which a folder is kept in memory
_LISTED = 10  # bad files that an error names


@dataclass(frozen=True, eq=False)
class Source:
    """All images of one official split, in canonical order; a sample's id is its position here.

    Attributes:
        labels: Class of every image; −1 where it is not known.
        pixels: The images, square and ready for evaluation; None if they stay in files.
        files: The images as they are stored; None for a published set.
    """

    labels: Int64[np.ndarray, " N"]
    pixels: UInt8[np.ndarray, "N H W C"] | None
    files: Encoded | None

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class Dataset:
    """A training and a test split over the same classes.

    Attributes:
        name: The recipe's name for it.
        classes: Names; a label is a position here.
        train: The training split, whole.
        test: The split that results are reported on.
        train_ids: Sorted ids of `train` that are trained on.
        val_ids: Sorted ids of `train` that are held out for choices.
        image_size: Pixels of the sides of an image.
        mean: Of the training images in [0, 1], by channel; ImageNet's for a folder.
        std: Standard deviation, likewise.
        max_pixels: An image file with more counts as bad.
        bad: Names of the training files that were left out because they are bad.
        content: SHA-256 of the images: the pixels of a published set, or the names and sizes of
            stored images; and of the control, where there is one.
        fingerprint: SHA-256 of the name, the classes, the labels and the content.
    """

    name: str
    classes: tuple[str, ...]
    train: Source
    test: Source
    train_ids: Int64[np.ndarray, " T"]
    val_ids: Int64[np.ndarray, " V"]
    image_size: int
    mean: Triple
    std: Triple
    max_pixels: int
    bad: tuple[str, ...]
    content: str
    fingerprint: str

    @property
    def labelled(self) -> bool:
        """Whether the classes of the training images are known."""
        return bool((self.train.labels >= 0).all())


def load(data: Data) -> Dataset:
    """The data set that a recipe's `data` section describes.

    Raises:
        RecipeError: If the section lacks a key that this set needs.
        IncompatibleError: If it leaves out a class that the set has not, or all of them, or
            permutes the pixels of images that stay in their files.
        PreflightError: If files are missing, misplaced or bad images.
        DamagedError: If a file of a published set is not in its format.
    """
    if (found := stored.load(data)) is not None:
        dataset = _load_stored(data, found)
    else:
        published = official.read(data.name, stored.root(data), download=data.download)
        dataset = _load_official(data, published)
    if data.transfer is not None:
        dataset = _transferred(dataset, data)
    return dataset if data.control is None else _controlled(dataset, data, data.control)


def _load_official(data: Data, published: official.Official) -> Dataset:
    train, test = published.train, published.test
    size = data.image_size or train.pixels.shape[1]
    train_ids, val_ids = _ids(data, train.labels, published.classes)
    of_pixels = sha256(
        part for split in (train, test) for part in (str(split.pixels.shape), split.pixels.data)
    )
    return Dataset(
        name=data.name,
        classes=published.classes,
        train=Source(train.labels, _resized(train.pixels, size, data.eval_crop), None),
        test=Source(test.labels, _resized(test.pixels, size, data.eval_crop), None),
        train_ids=train_ids,
        val_ids=val_ids,
        image_size=size,
        mean=published.mean,
        std=published.std,
        max_pixels=data.max_pixels,
        bad=(),
        content=of_pixels,
        fingerprint=_fingerprint(data.name, published.classes, [train, test], of_pixels),
    )


def _load_stored(data: Data, found: Stored) -> Dataset:
    size = data.image_size or IMAGE_SIZE
    in_memory = _in_memory(data, len(found.train.files) + len(found.test.files), size)
    train, bad_train = _open(found.train, data, in_memory)
    test, bad_test = _open(found.test, data, in_memory)
    refuse_bad(found.origin, data, len(train), bad_train.values(), bad_test.values())
    train_ids, val_ids = _ids(data, train.labels, found.classes, bad_train)
    used = np.bincount(train.labels[train_ids], minlength=len(found.classes))
    lost = [found.classes[i] for i in np.flatnonzero(used == 0)]
    if data.transfer is None and (lost := [name for name in lost if name not in data.omit]):
        names = ", ".join(map(repr, lost))
        raise PreflightError(f"{found.origin}: classes without a usable training image: {names}")
    of_images = stored.content(found)
    return Dataset(
        name=data.name,
        classes=found.classes,
        train=train,
        test=test,
        train_ids=train_ids,
        val_ids=val_ids,
        image_size=size,
        mean=_IMAGENET_MEAN,
        std=_IMAGENET_STD,
        max_pixels=data.max_pixels,
        bad=tuple(found.train.files.name(i) for i in bad_train),
        content=of_images,
        fingerprint=_fingerprint(data.name, found.classes, [train, test], of_images),
    )


def _transferred(dataset: Dataset, data: Data) -> Dataset:
    """The data set with other images, which have no labels, for its training split."""
    found = stored.load_transfer(data)
    train, bad = _open(found, data, _in_memory(data, len(found.files), dataset.image_size))
    refuse_bad(found.files.origin, data, len(train), bad.values(), ())
    ids = splits.subset(np.arange(len(train)), train.labels, data.fraction, data.seed)
    both = sha256([dataset.content, *found.content])
    return replace(
        dataset,
        train=train,
        train_ids=np.setdiff1d(ids, np.array(list(bad), np.int64)),
        val_ids=np.arange(0),
        bad=tuple(found.files.name(i) for i in bad),
        content=both,
        fingerprint=sha256([dataset.fingerprint, both]),
    )


def _controlled(dataset: Dataset, data: Data, control: str) -> Dataset:
    """The data set without what the control takes away; to whoever compares, another one."""
    both = sha256([dataset.content, control, str(data.seed)])
    dataset = replace(dataset, content=both, fingerprint=sha256([dataset.fingerprint, both]))
    if control == "permuted-labels":
        labels = controls.permuted_labels(dataset.train.labels, dataset.train_ids, seed=data.seed)
        return replace(dataset, train=replace(dataset.train, labels=labels))
    train, test = (_rearranged(source, data.seed) for source in (dataset.train, dataset.test))
    return replace(dataset, train=train, test=test)


def _rearranged(source: Source, seed: int) -> Source:
    if source.pixels is None:
        raise IncompatibleError(
            "data.control: permuted-pixels needs images in memory, and these stay in their files",
            hint="a smaller data.image_size, and no resized_crop among data.augment",
        )
    return replace(source, pixels=controls.permuted_pixels(source.pixels, seed=seed))


def _in_memory(data: Data, images: int, size: int) -> int | None:
    """`size` if so many images are decoded into memory once, None if they stay in their files."""
    # A random crop is cut from the whole image, so the files must stay at hand for it.
    cropped = any(augmentation.name == "resized_crop" for augmentation in data.augment)
    return size if images * size * size * 3 <= _MEMORY and not cropped else None


def _fingerprint(
    name: str, classes: tuple[str, ...], splits: Sequence[Source | official.Split], content: str
) -> str:
    parts = (np.ascontiguousarray(split.labels, "<i8").data for split in splits)
    return sha256([json.dumps([name, classes]), *parts, content])


def _ids(
    data: Data,
    labels: Int64[np.ndarray, " N"],
    classes: Sequence[str],
    bad: Collection[int] = (),
) -> tuple[Int64[np.ndarray, " T"], Int64[np.ndarray, " V"]]:
    """Sorted ids to train on and to validate on. What is left out changes no other image's place.

    Raises:
        IncompatibleError: If a class that is left out is unknown, or none is left.
    """
    for name in data.omit:
        if name not in classes:
            known = component.suggestion(name, classes)
            raise IncompatibleError(f"data.omit: the data has no class {name!r}{known}")
    train, val = splits.held_out(labels, data.val, data.seed)
    train = splits.subset(train, labels, data.fraction, data.seed)
    if data.omit:
        omitted = [i for i, name in enumerate(classes) if name in data.omit]
        train = train[~np.isin(labels[train], omitted)]
        if not len(train):
            raise IncompatibleError("data.omit: leaves no image to train on")
    if bad:
        bad_ids = np.array(list(bad), np.int64)
        train, val = np.setdiff1d(train, bad_ids), np.setdiff1d(val, bad_ids)
    return train, val


def _resized(
    pixels: UInt8[np.ndarray, "N H W C"], size: int, crop: float
) -> UInt8[np.ndarray, "N size size C"]:
    """The evaluation view of every image; the images themselves where that changes nothing."""
    count, height, width, channels = pixels.shape
    if (height, width, crop) == (size, size, 1.0):
        return pixels
    try:
        views = np.empty((count, size, size, channels), np.uint8)
    except (MemoryError, ValueError):
        raise PreflightError(
            f"data.image_size: {count:,} images of {size:,} x {size:,} pixels do not fit in memory",
            hint="leave it out: a network scales its images itself",
        ) from None

    def resize(i: int) -> None:
        image = Image.fromarray(pixels[i].squeeze(axis=-1) if channels == 1 else pixels[i])
        views[i] = images.evaluation_view(image, size=size, crop=crop).reshape(views[i].shape)

    for _ in _parallel(resize, count):
        pass
    return views


def _open(split: Split, data: Data, size: int | None) -> tuple[Source, dict[int, str]]:
    """A split of stored images, and what is wrong with its bad images by id.

    With a `size` every image is decoded into memory; without, only headers are read.
    """
    files, most = split.files, data.max_pixels
    pixels = None if size is None else np.zeros((len(files), size, size, 3), np.uint8)
    suspects = files.suspects(most) if pixels is None else range(len(files))

    def fault(i: int) -> str | None:
        number = int(suspects[i])
        try:
            if pixels is None or size is None:
                encoded.check_header(files, number, max_pixels=most)
            else:
                image = encoded.decode(files, number, max_pixels=most)
                pixels[number] = images.evaluation_view(image, size=size, crop=data.eval_crop)
        except images.BadImageError as error:
            return str(error)
        return None

    found = enumerate(_parallel(fault, len(suspects)))
    faults = {int(suspects[i]): what for i, what in found if what is not None}
    return Source(split.labels, pixels, files), faults


def refuse_bad(
    origin: str, data: Data, count: int, train: Collection[str], test: Collection[str]
) -> None:
    """Refuse bad images, unless they may be skipped and are not many.

    Args:
        origin: Where they lie.
        data: Says what may be skipped.
        count: Training images in all.
        train: What is wrong with those that are bad.
        test: Likewise.

    Raises:
        PreflightError: A list of those that are in the way.
    """
    most = int(round(data.max_bad * count, 6))  # 0.29 of 100 are 29
    many = len(train) > (most if data.on_bad_image == "skip" else 0)
    bad = [*test, *(train if many else ())]
    if not bad:
        return
    more = [f"and {len(bad) - _LISTED:,} more"] if len(bad) > _LISTED else []
    lines = [f"{origin}: images that cannot be used: {len(bad):,}", *bad[:_LISTED]]
    hint = "mend or remove them"
    if test:
        hint += "; images of the test split are never skipped"
    if many and data.on_bad_image == "skip":
        hint += f"; data.max_bad {data.max_bad:g} allows {most:,} of {count:,} training images"
    elif many:
        hint += "; `data.on_bad_image: skip` leaves bad training images out"
    raise PreflightError("\n  ".join([*lines, *more]), hint=hint)


def _parallel(job: Callable[[int], T], count: int) -> Iterator[T]:
    """`job(0), ..., job(count - 1)`, in threads: Pillow lets go of the interpreter lock."""
    size = max(16, count // 1024)  # each chunk waits as an object of some kilobytes
    chunks = [range(start, min(start + size, count)) for start in range(0, count, size)]
    pool = ThreadPoolExecutor()
    try:
        for results in pool.map(lambda chunk: [job(i) for i in chunk], chunks):
            yield from results
    finally:
        pool.shutdown(cancel_futures=True)
