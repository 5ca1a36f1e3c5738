"""The images of a recipe as they are stored, held against their manifest where there is one."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from distill.data import folder, hub, manifest, tars
from distill.data.encoded import Split, Stored
from distill.errors import RecipeError
from distill.recipe import Data
from distill.remote import is_remote


def load(data: Data) -> Stored | None:
    """The images of the set, whole; None for a published set.

    Raises:
        PreflightError: If files are missing or misplaced.
        DamagedError: If a shard is altered or cut short, or images are not those of the manifest.
        IdentityError: If the manifest was made with another `max_pixels`.
    """
    if (found := _load(data)) is None or data.manifest is None:
        return found
    if data.transfer is None:
        held = _held(data, {"train": found.train, "test": found.test}, found.classes)
        return found._replace(train=held["train"], test=held["test"])
    return found._replace(test=_held(data, {"test": found.test}, found.classes)["test"])


def load_transfer(data: Data) -> Split:
    """The images of `data.transfer`, which have no labels; raises as `load` does."""
    assert data.transfer is not None
    found = _of_files(folder.unlabelled(Path(data.transfer).expanduser().absolute()), ())
    return found if data.manifest is None else _held(data, {"transfer": found}, ())["transfer"]


def content(found: Stored) -> str:
    """SHA-256 of what tells these images from others."""
    return sha256(part for split in (found.train, found.test) for part in (*split.content, "\0"))


def root(data: Data) -> Path | None:
    """Where the files lie, or should lie.

    Raises:
        RecipeError: If it is below the home of nobody.
    """
    try:
        return None if data.root is None else Path(data.root).expanduser().absolute()
    except RuntimeError:  # no user of that name
        raise RecipeError(f"data.root: {data.root}: no such home directory") from None


def sha256(parts: Iterable[str | bytes | memoryview]) -> str:
    """The digest of parts one after the other; of names their bytes."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(os.fsencode(part) if isinstance(part, str) else part)
    return digest.hexdigest()


def _load(data: Data) -> Stored | None:
    labelled, place = data.transfer is None, root(data)
    if data.name.partition("/")[0] == "hf":
        where = None if place is None else str(place)
        return hub.load(data.name, where, download=data.download, labelled=labelled)
    if data.name not in ("folder", "webdataset"):
        return None
    if data.root is not None and is_remote(data.root):
        return tars.load(data.root, labelled=labelled, mixed=data.shuffle_shards)
    assert place is not None, "the recipe checks this"
    if data.name == "webdataset":
        return tars.load(str(place), labelled=labelled)
    found = folder.scan(place, data.split_file, labelled=labelled)
    train, test = (_of_files(images, found.classes) for images in (found.train, found.test))
    return Stored(str(place), found.classes, train, test)


def _of_files(files: folder.Images, classes: Sequence[str]) -> Split:
    # No file name contains NUL.
    parts = (f"{entry.name}\0{entry.size}\0" for entry in files)
    return Split(files, files.classes(classes), parts)


def _held(data: Data, splits: Mapping[str, Split], classes: Sequence[str]) -> dict[str, Split]:
    path = Path(str(data.manifest)).expanduser()
    return manifest.recorded(path, splits, classes, max_pixels=data.max_pixels)
