"""Which temperature, which weight: one student for each, chosen on the validation split."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from distill import console, statistics, storage
from distill.cache import write
from distill.cache.store import places
from distill.data import datasets
from distill.engine import machine
from distill.engine.caches import complete_caches
from distill.engine.machine import Machine
from distill.engine.networks import trained
from distill.engine.session import answers
from distill.engine.train import train, train_teachers
from distill.engine.trials import Outcome, outcome, run_trials
from distill.errors import DivergedError, RecipeError
from distill.grid import Axis, Setting, Trial, points
from distill.models import weights
from distill.recipe import Cache, Recipe
from distill.statistics import Estimate, named

VAL = 0.1  # of the training images, held out where the recipe holds out none
CONCLUDING = 3600.0  # seconds that a part of a job waits for another that ended at the same moment


class Sweep(NamedTuple):
    """What a sweep found. Rates are fractions in [0, 1]."""

    best: dict[str, Any]  # value of each axis, scores, runs, recipe
    plateau: list[dict[str, float]]  # settings within one standard error of the best
    settings: list[dict[str, Any]]  # values, scores on the validation split, runs, failed
    axes: dict[str, list[float]]
    seeds: list[int]
    images: dict[str, int]  # of the validation and the test split
    levels: dict[str, float]  # validation accuracy of the teachers, and of the student alone
    out: str

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"complete": True, **self._asdict()}


class Part(NamedTuple):
    """What a part of a sweep leaves behind while others are missing."""

    done: int  # trials, of all parts
    trials: int
    out: str

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"complete": False, **self._asdict()}


def sweep(
    recipe: Recipe,
    axes: Sequence[Axis],
    out: Path,
    *,
    seeds: Sequence[int] = (),
    shard: tuple[int, int] = (1, 1),
    live: bool = False,
    baseline: bool = False,
    memory: float | None = None,
    conclude: bool = True,
    workers: int | None = None,
    device_batch_size: int | None = None,
    compile: bool = False,
    cuda_graph: bool = True,
    checkpoint_seconds: float = 300.0,
) -> Sweep | Part:
    """Train one student for every combination of values, and choose by the validation split.

    The teachers answer once, into a cache; students that see the same batches are trained side by
    side. Whatever is done already is not done again. The test split is read for the best alone.

    Args:
        recipe: What is varied.
        axes: Of the grid.
        out: Where everything is kept.
        seeds: Of training; none is the recipe's own.
        shard: Which part of how many this process does, from 1.
        live: Ask the teachers in every step, where the recipe names no cache.
        baseline: Also train the student from labels alone.
        memory: Bytes for students that are trained side by side; None is half of what is free.
        conclude: Whether this process may look at the test split once all is there.
        workers: Processes that decode images.
        device_batch_size: Most images at once on a device.
        compile: Compile students and teachers.
        cuda_graph: On a GPU that waits for its host, launch a step as one CUDA graph.
        checkpoint_seconds: Time between two checkpoints of each student.

    Returns:
        What was found; or how far all parts are, where others are not done yet.

    Raises:
        RecipeError: If a value is wrong, or nothing can be held out to choose by.
        IdentityError: If `out` holds a sweep of another recipe.
        DivergedError: If every student failed.
        Stopped: If a signal asked for it; the same call goes on.
    """
    asked, recipe = recipe, ready(recipe, out, live=live)
    seeds = list(dict.fromkeys(seeds)) or [recipe.train.seed]
    grid = points(recipe, axes, seeds)
    controls = alone(recipe, seeds) if baseline else []
    trials = [trial for setting in grid for trial in setting.trials] + controls
    number, count = shard
    options = {
        "workers": workers,
        "device_batch_size": device_batch_size,
        "compile": compile,
        "cuda_graph": cuda_graph,
        "checkpoint_seconds": checkpoint_seconds,
    }
    here = machine.setup(**options)  # type: ignore[arg-type]
    console.say(f"{out}: {len(grid)} settings, {len(trials)} trials")
    train_teachers(asked, out, here, parts=count)
    complete_caches(recipe, out, here, shard=shard)
    run_trials(trials[number - 1 :: count], out / "trials", here, memory=memory)
    done = [outcome(out / "trials" / trial.name) is not None for trial in trials]
    if not all(done) or not conclude:
        return Part(sum(done), len(trials), str(out))
    with storage.lock(out, seconds=CONCLUDING):
        return _conclude(recipe, axes, grid, controls, out, here, options)


def ready(recipe: Recipe, out: Path, *, live: bool = False) -> Recipe:
    """The recipe with something to choose by, and with a cache that the teachers fill once."""
    if recipe.generations > 1:
        raise RecipeError("generations: must be 1 where students are compared: each is one")
    if recipe.transfers:
        raise RecipeError(
            "data.transfer: the images have no labels, and students are compared by labels",
            hint="compare them on labelled images, and distil with the best choice",
        )
    changes: dict[str, Any] = {}
    if recipe.data.val == 0:
        console.say(f"data.val is 0: {VAL:.0%} of the training images are held out to choose by")
        changes["data"] = recipe.data.model_copy(update={"val": VAL})
    if recipe.teachers and not (live and (recipe.cache is None or recipe.cache.path is None)):
        kept = recipe.cache or Cache.model_validate({"views": recipe.default_views})
        path = kept.path or str(out / "cache")
        own = {"path": path, "fill": False, "precision": kept.precision or recipe.train.precision}
        changes["cache"] = kept.model_copy(update=own)
    teachers = [trained(spec, out, i) for i, spec in enumerate(recipe.teachers)]
    return recipe.model_copy(update={**changes, "teachers": teachers})


def alone(recipe: Recipe, seeds: Sequence[int]) -> list[Trial]:
    """The student from labels alone, on the same views."""
    plain = recipe.without_teacher()
    return [Trial(f"alone_seed-{seed}", plain.changed({"train.seed": seed})) for seed in seeds]


def _conclude(
    recipe: Recipe,
    axes: Sequence[Axis],
    grid: list[Setting],
    controls: list[Trial],
    out: Path,
    here: Machine,
    options: dict[str, Any],
) -> Sweep:
    """Choose by the validation split, and read the test split for the chosen one."""
    outcomes = [_outcomes(setting.trials, out) for setting in grid]
    good = [i for i, found in enumerate(outcomes) if not any(one.failed for one in found)]
    if not good:
        raise DivergedError(f"{out}: every student failed; the first: {outcomes[0][0].failed}")
    correct = [np.stack([one.correct for one in outcomes[i]]) for i in good]
    plain = _outcomes(controls, out)
    control = [np.stack([one.correct for one in plain])] if _sound(plain) else []
    draws = statistics.bootstrap([*correct, *control])
    values = np.array([rows.mean() for rows in correct])
    nll = [float(np.mean([one.scores["nll"] for one in outcomes[i]])) for i in good]
    best = max(range(len(good)), key=lambda k: (values[k], -nll[k]))
    level = {good[k] for k in statistics.plateau(values, draws[: len(good)], best)}
    rows: list[dict[str, Any]] = []
    for i, setting in enumerate(grid):
        row: dict[str, Any] = {**setting.values, "runs": _runs(setting, out)}
        if i in good:
            k = good.index(i)
            row |= named("val_top1", statistics.estimate(values[k], draws[k]))
            row |= {"val_nll": nll[k], "plateau": i in level, "failed": None}
            for rights in control:
                gain = statistics.estimate(values[k] - rights.mean(), draws[k] - draws[-1])
                row |= named("gain", gain)
        else:
            reasons = [one.failed for one in outcomes[i] if one.failed]
            row |= {"plateau": False, "failed": reasons[0]}
        rows.append(row)
    chosen = grid[good[best]]
    recipe_file = out / "best.yaml"
    storage.write(recipe_file, chosen.trials[0].recipe.to_yaml().encode())
    tested, images = _tested(chosen, out, here, options)
    return Sweep(
        best={
            **rows[good[best]],
            **named("test_top1", tested),
            "recipe": str(recipe_file),
        },
        plateau=[grid[i].values for i in sorted(level)],
        settings=rows,
        axes={axis.name: list(axis.values) for axis in axes},
        seeds=[trial.recipe.train.seed for trial in chosen.trials],
        images={"val": correct[0].shape[1], "test": images},
        levels=_levels(recipe, plain),
        out=str(out),
    )


def _sound(runs: Sequence[Outcome]) -> bool:
    return bool(runs) and not any(one.failed for one in runs)


def _outcomes(trials: Sequence[Trial], out: Path) -> list[Outcome]:
    found = (outcome(out / "trials" / trial.name) for trial in trials)
    return [one for one in found if one is not None]


def _runs(setting: Setting, out: Path) -> list[str]:
    return [str(out / "trials" / trial.name) for trial in setting.trials]


def _tested(
    setting: Setting, out: Path, here: Machine, options: dict[str, Any]
) -> tuple[Estimate, int]:
    """The test accuracy of a setting over its seeds, and on how many images.

    Its runs stand after their last step: to go on with them is to finish them, as any other run.
    """
    correct = []
    for trial in setting.trials:
        run = out / "trials" / trial.name
        train(trial.recipe, run, **options)
        own = [trial.recipe.student.model]
        network = weights.load(run, vouched=own).to(here.device)
        dataset = datasets.load(trial.recipe.data)
        correct.append(answers(network, "test", trial.recipe, dataset, here).correct)
    rows = np.stack(correct)
    return statistics.estimate(rows.mean(), statistics.bootstrap([rows])[0]), rows.shape[1]


def _levels(recipe: Recipe, plain: Sequence[Outcome]) -> dict[str, float]:
    """Accuracies on the same validation images that a student is compared with."""
    found: dict[str, float] = {}
    if recipe.cache is not None and recipe.cache.path is not None:
        several = len(recipe.teachers) > 1
        for name, store in places(recipe.teachers, recipe.cache.path):
            manifest = write.read_manifest(store)
            index = manifest and write.read_index(store, manifest)
            if index and "val" in index.scores:
                found[f"teacher {name}" if several else "teacher"] = index.scores["val"]["top1"]
    if _sound(plain):
        found["student alone"] = float(np.mean([one.correct.mean() for one in plain]))
    return found
