"""Images scaled down once and put into tar shards, so that training need not do it every epoch.

pack.json            what the shards are made from; while it is the only one, more are to come
classes.txt          the names of the classes, one a line
train-00000.tar      a shard: NUMBER.jpg (or .ppm, which is raw) and NUMBER.cls, its class
train.index          where each image lies, and its checksum; written last
.train-00000.section what the index will say of a shard that is made

Image i of the source is image i of the pack: a bad one has its place there and no bytes. What a
shard holds follows from the source and the settings, so whoever makes it writes the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import time
import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distill import console, jsonio, storage
from distill.data import datasets, images, packed, stored, tar_index
from distill.data.encoded import Stored
from distill.data.packed import Plan, Settings, Shard, Source
from distill.data.shelf import File
from distill.data.tar_index import RECORD, Section
from distill.data.tars import CLASSES, INDEX, PACK, TESTS, TRAIN
from distill.data.workers import in_processes
from distill.errors import (
    DamagedError,
    DistillError,
    IdentityError,
    IncompatibleError,
    IncompleteError,
    PreflightError,
    Stopped,
)
from distill.identity import require_known, require_same
from distill.recipe import Data, Recipe

if TYPE_CHECKING:
    from distill.engine.machine import StopRequest

FORMAT = 1  # of pack.json
_TEST = TESTS[0]
_SAY_SECONDS = 10.0
_LISTED = 10


def pack(
    recipe: Recipe, out: Path, settings: Settings, *, workers: int, stop: StopRequest
) -> dict[str, Any]:
    """Write a smaller copy of the recipe's images to `out`, or what is still missing of it.

    Args:
        recipe: Names the images; may say `data.on_bad_image: skip`.
        out: A folder of its own.
        settings: What becomes of an image.
        workers: Processes that do it; 0 does it in this one.
        stop: Looked at after every shard.

    Returns:
        `out`, the `images`, `bad`, `shards` and `bytes` of each split, the shards `made` by this
        call, and the keys of the recipe to change, as `recipe`.

    Raises:
        IncompatibleError: If the images are not in files, or have no classes.
        IdentityError: If `out` holds a pack of something else; nothing is written.
        PreflightError: If `out` holds something else, there is no room, or an image is bad.
        Stopped: If a signal came; the same call goes on.
    """
    found = _source(recipe.data)
    wanted = round((recipe.data.image_size or datasets.IMAGE_SIZE) / recipe.data.eval_crop)
    if settings.size < wanted:
        console.warn(
            f"the recipe scales the shorter side of an image to {wanted} px, and --size "
            f"{settings.size} leaves it less: give --size {wanted}"
        )
    sources = {TRAIN: Source(*found.train[:2]), _TEST: Source(*found.test[:2])}
    _require_own(out)
    with storage.lock(out):
        plan = _begin(out, recipe.data, found, sources, settings)
        shards = {
            split: packed.cut(split, len(source.labels), plan[split].images_a_shard)
            for split, source in sources.items()
        }
        missing = [one for split, each in shards.items() for one in _missing(out, split, each)]
        _require_room(out, missing, plan)
        job = partial(packed.make, out, recipe.data, settings, sources)
        began = shown = time.monotonic()
        made = in_processes(job, missing, workers=min(workers, len(missing)))
        for done, _ in enumerate(made, 1):
            if stop.signum is not None and done < len(missing):
                raise Stopped(
                    f"{out}: stopped as a signal asked; all shards that were made are kept",
                    hint="the same command goes on from there",
                    signum=stop.signum,
                )
            if time.monotonic() - shown > _SAY_SECONDS:
                shown = time.monotonic()
                left = (shown - began) / done * (len(missing) - done)
                console.say(f"{out}: {done:,} of {len(missing):,} shards  {left:.0f} s left")
        told = {split: _finish(out, split, each) for split, each in shards.items()}
    return {
        "out": str(out),
        "splits": told,
        "made": len(missing),
        "recipe": {
            "data.name": "webdataset",
            "data.root": str(out.absolute()),
            **({"data.split_file": None} if recipe.data.split_file else {}),
        },
    }


def verify(out: Path, *, workers: int) -> dict[str, Any]:
    """Read every byte of a pack.

    Returns:
        `out`, and the number of `images` and `bytes` that are sound.

    Raises:
        IncompleteError: If it is not finished.
        DamagedError: If anything in it is not what was written.
        PreflightError: If there is no pack.
    """
    if not (out / PACK).is_file():
        raise PreflightError(f"{out}: no pack", hint="leave --verify out to make one")
    faults, count, size = [], 0, 0
    for split in (TRAIN, _TEST):
        index = tar_index.read(out / f"{split}{INDEX}")
        if index is None:
            raise IncompleteError(
                f"{out}: a pack that is not finished", hint="leave --verify out: it goes on"
            )
        paths = [out / shard.name for shard in index.shards]
        again = in_processes(_read_again, paths, workers=min(workers, len(paths)))
        for shard, section, known in zip(index.shards, again, index.sections(), strict=True):
            count, size = count + shard.images, size + shard.size
            if isinstance(section, str):
                faults.append(section)
            elif section.to_bytes() != known.to_bytes():
                faults.append(f"{out / shard.name}: " + _difference(section, known))
    if faults:
        more = [f"and {len(faults) - _LISTED:,} more"] if len(faults) > _LISTED else []
        head = f"{out}: shards that are altered: {len(faults):,}"
        raise DamagedError(
            "\n  ".join([head, *faults[:_LISTED], *more]),
            hint="remove them, and run the command without --verify: it makes what is missing",
        )
    return {"out": str(out), "images": count, "bytes": size}


def _source(data: Data) -> Stored:
    if data.transfer is not None:
        raise IncompatibleError(
            "data.transfer: its images have no classes, and a pack is of images with classes"
        )
    found = stored.load(data)
    if found is None:
        raise IncompatibleError(
            f"data.name: {data.name} is a few files that are read into memory at once; a pack "
            "would not be faster"
        )
    if bad := [name for name in found.classes if "\n" in name or "\r" in name]:
        raise IncompatibleError(f"{found.origin}: the name of a class has two lines: {bad[0]!r}")
    return found


def _require_own(out: Path) -> None:
    """Refuse a folder of somebody else's files."""
    try:
        there = {item.name for item in out.iterdir()}
    except OSError:
        return  # it is not there yet, or else its lock says what is wrong
    others = {name for name in there if not name.startswith(".")}
    if ".lock" in there:
        others.discard(CLASSES)  # written first: a process was killed right after it
    if PACK not in there and others:
        raise PreflightError(
            f"{out}: holds something else, such as {min(others)!r}; nothing was written",
            hint="give a folder of its own",
        )


def _begin(
    out: Path, data: Data, found: Stored, sources: dict[str, Source], settings: Settings
) -> dict[str, Plan]:
    """The plan of the pack: that which lies in `out`, or else one that is written there."""
    identity = {
        "format": FORMAT,
        "source": {
            "images": stored.content(found),
            "classes": list(found.classes),
            **{
                split: {
                    "images": len(source.labels),
                    "labels": hashlib.sha256(source.labels.astype("<i8").tobytes()).hexdigest(),
                }
                for split, source in sources.items()
            },
        },
        "pixels": images.VERSION,
        "settings": settings.identity(),
    }
    path = out / PACK
    if path.exists():
        try:
            there = jsonio.mapping(path.read_bytes())
            before = there["identity"]
            require_known(before["format"], FORMAT, str(path))
            plan = {split: jsonio.checked(Plan, there["plan"][split]) for split in (TRAIN, _TEST)}
        except IdentityError:
            raise
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedError(f"{path}: {error}", hint="give another --out") from None
        require_same(
            before,
            identity,
            origin=f"{out}: made from something else, nothing was written",
            hint="give another --out",
        )
        return plan
    plan = {split: packed.plan(source, split, data, settings) for split, source in sources.items()}
    storage.write(out / CLASSES, "".join(f"{name}\n" for name in found.classes).encode())
    about = {"identity": identity, "plan": {split: one._asdict() for split, one in plan.items()}}
    storage.write(path, json.dumps(about, indent=1).encode())
    return plan


def _missing(out: Path, split: str, shards: Sequence[Shard]) -> list[Shard]:
    """The shards that are not there, or of which nothing is known."""
    listed = {shard.name: shard.size for shard in _listed(out, split)}

    def is_made(shard: Shard) -> bool:
        path = out / shard.name
        if not path.is_file():
            return False
        return (out / shard.section).is_file() or listed.get(shard.name) == path.stat().st_size

    return [shard for shard in shards if not is_made(shard)]


def _listed(out: Path, split: str) -> tuple[tar_index.Shard, ...]:
    """The shards in the index of a split, as far as there is a sound one."""
    try:
        found = tar_index.read(out / f"{split}{INDEX}")
    except DamagedError:
        return ()
    return found.shards if found else ()


def _require_room(out: Path, missing: Sequence[Shard], plan: dict[str, Plan]) -> None:
    needed = sum(len(shard.images) * plan[shard.split].bytes_an_image for shard in missing)
    storage.require_room(out, needed + needed // 20)


def _finish(out: Path, split: str, shards: Sequence[Shard]) -> dict[str, Any]:
    """Write the index of a split where it is not there; say what the split consists of."""
    path = out / f"{split}{INDEX}"
    if any((out / shard.section).exists() for shard in shards):
        files = {shard.name: File((out / shard.name).stat().st_size, 0) for shard in shards}
        tar_index.write(path, _sections(out, split, shards), files, checked=True)
        storage.remove(*(out / shard.section for shard in shards))
    index = tar_index.read(path)
    assert index is not None
    return {
        "images": sum(shard.images for shard in index.shards),
        "bad": sum(int((section.records["size"] == 0).sum()) for section in index.sections()),
        "shards": len(index.shards),
        "bytes": sum(shard.size for shard in index.shards) + path.stat().st_size,
    }


def _sections(out: Path, split: str, shards: Sequence[Shard]) -> Iterator[Section]:
    """What is known of the shards: since they were made, or from the index that there was."""
    listed = {shard.name: shard for shard in _listed(out, split)}
    for shard in shards:
        try:
            data = (out / shard.section).read_bytes()
        except FileNotFoundError:
            with (out / f"{split}{INDEX}").open("rb") as file:
                file.seek(listed[shard.name].start)
                data = file.read(listed[shard.name].end - listed[shard.name].start)
        yield Section.from_bytes(data, len(shard.images))


def _read_again(path: Path) -> Section | str:
    """What is found in a shard now, with checksums; or what is wrong with it."""
    try:
        section = tar_index.scan(path)
        with path.open("rb") as file:
            for record in section.records:
                file.seek(int(record["offset"]))
                record["crc32"] = zlib.crc32(file.read(int(record["size"])))
    except DistillError as error:
        return str(error)
    return section


def _difference(found: Section, known: Section) -> str:
    """Where a shard differs from what its index says."""
    if found.keys != known.keys:
        return "its images have other names"
    number = int(np.flatnonzero(found.records != known.records)[0])
    fields = [n for n in RECORD.names or () if found.records[number][n] != known.records[number][n]]
    return f"image {number} of it has another {' and '.join(fields)}"
