"""A cache as the by-product of training: what live teachers say is kept, view by view."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Int
from numpy import ndarray
from torch import Tensor

from distill import console
from distill.cache import verify
from distill.cache.codec import require_finite
from distill.cache.read import Reader
from distill.cache.store import places
from distill.cache.write import Writer
from distill.data.datasets import Dataset
from distill.data.pixels import Views
from distill.engine import cached
from distill.engine.canaries import numerics, precision
from distill.engine.jobs import Job, Settings
from distill.engine.machine import BATCH_SIZE, Machine, StopRequest
from distill.engine.precompute import bits, precompute, require_room
from distill.models.network import Network
from distill.recipe import Recipe
from distill.teacher import Live, own_columns, pack, unpack
from distill.types import Batch, Outputs


class Filler:
    """The live teachers of a run, and the caches that they fill.

    A view that is whole is read; one that is not is asked for and kept. What is kept passes
    through the cache's code first, so that the student hears the same whichever it is.

    Attributes:
        members: The teachers.
        row_bytes: Bytes of a row of all of them.
    """

    def __init__(
        self,
        recipe: Recipe,
        dataset: Dataset,
        networks: Sequence[Network],
        default: Path,
        here: Machine,
    ) -> None:
        assert recipe.cache is not None
        num_views = recipe.num_views
        assert num_views is not None
        self._recipe, self._dataset, self._here = recipe, dataset, here
        self._num_views = num_views
        found = places(recipe.teachers, recipe.cache.path or str(default))
        self.members: list[_Member] = []
        for network, (name, store) in zip(networks, found, strict=True):
            manifest, warnings = cached.start(
                recipe, dataset, network, store, num_views=num_views, device=here.device
            )
            for warning in warnings:
                console.warn(warning)
            reader = Reader(store, manifest, num_views=num_views, partial=True)
            job = Job(name, store, network, manifest)
            self.members.append(_Member(job, reader, cached.prefix(manifest), recipe, here.device))
        if here.main:
            require_room([member.job for member in self.members], num_views)
        self._caches = cached.Caches([member.reader for member in self.members])
        self.row_bytes = self._caches.row_bytes
        self._whole: set[int] = set()  # views that are read
        self._finished = False

    def rows(self, ids: Int[ndarray, " n"], view: int) -> dict[str, ndarray] | None:
        """The columns of these samples in a view; None where a teacher has not answered it all."""
        if not self._is_whole(view):
            return None
        return self._caches.rows(ids, view)

    def finish(self, view: int, views: Views) -> None:
        """Keep a view whose epoch is over; ask for the rows that no step had.

        An epoch leaves out what fills no batch, and a run that was cut has forgotten the answers
        before the cut.
        """
        if view not in self._whole:
            for member in self.members:
                member.ask_missing(view, views, self._here)
                member.write(view, self._here)
            self._here.accelerator.wait_for_everyone()
            self._whole.add(view)
        if not self._finished and all(map(self._is_whole, range(self._num_views))):
            self._finished = True
            if self._here.main:
                self._finish_all()

    def close(self) -> None:
        """Let go of files and threads."""
        self._caches.close()

    def _is_whole(self, view: int) -> bool:
        """Whether a view can be read: the same answer in all processes."""
        if view not in self._whole:
            whole = all(member.reader.complete(view) for member in self.members)
            if dist.is_initialized():
                flag = torch.tensor(int(whole), device=self._here.device)
                dist.all_reduce(flag, op=dist.ReduceOp.MIN)
                whole = bool(flag)
            if whole:
                self._whole.add(view)
        return view in self._whole

    def _finish_all(self) -> None:
        """What is left are the evaluation splits and the index."""
        jobs = [member.job for member in self.members]
        jobs = [job for job in jobs if not verify.indexed(job.store, job.manifest)]
        if jobs:
            precompute(self._recipe, jobs, self._dataset, self._here, StopRequest(), Settings())


class _Member:
    """One live teacher, its cache, and the view in work."""

    def __init__(
        self, job: Job, reader: Reader, prefix: str, recipe: Recipe, device: torch.device
    ) -> None:
        self.job, self.reader, self.prefix = job, reader, prefix
        self._recipe, self._device = recipe, device
        self._live = Live(job.network)
        table = np.zeros(int(reader.ids[-1]) + 1, np.int64)
        table[reader.ids] = np.arange(len(reader.ids))
        self._row = torch.from_numpy(table).to(device)
        self._num_rows = len(reader.ids)
        self._kept: dict[str, Tensor] = {}
        self._known = torch.zeros(self._num_rows, dtype=torch.uint8, device=device)

    def __call__(self, batch: Batch) -> Outputs:
        """What the teacher says of the batch, from the cache where the view is in it."""
        with torch.no_grad():
            columns = own_columns(batch, self.prefix) if batch.cached else self._ask(batch)
            return unpack(self.job.manifest.codec, columns, self.job.manifest.num_classes)

    def ask_missing(self, view: int, views: Views, here: Machine) -> None:
        """Ask for the rows of a view that no step of any process had."""
        _sum(self._known)
        missing = np.flatnonzero(self._known.cpu().numpy() == 0)[here.rank :: here.world]
        numbers = np.full(len(missing), view)
        for batch, _ in views.single(missing, numbers, batch_size=BATCH_SIZE[here.device.type]):
            with torch.no_grad():
                self._ask(batch)

    def write(self, view: int, here: Machine) -> None:
        """Put the answers of all processes into the cache, and begin the next view."""
        for column in self._kept.values():
            _sum(column.view(torch.uint8))
        if here.main:
            columns = {name: column.cpu() for name, column in self._kept.items()}
            require_finite(columns, self.job.store.origin)
            host = {name: column.numpy() for name, column in columns.items()}
            writer = Writer(self.job.store, self.job.manifest)
            for unit in self.job.manifest.units_of(view):
                rows = slice(unit.start, unit.start + unit.rows)
                writer.put(unit, {name: column[rows] for name, column in host.items()})
            writer.close()
        self._kept.clear()
        self._known.zero_()

    def _ask(self, batch: Batch) -> dict[str, Tensor]:
        with numerics(precision(self._recipe), self._device):
            outputs = self._live(batch)
        columns = pack(self.job.manifest.codec, outputs)
        assert {column.name for column in self.job.manifest.columns} == set(columns)
        at = self._row[batch.ids]
        for name, column in columns.items():
            plain = bits(column)
            if name not in self._kept:
                self._kept[name] = plain.new_zeros(self._num_rows, *plain.shape[1:])
            self._kept[name].index_copy_(0, at, plain)
        self._known.index_fill_(0, at, 1)
        return columns


def _sum(column: Tensor) -> None:
    """Add up what the processes hold: each row is known to one of them, and zero elsewhere."""
    if dist.is_initialized():
        dist.all_reduce(column)
