"""The caches of a recipe, made or completed, with the teachers that they are made of."""

from __future__ import annotations

from pathlib import Path

from distill.cache.read import require_complete
from distill.cache.store import places
from distill.cache.verify import indexed
from distill.cache.write import read_manifest
from distill.data import datasets
from distill.engine import machine
from distill.engine.jobs import Settings, build_jobs
from distill.engine.machine import Machine
from distill.engine.precompute import Built, precompute
from distill.engine.train import train_teachers
from distill.errors import IncompleteError
from distill.recipe import Recipe


def build_caches(recipe: Recipe, place: str, run: Path, here: Machine, settings: Settings) -> Built:
    """Make this part of the teachers' caches, or what is still missing of it.

    Args:
        recipe: Has a `cache` section and teachers; those that are recipes are trained first.
        place: Where the caches lie.
        run: The run directory beside which teachers that are recipes have theirs.
        here: Where.
        settings: How the pass is made.

    Raises:
        IdentityError: If a cache was begun from something else; nothing is written.
        IncompatibleError: If a term of the objective could not use what would be kept.
        PreflightError: If there is no room, or a teacher is worse than it must be.
        Stopped: If a signal or the time limit came; the same call goes on.
    """
    for _, store in places(recipe.teachers, place):
        read_manifest(store)  # a wrong address, or a damaged cache, before anything is trained
    train_teachers(recipe, run, here, parts=settings.shard[1])
    dataset = datasets.load(recipe.data)
    jobs = build_jobs(recipe, place, run, dataset, here, unit_rows=settings.unit_rows)
    with machine.stop_request() as stop:
        return precompute(recipe, jobs, dataset, here, stop, settings)


def complete_caches(recipe: Recipe, run: Path, here: Machine, *, shard: tuple[int, int]) -> None:
    """Make what the recipe's caches lack, this process's part of it first.

    Then what the others have not made yet, so that none has to wait for another. Nothing is done
    where the recipe names no cache, or has no teacher to ask.

    Raises:
        As `build_caches`.
    """
    if not recipe.teachers or recipe.cache is None or recipe.cache.path is None:
        return
    for part in dict.fromkeys((shard, (1, 1))):
        if not _complete(recipe, recipe.cache.path):
            build_caches(recipe, recipe.cache.path, run, here, Settings(shard=part))


def _complete(recipe: Recipe, place: str) -> bool:
    for _, store in places(recipe.teachers, place):
        manifest = read_manifest(store)
        if manifest is None or not indexed(store, manifest):
            return False
        try:
            require_complete(store, manifest, recipe.num_views or 1)
        except IncompleteError:
            return False
    return True
