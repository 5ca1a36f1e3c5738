"""Who is evaluated: the runs that were named, their teachers, and their students without one."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from distill import console, evaluate
from distill.cache import write
from distill.cache.read import Reader
from distill.cache.store import places
from distill.data.datasets import Dataset
from distill.data.loader import Loader, evaluation_batches
from distill.engine import finished, machine
from distill.engine.finished import Finished
from distill.engine.machine import Machine
from distill.engine.networks import Together, placed
from distill.engine.run import Result
from distill.engine.session import batches_of
from distill.errors import DistillError, IncompatibleError, PreflightError
from distill.evaluate import Answers, Predictions
from distill.models import weights
from distill.models.network import Network
from distill.recipe import Recipe
from distill.suites import as_bytes
from distill.types import Batch


class Tested(NamedTuple):
    """A network, the images it is asked about, and what it says of them."""

    key: str  # the same for the same weights and images
    model: str
    network: nn.Module | None  # None: a cache holds what it says
    recipe: Recipe  # of the run whose images it sees
    dataset: Dataset
    answers: Answers  # to the test split
    predictions: Predictions  # that those are

    @property
    def view(self) -> tuple[int, float]:
        """What decides how the images are shown: equal views show the same pixels."""
        return self.dataset.image_size, self.recipe.data.eval_crop


class Subject(NamedTuple):
    """What a report has a row for: a run, or several that differ in their seeds alone."""

    name: str
    role: Literal["run", "teacher", "alone"]
    members: tuple[Tested, ...]  # one a seed; of a teacher that all of them share, one
    runs: tuple[Path, ...]  # of the members; none of a teacher's that is no run
    seeds: tuple[int, ...]
    teacher: str | None = None  # the name of its subject; of a control, that of its run
    control: str | None = None  # the same student without teacher: the name of its subject

    @property
    def first(self) -> Tested:
        """The member that stands for all where one is enough."""
        return self.members[0]

    @property
    def model(self) -> str:
        """The name of its network."""
        return self.first.model


def find(runs: Sequence[Path], data_root: Path | None, here: Machine) -> list[Subject]:
    """The runs as subjects, then their teachers, then their students without teacher.

    Runs of one recipe that differ in their seeds alone are one subject. The control of a run is a
    run of its recipe without teacher: one of those that were named, or the `baseline` in it.

    Raises:
        PreflightError: If data or weights are not there.
        IncompatibleError: If their test images are not the same.
    """
    load = finished.Loader(data_root)
    loaded = [load(run) for run in runs]
    _require_same_images(loaded)
    groups: dict[str, list[Finished]] = {}
    for one in loaded:
        kind, seed = _kind(one.recipe, one.result), one.recipe.train.seed
        again = seed in [other.recipe.train.seed for other in groups.get(kind, ())]
        groups.setdefault(f"{kind} {one.path}" if again else kind, []).append(one)
    panel = _Panel(here)
    found = {kind: panel.add("run", _name(group), group) for kind, group in groups.items()}
    for kind, group in groups.items():
        own = found[kind]
        teacher = panel.teacher(group) or panel.subjects[own].teacher
        control = _control(group, found, panel, load)
        panel.subjects[own] = panel.subjects[own]._replace(teacher=teacher, control=control)
        if control is not None and panel.subjects[control].teacher is None:
            panel.subjects[control] = panel.subjects[control]._replace(teacher=teacher)
    return sorted(panel.subjects.values(), key=lambda subject: _ORDER.index(subject.role))


def networks(subjects: Sequence[Subject]) -> list[Tested]:
    """Every network of theirs once, without those that a cache stands for."""
    members = [one for subject in subjects for one in subject.members]
    return list({one.key: one for one in members if one.network is not None}.values())


def pixels(tested: Tested, ids: Int[np.ndarray, " n"]) -> Iterator[UInt8[np.ndarray, "S S 3"]]:
    """Test images as the network is shown them, one after the other."""
    dataset, data = tested.dataset, tested.recipe.data
    cpu = torch.device("cpu")
    for i in ids:
        one = np.array([i])
        batches = evaluation_batches(dataset, dataset.test, one, data, batch_size=1, device=cpu)
        for images, _, _ in batches:
            yield as_bytes(images[0])


class Sample(NamedTuple):
    """Some test images on the device, the same for all that see them alike."""

    images: Float[Tensor, "N 3 S S"]
    labels: Int[Tensor, " N"]
    ids: Int[Tensor, " N"]


def sample(tested: Tested, here: Machine, images: int) -> Sample:
    """At most so many of the test images, spread over the split; all of them in this process.

    In an order that is drawn once: some splits are sorted by class, and parts of a sample are used.
    """
    dataset = tested.dataset
    ids = np.random.default_rng(0).permutation(evenly(len(dataset.test), images))
    batches = batches_of(dataset.test, ids, tested.recipe, dataset, here._replace(rank=0, world=1))
    return Sample(*(torch.cat(column) for column in zip(*batches, strict=True)))


def training_views(tested: Tested, here: Machine, *, images: int) -> Iterator[Batch]:
    """Training images as they were augmented, at most so many; the same in every process."""
    dataset, recipe = tested.dataset, tested.recipe
    size = min(machine.BATCH_SIZE[here.device.type], recipe.train.batch_size)
    loader = Loader(
        dataset,
        recipe.data,
        batch_size=min(size, len(dataset.train_ids)) // 2 * 2 or 1,  # mixing pairs them
        train_seed=recipe.train.seed,
        device=here.device,
        workers=here.workers,
        audience="both",
    )
    try:
        yield from itertools.islice(loader.epoch(0), max(1, images // size))
    finally:
        loader.close()


def evenly(count: int, most: int) -> Int[np.ndarray, " n"]:
    """At most so many of the numbers below `count`, spread over all of them, ascending."""
    return np.unique(np.linspace(0, count - 1, min(most, count)).round().astype(np.int64))


_ORDER = ("run", "teacher", "alone")


def _control(
    group: list[Finished], found: dict[str, str], panel: _Panel, load: finished.Loader
) -> str | None:
    """The subject that is the same student without teacher."""
    recipe = group[0].recipe
    if recipe.transfers or not (recipe.teachers or recipe.cache):
        return None
    alone = _kind(recipe.without_teacher(), group[0].result)
    if (named := found.get(alone)) is not None:
        return named
    paths = [one.path / "baseline" for one in group]
    if not all((path / "student.safetensors").is_file() for path in paths):
        return None
    return panel.add("alone", "student alone", [load(path) for path in paths])


class _Panel:
    """All subjects by name; equal networks on equal images answer once."""

    def __init__(self, here: Machine) -> None:
        self.here = here
        self.subjects: dict[str, Subject] = {}
        self._tested: dict[str, Tested] = {}

    def add(
        self, role: Literal["run", "teacher", "alone"], name: str, group: list[Finished]
    ) -> str:
        """The name of the subject that these runs are."""
        members = [self._test(one.network, weights.fingerprint(one.network), one) for one in group]
        runs, seeds = [one.path for one in group], [one.recipe.train.seed for one in group]
        return self._enter(Subject(name, role, tuple(members), tuple(runs), tuple(seeds)))

    def teacher(self, group: list[Finished]) -> str | None:
        """The name of the subject that taught these runs; None where there is none, or not here."""
        members = [self._teacher(one) for one in group]
        known = list({one.key: one for one in members if one is not None}.values())
        if None in members or not known:
            return None
        members_ = known if len(known) == 1 else [one for one in members if one is not None]
        runs = [Path(str(spec.weights)) for spec in group[0].specs if _is_run(spec.weights)]
        several = len(group[0].recipe.teachers) > 1
        name = runs[0].name if len(runs) == 1 else "teachers" if several else known[0].model
        name = name if "teacher" in name else f"teacher {name}"
        seeds = tuple(range(len(members_)))
        return self._enter(Subject(name, "teacher", tuple(members_), tuple(runs), seeds))

    def _enter(self, subject: Subject) -> str:
        keys = [one.key for one in subject.members]
        for known in self.subjects.values():
            if subject.role != "run" and [one.key for one in known.members] == keys:
                return known.name
        name, count = subject.name, 1
        while name in self.subjects:
            count += 1
            name = f"{subject.name} ({count})"
        self.subjects[name] = subject._replace(name=name)
        return name

    def _teacher(self, one: Finished) -> Tested | None:
        recipe = one.recipe
        if not recipe.teachers:
            try:
                return self._cached(one)
            except DistillError as error:
                console.warn(f"{one.path}: its teacher cannot be asked: {error}")
                return None
        networks = one.teachers()
        if not networks:
            return None
        keys = [weights.fingerprint(network) for network in networks]
        if len(networks) == 1:
            return self._test(networks[0], keys[0], one)
        shares = [spec.weight for spec in recipe.teachers]
        ensemble = Together(networks, shares, recipe.ensemble)
        return self._test(ensemble, json.dumps([keys, shares, recipe.ensemble]), one)

    def _cached(self, one: Finished) -> Tested | None:
        """A teacher of which there is a cache alone."""
        cache = one.recipe.cache
        if cache is None or cache.path is None:
            return None
        ((_, store),) = places([], cache.path)
        manifest = write.read_manifest(store)
        if manifest is None:
            raise PreflightError(f"{store.origin}: there is no cache any more")
        reader = Reader(store, manifest, num_views=1)
        logits = reader.evaluation("test")
        reader.close()
        labels = one.dataset.test.labels
        told = Answers(np.arange(len(labels)), labels, logits)
        model = str(manifest.about["model"])
        return Tested(manifest.id, model, None, one.recipe, one.dataset, told, told.predictions)

    def _test(self, network: Network | Together, weights_key: str, one: Finished) -> Tested:
        recipe, dataset, here = one.recipe, one.dataset, self.here
        key = json.dumps([weights_key, dataset.image_size, recipe.data.eval_crop])
        if key not in self._tested:
            network = placed(network, here) if isinstance(network, Network) else network
            network = network.to(here.device).eval().requires_grad_(False)
            ids = np.arange(len(dataset.test))
            told = evaluate.answer(
                network,
                batches_of(dataset.test, ids, recipe, dataset, here),
                autocast=machine.autocast(recipe.train.precision, here.device),
            )
            model = network.model if isinstance(network, Network) else _members(network)
            predictions = told.predictions
            self._tested[key] = Tested(key, model, network, recipe, dataset, told, predictions)
        return self._tested[key]


def _members(network: Together) -> str:
    return f"{len(network.networks)} networks together"


def _require_same_images(loaded: list[Finished]) -> None:
    first = loaded[0]
    for one in loaded[1:]:
        if one.dataset.fingerprint != first.dataset.fingerprint:
            raise IncompatibleError(
                f"{one.path}: its data ({one.dataset.name}, {len(one.dataset.test):,} test images) "
                f"are not those of {first.path} ({first.dataset.name}, "
                f"{len(first.dataset.test):,})",
                hint="runs are compared image by image; evaluate these one at a time",
            )


def _kind(recipe: Recipe, result: Result | None) -> str:
    """What decides a run, apart from its seed and its precision.

    A recipe's identity has no weights: those that a student began with, and those of teachers that
    no recipe trained, are known by what the run found of them.
    """
    identity, known = recipe.identity(), {} if result is None else result.identity
    for key in ("seed", "precision"):
        del identity["train"][key]
    taught = zip(recipe.teachers, known.get("teachers", []), strict=False)
    given = [key for spec, key in taught if spec.recipe is None]
    return json.dumps([identity, known.get("student"), given], sort_keys=True)


def _name(group: list[Finished]) -> str:
    first = group[0].path.resolve().name
    return first if len(group) == 1 else f"{first} ({len(group)} seeds)"


def _is_run(source: str | None) -> bool:
    return source is not None and (Path(source) / "recipe.yaml").is_file()
