"""Reading a cache: any rows of a view at once, the next view fetched and checked meanwhile."""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from safetensors.numpy import load as load_tensors

from distill import storage
from distill.cache import verify, write
from distill.cache.layout import CANARIES, SAMPLES, Column, Manifest, Unit, checksum, view_part
from distill.cache.store import Folder, Store
from distill.errors import DamagedError, IdentityError, IncompleteError

_TYPES = {
    "U8": np.uint8, "U16": np.uint16, "U32": np.uint32,
    "F16": np.float16, "F32": np.float32, "I64": np.int64,
}  # fmt: skip
_SETS = "mind data.fraction, data.val and data.seed"
_OPEN = 2  # views: the one that is read and the one that comes next
_KEPT = 3  # views of a store that is far away, on this machine's disk
_FETCHED = 8  # files at once
_SPARSEST = 1000  # images of a set for each one that is in the cache


class Reader:
    """The rows of a cache, by sample and view.

    A view is checked byte for byte when it is opened, which also brings it into memory in the
    order of the disk; so no training reads what was altered, or waits for a random read.

    Attributes:
        row_bytes: Bytes of a row.

    Args:
        store: Where the cache lies.
        manifest: What it is.
        num_views: How many of its views are read, in turn.
        partial: Whether some views may not be there yet.
        scratch: Where views of a store that is far away are kept while they are needed.
    """

    def __init__(
        self,
        store: Store,
        manifest: Manifest,
        *,
        num_views: int,
        partial: bool = False,
        scratch: Path | None = None,
    ) -> None:
        self.store, self.manifest, self.num_views = store, manifest, num_views
        self._partial = partial
        self.row_bytes = manifest.row_bytes
        self.ids = _sound_ids(_tensors(store, SAMPLES, manifest), store, manifest)
        self._row = np.full(int(self.ids[-1]) + 2, -1, np.int32)
        self._row[self.ids] = np.arange(len(self.ids), dtype=np.int32)
        self._scratch = scratch or storage.scratch("views") / manifest.id[:16]
        self._pool = ThreadPoolExecutor(1)
        self._views: dict[int, Future[_View]] = {}
        self._reading = -1  # the view that was asked for last

    def require(self, ids: Int[ndarray, " n"], *, exact: bool) -> None:
        """Refuse to serve samples that are not in it.

        Args:
            ids: Sorted ids of the samples that are trained on.
            exact: Whether they must be all of the cache's, as where views mix pairs of samples.

        Raises:
            IdentityError: If it has not the right ones.
        """
        within = bool(np.isin(ids, self.ids, assume_unique=True).all())
        if not within or (exact and len(ids) != len(self.ids)):
            raise IdentityError(
                f"{self.store.origin}: has {len(self.ids):,} training images, and these "
                f"{len(ids):,} are not " + ("exactly them" if exact else "among them"),
                hint=_SETS
                + ("; with mixup or cutmix they decide who is mixed with whom" if exact else ""),
            )

    def complete(self, view: int) -> bool:
        """Whether all units of a view are there."""
        sizes = self.store.sizes()
        units = self.manifest.units_of(view)
        return all(sizes.get(unit.name) == self.manifest.size_of(unit) for unit in units)

    def rows(self, ids: Int[ndarray, " n"], view: int) -> dict[str, ndarray]:
        """The columns of these samples in a view; the next view is opened behind the scenes.

        Raises:
            DamagedError: If a file of the view is not what was written.
            IdentityError: If the cache has no row of a sample.
            PreflightError: If it cannot be read.
        """
        at = self._row[np.minimum(ids, len(self._row) - 1)]
        if (at < 0).any():
            raise IdentityError(
                f"{self.store.origin}: has no answers to sample {ids[at < 0][0]}", hint=_SETS
            )
        opened = self._open(view).result()
        for old in [v for v in self._views if v != view][: max(0, len(self._views) - _OPEN)]:
            del self._views[old]
        if view != self._reading:
            self._reading, following = view, (view + 1) % self.num_views
            if not self._partial or self.complete(following):
                self._open(following)
        return opened.rows(at)

    def evaluation(self, split: str) -> Float[ndarray, "N K"]:
        """The logits of every image of `test` or `val`, exactly as the teacher gave them.

        Raises:
            DamagedError: If a file is not what was written.
        """
        units = [unit for unit in self.manifest.units(0) if unit.part == split]
        found = [self._columns(unit)["logits"] for unit in units]
        none = np.zeros((0, self.manifest.num_classes), np.float32)
        whole: ndarray = np.concatenate([none, *found])
        return whole

    def close(self) -> None:
        """Let go of files and threads."""
        self._pool.shutdown(cancel_futures=True)
        self._views.clear()

    def _open(self, view: int) -> Future[_View]:
        if view not in self._views:
            self._views[view] = self._pool.submit(self._load, view)
        return self._views[view]

    def _load(self, view: int) -> _View:
        units = self.manifest.units_of(view)
        if not isinstance(self.store, Folder):
            self._make_room(view)
        with ThreadPoolExecutor(_FETCHED) as pool:
            list(pool.map(self._local, units))
        each = [self._columns(unit) for unit in units]
        columns = {
            column.name: [found[column.name] for found in each] for column in self.manifest.columns
        }
        return _View(columns, self.manifest.unit_rows, self.manifest.columns)

    def _columns(self, unit: Unit) -> dict[str, ndarray]:
        """The columns of a unit; where a copy on this machine went bad, it is fetched again."""
        path = self._local(unit)
        try:
            return _checked(self.manifest, unit, _mapped(path), self.store.origin)
        except DamagedError:
            if isinstance(self.store, Folder):
                raise
        return _checked(self.manifest, unit, memoryview(self._fetch(unit)), self.store.origin)

    def _local(self, unit: Unit) -> Path:
        """A unit's file on a disk of this machine."""
        if isinstance(self.store, Folder):
            return self.store.path / unit.name
        path = self._scratch / unit.name
        if not path.exists():
            self._fetch(unit)
        os.utime(path.parent)
        return path

    def _fetch(self, unit: Unit) -> bytes:
        """A unit's file, which is kept on a disk of this machine from now on."""
        data = self.store.read(unit.name)
        if data is None:
            raise DamagedError(f"{self.store.origin}/{unit.name}: is missing", hint=_REPAIR)
        path = self._scratch / unit.name
        storage.make_folder(path.parent)
        storage.write(path, data)
        return data

    def _make_room(self, view: int) -> None:
        """Remove the views on this machine's disk that were not read for longest."""
        storage.sweep(self._scratch)
        there = {path.parent for path in self._scratch.glob("views/*/*.safetensors")}
        others = sorted(
            there - {self._scratch / view_part(view)}, key=lambda path: path.stat().st_mtime
        )
        for old in others[: max(0, len(others) - _KEPT + 1)]:
            # The folder stays, for another process may be writing to it; and who has a file open
            # keeps its content.
            storage.remove(*old.glob("*.safetensors"))


class _View:
    """The files of one view in memory."""

    def __init__(
        self, columns: dict[str, list[ndarray]], unit_rows: int, shapes: tuple[Column, ...]
    ) -> None:
        self._columns, self._unit_rows, self._shapes = columns, unit_rows, shapes

    def rows(self, at: Int[ndarray, " n"]) -> dict[str, ndarray]:
        if len(next(iter(self._columns.values()))) == 1:
            return {name: np.take(only, at, axis=0) for name, (only,) in self._columns.items()}
        found = {
            column.name: np.empty((len(at), *column.shape), _TYPES[column.dtype])
            for column in self._shapes
        }
        unit = at // self._unit_rows
        order = np.argsort(unit, kind="stable")
        present, starts = np.unique(unit[order], return_index=True)
        for number, rows in zip(present, np.split(order, starts)[1:], strict=True):
            local = at[rows] - number * self._unit_rows
            for name, units in self._columns.items():
                found[name][rows] = np.take(units[number], local, axis=0)
        return found


def require_complete(store: Store, manifest: Manifest, num_views: int) -> None:
    """Refuse to train on views that are not all there.

    Raises:
        IncompleteError: If some are missing.
    """
    if manifest.views < num_views:
        raise IncompleteError(
            f"{store.origin}: has {manifest.views} views of every image, the recipe reads "
            f"{num_views}",
            hint=f"`distill teacher-cache RECIPE --views {num_views}` adds them, or read fewer: "
            f"--set cache.views={manifest.views}",
        )
    if left := write.missing(store, manifest, num_views):
        raise IncompleteError(
            f"{store.origin}: {len(left):,} of {len(manifest.units(num_views)):,} units are still "
            f"missing, the first is {left[0].name}",
            hint="`distill teacher-cache RECIPE` goes on where it stopped; `--status` shows more",
        )


def samples(store: Store) -> dict[str, Int[ndarray, " n"]]:
    """The ids of the rows of a view (`train`) and of the validation split (`val`)."""
    return _tensors(store, SAMPLES)


def canaries(store: Store, manifest: Manifest) -> dict[str, ndarray]:
    """Positions, views, pixel checksums and logits of the canaries.

    Raises:
        DamagedError: If they are not those that were written.
    """
    found = _tensors(store, CANARIES)
    index = write.read_index(store, manifest)
    try:
        shapes = {name: found[name].shape for name in ("positions", "views", "pixels")}
        sound = set(shapes.values()) == {(len(found["logits"]),)}
        sound &= found["logits"].shape[1:] == (manifest.num_classes,)
        sound &= bool((found["positions"] >= 0).all() and (found["views"] >= 0).all())
        sound &= bool((found["positions"] < manifest.samples).all())
    except KeyError:
        sound = False
    data = store.read(CANARIES) or b""
    if not sound or (index and index.files.get(CANARIES) != f"{checksum(data):08x}"):
        raise DamagedError(f"{store.origin}/{CANARIES}: {_CHANGED}", hint=_REPAIR)
    return found


def _sound_ids(found: dict[str, ndarray], store: Store, manifest: Manifest) -> Int[ndarray, " n"]:
    """The ids of the rows of a view, ascending; there is a table as long as the last one says."""
    ids = found.get("train", np.zeros(0, np.int64))
    sound = ids.dtype == np.int64 and ids.shape == (manifest.samples,) and ids[0] >= 0
    if not sound or (np.diff(ids) <= 0).any() or ids[-1] > _SPARSEST * (len(ids) + _SPARSEST):
        raise DamagedError(f"{store.origin}/{SAMPLES}: {_CHANGED}", hint=_REPAIR)
    return ids


_CHANGED = "its content changed after it was written"
_REPAIR = "`distill teacher-cache RECIPE --verify full --repair` finds and makes again what is bad"


def _tensors(store: Store, name: str, manifest: Manifest | None = None) -> dict[str, ndarray]:
    data = store.read(name)
    try:
        if data is None:
            raise ValueError("is missing")
        if manifest is not None and not manifest.lists(data):
            raise ValueError(_CHANGED)
        found: dict[str, ndarray] = load_tensors(data)
        return found
    except Exception as error:  # safetensors has a type of its own for every reader
        raise DamagedError(f"{store.origin}/{name}: {error}", hint=_REPAIR) from None


def _mapped(path: Path) -> memoryview:
    """A file's content, brought into memory where it is looked at."""
    try:
        return np.memmap(path, np.uint8, mode="r").data
    except (OSError, ValueError) as error:
        raise DamagedError(f"{path}: {error}", hint=_REPAIR) from None


def _checked(manifest: Manifest, unit: Unit, data: memoryview, origin: str) -> dict[str, ndarray]:
    """The columns of a unit's file as arrays over its content, every byte checked."""
    try:
        stated = manifest.checksums(unit, bytes(data[:65_536]))
        if len(data) != manifest.size_of(unit) or any(verify.changed(manifest, unit, data, stated)):
            raise DamagedError(f"{unit.name}: its content changed after it was written")
    except DamagedError as error:
        raise DamagedError(f"{origin}/{error}", hint=_REPAIR) from None
    offset = len(manifest.header(unit, stated))
    found = {}
    for column in manifest.columns_of(unit):
        size = column.row_bytes * unit.rows
        values = np.frombuffer(data[offset : offset + size], _TYPES[column.dtype])
        found[column.name] = values.reshape(unit.rows, *column.shape)
        offset += size
    return found
