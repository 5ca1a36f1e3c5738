"""The work of the teachers' pass: whose answers, which pieces, and how long it takes.

What there is to do follows from the manifests alone. A process takes every N-th piece of it and
skips what is there: so it can be killed, started twice, or spread over machines that know nothing
of each other.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from distill import evaluate, models, objectives, storage
from distill.cache import write
from distill.cache.layout import Manifest, Unit, view_part
from distill.cache.read import Reader
from distill.cache.store import Folder, Store, places
from distill.data.datasets import Dataset
from distill.data.loader import evaluation_batches
from distill.data.pixels import Views
from distill.diagnostics.timing import time_network
from distill.engine import cached
from distill.engine.canaries import numerics, precision, tell
from distill.engine.machine import BATCH_SIZE, Machine
from distill.engine.networks import facts, placed, trained
from distill.models.network import Network
from distill.recipe import Recipe

VIEWS_PER_READ = 4  # views made from one decoded file
PROBE_SECONDS = 10.0
TIMED_SECONDS = 3.0  # of a network's forward passes


class Job(NamedTuple):
    """A teacher and its cache."""

    name: str
    store: Store
    network: Network
    manifest: Manifest


class Settings(NamedTuple):
    """How the pass is made; nothing here decides what is in the cache."""

    shard: tuple[int, int] = (1, 1)  # which part of how many, from 1
    time_limit: float | None = None  # seconds
    batch_size: int | None = None
    views_per_read: int = VIEWS_PER_READ
    unit_rows: int | None = None
    compile: bool = False
    min_top1: float | None = None  # of the teacher on the test split


class Piece(NamedTuple):
    """A block of rows of some views, or of an evaluation split: what is made at a time."""

    part: str  # test, val or views
    views: tuple[int, ...]
    block: int
    start: int
    rows: int

    def units(self, wanted: set[str]) -> list[Unit]:
        """Those of its units whose files are wanted."""
        parts = [view_part(view) for view in self.views] or [self.part]
        units = [Unit(part, self.block, self.start, self.rows) for part in parts]
        return [unit for unit in units if unit.name in wanted]


def build_jobs(
    recipe: Recipe,
    path: str,
    run: Path,
    dataset: Dataset,
    here: Machine,
    *,
    unit_rows: int | None = None,
) -> list[Job]:
    """The recipe's teachers on the device, with the caches that they would have today.

    Args:
        recipe: Has a `cache` section and teachers.
        path: Where the caches lie.
        run: The run directory beside which teachers that are recipes have theirs.
        dataset: What they are asked about.
        here: Where.
        unit_rows: Of each file; None chooses.

    Raises:
        IncompatibleError: If a term of the objective could not use what would be kept.
        PreflightError: If a teacher's run is not there.
    """
    jobs = []
    num_views = recipe.num_views
    assert num_views is not None
    objective = objectives.build(recipe.objective)
    for i, (spec, place) in enumerate(
        zip(recipe.teachers, places(recipe.teachers, path), strict=True)
    ):
        network = placed(models.build_teacher(trained(spec, run, i), **facts(dataset)), here)
        wanted = cached.manifest(recipe, dataset, network, num_views=num_views, unit_rows=unit_rows)
        cached.require_usable(wanted, objective)
        jobs.append(Job(place.name, place.store, network, wanted))
    return jobs


def pieces(manifest: Manifest, settings: Settings, num_views: int | None) -> Iterator[Piece]:
    """This part's pieces of the whole, the same however much is done already."""
    number, count = settings.shard
    for i, piece in enumerate(_all_pieces(manifest, settings.views_per_read, num_views)):
        if i % count == number - 1:
            yield piece


def _all_pieces(manifest: Manifest, group: int, num_views: int | None) -> Iterator[Piece]:
    total = manifest.views if num_views is None else num_views
    for unit in manifest.units(0):
        yield Piece(unit.part, (), unit.block, unit.start, unit.rows)
    for first in range(0, total, group):
        views = tuple(range(first, min(first + group, total)))
        for unit in manifest.units_of(first):
            yield Piece("views", views, unit.block, unit.start, unit.rows)


def scores(job: Job, dataset: Dataset) -> dict[str, dict[str, float]]:
    """The teacher's accuracy and calibration on each evaluation split that is all there."""
    found: dict[str, dict[str, float]] = {}
    left = {unit.part for unit in write.missing(job.store, job.manifest, 0)}
    labels = {"test": dataset.test.labels, "val": dataset.train.labels[dataset.val_ids]}
    reader = Reader(job.store, job.manifest, num_views=job.manifest.views)
    for split, known in labels.items():
        if len(known) and split not in left:
            told = evaluate.of_logits(reader.evaluation(split), known)
            found[split] = evaluate.scores(told)._asdict()
    reader.close()
    return found


def plan(
    recipe: Recipe, jobs: Sequence[Job], dataset: Dataset, here: Machine, settings: Settings
) -> dict[str, Any]:
    """What the pass would make, and how long it would take here; nothing is written.

    Raises:
        IdentityError: If a cache was begun from something else.
    """
    teachers, answers = [], 0
    for job in jobs:
        there = write.read_manifest(job.store)
        if there is not None:
            write.require_identity(there, job.manifest.identity, job.store.origin)
        manifest = there or job.manifest
        views = max(job.manifest.views, manifest.views)
        manifest = manifest.model_copy(update={"views": views})
        left = write.missing(job.store, manifest, recipe.num_views)
        wanted = {unit.name for unit in left}
        mine = pieces(manifest, settings, recipe.num_views)
        answers += sum(unit.rows for piece in mine for unit in piece.units(wanted))
        teachers.append(
            {
                "name": job.name,
                "path": job.store.origin,
                **manifest.about,
                "codec": manifest.codec,
                "views": manifest.views,
                "samples": manifest.samples,
                "unit_rows": manifest.unit_rows,
                "units": len(manifest.units()),
                "bytes": sum(manifest.size_of(unit) for unit in manifest.units()),
                "missing": len(left),
                "missing_bytes": sum(manifest.size_of(unit) for unit in left),
            }
        )
    folders = [job.store.path for job in jobs if isinstance(job.store, Folder)]
    rate = _probe(recipe, jobs, dataset, here, settings)
    return {
        "teachers": teachers,
        "shard": "/".join(map(str, settings.shard)),
        "views_per_second": rate,
        "seconds": answers / len(jobs) / rate,
        "free_bytes": storage.free_bytes(folders[0]) if folders else None,
    }


def _probe(
    recipe: Recipe, jobs: Sequence[Job], dataset: Dataset, here: Machine, settings: Settings
) -> float:
    """Views that all teachers together answer in a second, tried on training images."""
    source = Views(
        dataset, recipe.data, device=here.device, workers=here.workers, audience="teacher"
    )
    size = settings.batch_size or BATCH_SIZE[here.device.type]
    positions = np.arange(min(len(dataset.train_ids), 64 * size))
    done, began = 0, time.monotonic()
    for batch, which in source.single(positions, np.zeros_like(positions), batch_size=size):
        for job in jobs:  # a number on the host: the device is done
            float(tell(job.network, batch.images, recipe, here.device).logits[0, 0])
        done += len(which)
        if time.monotonic() - began > PROBE_SECONDS:
            break
    seconds = time.monotonic() - began
    source.close()
    return done / max(seconds, 1e-9)


def throughput(network: Network, recipe: Recipe, dataset: Dataset, here: Machine) -> float:
    """Images that a network answers in a second: the median over passes on one batch."""
    size = BATCH_SIZE[here.device.type]
    ids = np.resize(dataset.train_ids, size)
    batches = evaluation_batches(
        dataset, dataset.train, ids, recipe.data, batch_size=size, device=here.device
    )
    images = next(images for images, _, _ in batches)
    with numerics(precision(recipe), here.device):
        return time_network(network, images, seconds=TIMED_SECONDS).images_per_second
