"""Every image of a set read whole once: which are bad, which stand twice, what they are stored as.

Two images are the same where their upright RGB pixels are, whatever files they lie in.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int64, UInt8, UInt64
from numpy import ndarray

from distill import console
from distill.data import datasets, images, manifest, stored
from distill.data.encoded import Split
from distill.data.images import About, BadImageError
from distill.data.manifest import Recorded, Row
from distill.data.workers import in_processes
from distill.errors import IncompatibleError
from distill.recipe import Data

_AT_ONCE = 32  # images that a process is given
_SAY_SECONDS = 10.0
_MOST_NAMED = 1000  # of a list, as plain data
_MOST_WORDS = 1000  # characters of a reason

Pairs = list[tuple[str, str]]


class Survey(NamedTuple):
    """What was found.

    Attributes:
        origin: Where the images lie.
        images: How many each split has.
        size: Bytes of all of them.
        bad: Those that cannot be used, with the reason, by split.
        repeated: Training images that are the same as one before them, and that one.
        relabelled: Those of them that have another class than that one.
        leaked: Test images that are the same as a training image, and that one.
        needed: Pixels that the recipe scales the shorter side of an image to.
        small: How many images have fewer.
        kinds: How many there are of each format and mode, such as JPEG CMYK.
        animated: How many have several frames or pages, of which the first is used.
        classes: How many usable training images each class has, the rarest first.
        changed: What differs from the manifest that there was.
    """

    origin: str
    images: dict[str, int]
    size: int
    bad: dict[str, list[str]]
    repeated: Pairs
    relabelled: Pairs
    leaked: Pairs
    needed: int
    small: int
    kinds: dict[str, int]
    animated: int
    classes: dict[str, int]
    changed: list[str]

    def to_json(self) -> dict[str, Any]:
        """Plain data: of each list its length, and its beginning."""
        found = self._asdict()
        for name in ("repeated", "relabelled", "leaked", "changed"):
            found[name] = _shortened(found[name])
        return {**found, "bad": {split: _shortened(what) for split, what in self.bad.items()}}


class _Split:
    """What is kept of the images of a split while others are read."""

    def __init__(self, split: Split) -> None:
        self.files, self.labels, count = split.files, split.labels, len(split.files)
        self.sums: UInt8[ndarray, "N 32"] = np.zeros((count, 32), np.uint8)
        self.pixels: UInt64[ndarray, " N"] = np.zeros(count, np.uint64)
        self.usable: Bool[ndarray, " N"] = np.zeros(count, np.bool_)
        self.bad: list[str] = []

    def add(self, number: int, row: Row) -> None:
        """Keep what a row says of an image."""
        self.sums[number] = np.frombuffer(bytes.fromhex(row.sha256), np.uint8)
        if row.bad is not None:
            self.bad.append(f"{row.name}: {row.bad}")
            return
        self.pixels[number], self.usable[number] = int(row.pixels, 16), True

    def pairs(
        self, numbers: Int64[ndarray, " n"], of: _Split, firsts: Int64[ndarray, " n"]
    ) -> Pairs:
        """The names of some images, each with that of another."""
        pairs = zip(numbers.tolist(), firsts.tolist(), strict=True)
        return [(self.files.name(one), of.files.name(other)) for one, other in pairs]


def survey(data: Data, path: Path | None, *, workers: int) -> Survey:
    """Read and decode every image of a set, and write or compare its manifest.

    Args:
        data: The images.
        path: The manifest: written if there is none, compared if there is one; None: neither.
        workers: Processes that do it; 0 does it in this one.

    Raises:
        IncompatibleError: If the set is not images in files.
        PreflightError: If files are missing or cannot be read, or a worker was killed.
        DamagedError: If the manifest is altered.
        IdentityError: If it was made with another `data.max_pixels`, or by a newer version.
    """
    splits, classes = _splits(data)
    known, changed = dict[str, Split](), list[str]()
    if path is not None and path.exists():
        known, changed = manifest.match(path, splits, classes, max_pixels=data.max_pixels)
    needed = round((data.image_size or datasets.IMAGE_SIZE) / data.eval_crop)
    found = {name: _Split(split) for name, split in splits.items()}
    size, small, animated, kinds = 0, 0, 0, Counter[str]()
    with _book(None if known else path, splits, data.max_pixels) as write:
        for number, row in _read(splits, classes, data.max_pixels, workers):
            write(row)
            found[row.split].add(number, row)
            size += row.size
            if row.bad is None:
                kinds[f"{row.format} {row.mode}"] += 1
                animated += row.animated
                small += min(row.width, row.height) < needed
    for name, split in known.items():
        assert isinstance(split.files, Recorded)
        changed += [f"{name} image {what}" for what in split.files.altered(found[name].sums)]
    trained = next(found[name] for name in found if name != "test")
    repeated, firsts = _repeated(trained)
    other = trained.labels[repeated] != trained.labels[firsts]
    leaked, sources = _leaked(found["test"], trained)
    counts = np.bincount(
        trained.labels[trained.usable & (trained.labels >= 0)], minlength=len(classes)
    )
    return Survey(
        origin=trained.files.origin,
        images={name: len(split.files) for name, split in splits.items()},
        size=size,
        bad={name: split.bad for name, split in found.items()},
        repeated=trained.pairs(repeated, trained, firsts),
        relabelled=trained.pairs(repeated[other], trained, firsts[other]),
        leaked=found["test"].pairs(leaked, trained, sources),
        needed=needed,
        small=small,
        kinds=dict(kinds.most_common()),
        animated=animated,
        classes=dict(sorted(zip(classes, counts.tolist(), strict=True), key=lambda one: one[1])),
        changed=changed,
    )


def _splits(data: Data) -> tuple[dict[str, Split], tuple[str, ...]]:
    """The images of a recipe by the names that a manifest has for their splits."""
    plain = data.model_copy(update={"manifest": None})
    found = stored.load(plain)
    if found is None:
        raise IncompatibleError(
            f"data.name: {data.name} is a few files that were verified when they were fetched, and "
            "not images in files",
            hint="leave --data out",
        )
    if data.transfer is None:
        return {"train": found.train, "test": found.test}, found.classes
    return {"transfer": stored.load_transfer(plain), "test": found.test}, found.classes


def _book(
    path: Path | None, splits: Mapping[str, Split], max_pixels: int
) -> AbstractContextManager[Callable[[Row], None]]:
    """What takes down the rows: a manifest, or nothing."""
    if path is None:
        return nullcontext(lambda row: None)
    counts = {name: len(split.files) for name, split in splits.items()}
    return manifest.writing(path, max_pixels=max_pixels, images=counts)


def _read(
    splits: Mapping[str, Split], classes: Sequence[str], max_pixels: int, workers: int
) -> Iterator[tuple[int, Row]]:
    """Number and row of every image, those of a split in order."""
    tasks = [
        (name, range(start, min(start + _AT_ONCE, len(split.files))))
        for name, split in splits.items()
        for start in range(0, len(split.files), _AT_ONCE)
    ]
    job = partial(_rows, splits, classes, max_pixels)
    total, done = sum(len(split.files) for split in splits.values()), 0
    began = shown = time.monotonic()
    made = in_processes(job, tasks, workers=min(workers, len(tasks)))
    for (_, numbers), rows in zip(tasks, made, strict=True):
        yield from zip(numbers, rows, strict=True)
        done += len(numbers)
        if time.monotonic() - shown > _SAY_SECONDS:
            shown = time.monotonic()
            left = (shown - began) / done * (total - done)
            console.say(f"{done:,} of {total:,} images  {left:.0f} s left")


def _rows(
    splits: Mapping[str, Split], classes: Sequence[str], max_pixels: int, task: tuple[str, range]
) -> list[Row]:
    """What a manifest says of some images of a split."""
    name, numbers = task
    return [_row(name, splits[name], i, classes, max_pixels) for i in numbers]


def _row(split: Any, of: Split, number: int, classes: Sequence[str], max_pixels: int) -> Row:
    name = of.files.name(number)
    place = f"{of.files.origin}/{name}"
    about, pixels, bad = About(0, 0, "", "", False), "", None
    source = of.files.read(number)
    data = images.stored(source)
    try:
        about, image = images.inspect(data or source, max_pixels=max_pixels, name=place)
        digest = hashlib.sha256(repr(image.size).encode() + image.tobytes())
        pixels = digest.hexdigest()[:16]
    except BadImageError as error:
        bad = manifest.written(str(error).removeprefix(f"{place}: "))[:_MOST_WORDS]
    return Row(
        split=split,
        name=manifest.written(name),
        label=manifest.label_of(of, number, classes),
        size=_length(source) if isinstance(source, Path) else len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        pixels=pixels,
        bad=bad,
        **about._asdict(),
    )


def _length(path: Path) -> int:
    """Bytes of a file; 0 of a link that leads nowhere."""
    with suppress(OSError):
        return path.stat().st_size
    return 0


def _repeated(split: _Split) -> tuple[Int64[ndarray, " n"], Int64[ndarray, " n"]]:
    """The images of a split that are the same as one before them, and the first such one."""
    there = np.flatnonzero(split.usable)
    _, first, which = np.unique(split.pixels[there], return_index=True, return_inverse=True)
    again = first[which] != np.arange(len(there))
    return there[again], there[first[which][again]]


def _leaked(test: _Split, trained: _Split) -> tuple[Int64[ndarray, " n"], Int64[ndarray, " n"]]:
    """The test images that are the same as a training image, and the first such one."""
    there = np.flatnonzero(trained.usable)
    keys, first = np.unique(trained.pixels[there], return_index=True)
    asked = np.flatnonzero(test.usable)
    at = np.searchsorted(keys, test.pixels[asked])
    same = at < len(keys)
    same[same] = keys[at[same]] == test.pixels[asked][same]
    return asked[same], there[first[at[same]]]


def _shortened(found: Sequence[Any]) -> dict[str, Any]:
    return {"count": len(found), "first": list(found[:_MOST_NAMED])}
