"""Writing a cache: by any number of processes at once, that may be killed at any moment.

No process talks to another. What is to be made follows from the manifest alone, which is the same
from all of them; what is done already is what lies there. Two that make the same unit write the
same bytes, and the later one replaces the earlier.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from distill.cache import layout
from distill.cache.layout import CANARIES, INDEX, MANIFEST, SAMPLES, Index, Manifest, Unit
from distill.cache.store import Folder, Store
from distill.errors import DamagedError, IdentityError
from distill.identity import require_same

_QUEUE = 2  # units that wait for the disk; more would only hold memory
_READERS = 16  # headers that are fetched at once, for stores that are far away
_HEAD = 65_536  # bytes in which a unit's header ends


def read_manifest(store: Store) -> Manifest | None:
    """The manifest of the cache in `store`; None where there is none.

    Raises:
        DamagedError: If it was altered.
        IdentityError: If a newer version wrote it.
    """
    data = store.read(MANIFEST)
    return None if data is None else layout.manifest(data, store.origin)


def read_index(store: Store, manifest: Manifest) -> Index | None:
    """The index of the cache; None where it is not complete yet.

    Raises:
        DamagedError: If it was altered, or is another cache's.
    """
    data = store.read(INDEX)
    if data is None:
        return None
    found = layout.index(data, store.origin)
    if found.cache != manifest.id:
        raise DamagedError(
            f"{store.origin}: {INDEX} belongs to another cache", hint="`--repair` removes it"
        )
    return found


def begin(store: Store, wanted: Manifest, *, samples: bytes, canaries: bytes) -> Manifest:
    """Start a cache, or find that it was started from the same things.

    Returns:
        The manifest that lies there. It may have other unit sizes than `wanted`, and more views;
        it never has fewer, for views can be added.

    Raises:
        IdentityError: If it was started from something else; nothing is written.
        DamagedError: If its manifest was altered.
    """
    found = read_manifest(store)
    if found is None:
        # The manifest comes last: where it is, the others are. Where it is not, they may be those
        # of something else whose start was killed.
        store.write(SAMPLES, samples)
        store.write(CANARIES, canaries)
        store.create(MANIFEST, layout.seal(wanted))
        found = read_manifest(store)
        assert found is not None
    require_identity(found, wanted.identity, store.origin)
    if found.samples_sha256 != wanted.samples_sha256:
        raise IdentityError(
            f"{store.origin}: made for {found.samples:,} other training images than these "
            f"{wanted.samples:,}",
            hint=_ELSEWHERE,
        )
    if not found.lists(store.read(SAMPLES)):  # damaged, or lost
        store.write(SAMPLES, samples)
    store.create(CANARIES, canaries)  # lost, if it is not there
    if found.views < wanted.views:
        found = found.model_copy(update={"views": wanted.views})
        store.write(MANIFEST, layout.seal(found))
    return found


_ELSEWHERE = "give another --out; what lies there serves the recipe that it was made for"


def require_identity(found: Manifest, identity: Mapping[str, object], origin: str) -> None:
    """Raise if a cache was made from something else, field by field.

    Raises:
        IdentityError: If it was.
    """
    require_same(
        found.identity,
        dict(identity),
        origin=f"{origin}: made from something else, nothing was written",
        hint=_ELSEWHERE,
    )


def missing(store: Store, manifest: Manifest, views: int | None = None) -> list[Unit]:
    """The units that are not there whole, as far as names and sizes tell."""
    there = store.sizes()
    return [
        unit for unit in manifest.units(views) if there.get(unit.name) != manifest.size_of(unit)
    ]


def encode(manifest: Manifest, unit: Unit, columns: Mapping[str, np.ndarray]) -> bytes:
    """A unit's file."""
    parts = []
    for column in manifest.columns_of(unit):
        values = np.ascontiguousarray(columns[column.name])
        assert values.shape == (unit.rows, *column.shape), (column, values.shape)
        parts.append(values.tobytes())
        assert len(parts[-1]) == column.row_bytes * unit.rows, (column, values.dtype)
    names = [column.name for column in manifest.columns_of(unit)]
    checksums = {name: layout.checksum(part) for name, part in zip(names, parts, strict=True)}
    return b"".join([manifest.header(unit, checksums), *parts])


class Writer:
    """Units on their way to the store, while the next ones are being made."""

    def __init__(self, store: Store, manifest: Manifest) -> None:
        self.store, self.manifest = store, manifest
        self._pool = ThreadPoolExecutor(1)
        self._queue: list[Future[None]] = []
        if isinstance(store, Folder):
            store.sweep()

    def put(self, unit: Unit, columns: Mapping[str, np.ndarray]) -> None:
        """Write a unit, later. An error of an earlier one comes up here.

        Args:
            unit: The unit.
            columns: All of its rows by name; they must not change any more.
        """
        while len(self._queue) >= _QUEUE:
            self._queue.pop(0).result()
        self._queue.append(self._pool.submit(self._write, unit, columns))

    def wait(self) -> None:
        """Return when all is written; the first error of all comes up here."""
        while self._queue:
            self._queue.pop(0).result()

    def close(self) -> None:
        """Return when all is written or has failed, and end the thread."""
        self._pool.shutdown()
        self.wait()

    def _write(self, unit: Unit, columns: Mapping[str, np.ndarray]) -> None:
        self.store.write(unit.name, encode(self.manifest, unit, columns))


def finish(
    store: Store, manifest: Manifest, scores: Mapping[str, Mapping[str, float]]
) -> list[Unit]:
    """Mark the cache as complete, if it is; return what is still missing.

    Args:
        store: Where it lies.
        manifest: What it consists of.
        scores: The teacher's on each evaluation split that there are labels for.

    Raises:
        DamagedError: If a unit's header was altered, or what the cache began with is missing.
    """
    left = missing(store, manifest)
    if not left:
        units = manifest.units()
        found = headers(store, manifest, units)
        done = Index(
            cache=manifest.id,
            views=manifest.views,
            files={name: _checksum(store, name) for name in (MANIFEST, SAMPLES, CANARIES)},
            units={
                unit.name: {name: f"{value:08x}" for name, value in each.items()}
                for unit, each in zip(units, found, strict=True)
            },
            scores={split: dict(values) for split, values in scores.items()},
        )
        store.write(INDEX, layout.seal(done))
    return left


def headers(store: Store, manifest: Manifest, units: Sequence[Unit]) -> list[dict[str, int]]:
    """The checksums that the units' files state.

    Raises:
        DamagedError: If a header was altered.
    """

    def one(unit: Unit) -> dict[str, int]:
        return manifest.checksums(unit, store.read(unit.name, _HEAD) or b"")

    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(one, units))


def _checksum(store: Store, name: str) -> str:
    data = store.read(name)
    if data is None:
        raise DamagedError(f"{store.origin}/{name}: is missing", hint="run the same command again")
    return f"{layout.checksum(data):08x}"
