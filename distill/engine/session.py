"""The parts of one run, built from its recipe and put on their device."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from distill import console, evaluate, models, objectives
from distill.data import datasets, on_device
from distill.data.loader import Loader, Rows, evaluation_batches
from distill.engine import machine, optim, parallel
from distill.engine.average import Average
from distill.engine.cached import Caches, Opened, Tutor
from distill.engine.fill import Filler
from distill.engine.finite import of_network
from distill.engine.machine import Machine
from distill.engine.networks import connect, facts, placed
from distill.engine.staff import Staff
from distill.engine.step import Distiller
from distill.errors import DivergedError
from distill.models import cost
from distill.models.network import Network
from distill.models.quick import compile_network
from distill.models.weights import fingerprint
from distill.recipe import Recipe
from distill.teacher import Teacher

TRIED_IMAGES = 256  # that a teacher is shown before training


class Session(NamedTuple):
    """Everything that takes part in training."""

    dataset: datasets.Dataset
    loader: Loader
    distiller: Distiller
    model: nn.Module  # the distiller, wrapped where there are several processes
    teacher: Teacher | None
    tutors: list[Tutor]
    opened: Opened | None  # where teachers answer from a cache
    filler: Filler | None  # where they are asked while a cache is filled
    optimizer: torch.optim.Optimizer
    average: Average | None
    scaler: torch.amp.GradScaler | None
    autocast: AbstractContextManager[Any]
    recordable: bool  # whether a step may become one CUDA graph
    identity: dict[str, Any]  # what a resumed run must have in common with this one

    @property
    def student(self) -> Network:
        """The network that is evaluated and saved: the averaged one, where there is one."""
        network = self.distiller.student if self.average is None else self.average.network
        assert isinstance(network, Network)
        return network

    def close(self) -> None:
        """End processes and threads."""
        self.loader.close()
        if self.opened is not None:
            self.opened.caches.close()
        if self.filler is not None:
            self.filler.close()


def prepare(recipe: Recipe, path: Path, here: Machine) -> Session:
    """Build everything a run in `path` needs; clashes between its parts show before step one.

    Raises:
        IncompatibleError: If parts of the recipe do not fit each other or the machine.
        PreflightError: If data or weights are missing.
    """
    return prepare_together([recipe], path, here)[0]


def prepare_together(
    recipes: Sequence[Recipe],
    path: Path,
    here: Machine,
    *,
    memory: float = math.inf,
    lost: Callable[[int, Exception], None] | None = None,
) -> dict[int, Session]:
    """Build what several runs need that see the same batches.

    Data and loader are shared, and teachers by those that have the same: they are asked once about
    each batch. Student, objective and optimizer are each run's own, and drawn as if it were alone.

    Args:
        recipes: Alike in all that decides the batches.
        path: A run directory; teachers that are recipes have their runs beside it.
        here: Where.
        memory: Bytes for students and their optimizers; the first is built even beyond it.
        lost: Told of a recipe whose student or objective cannot be built; left out, it is raised.

    Returns:
        Sessions by the number of their recipe: those lost are left out, and those from the first
        on that does not fit into memory.
    """
    first = recipes[0]
    autocast = machine.autocast(first.train.precision, here.device)
    with here.accelerator.local_main_process_first() if first.data.download else nullcontext():
        dataset = datasets.load(first.data)
    staffs: dict[str, Staff] = {}
    learners: dict[int, tuple[Network, objectives.Objective, Staff]] = {}
    for i, recipe in enumerate(recipes):
        whose = recipe.model_dump_json(include={"teachers", "ensemble", "cache"})
        if whose not in staffs:
            staffs[whose] = Staff(recipe, path, dataset)
        staff = staffs[whose]
        torch.manual_seed(recipe.train.seed)
        try:
            student = models.build_student(recipe.student, **facts(dataset))
            objective = objectives.build(recipe.objective)
            anatomies = staff.anatomies if objective.looks_inside else []
            parallel.synchronise(student, recipe, here)
            connect(objective, student, anatomies, dataset)
            if here.shards:
                parallel.require_shardable(recipe, objective, here)
        except Exception as error:
            if lost is None:
                raise
            lost(i, error)
            continue
        memory -= _state_bytes(student, objective)
        if memory < 0 and learners:
            break
        staff.heard.append(objective)
        learners[i] = student, objective, staff
    if not learners:
        return {}
    hired = [staff for staff in staffs.values() if staff.heard]
    for staff in hired:
        staff.engage(here)
    shared = functools.partial(
        Session, dataset=dataset, loader=_loader(first, dataset, hired, here), autocast=autocast
    )
    return {
        i: _session(recipes[i], student, objective, staff, shared, here)
        for i, (student, objective, staff) in learners.items()
    }


def _state_bytes(student: Network, objective: objectives.Objective) -> int:
    """Bytes of weights and gradients, their average, and an optimizer's two moments."""
    parts = (*student.parameters(), *objective.parameters())
    return 5 * sum(parameter.numel() * parameter.element_size() for parameter in parts)


def _loader(
    recipe: Recipe, dataset: datasets.Dataset, staffs: Sequence[Staff], here: Machine
) -> Loader:
    """Batches, with what caches hold for all of the staffs."""
    kept: Rows | None = None
    if opened := [staff.opened.caches for staff in staffs if staff.opened]:
        kept = Caches([reader for caches in opened for reader in caches.readers])
    elif fillers := [staff.filler for staff in staffs if staff.filler]:
        kept = fillers[0]
    live = any(tutor.network for staff in staffs for tutor in staff.tutors)
    return Loader(
        dataset,
        recipe.data,
        batch_size=recipe.train.batch_size,
        train_seed=recipe.train.seed,
        device=here.device,
        rank=here.rank,
        world=here.world,
        workers=here.workers,
        num_views=recipe.num_views,
        audience="both" if live else "student",
        kept=kept,
    )


def _session(
    recipe: Recipe,
    student: Network,
    objective: objectives.Objective,
    staff: Staff,
    shared: functools.partial[Session],
    here: Machine,
) -> Session:
    own = {
        "recipe": recipe.digest(),
        "student": fingerprint(student) if recipe.student.weights else None,
    }
    distiller = Distiller(placed(student, here), objective.to(here.device))
    average = Average(distiller.student, recipe.train.ema) if recipe.train.ema else None
    if average is not None and here.shards:
        parallel.shard(average.network, here)
    if here.compile:
        if student.is_convolutional:
            distiller.compile()  # with the losses: one graph more than the network's own
        else:
            compile_network(student)
    half = recipe.train.precision == "fp16"
    recordable = (
        here.cuda_graph
        and here.device.type == "cuda"
        and here.world == 1  # an all-reduce would have to be recorded in every process alike
        and recipe.optimizer.name in optim.RECORDABLE
        and staff.filler is None  # it hands what it hears to the host
        and not half  # whether a step counts is asked of the device
        and not recipe.train.deterministic  # whether it pays is a matter of time
    )
    return shared(
        distiller=distiller,
        model=parallel.wrap(distiller, here),
        teacher=staff.teacher,
        tutors=staff.tutors,
        opened=staff.opened,
        filler=staff.filler,
        optimizer=optim.build(distiller, recipe.optimizer, recordable=recordable),
        average=average,
        scaler=torch.amp.GradScaler(here.device.type) if half else None,
        recordable=recordable,
        identity=own | staff.identity,
    )


def announce(recipe: Recipe, session: Session, here: Machine) -> list[str]:
    """Say what is about to happen, and try the teachers; return what to be warned of.

    A teacher that knows nothing of the data is usually one that is fed wrongly: other classes,
    another normalisation, or weights that were never trained. It is tried on training images.
    """
    dataset = session.dataset
    console.say(
        f"{dataset.name}: {len(dataset.train_ids):,} training, {len(dataset.val_ids):,} validation "
        f"and {len(dataset.test):,} test images of {dataset.image_size} px in "
        f"{len(dataset.classes):,} classes"
    )
    warnings = [] if session.opened is None else list(session.opened.warnings)
    chance = 1 / len(dataset.classes)
    for tutor in session.tutors:
        if tutor.network is not None and dataset.labelled:
            told = answers(tutor.network, "some", recipe, dataset, here)
            top1, images = taught(tutor, told).top1, f"{len(told.ids)} training images"
        elif "test" in tutor.scores:
            top1, images = tutor.scores["test"]["top1"], f"{len(dataset.test):,} test images"
        else:
            continue
        cached = "" if tutor.network else ", from its cache"
        console.say(
            f"teacher {tutor.model}{cached}: {tutor.parameters:,} parameters, right on {top1:.1%} "
            f"of {images}"
        )
        if top1 < 1.5 * chance:
            warnings.append(
                f"teacher {tutor.model} is right on {top1:.1%} of {images}, and chance is "
                f"{chance:.1%}: mind its weights and classes"
            )
    for warning in warnings:
        console.warn(warning)
    return warnings + describe(recipe, session, here)


def describe(recipe: Recipe, session: Session, here: Machine) -> list[str]:
    """Say what the student is and what its terms read; return what to be warned of."""
    student, warnings = session.student, []
    console.say(
        f"student {student.model}: {cost.parameters(student):,} parameters, "
        f"{recipe.train.epochs:,} epochs of {session.loader.steps_per_epoch:,} steps"
    )
    for name, reads in session.distiller.objective.reads().items():
        console.say(f"{name} reads {reads}")
    micro_batches = here.micro_batches(recipe.train.batch_size)
    for name, term in session.distiller.objective.terms.items():
        if micro_batches > 1 and getattr(term, "needs_batch", False):
            warnings.append(
                f"{name} compares the images of a batch, and sees each of {micro_batches} "
                "micro-batches by itself: a larger --device-batch-size gives another result"
            )
    warnings += parallel.seen_apart(student, recipe, here)
    if session.dataset.train.pixels is None:
        warnings += on_device.slow(recipe.data.decoder, here.device)
    if student.reinitialised:
        console.say(f"drawn anew, for other classes: {', '.join(student.reinitialised)}")
    for warning in warnings:
        console.warn(warning)
    return warnings


def taught(tutor: Tutor, told: evaluate.Predictions) -> evaluate.Scores:
    """The scores of what a teacher said.

    Raises:
        DivergedError: If it is not finite; the teacher is named.
    """
    try:
        return evaluate.scores(told)
    except DivergedError as error:
        raise DivergedError(
            f"teacher {tutor.model}: {error}{of_network(tutor.network)}",
            hint="other weights for that teacher",
        ) from None


def answers(
    network: nn.Module, split: str, recipe: Recipe, dataset: datasets.Dataset, here: Machine
) -> evaluate.Predictions:
    """What the network says of the `test` split, of the held-out `val` part of train, or of some.

    "some" are training images, spread over all that are trained on.
    """
    ids = {
        "test": np.arange(len(dataset.test)),
        "val": dataset.val_ids,
        "some": dataset.train_ids[:: max(1, len(dataset.train_ids) // TRIED_IMAGES)],
    }
    source = dataset.test if split == "test" else dataset.train
    batches = batches_of(source, ids[split], recipe, dataset, here)
    total = math.ceil(len(ids[split]) / _evaluation_size(recipe, here))
    batches = parallel.in_step(batches, network, total, dataset.image_size, here)
    parallel.share_buffers(network, here)
    autocast = machine.autocast(recipe.train.precision, here.device)
    return evaluate.predict(network, batches, autocast=autocast)


def _evaluation_size(recipe: Recipe, here: Machine) -> int:
    most = min(recipe.train.batch_size, machine.BATCH_SIZE[here.device.type])
    return min(most, here.device_batch_size or most)


def batches_of(
    source: datasets.Source,
    ids: Int[np.ndarray, " n"],
    recipe: Recipe,
    dataset: datasets.Dataset,
    here: Machine,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Images, labels and ids of a split's samples as they are; this process's share of them.

    The size of a batch follows from the recipe and the kind of device, whatever their number.
    """
    return evaluation_batches(
        dataset,
        source,
        ids,
        recipe.data,
        batch_size=_evaluation_size(recipe, here),
        device=here.device,
        rank=here.rank,
        world=here.world,
        workers=here.workers,
    )
