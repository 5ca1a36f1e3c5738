"""Accuracy against the number of training images, for several recipes: who needs fewer of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from distill import console, jsonio, statistics, storage
from distill.data import datasets, splits
from distill.data.datasets import Dataset
from distill.engine import machine
from distill.engine.caches import complete_caches
from distill.engine.machine import Machine
from distill.engine.networks import trained
from distill.engine.session import answers
from distill.engine.train import train_teachers
from distill.engine.trials import outcome, run_trials
from distill.errors import DivergedError
from distill.evaluate import scores
from distill.grid import Trial
from distill.models import weights
from distill.recipe import Recipe
from distill.statistics import Estimate, named
from distill.subsets import Curve, Images, Plan, Student, Teaching, plan
from distill.sweep import CONCLUDING, Part

SEEN = 2000  # training images that a student is asked about, to compare with the test images


class Efficiency(NamedTuple):
    """What was found. Rates are fractions in [0, 1]."""

    curves: list[dict[str, Any]]  # name, recipe, teacher, area, points
    multipliers: list[dict[str, Any]]  # `of` needs `value` times fewer images than `over`
    sizes: list[int]
    seeds: list[int]
    images: dict[str, int]  # to train on, and of the test split
    resamples: int
    notes: list[str]
    out: str

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"complete": True, **self._asdict()}


class Answers(NamedTuple):
    """Which test images the students of a curve are right on."""

    sizes: Sequence[int]
    correct: Sequence[Bool[np.ndarray, "S N"]]  # by size; a row a seed


class Comparison(NamedTuple):
    """How sure curves are, and how they differ."""

    points: list[list[Estimate]]  # accuracy, by curve and size
    areas: list[Estimate]
    multipliers: list[dict[str, Any]]  # of, over (numbers of curves), value, ci95, draws


def efficiency(
    recipes: Mapping[str, Recipe],
    out: Path,
    *,
    sizes: Sequence[int] = (),
    seeds: Sequence[int] = (),
    teacher: Teaching = "both",
    baseline: bool = False,
    shard: tuple[int, int] = (1, 1),
    live: bool = False,
    memory: float | None = None,
    conclude: bool = True,
    workers: int | None = None,
    device_batch_size: int | None = None,
    compile: bool = False,
    cuda_graph: bool = True,
    checkpoint_seconds: float = 300.0,
) -> Efficiency | Part:
    """Train every recipe's student on nested, class-balanced parts of the images, for equal steps.

    Each is judged by the test split after its last epoch: a measurement, by which nothing is
    chosen. Students that see the same batches are trained side by side, and whatever is done
    already is not done again.

    Args:
        recipes: By name; they have the same images.
        out: Where everything is kept.
        sizes: Numbers of training images; none is 1, 2, 5, 10, ..., and all of them.
        seeds: Of training; none is each recipe's own.
        teacher: Whether teachers have seen `all` images, the `same` as their students, or `both`:
            a curve for each, or for `all` alone where a teacher cannot be trained anew.
        baseline: Also train the students of recipes with teachers from labels alone.
        shard: Which part of how many this process does, from 1.
        live: Ask the teachers in every step, where a recipe names no cache.
        memory: Bytes for students that are trained side by side; None is half of what is free.
        conclude: Whether this process may sum up once all is there.
        workers: Processes that decode images.
        device_batch_size: Most images at once on a device.
        compile: Compile students and teachers.
        cuda_graph: On a GPU that waits for its host, launch a step as one CUDA graph.
        checkpoint_seconds: Time between two checkpoints of each student.

    Returns:
        What was found; or how far all parts are, where others are not done yet.

    Raises:
        RecipeError: If the recipes cannot be compared, or a size is impossible.
        IdentityError: If `out` holds something else.
        DivergedError: If every student failed.
        Stopped: If a signal asked for it; the same call goes on.
    """
    planned = plan(
        recipes, out, sizes=sizes, seeds=seeds, teacher=teacher, baseline=baseline, live=live
    )
    here = machine.setup(
        workers=workers,
        device_batch_size=device_batch_size,
        compile=compile,
        cuda_graph=cuda_graph,
        checkpoint_seconds=checkpoint_seconds,
    )
    for note in planned.notes:
        console.say(note)
    students = planned.students()
    shown = ", ".join(f"{size.images:,}" for size in planned.sizes)
    console.say(f"{out}: {len(students)} trials in {len(planned.curves)} curves at {shown} images")
    for name, recipe in recipes.items():
        _prepare(recipe, planned.students(name), out, here, shard)
    _train(_part(students, shard), out, here, memory)
    runs = [_run(one, out) for one in students]
    done = [
        outcome(run) is not None or _failure(one, out) is not None
        for run, one in zip(runs, students, strict=True)
    ]
    if not all(done) or not conclude:
        return Part(sum(done), len(done), str(out))
    with storage.lock(out, seconds=CONCLUDING):
        return _conclude(planned, recipes, out, here)


def compare(curves: Sequence[Answers]) -> Comparison:
    """Intervals of curves and of their differences.

    All come from the same draws of test images, and of seeds where there are several: what curves
    have in common cancels. A resample in which two curves reach no accuracy in common says nothing
    of their multiplier and is left out; `draws` is how many were kept.
    """
    draws = statistics.bootstrap([rows for one in curves for rows in one.correct])
    ends = np.cumsum([len(one.sizes) for one in curves])
    points, areas = list[list[Estimate]](), list[Estimate]()
    means, resamples = list[statistics.Curve](), list[list[statistics.Curve]]()
    for one, drawn in zip(curves, np.split(draws, ends[:-1]), strict=True):
        sizes = np.asarray(one.sizes)
        means.append(statistics.Curve(sizes, np.array([rows.mean() for rows in one.correct])))
        resamples.append([statistics.Curve(sizes, column) for column in drawn.T])
        pairs = zip(means[-1].accuracy, drawn, strict=True)
        points.append([statistics.estimate(*pair) for pair in pairs])
        spread = np.array([statistics.area(curve) for curve in resamples[-1]])
        areas.append(statistics.estimate(statistics.area(means[-1]), spread))
    multipliers = []
    for i, j in combinations(range(len(curves)), 2):
        value = statistics.data_multiplier(means[i], means[j])
        every = map(statistics.data_multiplier, resamples[i], resamples[j])
        kept = np.array([one for one in every if one is not None])
        multipliers.append(_multiplier(i, j, value, kept))
        multipliers.append(_multiplier(j, i, value and 1 / value, 1 / kept))
    multipliers.sort(key=lambda one: (one["of"], one["over"]))
    return Comparison(points, areas, multipliers)


def _multiplier(
    of: int, over: int, value: float | None, draws: Float[np.ndarray, " R"]
) -> dict[str, Any]:
    found = None
    if value is not None and len(draws) > 1:
        found = list(statistics.estimate(value, draws).ci95)
    return {"of": of, "over": over, "value": value, "ci95": found, "draws": len(draws)}


def _prepare(
    recipe: Recipe,
    students: list[Student],
    out: Path,
    here: Machine,
    shard: tuple[int, int],
) -> None:
    """What the recipe itself names and its students use: teachers, and a cache of all images."""
    heard = [student.trial.recipe for student in students]
    if any(spec.recipe for one in heard for spec in one.teachers):
        train_teachers(recipe, out, here, parts=shard[1])
    cache = recipe.cache
    if (
        cache
        and cache.path
        and any(one.teachers and one.cache and one.cache.path == cache.path for one in heard)
    ):
        read = cache.model_copy(update={"fill": False})
        whole = _placed(recipe, out).model_copy(update={"cache": read})
        complete_caches(whole, out, here, shard=shard)


def _placed(recipe: Recipe, out: Path) -> Recipe:
    """The recipe with teachers that have weights."""
    teachers = [trained(spec, out, i) for i, spec in enumerate(recipe.teachers)]
    return recipe.model_copy(update={"teachers": teachers})


def _part(students: list[Student], shard: tuple[int, int]) -> list[Student]:
    """This process's part of the students. Those that share teachers or a cache are in one.

    Steps are equal, so that all students cost about the same.
    """
    number, count = shard
    teachers = {one.trial.name for student in students for one in _before(student)}
    units: dict[str, list[Student]] = {}
    for student in students:
        recipe = student.trial.recipe
        if student.teachers or student.trial.name in teachers:
            shared: Any = "same"
        elif recipe.teachers:
            shared = recipe.model_dump(include={"teachers", "cache"})
        else:
            shared = recipe.train.seed
        units.setdefault(json.dumps([recipe.data.fraction, shared]), []).append(student)
    parts: list[list[Student]] = [[] for _ in range(count)]
    for unit in sorted(units.values(), key=len, reverse=True):
        min(parts, key=len).extend(unit)
    return parts[number - 1]


def _before(student: Student) -> list[Student]:
    """All that is trained before a student."""
    return [one for teacher in student.teachers for one in (*_before(teacher), teacher)]


def _train(students: list[Student], out: Path, here: Machine, memory: float | None) -> None:
    """Train students after their teachers, but for those whose teachers failed."""
    if teachers := [teacher for student in students for teacher in student.teachers]:
        _train(teachers, out, here, memory)
    ready = [one for one in students if not any(_failure(t, out) for t in one.teachers)]
    placed = {_run(one, out): _placed(one.trial.recipe, out) for one in ready}
    left = [recipe for run, recipe in placed.items() if (o := outcome(run)) is None or o.failed]
    for recipe in {one.cache and one.cache.path: one for one in left}.values():
        complete_caches(recipe, out, here, shard=(1, 1))
    for folder in dict.fromkeys(run.parent for run in placed):
        trials = [Trial(run.name, placed[run]) for run in placed if run.parent == folder]
        run_trials(trials, folder, here, split="test", memory=memory)


def _run(student: Student, out: Path) -> Path:
    return out / student.folder / student.trial.name


def _failure(student: Student, out: Path) -> str | None:
    """Why there is no such student, where it was tried."""
    for teacher in student.teachers:
        if reason := _failure(teacher, out):
            return f"its teacher failed: {reason}"
    found = outcome(_run(student, out))
    return found and found.failed


def _conclude(planned: Plan, recipes: Mapping[str, Recipe], out: Path, here: Machine) -> Efficiency:
    """The curves, from what all trials left behind."""
    dataset = datasets.load(next(iter(recipes.values())).data)
    rows = {
        one.trial.name: _row(one, planned.images, dataset, out, here) for one in planned.students()
    }
    found = [_points(curve, planned, rows) for curve in planned.curves]
    told = [
        Answers(
            [point["size"] for point in points if not point["failed"]],
            [
                np.stack([_correct(one, out) for one in students])
                for students, point in zip(curve.students, points, strict=True)
                if not point["failed"]
            ],
        )
        for curve, points in zip(planned.curves, found, strict=True)
    ]
    whole = [i for i, one in enumerate(told) if one.sizes]
    if not whole:
        raise DivergedError(f"{out}: every student failed; the first: {found[0][0]['failed']}")
    compared = compare([told[i] for i in whole])
    for i, estimates in zip(whole, compared.points, strict=True):
        good = [point for point in found[i] if not point["failed"]]
        for point, estimate in zip(good, estimates, strict=True):
            point |= named("top1", estimate)
    areas = {i: named("area", area) for i, area in zip(whole, compared.areas, strict=True)}
    names = [curve.name for curve in planned.curves]
    return Efficiency(
        curves=[
            {
                "name": curve.name,
                "recipe": curve.recipe,
                "teacher": curve.teacher,
                **areas.get(i, dict.fromkeys(("area", "area_ci95", "area_se"))),
                "points": found[i],
            }
            for i, curve in enumerate(planned.curves)
        ],
        multipliers=[
            {**one, "of": names[whole[one["of"]]], "over": names[whole[one["over"]]]}
            for one in compared.multipliers
        ],
        sizes=[size.images for size in planned.sizes],
        seeds=sorted({row["seed"] for row in rows.values()}),
        images={"train": len(dataset.train_ids), "test": len(dataset.test)},
        resamples=statistics.RESAMPLES,
        notes=planned.notes,
        out=str(out),
    )


def _points(
    curve: Curve, planned: Plan, rows: Mapping[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """What is known of a curve's students at each size, as means over seeds."""
    found = []
    for size, students in zip(planned.sizes, curve.students, strict=True):
        runs = [rows[one.trial.name] for one in students]
        train = students[0].trial.recipe.train
        failed = next((run["failed"] for run in runs if run["failed"]), None)
        top1, nll, seen = (
            None if failed else float(np.mean([run[key] for run in runs]))
            for key in ("top1", "nll", "train_top1")
        )
        found.append(
            {
                "size": size.images,
                "fraction": size.fraction,
                "epochs": train.epochs,
                "steps": train.epochs * (size.images // train.batch_size),
                "top1": top1,
                "top1_ci95": None,
                "top1_se": None,
                "nll": nll,
                "train_top1": seen,
                "gap": None if seen is None or top1 is None else seen - top1,
                "runs": runs,
                "failed": failed,
            }
        )
    return found


def _row(
    student: Student, images: Images, dataset: Dataset, out: Path, here: Machine
) -> dict[str, Any]:
    """What is known of a student."""
    run, recipe = _run(student, out), student.trial.recipe
    row: dict[str, Any] = {"seed": recipe.train.seed, "run": str(run)}
    row |= dict.fromkeys(("top1", "nll", "train_top1"))
    if reason := _failure(student, out):
        return {**row, "failed": reason}
    found = outcome(run)
    assert found is not None
    told = {key: found.scores[key] for key in ("top1", "nll")}
    seen = _seen(recipe, run, images, dataset, here)
    return {**row, **told, "train_top1": seen, "failed": None}


def _correct(student: Student, out: Path) -> Bool[np.ndarray, " N"]:
    found = outcome(_run(student, out))
    assert found is not None
    return found.correct


def _seen(recipe: Recipe, run: Path, images: Images, dataset: Dataset, here: Machine) -> float:
    """Accuracy on some of the images that a student was trained on, kept beside its trial."""
    file = run / "train.json"
    try:
        return float(jsonio.mapping(file.read_text(encoding="utf-8"))["top1"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # never asked, or to be asked again
    ids = images.of(recipe.data)
    ids = splits.subset(ids, images.labels, min(1.0, SEEN / len(ids)), recipe.data.seed)
    network = weights.load(run, vouched=[recipe.student.model]).to(here.device)
    # To the network they are one split like another.
    told = answers(network, "val", recipe, replace(dataset, val_ids=ids), here)
    kept = {"top1": scores(told).top1, "images": len(ids)}
    storage.write(file, (json.dumps(kept) + "\n").encode())
    return float(kept["top1"])
