"""Which teacher: candidates measured on the recipe's own data, and by a short student of each."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from distill import console, evaluate, jsonio, models, statistics, storage
from distill.cache.layout import Manifest
from distill.cache.read import Reader
from distill.cache.store import Store, places
from distill.cache.write import read_manifest
from distill.data import datasets
from distill.data.datasets import Dataset
from distill.engine import machine
from distill.engine.caches import complete_caches
from distill.engine.jobs import throughput
from distill.engine.machine import Machine
from distill.engine.networks import facts, placed, trained
from distill.engine.train import train_teachers
from distill.engine.trials import Outcome, outcome, run_trials
from distill.errors import DistillError, IncompatibleError
from distill.grid import Trial, softened
from distill.order import Goal, ranked, summary
from distill.recipe import Recipe, Teacher
from distill.statistics import named
from distill.sweep import CONCLUDING, Part, alone, ready

EPOCHS = 5  # of a proxy student, or a tenth of the recipe's where that is more


class Candidate(NamedTuple):
    """A teacher, or several that are heard as one."""

    name: str
    members: tuple[int, ...]  # numbers of the teachers


class Contest(NamedTuple):
    """What is compared."""

    recipe: Recipe  # of the proxy students, with all teachers
    dataset: Dataset
    logits: list[Float[np.ndarray, "N K"]]  # of each teacher, on the validation images
    candidates: list[Candidate]
    proxies: list[list[Trial]]  # by candidate, one a seed
    controls: list[Trial]  # without a teacher


class Ranking(NamedTuple):
    """Candidates in order. Rates are fractions in [0, 1]."""

    best: dict[str, Any]  # the first of the ranking, and a recipe with it
    ranking: list[dict[str, Any]]
    refused: list[dict[str, str]]  # name and reason
    alone: dict[str, Any]  # the proxy student without a teacher
    goal: str
    temperature: float  # at which entropies are
    epochs: int  # of a proxy student
    seeds: list[int]
    images: int  # of the validation split
    out: str

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"complete": True, **self._asdict()}


def rank(
    recipe: Recipe,
    out: Path,
    *,
    goal: Goal = "accuracy",
    epochs: int | None = None,
    ensembles: int = 3,
    seeds: Sequence[int] = (),
    shard: tuple[int, int] = (1, 1),
    memory: float | None = None,
    conclude: bool = True,
    workers: int | None = None,
    checkpoint_seconds: float = 300.0,
) -> Ranking | Part:
    """Measure the recipe's teachers as candidates, and rank them for a goal.

    Each is asked once, into a cache. The best of them as ensembles cost nothing more. A short
    student is trained from each, and one alone, all on the same batches where they can be. The
    test split is not read.

    Args:
        recipe: Its `teachers` are the candidates.
        out: Where everything is kept.
        goal: `accuracy` orders by the proxy student; `mobile` puts the smallest and `time` the
            quickest first of those teachers whose students are within one standard error of the
            best.
        epochs: Of a proxy student; None is 5, or a tenth of the recipe's where that is more.
        ensembles: The best two, three, up to this many, are tried together.
        seeds: Of the proxy students; none is the recipe's own.
        shard: Which part of how many this process does, from 1.
        memory: Bytes for students that are trained side by side; None is half of what is free.
        conclude: Whether this process may rank once all is there.
        workers: Processes that decode images.
        checkpoint_seconds: Time between two checkpoints of each student.

    Raises:
        IncompatibleError: If no candidate fits the data.
        IdentityError: If `out` holds a ranking for another recipe.
        DivergedError: If every proxy student failed.
        Stopped: If a signal asked for it; the same call goes on.
    """
    asked = recipe.model_copy(update={"teachers": _distinct(recipe.teachers), "cache": None})
    here = machine.setup(workers=workers, checkpoint_seconds=checkpoint_seconds)
    number, count = shard
    train_teachers(asked, out, here, parts=count)
    dataset = datasets.load(ready(asked, out).data)
    fitting, refused = _fitting(asked, out, dataset)
    short = _short(ready(fitting, out), epochs)
    complete_caches(_cached(short), out, here, shard=shard)
    chosen_seeds = list(dict.fromkeys(seeds)) or [recipe.train.seed]
    contest = _contest(short, dataset, ensembles, chosen_seeds)
    trials = [*itertools.chain(*contest.proxies), *contest.controls]
    run_trials(trials[number - 1 :: count], out / "trials", here, memory=memory)
    done = [outcome(out / "trials" / trial.name) is not None for trial in trials]
    if not all(done) or not conclude:
        return Part(sum(done), len(trials), str(out))
    with storage.lock(out, seconds=CONCLUDING):
        rows, control = _rows(contest, out, here, goal)
        best = next(one for one in contest.candidates if one.name == rows[0]["name"])
        chosen = _chosen(recipe, [short.teachers[i] for i in best.members])
        storage.write(out / "best.yaml", chosen.to_yaml().encode())
    return Ranking(
        best={**rows[0], "recipe": str(out / "best.yaml")},
        ranking=rows,
        refused=refused,
        alone=summary(control),
        goal=goal,
        temperature=_temperature(short),
        epochs=short.train.epochs,
        seeds=[trial.recipe.train.seed for trial in contest.controls],
        images=len(dataset.val_ids),
        out=str(out),
    )


def _contest(recipe: Recipe, dataset: Dataset, most: int, seeds: Sequence[int]) -> Contest:
    """Who is compared, by which students; the teachers' caches are complete."""
    logits = _logits(recipe)
    candidates = _candidates(recipe, logits, dataset, most)
    proxies = [_proxies(recipe, candidate, seeds) for candidate in candidates]
    return Contest(recipe, dataset, logits, candidates, proxies, alone(recipe, seeds))


def _rows(
    contest: Contest, out: Path, here: Machine, goal: Goal
) -> tuple[list[dict[str, Any]], list[Outcome]]:
    """The candidates in order, and the students alone, once all are trained."""
    short, dataset = contest.recipe, contest.dataset
    rates = _rates(short, dataset, out, here)
    measured = [
        {
            "name": candidate.name,
            "teachers": [str(short.teachers[i].weights) for i in candidate.members],
            **_costs(short, candidate, rates),
            **_scores(short, candidate, contest.logits, dataset),
        }
        for candidate in contest.candidates
    ]
    told = [[_kept(out, trial) for trial in group] for group in contest.proxies]
    control = [_kept(out, trial) for trial in contest.controls]
    return ranked(measured, told, control, goal), control


def _chosen(recipe: Recipe, teachers: list[Teacher]) -> Recipe:
    """The recipe with these teachers; a cache that it names is another teacher's."""
    kept = recipe.cache and recipe.cache.model_copy(update={"path": None})
    return recipe.model_copy(update={"teachers": teachers, "cache": kept})


def _distinct(teachers: Sequence[Teacher]) -> list[Teacher]:
    """The teachers, each with a name of its own."""
    found: list[Teacher] = []
    for spec in teachers:
        name = spec.name or spec.model or str(spec.weights).rstrip("/").rpartition("/")[2]
        name = name.replace("/", "-")
        taken = {one.name for one in found}
        numbered = (f"{name}-{i}" for i in itertools.count(2))
        name = next(one for one in itertools.chain([name], numbered) if one not in taken)
        found.append(spec.model_copy(update={"name": name, "weight": 1.0}))
    return found


def _fitting(recipe: Recipe, out: Path, dataset: Dataset) -> tuple[Recipe, list[dict[str, str]]]:
    """The recipe with those of its teachers that answer for its classes, and why others do not.

    Raises:
        IncompatibleError: If none does.
    """
    fit, refused = [], []
    for i, spec in enumerate(recipe.teachers):
        found = trained(spec, out, i)
        try:
            models.build_teacher(found, **facts(dataset))
        except DistillError as error:
            refused.append({"name": str(spec.name), "reason": str(error)})
            console.warn(f"{spec.name} is left out: {error}")
        else:
            fit.append(found)
    if not fit:
        raise IncompatibleError(
            f"teachers: none of {len(refused)} fits the data; the first: {refused[0]['reason']}",
            hint="a teacher can be a `recipe:` that trains it on these data",
        )
    return recipe.model_copy(update={"teachers": fit}), refused


def _short(recipe: Recipe, epochs: int | None) -> Recipe:
    """The recipe of the proxy students: the same in fewer epochs, each with a view of its own."""
    whole = recipe.train.epochs
    fewer = min(whole, epochs or max(EPOCHS, whole // 10))
    optimizer = recipe.optimizer
    scaled = {
        "warmup_epochs": optimizer.warmup_epochs * fewer / whole,
        "milestones": [milestone * fewer / whole for milestone in optimizer.milestones],
    }
    cache = recipe.cache
    assert cache is not None
    return recipe.model_copy(
        update={
            "train": recipe.train.model_copy(update={"epochs": fewer, "eval_epochs": fewer}),
            "optimizer": optimizer.model_copy(update=scaled),
            "cache": cache.model_copy(update={"views": min(cache.views or fewer, fewer)}),
        }
    )


def _logits(recipe: Recipe) -> list[Float[np.ndarray, "N K"]]:
    """What each teacher says of the validation images."""
    found = []
    for store, manifest in _manifests(recipe):
        reader = Reader(store, manifest, num_views=manifest.views)
        found.append(reader.evaluation("val"))
        reader.close()
    return found


def _manifests(recipe: Recipe) -> list[tuple[Store, Manifest]]:
    """The teachers' caches, which are complete."""
    kept = _cached(recipe).cache
    assert kept is not None
    found = []
    for _, store in places(recipe.teachers, str(kept.path)):
        manifest = read_manifest(store)
        assert manifest is not None
        found.append((store, manifest))
    return found


def _candidates(
    recipe: Recipe, logits: Sequence[Float[np.ndarray, "N K"]], dataset: Dataset, most: int
) -> list[Candidate]:
    """Every teacher, and the best two, three, … of them together."""
    labels = dataset.train.labels[dataset.val_ids]
    scores = [evaluate.scores(evaluate.of_logits(one, labels)) for one in logits]
    order = sorted(range(len(logits)), key=lambda i: (-scores[i].top1, scores[i].nll))
    names = [str(spec.name) for spec in recipe.teachers]
    found = [Candidate(name, (i,)) for i, name in enumerate(names)]
    for size in range(2, min(most, len(logits)) + 1):
        members = tuple(sorted(order[:size]))
        found.append(Candidate(" + ".join(names[i] for i in members), members))
    return found


def _proxies(recipe: Recipe, candidate: Candidate, seeds: Sequence[int]) -> list[Trial]:
    """The students of a candidate, one a seed; other candidates leave no trace in their recipes."""
    teachers = [recipe.teachers[i] for i in candidate.members]
    # A number or name of one of several teachers means nothing here.
    heard = [spec.model_copy(update={"teacher": None}) for spec in recipe.objective]
    own = _cached(recipe.model_copy(update={"teachers": teachers, "objective": heard}))
    name = candidate.name.replace(" ", "")
    return [Trial(f"{name}_seed-{seed}", own.changed({"train.seed": seed})) for seed in seeds]


def _cached(recipe: Recipe) -> Recipe:
    """The recipe with its teachers' caches where they always are, however many it has."""
    assert recipe.cache is not None
    if len(recipe.teachers) > 1:
        return recipe
    path = f"{recipe.cache.path}/{recipe.teachers[0].name}"
    return recipe.model_copy(update={"cache": recipe.cache.model_copy(update={"path": path})})


def _scores(
    recipe: Recipe,
    candidate: Candidate,
    logits: Sequence[Float[np.ndarray, "N K"]],
    dataset: Dataset,
) -> dict[str, Any]:
    """Accuracy, calibration and entropy of a candidate on the validation images."""
    labels = dataset.train.labels[dataset.val_ids]
    members = [logits[i] for i in candidate.members]
    told = evaluate.of_logits(mixed(members, 1.0), labels)
    log_p = mixed(members, _temperature(recipe))
    rows = told.correct[None]
    return {
        **named("val_top1", statistics.estimate(rows.mean(), statistics.bootstrap([rows])[0])),
        **{f"val_{key}": value for key, value in evaluate.scores(told)._asdict().items()},
        "entropy": float(-(np.exp(log_p) * log_p).sum(axis=-1).mean()),
    }


def mixed(
    members: Sequence[Float[np.ndarray, "N K"]], temperature: float
) -> Float[np.ndarray, "N K"]:
    """The log of the mean of the members' probabilities at a temperature."""
    softened = [np.asarray(z, np.float64) / temperature for z in members]
    logs = [z - np.logaddexp.reduce(z, axis=-1, keepdims=True) for z in softened]
    mean: np.ndarray = np.logaddexp.reduce(logs, axis=0) - np.log(len(members))
    return mean


def _temperature(recipe: Recipe) -> float:
    """At which the recipe's first term that softens classes hears them; 1 where none does."""
    for i in softened(recipe):
        value = recipe.objective[i].arguments.get("temperature")
        if isinstance(value, list):
            return float(value[0])
        if value is not None:
            return float(value)
    return 1.0


def _rates(recipe: Recipe, dataset: Dataset, out: Path, here: Machine) -> dict[str, float]:
    """Images that each teacher answers in a second here, measured once and kept."""
    file = out / "rates.json"
    known: dict[str, float] = {}
    with suppress(OSError, ValueError):  # never measured, or to be measured again
        known = jsonio.checked(dict[str, float], jsonio.load(file.read_text(encoding="utf-8")))
    for spec in recipe.teachers:
        if str(spec.name) not in known:
            network = placed(models.build_teacher(spec, **facts(dataset)), here)
            known[str(spec.name)] = throughput(network, recipe, dataset, here)
            storage.write(file, (json.dumps(known, indent=1) + "\n").encode())
    return known


def _costs(recipe: Recipe, candidate: Candidate, rates: dict[str, float]) -> dict[str, Any]:
    """What a candidate costs: the sum of its members."""
    about = [manifest.about for _, manifest in _manifests(recipe)]
    mine = [about[i] for i in candidate.members]
    seconds = sum(1 / rates[str(recipe.teachers[i].name)] for i in candidate.members)
    return {
        "models": [one["model"] for one in mine],
        "parameters": sum(int(one["parameters"]) for one in mine),
        "flops": sum(int(one["flops"]) for one in mine),
        "images_per_second": 1 / seconds,
        "seconds_per_image": seconds,
    }


def _kept(out: Path, trial: Trial) -> Outcome:
    found = outcome(out / "trials" / trial.name)
    assert found is not None
    return found
