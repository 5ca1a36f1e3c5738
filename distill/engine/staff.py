"""Who teaches: the networks or caches of a recipe, for one run or for several."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from distill import models, objectives
from distill.data.datasets import Dataset
from distill.engine import cached, machine, parallel
from distill.engine.cached import Opened, Tutor, open_caches
from distill.engine.fill import Filler
from distill.engine.machine import Machine
from distill.engine.networks import facts, placed, trained
from distill.errors import IncompatibleError
from distill.models import cost
from distill.models.network import Network
from distill.models.quick import compile_network, fold, halve
from distill.models.weights import fingerprint
from distill.recipe import Recipe
from distill.teacher import Ensemble, Live, Once, Teacher
from distill.types import Anatomy


class Staff:
    """The teachers of the runs that hear the same ones.

    Attributes:
        heard: The objectives of those runs.
        teacher: All of them as one, once they are engaged; None where there is none.
        tutors: Each as it is reported.
        opened: Where they answer from a cache.
        filler: Where they are asked while a cache is filled.
        identity: What a resumed run must have in common with this one.

    Args:
        recipe: Whose teachers.
        path: The run directory beside which teachers that are recipes have their runs.
        dataset: What they are asked about.
    """

    def __init__(self, recipe: Recipe, path: Path, dataset: Dataset) -> None:
        self._recipe, self._path, self._dataset = recipe, path, dataset
        specs = [trained(spec, path, i) for i, spec in enumerate(recipe.teachers)]
        self._networks = [models.build_teacher(spec, **facts(dataset)) for spec in specs]
        self.heard: list[objectives.Objective] = []
        self.teacher: Teacher | None = None
        self.tutors: list[Tutor] = []
        self.opened: Opened | None = None
        self.filler: Filler | None = None
        self.identity: dict[str, Any] = {
            "data": dataset.fingerprint,
            "teachers": [fingerprint(network) for network in self._networks],
        }

    @functools.cached_property
    def anatomies(self) -> list[Anatomy]:
        """What there is to read inside of each."""
        return cached.anatomies(self._recipe, self._networks)

    def engage(self, here: Machine) -> None:
        """Open the caches, or put the networks in their place, for all that `heard` reads."""
        cache, networks = self._recipe.cache, self._networks
        if cache is not None and cache.path is not None and not cache.fill:
            self.opened = open_caches(
                self._recipe, self._dataset, networks, self.heard, here.device
            )
            self.identity["cache"] = self.opened.ids
            members, self.tutors = self.opened.members, self.opened.tutors
        else:
            for i, network in enumerate(networks):
                placed(network, here).tap(objectives.taps(self.heard, i))
            members = [Live(network) for network in networks]
            self.tutors = [_tutor(network, self._dataset) for network in networks]
            if cache is not None and cache.fill:
                _require_kept(self.heard, len(networks), cache.features)
                self.filler = Filler(
                    self._recipe, self._dataset, networks, self._path / "cache", here
                )
                members = list(self.filler.members)
            else:
                for network in networks:
                    _quicken(network, self._recipe, here)
                    if here.shards:
                        parallel.shard(network, here)
        for tutor in self.tutors:
            if here.compile and tutor.network:
                compile_network(tutor.network)
        teacher = together(members, self._recipe)
        if teacher is not None and len(self.heard) > 1:
            teacher = Once(teacher, here.micro_batches(self._recipe.train.batch_size))
        self.teacher = teacher


def _require_kept(heard: list[objectives.Objective], teachers: int, kept: list[str]) -> None:
    needed = [name for i in range(teachers) for name in objectives.taps(heard, i)]
    if missing := [name for name in needed if name not in kept]:
        raise IncompatibleError(
            f"objective: reads the feature {missing[0]}, which would not be kept",
            hint=f"--set cache.features=[{', '.join([*kept, *missing])}]",
        )


def together(members: Sequence[Teacher], recipe: Recipe) -> Teacher | None:
    """The recipe's teachers as one; None where there is none."""
    if len(members) < 2:
        return members[0] if members else None
    weights = [spec.weight for spec in recipe.teachers]
    return Ensemble(members, weights, recipe.ensemble)


def _quicken(network: Network, recipe: Recipe, here: Machine) -> None:
    """Fold and halve a network that is asked in every step, and that nothing is kept of."""
    fold(network)
    with machine.autocast(recipe.train.precision, here.device):
        if torch.is_autocast_enabled(here.device.type):
            halve(network, torch.get_autocast_dtype(here.device.type))


def _tutor(network: Network, dataset: Dataset) -> Tutor:
    return Tutor(
        network.model,
        cost.parameters(network),
        cost.flops(network, dataset.image_size),
        network,
        {},
    )
