"""Whether a cache is what was written, without asking a teacher."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from distill.cache import layout, write
from distill.cache.layout import CANARIES, INDEX, MANIFEST, SAMPLES, Manifest, Unit
from distill.cache.store import Store
from distill.errors import DamagedError, DistillError


class Fault(NamedTuple):
    """A file that is not what it should be."""

    name: str
    what: str


class Progress(NamedTuple):
    """How much of a part of a cache is there."""

    part: str  # test, val, or views/v0000
    done: int  # units
    total: int


def progress(store: Store, manifest: Manifest) -> list[Progress]:
    """How much there is of each part, as far as names and sizes tell."""
    left = {unit.name for unit in write.missing(store, manifest)}
    parts: dict[str, list[bool]] = {}
    for unit in manifest.units():
        parts.setdefault(unit.part, []).append(unit.name not in left)
    return [Progress(part, sum(done), len(done)) for part, done in parts.items()]


def quick(store: Store, manifest: Manifest) -> list[Fault]:
    """Names, sizes and headers. A unit that is not there at all is no fault: it is to be made."""
    return list(_faults(store, manifest, whole=False))


def full(store: Store, manifest: Manifest) -> list[Fault]:
    """Every byte of every file."""
    return list(_faults(store, manifest, whole=True))


def indexed(store: Store, manifest: Manifest) -> bool:
    """Whether there is an index of all views."""
    try:
        index = write.read_index(store, manifest)
    except DamagedError:
        return False
    return index is not None and index.views == manifest.views


def repair(store: Store, faults: list[Fault]) -> None:
    """Remove what is bad and can be made again, and an index that is not true."""
    for fault in faults:
        if fault.name not in (MANIFEST, SAMPLES):  # the next writer mends the latter in place
            store.remove(fault.name)
    if faults:
        store.remove(INDEX)


def _faults(store: Store, manifest: Manifest, *, whole: bool) -> Iterator[Fault]:
    try:
        index = write.read_index(store, manifest)
    except DamagedError as error:
        index = None
        yield Fault(INDEX, _what(error))
    for name in (MANIFEST, SAMPLES, CANARIES):
        data = store.read(name)
        if data is None:
            yield Fault(name, "is missing")
        elif _altered(name, data, manifest, index):
            yield Fault(name, "its content changed after it was written")
    sizes = store.sizes()
    known = {unit.name for unit in manifest.units()}
    for unit in manifest.units():
        yield from _unit_faults(store, manifest, unit, sizes, index, whole=whole)
    for name in sorted(sizes):
        if name.startswith(("views/", "test/", "val/")) and name not in known:
            yield Fault(name, "is no part of this cache")


def _altered(name: str, data: bytes, manifest: Manifest, index: layout.Index | None) -> bool:
    """Whether a file is known to be another than was written."""
    if name == MANIFEST:  # it is written anew when views are added, and vouches for itself
        try:
            return layout.manifest(data, "").id != manifest.id
        except DistillError:
            return True
    if name == SAMPLES:
        return not manifest.lists(data)
    return index is not None and index.files.get(name) != f"{layout.checksum(data):08x}"


def _unit_faults(
    store: Store,
    manifest: Manifest,
    unit: Unit,
    sizes: dict[str, int],
    index: layout.Index | None,
    *,
    whole: bool,
) -> Iterator[Fault]:
    size, expected = sizes.get(unit.name), manifest.size_of(unit)
    indexed = None if index is None else index.units.get(unit.name)
    if size is None:
        if indexed is not None:
            yield Fault(unit.name, "is missing from a cache that was complete")
        return
    if size != expected:
        yield Fault(unit.name, f"has {size:,} bytes, written were {expected:,}")
        return
    data = store.read(unit.name, None if whole else 65_536) or b""
    try:
        stated = manifest.checksums(unit, data)
    except DamagedError as error:
        yield Fault(unit.name, _what(error))
        return
    if indexed is not None and indexed != {n: f"{value:08x}" for n, value in stated.items()}:
        yield Fault(unit.name, "is not the one that the index names")
    if whole:
        for name in changed(manifest, unit, memoryview(data), stated):
            yield Fault(unit.name, f"the content of {name} changed after it was written")


def changed(
    manifest: Manifest, unit: Unit, data: memoryview, stated: dict[str, int]
) -> Iterator[str]:
    """The columns of a unit's file whose bytes are not those that its header vouches for."""
    offset = len(manifest.header(unit, stated))
    for column in manifest.columns_of(unit):
        end = offset + column.row_bytes * unit.rows
        if layout.checksum(data[offset:end]) != stated[column.name]:
            yield column.name
        offset = end


def _what(error: DamagedError) -> str:
    return str(error).partition(": ")[2]
