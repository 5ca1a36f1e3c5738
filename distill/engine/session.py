"""The parts of one run, built from its recipe and put on their device."""

from __future__ import annotations

from collections.abc import Sequence
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
from distill.engine import machine, optim
from distill.engine.machine import Machine
from distill.engine.step import Distiller
from distill.models import cost
from distill.models.network import Network
from distill.models.weights import fingerprint
from distill.recipe import Recipe
from distill.recipe import Teacher as TeacherSpec
from distill.teacher import Ensemble, Live, Teacher

TRIED_IMAGES = 256  # that a teacher is shown before training


class Session(NamedTuple):
    """Everything that takes part in training."""

    dataset: datasets.Dataset
    loader: Loader
    distiller: Distiller
    model: nn.Module  # the distiller, wrapped where there are several processes
    teacher: Teacher | None
    teachers: list[Network]
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


def prepare(recipe: Recipe, path: Path, here: Machine) -> Session:
    """Build everything a run in `path` needs; clashes between its parts show before step one.

    Raises:
        IncompatibleError: If parts of the recipe do not fit each other or the machine.
        PreflightError: If data or weights are missing.
    """
    autocast = machine.autocast(recipe.train.precision, here.device)
    with here.accelerator.local_main_process_first() if recipe.data.download else nullcontext():
        dataset = datasets.load(recipe.data)
    loader = Loader(
        dataset,
        recipe.data,
        batch_size=recipe.train.batch_size,
        train_seed=recipe.train.seed,
        device=here.device,
        rank=here.rank,
        world=here.world,
        workers=here.workers,
    )
    known = facts(dataset)
    specs = [trained(spec, path, i) for i, spec in enumerate(recipe.teachers)]
    teachers = [_placed(models.build_teacher(spec, **known), here) for spec in specs]
    torch.manual_seed(recipe.train.seed)
    student = models.build_student(recipe.student, **known)
    identity = {
        "recipe": recipe.digest(),
        "data": dataset.fingerprint,
        "teachers": [fingerprint(network) for network in teachers],
        "student": fingerprint(student) if recipe.student.weights else None,
    }
    distiller = Distiller(_placed(student, here), objectives.build(recipe.objective)).to(
        here.device
    )
    teacher = together(teachers, [spec.weight for spec in recipe.teachers])
    if here.compile:
        for module in (distiller, *teachers):
            module.compile()
    half = recipe.train.precision == "fp16"
    return Session(
        dataset=dataset,
        loader=loader,
        distiller=distiller,
        model=here.accelerator.prepare_model(distiller),
        teacher=teacher,
        teachers=teachers,
        optimizer=optim.build(distiller, recipe.optimizer),
        ema=_average(distiller.student, recipe.train.ema) if recipe.train.ema else None,
        scaler=torch.amp.GradScaler(here.device.type) if half else None,
        autocast=autocast,
        identity=identity,
    )


def facts(dataset: datasets.Dataset) -> dict[str, Any]:
    """What a network has to know of the data."""
    return {
        "classes": dataset.classes,
        "image_size": dataset.image_size,
        "mean": dataset.mean,
        "std": dataset.std,
    }


def trained(spec: TeacherSpec, path: Path, position: int) -> TeacherSpec:
    """The teacher with weights: one that is a recipe has its run beside the student's `path`."""
    if spec.recipe is None:
        return spec
    run = path.parent / (spec.name or f"{path.name}-teacher-{position}")
    return spec.model_copy(update={"recipe": None, "weights": str(run)})


def announce(recipe: Recipe, session: Session, here: Machine) -> list[str]:
    """Say what is about to happen, and try the teachers; return what they should be warned of.

    A teacher that knows nothing of the data is usually one that is fed wrongly: other classes,
    another normalisation, or weights that were never trained. It is tried on training images.
    """
    dataset, student = session.dataset, session.student
    console.say(
        f"{dataset.name}: {len(dataset.train_ids):,} training, {len(dataset.val_ids):,} validation "
        f"and {len(dataset.test):,} test images of {dataset.image_size} px in "
        f"{len(dataset.classes):,} classes"
    )
    warnings = []
    chance = 1 / len(dataset.classes)
    for network in session.teachers:
        told = answers(network, "some", recipe, dataset, here)
        top1 = evaluate.scores(told).top1
        console.say(
            f"teacher {network.model}: {cost.parameters(network):,} parameters, right "
            f"on {top1:.1%} of {len(told.ids)} training images"
        )
        if top1 < 1.5 * chance:
            warnings.append(
                f"teacher {network.model} is right on {top1:.1%} of {len(told.ids)} "
                f"training images, and chance is {chance:.1%}: mind its weights and classes"
            )
    console.say(
        f"student {student.model}: {cost.parameters(student):,} parameters, "
        f"{recipe.train.epochs:,} epochs of {session.loader.steps_per_epoch:,} steps"
    )
    if student.reinitialised:
        console.say(f"drawn anew, for other classes: {', '.join(student.reinitialised)}")
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


def _placed(network: Network, here: Machine) -> Network:
    """On the device; convolutional networks channels-last, which is their kernels' own order."""
    network = network.to(here.device)
    return network.to(memory_format=torch.channels_last) if network.is_convolutional else network


def together(networks: Sequence[Network], weights: list[float]) -> Teacher | None:
    """The networks as one teacher; None where there is none."""
    members = [Live(network) for network in networks]
    if len(members) < 2:
        return members[0] if members else None
    return Ensemble(members, weights)


def _average(student: nn.Module, decay: float) -> AveragedModel:
    average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
    return AveragedModel(student, multi_avg_fn=average, use_buffers=True)
