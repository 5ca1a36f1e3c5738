"""The end of a run: the test split is read, once, and what was trained is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from distill import console, evaluate, storage
from distill.data import datasets
from distill.engine import machine, memory, parallel
from distill.engine.cached import Tutor
from distill.engine.machine import Machine
from distill.engine.networks import trained
from distill.engine.run import Counter, Result, Run
from distill.engine.session import Session, answers, taught
from distill.evaluate import Predictions
from distill.models import cost, weights
from distill.recipe import Recipe

DATA_WAIT = 0.1  # of the time, from which on it is said
OUTDONE = 0.02  # by which a student beats a teacher that is a poor one


def _slow_data(data_wait: float, recipe: Recipe, session: Session, here: Machine) -> list[str]:
    """What to do where the device waited for images."""
    if data_wait < DATA_WAIT or session.dataset.train.pixels is not None:
        return []
    idle = machine.own_cores() - 1 - here.workers
    helps = [f"--workers {here.workers + idle}"] if idle > 0 else []
    if recipe.data.decoder == "exact" and any(
        one.name == "resized_crop" for one in recipe.data.augment
    ):
        helps.append("data.decoder: fast")
    helps.append("`distill pack`, whose small images decode several times as fast")
    said = (
        f"{data_wait:.0%} of the time went by waiting for images to be decoded "
        f"(--workers {here.workers}); what helps: {', '.join(helps)}"
    )
    console.warn(said)
    return [said]


def _test_scores(
    tutor: Tutor, recipe: Recipe, dataset: datasets.Dataset, here: Machine
) -> dict[str, float]:
    if tutor.network is None:
        return {}
    return taught(tutor, answers(tutor.network, "test", recipe, dataset, here))._asdict()


def _outdone(teachers: Sequence[Mapping[str, Any]], top1: float) -> list[str]:
    """Warn where the student is clearly better than all of its teachers."""
    best = max((one["top1"] for one in teachers if "top1" in one), default=1.0)
    if top1 <= best + OUTDONE:
        return []
    said = (
        f"the student is right on {top1:.1%} of the test images and no teacher on more than "
        f"{best:.1%}: it may be held back; --baseline shows what it does without"
    )
    console.warn(said)
    return [said]


def finish(
    recipe: Recipe, run: Run, session: Session, here: Machine, counter: Counter
) -> tuple[Result, Predictions]:
    """Read the test split, once, and write the student and the result."""
    dataset, student = session.dataset, session.student
    told = answers(student, "test", recipe, dataset, here)
    specs = [trained(spec, run.path, i) for i, spec in enumerate(recipe.teachers)]
    teachers = []
    for tutor, spec in zip_longest(session.tutors, specs):
        teachers.append(
            {
                "model": tutor.model,
                "run": spec and spec.weights,  # None where a cache alone stands for the teacher
                "weight": spec.weight if spec else 1.0,
                "parameters": tutor.parameters,
                "flops": tutor.flops,
                **(tutor.scores.get("test") or _test_scores(tutor, recipe, dataset, here)),
            }
        )
    values: dict[str, Any] = evaluate.scores(told)._asdict()
    if len(dataset.val_ids):
        held_out = answers(student, "val", recipe, dataset, here)
        values["val_top1"] = evaluate.scores(held_out).top1
    student = parallel.joined(student, here)
    images = counter.step * recipe.train.batch_size
    data_wait = round(counter.waited / max(counter.seconds, 1e-9), 4)
    result = Result(
        **values,
        epochs=recipe.train.epochs,
        steps=counter.step,
        seconds=round(counter.seconds, 3),
        images_per_second=round(images / max(counter.seconds, 1e-9), 1),
        data_wait=data_wait,
        memory=memory.peak_bytes(here.device),
        student=student.model,
        teachers=teachers,
        parameters=cost.parameters(student),
        flops=cost.flops(student, dataset.image_size),
        run=str(run.path),
        identity=session.identity,
        warnings=[
            *counter.warnings,
            *_slow_data(data_wait, recipe, session, here),
            *_outdone(teachers, values["top1"]),
        ],
    )
    if here.main:
        storage.write(run.student, weights.to_bytes(student))
        run.finish(result)
    console.say(
        f"{run.path}: test top1 {result.top1:.2%} after {result.epochs:,} epochs, "
        f"{result.seconds:.1f} s"
    )
    return result, told
