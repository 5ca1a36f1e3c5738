"""The parts of one run, built from its recipe and put on their device."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from distill import console, evaluate, models, objectives
from distill.data import datasets
from distill.data.loader import Loader, evaluation_batches
from distill.engine import cached, machine, optim
from distill.engine.cached import Opened, Tutor, open_caches
from distill.engine.fill import Filler
from distill.engine.machine import Machine
from distill.engine.networks import connect, facts, placed, trained
from distill.engine.step import Distiller
from distill.errors import IncompatibleError
from distill.models import cost
from distill.models.network import Network
from distill.models.weights import fingerprint
from distill.recipe import Recipe
from distill.teacher import Ensemble, Live, Once, Teacher

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
    ema: AveragedModel | None
    scaler: torch.amp.GradScaler | None
    autocast: AbstractContextManager[Any]
    identity: dict[str, Any]  # what a resumed run must have in common with this one

    @property
    def student(self) -> Network:
        """The network that is evaluated and saved: the averaged one, where there is one."""
        network = self.distiller.student if self.ema is None else self.ema.module
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
    """Build what several runs need that see the same batches and hear the same teachers.

    Data, loader, caches and teachers are shared; a teacher is asked once about each batch.
    Student, objective and optimizer are each run's own, and drawn as if it were alone.

    Args:
        recipes: Alike in all that decides the batches, and what teachers say of them.
        path: A run directory; teachers that are recipes have their runs beside it.
        here: Where.
        memory: Bytes for students and their optimizers; the first is built even beyond it.
        lost: Told of a recipe whose student or objective cannot be built; left out, it is raised.

    Returns:
        Sessions by the number of their recipe: those lost are left out, and those from the first
        on that does not fit into memory.
    """
    first = recipes[0]
    with here.accelerator.local_main_process_first() if first.data.download else nullcontext():
        dataset = datasets.load(first.data)
    known = facts(dataset)
    specs = [trained(spec, path, i) for i, spec in enumerate(first.teachers)]
    networks = [models.build_teacher(spec, **known) for spec in specs]
    inside = functools.cache(lambda: cached.anatomies(first, networks))
    learners: dict[int, tuple[Network, objectives.Objective]] = {}
    room = memory
    for i, recipe in enumerate(recipes):
        torch.manual_seed(recipe.train.seed)
        try:
            student = models.build_student(recipe.student, **known)
            objective = objectives.build(recipe.objective)
            connect(objective, student, inside() if objective.looks_inside else [], dataset)
        except Exception as error:
            if lost is None:
                raise
            lost(i, error)
            continue
        room -= _state_bytes(student, objective)
        if room < 0 and learners:
            break
        learners[i] = student, objective
    if not learners:
        return {}
    heard = [objective for _, objective in learners.values()]
    shared = _shared(first, path, dataset, networks, heard, here)
    return {
        i: _session(recipes[i], student, objective, shared, here)
        for i, (student, objective) in learners.items()
    }


def _state_bytes(student: Network, objective: objectives.Objective) -> int:
    """Bytes of weights and gradients, their average, and an optimizer's two moments."""
    parts = (*student.parameters(), *objective.parameters())
    return 5 * sum(parameter.numel() * parameter.element_size() for parameter in parts)


def _shared(
    recipe: Recipe,
    path: Path,
    dataset: datasets.Dataset,
    networks: list[Network],
    heard: list[objectives.Objective],
    here: Machine,
) -> functools.partial[Session]:
    """The parts of a session that others can have too."""
    autocast = machine.autocast(recipe.train.precision, here.device)
    identity: dict[str, Any] = {
        "data": dataset.fingerprint,
        "teachers": [fingerprint(network) for network in networks],
    }
    opened = filler = None
    if recipe.cache is not None and recipe.cache.path is not None and not recipe.cache.fill:
        opened = open_caches(recipe, dataset, networks, heard, here.device)
        identity["cache"] = opened.ids
        members, tutors = opened.members, opened.tutors
    else:
        for i, network in enumerate(networks):
            placed(network, here).tap(objectives.taps(heard, i))
        members = [Live(network) for network in networks]
        tutors = [_tutor(network, dataset) for network in networks]
        if recipe.cache is not None and recipe.cache.fill:
            _require_kept(heard, len(networks), recipe.cache.features)
            filler = Filler(recipe, dataset, networks, path / "cache", here)
            members = list(filler.members)
    loader = Loader(
        dataset,
        recipe.data,
        batch_size=recipe.train.batch_size,
        train_seed=recipe.train.seed,
        device=here.device,
        rank=here.rank,
        world=here.world,
        workers=here.workers,
        num_views=recipe.num_views,
        audience="both" if any(tutor.network for tutor in tutors) else "student",
        kept=opened.caches if opened else filler,
    )
    if here.compile:
        for tutor in tutors:
            if tutor.network:
                tutor.network.compile()
    teacher = together(members, recipe)
    if teacher is not None and len(heard) > 1:
        teacher = Once(teacher, here.micro_batches(recipe.train.batch_size))
    return functools.partial(
        Session,
        dataset=dataset,
        loader=loader,
        teacher=teacher,
        tutors=tutors,
        opened=opened,
        filler=filler,
        autocast=autocast,
        identity=identity,
    )


def _session(
    recipe: Recipe,
    student: Network,
    objective: objectives.Objective,
    shared: functools.partial[Session],
    here: Machine,
) -> Session:
    own = {
        "recipe": recipe.digest(),
        "student": fingerprint(student) if recipe.student.weights else None,
    }
    distiller = Distiller(placed(student, here), objective).to(here.device)
    if here.compile:
        distiller.compile()
    half = recipe.train.precision == "fp16"
    return shared(
        distiller=distiller,
        model=here.accelerator.prepare_model(distiller),
        optimizer=optim.build(distiller, recipe.optimizer),
        ema=_average(distiller.student, recipe.train.ema) if recipe.train.ema else None,
        scaler=torch.amp.GradScaler(here.device.type) if half else None,
        identity=own | shared.keywords["identity"],
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
            top1, images = evaluate.scores(told).top1, f"{len(told.ids)} training images"
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
    if student.reinitialised:
        console.say(f"drawn anew, for other classes: {', '.join(student.reinitialised)}")
    for warning in warnings:
        console.warn(warning)
    return warnings


def answers(
    network: nn.Module, split: str, recipe: Recipe, dataset: datasets.Dataset, here: Machine
) -> evaluate.Predictions:
    """What the network says of the `test` split, of the held-out `val` part of train, or of some.

    "some" are training images, spread over all that are trained on.
    """
    test = split == "test"
    ids = {
        "test": np.arange(len(dataset.test)),
        "val": dataset.val_ids,
        "some": dataset.train_ids[:: max(1, len(dataset.train_ids) // TRIED_IMAGES)],
    }
    batches = evaluation_batches(
        dataset,
        dataset.test if test else dataset.train,
        ids[split],
        recipe.data,
        batch_size=max(1, recipe.train.batch_size // here.world),
        device=here.device,
        rank=here.rank,
        world=here.world,
        workers=here.workers,
    )
    autocast = machine.autocast(recipe.train.precision, here.device)
    return evaluate.predict(network, batches, autocast=autocast)


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


def _tutor(network: Network, dataset: datasets.Dataset) -> Tutor:
    return Tutor(
        network.model,
        cost.parameters(network),
        cost.flops(network, dataset.image_size),
        network,
        {},
    )


def _average(student: nn.Module, decay: float) -> AveragedModel:
    average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
    return AveragedModel(student, multi_avg_fn=average, use_buffers=True)
