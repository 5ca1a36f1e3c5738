"""The teachers' pass over the data: every view of every image, once, in files."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from distill import console, storage
from distill.cache import write
from distill.cache.codec import require_finite
from distill.cache.layout import Manifest, Unit
from distill.cache.store import Folder
from distill.cache.write import Writer
from distill.data.datasets import Dataset
from distill.data.loader import evaluation_batches
from distill.data.pixels import Views
from distill.engine import cached
from distill.engine.canaries import tell
from distill.engine.jobs import Job, Piece, Settings, pieces, scores
from distill.engine.machine import BATCH_SIZE, Machine, StopRequest
from distill.engine.monitor import Passage
from distill.errors import PreflightError, Stopped
from distill.models.quick import compile_network
from distill.recipe import Recipe
from distill.teacher import pack

_OTHER_FILES = 16  # than units and their folders: those that a cache begins and ends with


class Built(NamedTuple):
    """What a pass has done."""

    teachers: list[dict[str, object]]  # name, path, model, units, missing, bytes, scores
    units: int  # made by this pass
    images: int  # views that were answered
    seconds: float
    data_wait: float  # fraction of the time spent waiting for pixels
    warnings: list[str]

    @property
    def complete(self) -> bool:
        """Whether nothing is missing, of this part or another."""
        return all(teacher["missing"] == 0 for teacher in self.teachers)


def precompute(
    recipe: Recipe,
    jobs: Sequence[Job],
    dataset: Dataset,
    here: Machine,
    stop: StopRequest,
    settings: Settings,
) -> Built:
    """Make this part of the caches, or what is still missing of it.

    Raises:
        IdentityError: If a cache was begun from something else; nothing is written.
        PreflightError: If there is no room, or a teacher is worse than it must be.
        Stopped: If a signal or the time limit came; the same call goes on.
    """
    began = time.monotonic()
    jobs, warnings = _begin(recipe, jobs, dataset, here, settings)
    for warning in warnings:
        console.warn(warning)
    num_views = recipe.num_views
    left = require_room(jobs, num_views)
    wanted = {name: {unit.name for unit in units} for name, units in left.items()}
    if settings.compile:
        for job in jobs:
            compile_network(job.network)
    total = _answers_of(jobs, wanted, settings, num_views)
    with Passage(jobs[0].store.origin, total) as passage:
        made = 0
        cuts = {(job.manifest.unit_rows, job.manifest.eval_rows) for job in jobs}
        for cut in sorted(cuts):
            alike = [j for j in jobs if (j.manifest.unit_rows, j.manifest.eval_rows) == cut]
            worker = _Pass(recipe, alike, dataset, here, stop, settings, passage, began)
            made += worker.run(wanted, num_views)
    teachers = [_finished(job, dataset) for job in jobs]
    return Built(
        teachers, made, passage.done, time.monotonic() - began, passage.data_wait, warnings
    )


class _Pass:
    """One process's way through the pieces of caches that are cut alike."""

    def __init__(
        self,
        recipe: Recipe,
        jobs: list[Job],
        dataset: Dataset,
        here: Machine,
        stop: StopRequest,
        settings: Settings,
        passage: Passage,
        began: float,
    ) -> None:
        self.recipe, self.jobs, self.dataset, self.here = recipe, jobs, dataset, here
        self.stop, self.settings, self.passage = stop, settings, passage
        self.deadline = None if settings.time_limit is None else began + settings.time_limit
        self.longest = 0.0  # seconds that a piece took
        self.least_top1 = settings.min_top1  # until it is known
        self.batch_size = settings.batch_size or BATCH_SIZE[here.device.type]

    def run(self, wanted: dict[str, set[str]], num_views: int | None) -> int:
        """Make what is wanted of this part; return how many units that were."""
        made = 0
        views = Views(
            self.dataset,
            self.recipe.data,
            device=self.here.device,
            workers=self.here.workers,
            audience="teacher",
        )
        writers = {job.name: Writer(job.store, job.manifest) for job in self.jobs}
        try:
            for piece in pieces(self.jobs[0].manifest, self.settings, num_views):
                if piece.part == "views":
                    self._require_good(writers)
                units = {job.name: piece.units(wanted[job.name]) for job in self.jobs}
                if not any(units.values()):
                    continue
                self._mind_the_time(ahead=self.longest)
                started = time.monotonic()
                for name, answers in self._answers(piece, units, views).items():
                    for unit, columns in answers:
                        writers[name].put(unit, columns)
                        made += 1
                self.longest = max(self.longest, time.monotonic() - started)
        finally:
            views.close()
            for writer in writers.values():  # what is made is kept, whatever came
                writer.close()
        return made

    def _answers(
        self, piece: Piece, units: dict[str, list[Unit]], views: Views
    ) -> dict[str, list[tuple[Unit, dict[str, np.ndarray]]]]:
        """The columns of a piece's units, made on the device and brought to the host at the end."""
        asked = [job for job in self.jobs if units[job.name]]
        numbers = sorted({unit.part for each in units.values() for unit in each})
        place = {part: i for i, part in enumerate(numbers)}
        kept: dict[str, dict[str, Tensor]] = {job.name: {} for job in asked}
        for images, which in self._images(piece, numbers, views):
            self._mind_the_time()
            at = torch.from_numpy(which).to(self.here.device, non_blocking=True)
            for job in asked:
                outputs = tell(job.network, images, self.recipe, self.here.device)
                if piece.part == "views":
                    columns = pack(job.manifest.codec, outputs)
                else:
                    columns = {"logits": outputs.logits.float()}
                _keep(kept[job.name], columns, at, len(numbers) * piece.rows)
            self.passage.advance(len(which) * len(asked))
        found = {}
        for job in asked:
            columns = {name: column.cpu() for name, column in kept[job.name].items()}
            require_finite(columns, job.store.origin)
            host = {name: column.numpy() for name, column in columns.items()}
            found[job.name] = [
                (unit, _rows(job.manifest, host, unit, place[unit.part] * piece.rows))
                for unit in units[job.name]
            ]
        return found

    def _images(
        self, piece: Piece, parts: list[str], views: Views
    ) -> Iterator[tuple[Tensor, np.ndarray]]:
        """Images of a piece, and which row of its parts, one after the other, each is."""
        if piece.part == "views":
            rows = np.arange(piece.start, piece.start + piece.rows)
            numbers = [int(part.rpartition("v")[2]) for part in parts]
            positions = np.tile(rows, len(numbers))
            batches = views.single(
                positions, np.repeat(numbers, len(rows)), batch_size=self.batch_size
            )
            for batch, which in self.passage.timed(batches):
                yield batch.images, which
            return
        test = piece.part == "test"
        source = self.dataset.test if test else self.dataset.train
        ids = np.arange(len(source)) if test else self.dataset.val_ids
        first = 0
        evaluation = evaluation_batches(
            self.dataset,
            source,
            ids[piece.start : piece.start + piece.rows],
            self.recipe.data,
            batch_size=self.batch_size,
            device=self.here.device,
            workers=self.here.workers,
        )
        for images, _, _ in self.passage.timed(evaluation):
            yield images, np.arange(first, first + len(images))
            first += len(images)

    def _mind_the_time(self, ahead: float = 0.0) -> None:
        """Stop if it was asked for, or if what comes next would not be done in time."""
        late = self.deadline is not None and time.monotonic() + ahead > self.deadline
        if self.stop.signum is None and not late:
            return
        raise Stopped(
            f"{self.jobs[0].store.origin}: stopped, "
            + ("the time is up" if self.stop.signum is None else "as a signal asked")
            + "; all units that were made are kept",
            hint="the same command goes on from there",
            signum=self.stop.signum,
        )

    def _require_good(self, writers: dict[str, Writer]) -> None:
        """Refuse a teacher that must be better, as soon as the test split is answered."""
        least, self.least_top1 = self.least_top1, None
        for job in self.jobs if least is not None else ():
            writers[job.name].wait()
            top1 = scores(job, self.dataset).get("test", {}).get("top1", 1.0)
            if least is not None and top1 < least:
                raise PreflightError(
                    f"teacher {job.name}: right on {top1:.1%} of the test images, "
                    f"--min-teacher-top1 asks for {least:.1%}",
                    hint="mind its weights, its normalisation and the order of its classes",
                )


def _begin(
    recipe: Recipe, jobs: Sequence[Job], dataset: Dataset, here: Machine, settings: Settings
) -> tuple[list[Job], list[str]]:
    """The jobs with the manifests that lie on disk, begun where there was none."""
    rows = settings.unit_rows
    if rows is None and len(jobs) > 1:  # so that one pass over the pixels serves all of them
        rows = min(job.manifest.unit_rows for job in jobs)
    begun, warnings = [], []
    for job in jobs:
        there = write.read_manifest(job.store)
        found, said = cached.start(
            recipe,
            dataset,
            job.network,
            job.store,
            num_views=job.manifest.views,
            device=here.device,
            unit_rows=settings.unit_rows if there else rows,
        )
        begun.append(job._replace(manifest=found))
        warnings += said
    return begun, warnings


def require_room(jobs: Sequence[Job], num_views: int | None) -> dict[str, list[Unit]]:
    """The units that are still missing of these views, by the name of the teacher.

    Raises:
        PreflightError: If they would fill the disk, all together.
    """
    left = {job.name: write.missing(job.store, job.manifest, num_views) for job in jobs}
    folders = {job.store.path: job for job in jobs if isinstance(job.store, Folder)}
    needed = [job.manifest.size_of(unit) for job in folders.values() for unit in left[job.name]]
    parts = {(job.name, unit.part) for job in folders.values() for unit in left[job.name]}
    if needed:
        files = len(needed) + len(parts) + _OTHER_FILES
        storage.require_room(next(iter(folders)), sum(needed), files=files)
    return left


def _answers_of(
    jobs: Sequence[Job], wanted: dict[str, set[str]], settings: Settings, num_views: int | None
) -> int:
    """Answers that this part still asks for."""
    return sum(
        unit.rows
        for job in jobs
        for piece in pieces(job.manifest, settings, num_views)
        for unit in piece.units(wanted[job.name])
    )


def _finished(job: Job, dataset: Dataset) -> dict[str, object]:
    """What there is of a cache now; the last process to come marks it complete."""
    told = scores(job, dataset)
    left = write.finish(job.store, job.manifest, told)
    units = job.manifest.units()
    return {
        "name": job.name,
        "path": job.store.origin,
        **job.manifest.about,
        "codec": job.manifest.codec,
        "views": job.manifest.views,
        "units": len(units),
        "missing": len(left),
        "bytes": sum(job.manifest.size_of(unit) for unit in units),
        "scores": told,
    }


def _keep(kept: dict[str, Tensor], columns: dict[str, Tensor], at: Tensor, rows: int) -> None:
    """Put rows of columns in their places, on the device."""
    for name, column in columns.items():
        column = bits(column)
        if name not in kept:
            kept[name] = column.new_zeros(rows, *column.shape[1:])
        kept[name].index_copy_(0, at, column)


def bits(column: Tensor) -> Tensor:
    """A column of a type that every kernel knows, with the same bytes."""
    alike = {torch.uint16: torch.int16, torch.uint32: torch.int32}
    return column.view(alike[column.dtype]) if column.dtype in alike else column


def _rows(
    manifest: Manifest, host: dict[str, np.ndarray], unit: Unit, first: int
) -> dict[str, np.ndarray]:
    return {
        column.name: host[column.name][first : first + unit.rows]
        for column in manifest.columns_of(unit)
    }
