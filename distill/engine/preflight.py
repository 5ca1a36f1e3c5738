"""A run rehearsed: every part built, one step made on two images, nothing kept."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from distill import models, objectives, storage
from distill.cache import write
from distill.cache.store import open_store, places
from distill.data import datasets, on_device
from distill.data.datasets import Dataset
from distill.data.loader import Loader
from distill.engine import cached, generations, machine, memory, optim
from distill.engine.networks import connect, facts, trained
from distill.engine.run import Run
from distill.engine.staff import together
from distill.engine.step import Distiller, train_step
from distill.errors import DistillError, IncompleteError
from distill.models import cost, weights
from distill.models.network import Network
from distill.objectives import Objective
from distill.recipe import Data, Recipe
from distill.recipe import Teacher as TeacherSpec
from distill.teacher import Live, Teacher, unpack
from distill.types import Batch, Outputs

CPU = torch.device("cpu")


class Memory(NamedTuple):
    """Bytes that training needs on each device, without its kernels' own workspace."""

    weights: int
    gradients: int
    optimizer: int
    average: int  # of the weights, where the recipe has an `ema`
    activations: int  # kept for the backward pass, for all images of a device
    teachers: int
    images: int

    @property
    def total(self) -> int:
        """All of them together."""
        return sum(self)


class Rehearsal(NamedTuple):
    """What a run will be like."""

    data: dict[str, Any]  # name, num_classes, train, val, test, image_size, bad
    student: dict[str, Any]  # model, parameters, flops, reinitialised
    teachers: list[dict[str, Any]]  # model, run, parameters, flops, trained_first
    epochs: int
    steps: int
    batch_size: int
    device_batch_size: int
    memory: Memory
    caches: list[dict[str, Any]]  # path, codec, views, units, missing and bytes of each teacher's
    reads: dict[str, str]  # by term, what it reads inside of the networks
    checkpoint: int  # bytes of one; a run directory holds two, and a third while it is written
    warnings: list[str]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        memory = {**self.memory._asdict(), "total": self.memory.total}
        return {**self._asdict(), "memory": memory}


def rehearse(recipe: Recipe, path: Path, *, devices: int = 1) -> Rehearsal:
    """Build all parts of the run in `path` and make one step on two images, on the CPU.

    Teachers that are recipes without a run yet are rehearsed the same way. Nothing is written
    but scratch files that are gone afterwards.

    Args:
        recipe: What would be trained.
        path: The run directory that it would be trained in.
        devices: How many share each batch.

    Raises:
        RecipeError: If a model, a term or an argument is unknown.
        IncompatibleError: If parts of the recipe do not fit each other.
        PreflightError: If data or weights are missing.
        DamagedError: If a file of data or weights is damaged.
    """
    recipe = generations.last(recipe, path)
    with machine.determinism(recipe.train.deterministic):
        return _rehearse(recipe, path, devices, datasets.load(recipe.data))[0]


def _rehearse(
    recipe: Recipe, path: Path, devices: int, dataset: Dataset
) -> tuple[Rehearsal, Network]:
    batch_size = recipe.train.batch_size
    seed = recipe.train.seed
    loader = Loader(
        dataset, recipe.data, batch_size=batch_size, train_seed=seed, device=CPU, world=devices
    )
    steps = recipe.train.epochs * loader.steps_per_epoch
    loader.close()
    student, teachers = _networks(recipe, path, devices, dataset)
    networks = [network for network, _ in teachers]
    caches = _caches(recipe, path, dataset, networks)
    objective = objectives.build(recipe.objective)
    needed, checkpoint = _step(recipe, dataset, student, networks, objective, batch_size // devices)
    if recipe.cache is not None and recipe.cache.path is not None and not recipe.cache.fill:
        needed = needed._replace(teachers=0)  # the cache answers for them
    plan = Rehearsal(
        data={
            "name": dataset.name,
            "num_classes": len(dataset.classes),
            "train": len(dataset.train_ids),
            "val": len(dataset.val_ids),
            "test": len(dataset.test),
            "image_size": dataset.image_size,
            "bad": list(dataset.bad),
        },
        student={
            **_cost(student, dataset.image_size),
            "reinitialised": list(student.reinitialised),
        },
        teachers=[
            {
                **_cost(network, dataset.image_size),
                "run": trained(spec, path, i).weights,
                "trained_first": first is not None,
                "steps": first.steps if first else 0,
            }
            for i, (spec, (network, first)) in enumerate(
                zip(recipe.teachers, teachers, strict=True)
            )
        ],
        epochs=recipe.train.epochs,
        steps=steps,
        batch_size=batch_size,
        device_batch_size=batch_size // devices,
        memory=needed,
        caches=caches,
        reads={name: str(reads) for name, reads in objective.reads().items()},
        checkpoint=checkpoint,
        warnings=_warnings(recipe, dataset, student, needed),
    )
    return plan, student


class _Taught(NamedTuple):
    """A teacher, and the rehearsal of the run that trains it first, if there is one."""

    network: Network
    first: Rehearsal | None


def _networks(
    recipe: Recipe, path: Path, devices: int, dataset: Dataset
) -> tuple[Network, list[_Taught]]:
    """The student and the teachers; the faults of all of them in one error."""
    faults: list[DistillError] = []
    student, teachers = None, []
    try:
        student = models.build_student(recipe.student, **facts(dataset))
    except DistillError as error:
        faults.append(error)
    for i, spec in enumerate(recipe.teachers):
        try:
            ready = trained(spec, path, i)
            teachers.append(_teacher(spec, ready, devices, recipe.data, dataset))
        except DistillError as error:
            faults.append(error)
    if student is None or faults:
        hints = dict.fromkeys(error.hint for error in faults if error.hint)
        raise type(faults[0])("\n".join(map(str, faults)), hint="; ".join(hints))
    return student, teachers


def _teacher(
    spec: TeacherSpec, ready: TeacherSpec, devices: int, data: Data, dataset: Dataset
) -> _Taught:
    """The teacher as the student's `dataset` meets it; without a run yet, its initial weights.

    `ready` is the teacher with its run for weights, `data` the section that gave `dataset`.
    """
    run = Run(Path(str(ready.weights)))
    if spec.recipe is None or run.student.exists():
        return _Taught(models.build_teacher(ready, **facts(dataset)), None)
    own = dataset if spec.recipe.data == data else datasets.load(spec.recipe.data)
    first, network = _rehearse(spec.recipe, run.path, devices, own)
    with storage.passing() as scratch:  # so that it is read as the real one will be
        storage.write(Run(scratch).student, weights.to_bytes(network))
        spec = ready.model_copy(update={"weights": str(scratch)})
        try:
            return _Taught(models.build_teacher(spec, **facts(dataset)), first)
        except DistillError as error:
            message = str(error).replace(str(scratch), str(run.path))
            raise type(error)(message, hint=error.hint) from None


def _cost(network: Network, image_size: int) -> dict[str, Any]:
    return {
        "model": network.model,
        "parameters": cost.parameters(network),
        "flops": cost.flops(network, image_size),
    }


def _step(
    recipe: Recipe,
    dataset: Dataset,
    student: Network,
    teachers: list[Network],
    objective: Objective,
    images: int,
) -> tuple[Memory, int]:
    """Memory of a device that gets `images` of each batch, and bytes of a checkpoint."""
    if objective.looks_inside:
        connect(objective, student, cached.anatomies(recipe, teachers), dataset)
    for i, network in enumerate(teachers):
        network.tap(objective.teacher_taps(i))
    distiller = Distiller(student, objective)
    optimizer = optim.build(distiller, recipe.optimizer)
    members: list[Teacher] = [Live(network) for network in teachers]
    if not members and recipe.cache is not None and recipe.cache.path is not None:
        members = [_stand_in(recipe.cache.path)]
    teacher = together(members, recipe)

    def kept(batch: Batch) -> int:
        step = functools.partial(
            train_step,
            distiller,
            teacher,
            optimizer,
            batch,
            weights=distiller.objective.weights_at(0.5),
            autocast=_autocast(recipe.train.precision),
        )
        return memory.kept_bytes(step, distiller)

    pair = _pair(recipe, dataset)
    four: Batch = tree_map_only(Tensor, lambda x: torch.cat([x, x]), pair)
    few, more = kept(pair), kept(four)
    state, _ = optim.state_tensors(optimizer)
    model = _bytes(distiller.state_dict())
    average = _bytes(student.state_dict()) if recipe.train.ema else 0
    needed = Memory(
        weights=model,
        gradients=sum(p.nbytes for p in distiller.parameters() if p.requires_grad),
        optimizer=_bytes(state),
        average=average,
        activations=memory.grown(few, more, images),
        teachers=sum(_bytes(network.state_dict()) for network in teachers),
        images=pair.images[0].nbytes * images,
    )
    return needed, needed.weights + needed.optimizer + needed.average


def _caches(
    recipe: Recipe, path: Path, dataset: Dataset, networks: list[Network]
) -> list[dict[str, Any]]:
    """What the recipe's caches are, or would be; those that cannot serve it are refused."""
    if recipe.cache is None or not (recipe.cache.path or recipe.cache.fill):
        return []
    objective = objectives.build(recipe.objective)
    found = []
    for i, (_, store) in enumerate(
        places(recipe.teachers, recipe.cache.path or str(path / "cache"))
    ):
        network = networks[i] if networks else None
        manifest = write.read_manifest(store)
        if manifest is not None:
            cached.require_identity(recipe, dataset, network, manifest, store)
        elif network is not None:
            views = recipe.num_views or 1
            manifest = cached.manifest(recipe, dataset, network, num_views=views, unit_rows=None)
        else:
            raise IncompleteError(f"{store.origin}: there is no cache, and no teacher to ask")
        cached.require_usable(manifest, objective)
        units = manifest.units()
        found.append(
            {
                "path": store.origin,
                "codec": manifest.codec,
                "views": manifest.views,
                "units": len(units),
                "missing": len(write.missing(store, manifest)),
                "bytes": sum(map(manifest.size_of, units)),
            }
        )
    return found


def _stand_in(path: str) -> Teacher:
    """A teacher that says nothing, in the shape of what the cache at `path` holds."""
    manifest = write.read_manifest(open_store(path))
    assert manifest is not None, "_caches has read it"

    def say(batch: Batch) -> Outputs:
        rows = len(batch.ids)
        blank = {c.name: torch.zeros(rows, *c.shape) for c in manifest.columns}
        return unpack(manifest.codec, blank, manifest.num_classes)

    return say


def _pair(recipe: Recipe, dataset: Dataset) -> Batch:
    """The first two training images, augmented and mixed as the recipe says."""
    loader = Loader(dataset, recipe.data, batch_size=2, train_seed=recipe.train.seed, device=CPU)
    try:
        return next(loader.epoch(0))
    finally:
        loader.close()


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _autocast(precision: str) -> AbstractContextManager[Any]:
    """The recipe's precision, imitated where this CPU has no instructions for it."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast("cpu", dtype=torch.bfloat16 if precision == "bf16" else torch.float16)


def _warnings(recipe: Recipe, dataset: Dataset, student: Network, needed: Memory) -> list[str]:
    """What a user should know before the run."""
    found = []
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        machine.autocast(recipe.train.precision, device)
    except DistillError as error:
        found.append(f"not on this machine: {error}")
    free = memory.free_bytes(device)
    if needed.total > memory.PART * free:
        found.append(
            f"about {needed.total / 1e9:,.1f} GB are needed, and {free / 1e9:,.1f} GB are free "
            "here: training would add up micro-batches"
        )
    if dataset.train.pixels is None:
        found += on_device.slow(recipe.data.decoder, device)
    if dataset.bad:
        found.append(f"training images that are bad and left out: {len(dataset.bad):,}")
    if student.reinitialised:
        found.append(
            f"student: {', '.join(student.reinitialised)} are drawn anew, because its weights know "
            "other classes"
        )
    return found
