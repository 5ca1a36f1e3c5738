"""Images in tar shards, in WebDataset's convention, read in any order."""

from __future__ import annotations

import hashlib
import os
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64
from numpy import ndarray

from distill import console, storage
from distill.data import shelf, tar_index
from distill.data.encoded import Ids, Split, Stored
from distill.data.folder import Images
from distill.data.shelf import File, Here, Shelf, There
from distill.data.tar_index import MOST_PIXELS, RECORD, Index, Section
from distill.errors import DamagedError, IdentityError, IncompleteError, PreflightError
from distill.remote import is_remote

TRAIN, TESTS = "train", ("test", "val")
CLASSES, PACK, INDEX = "classes.txt", "pack.json", ".index"

_INDEX = -1  # stands for the index among the numbers of shards
_MOST_OPEN = 256  # shards of a split; more are opened for every image
_SERIAL = 2**26  # bytes of shards up to which one process looks through them
_MOST_WORKERS = 16
_TRIES = 9  # to open a copy that others may remove
_AGAIN = "`distill pack` with the same recipe makes what is missing"
_LAYOUT = (
    "shards are train*.tar and test*.tar (or val*.tar), or *.tar in train/ and test/ (or val/)"
)


class Tars:
    """The images of a split: an `Encoded` that holds two numbers a shard.

    Attributes:
        origin: The place of the shards.
        checked: Whether there are checksums of the images, as in a pack.
        content: SHA-256 of what tells these images from others.
        ends: How many images there are up to the end of every shard.

    Args:
        place: Where the shards lie.
        index: What lies in them.
        ahead: Shards that are needed soon, where they must be fetched.
    """

    def __init__(self, place: Shelf, index: Index, *, ahead: int) -> None:
        self.origin, self.content, self.checked = place.origin, index.content, index.checked
        self._shelf, self._index, self._ahead = place, index, ahead
        self.ends = np.cumsum([shard.images for shard in index.shards], dtype=np.int64)
        self._open: dict[int, int] = {}  # descriptors

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}

    def __del__(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)

    def name(self, number: int) -> str:
        """Shard and key of an image."""
        shard, position = self._place(number)
        section = self._index.shards[shard]
        first = max(position - 1, 0)
        ends = self._records(shard, first, position + 1 - first)["key_end"].tolist()
        start = ends[0] if position else 0
        at = section.end - section.keys + start
        size = min(max(ends[-1] - start, 0), section.keys)  # an altered index may say anything
        key = self._bytes(_INDEX, at, size)
        return f"{section.name}/{os.fsdecode(key)}"

    def read(self, number: int) -> bytes:
        """The bytes of an image.

        Raises:
            DamagedError: If the shard is cut short, or a pack's image is not what was written.
            PreflightError: If the shard cannot be read.
        """
        shard, position = self._place(number)
        ((offset, size, crc32, *_),) = self._records(shard, position, 1).tolist()
        if offset + size > self._index.shards[shard].size:
            raise DamagedError(
                f"{self._index.path}: says that {self.name(number)} lies behind the end of its "
                "shard",
                hint="remove it: it is made again; " + _AGAIN,
            )
        data = self._bytes(shard, offset, size)
        if self._index.checked and zlib.crc32(data) != crc32:
            raise DamagedError(
                f"{self.origin}/{self.name(number)}: its content changed after it was written",
                hint="remove the shard; " + _AGAIN,
            )
        return data

    def suspects(self, max_pixels: int) -> Sequence[int]:
        """The images that are none, or larger, by what the index says."""
        found, first = [], 0
        for section in self._index.sections():
            records = section.records
            width, height = (records[side].astype(np.int64) for side in ("width", "height"))
            bad = (width * height > max_pixels) | (np.minimum(width, height) == 0)
            bad |= np.maximum(width, height) == MOST_PIXELS
            found.append(first + np.flatnonzero(bad))
            first += len(records)
        suspects: list[int] = np.concatenate(found).tolist()
        return suspects

    def ahead(self, batches: Iterable[Ids]) -> Iterable[Ids]:
        """These batches of images; shards that they need are fetched in the background."""
        if self._shelf.keeps_open:
            return batches

        def shards(ids: Ids) -> list[int]:
            found: list[int] = np.unique(np.searchsorted(self.ends, ids, side="right")).tolist()
            return found

        return shelf.ahead(batches, shards, self._path, most=self._ahead)

    def labels(self) -> Int64[ndarray, " N"]:
        """The class of every image."""
        return self._field("label")

    def sizes(self) -> Int64[ndarray, " N"]:
        """Bytes of every image."""
        return self._field("size")

    def _field(self, name: str) -> Int64[ndarray, " N"]:
        found, first = np.empty(len(self), np.int64), 0
        for section in self._index.sections():
            found[first : first + len(section.records)] = section.records[name]
            first += len(section.records)
        return found

    def _place(self, number: int) -> tuple[int, int]:
        """The shard of an image, and its position there."""
        shard = int(np.searchsorted(self.ends, number, side="right"))
        return shard, number - int(self.ends[shard]) + self._index.shards[shard].images

    def _records(self, shard: int, position: int, count: int) -> ndarray:
        at = self._index.shards[shard].start + position * RECORD.itemsize
        return np.frombuffer(self._bytes(_INDEX, at, count * RECORD.itemsize), RECORD)

    def _bytes(self, shard: int, offset: int, size: int) -> bytes:
        """Bytes of a shard, or of the index."""
        descriptor = self._open.get(shard)
        own = descriptor is None  # by this call, so that it closes it: threads share the others
        try:
            if descriptor is None:
                descriptor = self._opened(shard)
                if len(self._open) < _MOST_OPEN and (shard == _INDEX or self._shelf.keeps_open):
                    own = self._open.setdefault(shard, descriptor) != descriptor
            try:
                data = os.pread(descriptor, size, offset)
            finally:
                if own:
                    os.close(descriptor)
        except OSError as error:
            if isinstance(error, PreflightError):
                raise
            raise PreflightError(f"{self._path(shard)}: {error.strerror}") from None
        if len(data) < size:
            raise DamagedError(f"{self._path(shard)}: cut short since it was looked through")
        return data

    def _opened(self, shard: int) -> int:
        for _ in range(_TRIES - 1):
            with suppress(FileNotFoundError):  # a copy that had to make room just now
                return os.open(self._path(shard), os.O_RDONLY)
        return os.open(self._path(shard), os.O_RDONLY)

    def _path(self, shard: int) -> Path:
        if shard == _INDEX:
            return self._index.path
        return self._shelf.path(self._index.shards[shard].name)


def load(root: str, *, labelled: bool = True, mixed: int | None = None) -> Stored:
    """The images in the shards at a place.

    Splits are `train*.tar` and `test*.tar` there (`val*.tar` where there is no test), or all tars
    in a folder `train`, `test` or `val`. Names of classes stand in `classes.txt`, one a line;
    without it they are the numbers from 0.

    Args:
        root: A folder, or an address such as s3://bucket/folder.
        labelled: Whether a training split is looked for.
        mixed: Shards whose images an epoch mixes; must be known of an address.

    Raises:
        PreflightError: If shards are missing or cannot be read, or a sample is not whole.
        DamagedError: If a shard or the index of a pack is altered or cut short.
        IncompleteError: If it is a pack that is not finished.
        IncompatibleError: If copies of so many shards may not lie here.
    """
    place: Here | There = There(root) if is_remote(root) else Here(Path(root))
    if isinstance(place, Here) and not Path(root).is_dir():
        raise PreflightError(f"{root}: no such folder", hint="see data.root in the recipe")
    files = place.files()
    ahead = 2 * (mixed or 1)  # those that are read, and those that come next
    if isinstance(place, There):
        sizes = sorted(file.size for name, file in files.items() if name.endswith(".tar"))
        place.require_room(sum(sizes[-ahead - 1 :]))
    if PACK in files:
        indexes = {split: _index_of_pack(place, split, files) for split in (TRAIN, TESTS[0])}
    else:
        shards = _shards(place.origin, files, labelled=labelled)
        indexes = {split: _index(place, split, these) for split, these in shards.items()}
    found = {split: _split(place, split, index, ahead) for split, index in indexes.items()}
    names = place.path(CLASSES) if CLASSES in files else None
    classes, nothing = _classes(place.origin, names, found), Images(Path(), ())
    test = found[next(split for split in found if split != TRAIN)]
    train = found[TRAIN] if labelled else Split(nothing, np.arange(0), ())
    return Stored(place.origin, classes, train, test)


def _split(place: Shelf, split: str, index: Index, ahead: int) -> Split:
    tars = Tars(place, index, ahead=ahead)
    if not len(tars):
        raise PreflightError(f"{place.origin}: no image in the shards of the {split} split")
    return Split(tars, tars.labels(), [tars.content])


def _shards(
    origin: str, files: Mapping[str, File], *, labelled: bool
) -> dict[str, dict[str, File]]:
    """The shards of every split, in order."""
    found = {split: _shards_of(split, files) for split in (TRAIN, *TESTS)}
    test = next((split for split in TESTS if found[split]), TESTS[0])
    asked = (TRAIN, test) if labelled else (test,)
    for split in asked:
        if not found[split]:
            packed = any(re.search(r"\.tar\.\w+$|\.tgz$", name) for name in files)
            unpack = "; compressed shards cannot be read at random: unpack them with gunzip"
            raise PreflightError(
                f"{origin}: no shards of the {split} split", hint=_LAYOUT + unpack * packed
            )
    return {split: found[split] for split in asked}


def _shards_of(split: str, files: Mapping[str, File]) -> dict[str, File]:
    tars = sorted((name for name in files if name.endswith(".tar")), key=os.fsencode)
    found = [name for name in tars if "/" not in name and _split_of(name) == split]
    for folder in (split, *(["validation"] if split == "val" else [])):
        found = found or [name for name in tars if name.startswith(f"{folder}/")]
    return {name: files[name] for name in found}


def _split_of(name: str) -> str | None:
    """The split that a shard's name speaks of: a word in it begins with that."""
    found = re.search(r"(?<![a-z])(train|test|val)", name.lower())
    return found and found[1]


def _classes(origin: str, listed: Path | None, splits: Mapping[str, Split]) -> tuple[str, ...]:
    """Names of the classes, checked against the labels of every split, the training split first."""
    most = {split: int(found.labels.max(initial=-1)) for split, found in splits.items()}
    if listed is None:
        split = next(iter(splits))
        names, where = [str(i) for i in range(most[split] + 1)], f"the {split} split has"
    else:
        try:
            text = listed.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise PreflightError(f"{origin}/{CLASSES}: {error}") from None
        names = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
        where = f"{CLASSES} names"
        if len(set(names)) < len(names) or "" in names:
            raise PreflightError(f"{origin}/{CLASSES}: an empty line, or a class twice")
    for split, label in most.items():
        if label >= len(names):
            raise PreflightError(
                f"{origin}: a sample of the {split} split has class {label}, and {where} "
                f"{len(names):,} classes, counted from 0"
            )
    return tuple(names)


def _index(place: Here | There, split: str, files: Mapping[str, File]) -> Index:
    """What lies in the shards of a split, as it was found before or is found now."""
    name = f"{split}{INDEX}"
    folders = [_aside(place.origin)]  # shards may lie where only their owner writes
    if isinstance(place, Here):
        folders.insert(0, Path(place.origin))
    for folder in folders:
        try:
            found = tar_index.read(folder / name)
        except (DamagedError, IdentityError):
            continue
        if found is not None and found.describes(files):
            return found
    from distill.data.workers import cores, in_processes  # torch, which nothing else here needs

    size = sum(file.size for file in files.values())
    what = f"{len(files):,} {split} shards, {storage.size(size)}"
    console.say(f"{place.origin}: looking once through {what}")
    folder = folders[0] if os.access(folders[0], os.W_OK) else folders[-1]
    storage.make_folder(folder)
    storage.sweep(folder, below=False)
    workers = 0 if size < _SERIAL else min(len(files), cores(), _MOST_WORKERS)
    sections = in_processes(partial(_scanned, place), list(files), workers=workers)
    return tar_index.write(folder / name, sections, files, checked=False)


def _scanned(place: Shelf, name: str) -> Section:
    return tar_index.scan(place.path(name), f"{place.origin}/{name}")


def _aside(origin: str) -> Path:
    """Where indexes are kept that cannot lie beside their shards."""
    return storage.scratch("indexes") / hashlib.sha256(os.fsencode(origin)).hexdigest()[:16]


def _index_of_pack(place: Here | There, split: str, files: Mapping[str, File]) -> Index:
    """What lies in the shards of a pack's split, all of which must be there."""
    name = f"{split}{INDEX}"
    if name not in files:
        raise IncompleteError(f"{place.origin}: a pack that is not finished", hint=_AGAIN)
    path = Path(place.origin, name)
    if isinstance(place, There):
        path = _aside(place.origin) / name
        storage.make_folder(path.parent)
        place.fetch(name, path)
    found = tar_index.read(path)
    assert found is not None
    for shard in found.shards:
        size = files[shard.name].size if shard.name in files else None
        if size != shard.size:
            what = "is not there" if size is None else f"has {size:,} bytes"
            raise DamagedError(
                f"{place.origin}/{shard.name}: {what}, and the pack was made with "
                f"{shard.size:,} of it",
                hint=_AGAIN,
            )
    return found
