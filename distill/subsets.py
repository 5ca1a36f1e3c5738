"""Recipes on parts of their images: the points of curves, each checked before it is trained."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Int

from distill.data import datasets, splits
from distill.errors import RecipeError
from distill.grid import Trial
from distill.identity import differences
from distill.recipe import Cache, Data, Recipe, Teacher, is_published

Teaching = Literal["all", "same", "both"]  # the images that teachers are trained on

# Where sizes are not given: from this part of the images and so many of a class, up to this part of
# them, and all. A size nearer to all would cost as much and tell little.
LOWEST, LOWEST_CLASS, HIGHEST = 1 / 50, 10, 0.8
# How images are shown in training; the other keys of a recipe's data say which they are.
_AUGMENTED = ("augment", "decoder", "mixup", "cutmix")
_SHOWN = (*_AUGMENTED, "image_size", "eval_crop")


class Size(NamedTuple):
    """A class-balanced part of the training images."""

    images: int
    fraction: float  # of the recipe that trains on them


class Images(NamedTuple):
    """Which training images there are."""

    labels: Int[np.ndarray, " N"]  # of the whole training split
    usable: Int[np.ndarray, " U"]  # ids of those that are neither bad nor left out

    def of(self, data: Data) -> Int[np.ndarray, " T"]:
        """Ids that a recipe with this section trains on."""
        train, _ = splits.held_out(self.labels, data.val, data.seed)
        kept = splits.subset(train, self.labels, data.fraction, data.seed)
        return np.intersect1d(kept, self.usable, assume_unique=True)


class Student(NamedTuple):
    """A network to train; also a teacher, on the same images as its student."""

    trial: Trial
    folder: str  # of its run's folder: trials or teachers
    teachers: tuple[Student, ...] = ()  # that are trained before it


class Curve(NamedTuple):
    """A recipe at all sizes."""

    name: str
    recipe: str
    teacher: str | None  # all | same: the images that it has seen
    students: list[list[Student]]  # by size, one a seed


class Plan(NamedTuple):
    """What is trained."""

    curves: list[Curve]
    sizes: list[Size]
    images: Images
    notes: list[str]  # what is not as it was asked for

    def students(self, recipe: str | None = None) -> list[Student]:
        """Those of all curves, or of a recipe's, each once."""
        curves = [one for one in self.curves if recipe in (None, one.recipe)]
        every = [student for one in curves for row in one.students for student in row]
        return list({student.trial.name: student for student in every}.values())


def plan(
    recipes: Mapping[str, Recipe],
    out: Path,
    *,
    sizes: Sequence[int] = (),
    seeds: Sequence[int] = (),
    teacher: Teaching = "both",
    baseline: bool = False,
    live: bool = False,
) -> Plan:
    """All networks that `efficiency` trains for these arguments, each once.

    Raises:
        RecipeError: If the recipes cannot be compared, or a size is impossible.
        PreflightError: If the data set is not there.
    """
    require_comparable(recipes, teacher=teacher)
    data = next(iter(recipes.values())).data
    whole = datasets.load(data.model_copy(update={"fraction": 1.0, "val": 0.0}))
    images = Images(whole.train.labels, whole.train_ids)
    notes: list[str] = []
    kinds: dict[str, tuple[str, ...]] = {}
    batches: dict[str, int] = {}
    for name, recipe in recipes.items():
        obstacle = _obstacle(recipe, recipe.data) if teacher == "both" else None
        if obstacle:
            notes.append(f"{name} has the given teacher at every size; {obstacle}")
        kinds[name] = _kinds(recipe, "all" if obstacle else teacher)
        batches |= _batches(name, recipe, again="same" in kinds[name])
    found = _sizes(sizes, images, data, batches, notes)
    planner = _Planner(out, images, found, list(dict.fromkeys(seeds)), live=live)
    curves = []
    for name, recipe in recipes.items():
        for kind in kinds[name]:
            shown = {"all": ", teacher as given"} if len(kinds[name]) > 1 else {}
            shown |= {"same": ", teacher on the same images"}
            students = planner.students(name, recipe, kind)
            curves.append(Curve(name + shown.get(kind, ""), name, kind or None, students))
    if baseline:
        alone = list[Curve]()
        for name in [name for name in recipes if any(kinds[name])]:
            students = planner.students(name, recipes[name], "all", alone=True)
            if students not in [curve.students for curve in (*curves, *alone)]:
                alone.append(Curve(f"{name}, alone", name, None, students))
        curves += [alone[0]._replace(name="student alone")] if len(alone) == 1 else alone
    return Plan(curves, found, images, notes)


def require_comparable(recipes: Mapping[str, Recipe], *, teacher: Teaching = "both") -> None:
    """Refuse recipes whose curves would say nothing of each other.

    Raises:
        RecipeError: With everything that stands in the way.
    """
    first = next(iter(recipes))
    problems = []
    if len({_plain(name) for name in recipes}) < len(recipes):
        problems.append(f"{', '.join(recipes)}: names that are too much alike for folders")
    runs: dict[str, tuple[str, Recipe]] = {}
    for name, recipe in recipes.items():
        if recipe.generations > 1:
            problems.append(f"{name}: generations: a curve has one student for a number of images")
        if recipe.transfers:
            problems.append(f"{name}: data.transfer: a curve counts images that have labels")
        if changed := differences(_which(recipes[first].data), _which(recipe.data), "data"):
            problems.append(f"{first} and {name} have not the same images: {'; '.join(changed)}")
        if teacher == "same" and (obstacle := _obstacle(recipe, recipe.data)):
            problems.append(f"{name}: {obstacle}")
        for i, spec in enumerate(recipe.teachers):
            if spec.recipe is not None:
                other, known = runs.setdefault(spec.name or str(i), (name, spec.recipe))
                if known.identity() != spec.recipe.identity():
                    problems.append(
                        f"{other} and {name} have two teachers of the name {spec.name or i!r}, "
                        "which decides where a run lies: give one a `name:`"
                    )
    if problems:
        raise RecipeError("\n".join(problems))


def _which(data: Data) -> dict[str, Any]:
    """What decides the images, and not how they are shown in training."""
    found = data.model_dump(exclude={*_AUGMENTED, "download", "transfer"})
    if data.name != "folder" or data.root is None:
        return found | {"root": None}
    return found | {"root": str(Path(data.root).expanduser().absolute())}


def _obstacle(recipe: Recipe, data: Data) -> str | None:
    """Why the recipe's teachers cannot be trained anew on a part of its images."""
    if not recipe.teachers and recipe.cache is not None and recipe.cache.path is not None:
        return "cache.path: it stands for a teacher, which cannot be trained anew"
    for i, spec in enumerate(recipe.teachers):
        own = _origin(spec)
        if own is None:
            return f"teachers.{i}: no recipe says how {spec.weights} was trained"
        if own.student.weights is not None:
            return f"teachers.{i}: begins with {own.student.weights}, which has seen other images"
        if any(_which(own.data)[key] != _which(data)[key] for key in ("name", "root")):
            return f"teachers.{i}: was trained on another data set, {own.data.name}"
        if deeper := _obstacle(own, data):
            return f"teachers.{i}.recipe.{deeper}"
    return None


def _origin(spec: Teacher) -> Recipe | None:
    """The recipe that trains a teacher, where it is known."""
    if spec.recipe is not None or is_published(spec.weights):
        return spec.recipe
    file = Path(str(spec.weights)).expanduser() / "recipe.yaml"
    return Recipe.load(file) if file.is_file() else None


def _kinds(recipe: Recipe, teacher: Teaching) -> tuple[str, ...]:
    """The recipe's curves, by the images that its teachers have seen; '' has no teacher."""
    if not recipe.teachers and (recipe.cache is None or recipe.cache.path is None):
        return ("",)
    return ("all", "same") if teacher == "both" else (teacher,)


def _batches(name: str, recipe: Recipe, *, again: bool) -> dict[str, int]:
    """The batch size of a recipe, and with `again` of its teachers' recipes, by name."""
    found = {name: recipe.train.batch_size}
    for i, spec in enumerate(recipe.teachers if again else ()):
        if own := _origin(spec):
            found |= _batches(f"{name}, teachers.{i}", own, again=True)
    return found


def _sizes(
    asked: Sequence[int],
    images: Images,
    data: Data,
    batches: Mapping[str, int],
    notes: list[str],
) -> list[Size]:
    """The sizes that are asked for, as near as class balance allows, or those that are chosen.

    Raises:
        RecipeError: With all that are impossible.
    """
    every = images.of(data)
    total, classes = len(every), len(np.unique(images.labels[every]))
    lowest = max(LOWEST * total, LOWEST_CLASS * classes, *batches.values())
    steps = (digit * 10**power for power in range(len(str(total))) for digit in (1, 2, 5))
    usual = [*(n for n in steps if lowest <= n <= HIGHEST * total), total]
    problems, found = [], dict[int, Size]()
    for n in sorted(asked or usual):
        if n > total:
            problems.append(f"{n:,} images: there are {total:,} to train on")
            continue
        if n < classes:
            problems.append(f"{n:,} images: less than one of each of the {classes:,} classes")
            continue
        size = _nearest(n, images, data)
        if size.images == total:
            size = Size(total, data.fraction)
        if size.images in found:
            problems.append(f"{n:,} images: the same {size.images:,} as of another size")
        for name, batch in batches.items():
            if size.images < batch:
                problems.append(f"{n:,} images: less than train.batch_size {batch:,} of {name}")
        if asked and size.images != n:
            notes.append(f"{n:,} images: {size.images:,} are as near as balanced classes come")
        found[size.images] = size
    if problems:
        raise RecipeError("\n".join(problems))
    return list(found.values())


def _nearest(n: int, images: Images, data: Data) -> Size:
    """The class-balanced part of the images with about `n` of them, by bisection."""

    def size(fraction: float) -> Size:
        ids = images.of(data.model_copy(update={"fraction": fraction}))
        return Size(len(ids), fraction)

    low, high = 0.0, 1.0
    best = tried = size(n / size(1.0).images)
    # Closer than this no two classes go up by an image.
    step = 0.5 / int(np.bincount(images.labels).max()) ** 2
    while best.images != n and high - low > step:
        low, high = (tried.fraction, high) if tried.images < n else (low, tried.fraction)
        tried = size((low + high) / 2)
        best = min(best, tried, key=lambda one: abs(one.images - n))
    shorter = (size(round(best.fraction, digits)) for digits in range(1, 17))
    # The fewest decimals that still mean these images: it is read by people.
    return next((one for one in shorter if one.images == best.images and one.fraction), best)


def resized(recipe: Recipe, size: Size, *, own: int) -> Recipe:
    """The recipe on fewer images, for as many optimizer steps as on its `own` number of them.

    Steps are whole epochs of the part, so that they differ by less than one. Warm-up and
    milestones are the same parts of the run; the validation split is looked at once, at the end.
    """
    train = recipe.train
    before, now = (max(1, n // train.batch_size) for n in (own, size.images))
    epochs = max(1, round(train.epochs * before / now))
    longer = epochs / train.epochs
    return recipe.changed(
        {
            "data.fraction": size.fraction,
            "optimizer.warmup_epochs": min(recipe.optimizer.warmup_epochs * longer, float(epochs)),
            "optimizer.milestones": [one * longer for one in recipe.optimizer.milestones],
            "train.epochs": epochs,
            "train.eval_epochs": epochs,
        }
    )


class _Planner:
    """Makes the students of curves, each once, however many curves go through it."""

    def __init__(
        self, out: Path, images: Images, sizes: list[Size], seeds: Sequence[int], *, live: bool
    ) -> None:
        self.out, self.images, self.sizes, self.seeds, self.live = out, images, sizes, seeds, live
        self._known: dict[str, Student] = {}  # by all that decides them
        self._caches: dict[str, str] = {}

    def students(
        self, name: str, recipe: Recipe, kind: str, *, alone: bool = False
    ) -> list[list[Student]]:
        """By size, one a seed."""
        own = len(self.images.of(recipe.data))
        word = "alone" if alone else kind
        found = []
        for size in self.sizes:
            part, teachers = resized(recipe, size, own=own), tuple[Student, ...]()
            if kind == "same":
                part, teachers = self._taught_anew(part, part.data, size)
            if kind:
                place = f"{_plain(name)}_{kind}_{size.images}"
                serves = not teachers and (size.images == own or not _mixes(part.data))
                cache = self._cache(part, place, serves=serves)
                part = part.model_copy(update={"cache": cache})
            part = part.without_teacher() if alone else part
            begin = "_".join(filter(None, [_plain(name), word, str(size.images)]))
            trials = [
                Trial(f"{begin}_seed-{seed}", part.changed({"train.seed": seed}))
                for seed in self.seeds or (recipe.train.seed,)
            ]
            found.append([self._once(trial, "trials", teachers) for trial in trials])
        return found

    def _once(self, trial: Trial, folder: str, teachers: tuple[Student, ...]) -> Student:
        """The student, or the one there is already that is the same, under a name of its own."""
        key = trial.recipe.model_dump_json()
        if key not in self._known:
            taken = {one.trial.name for one in self._known.values()}
            names = (trial.name, *(f"{trial.name}-{i}" for i in range(2, 2 + len(taken))))
            name = next(name for name in names if name not in taken)
            self._known[key] = Student(trial._replace(name=name), folder, teachers)
        return self._known[key]

    def _taught_anew(
        self, recipe: Recipe, data: Data, size: Size
    ) -> tuple[Recipe, tuple[Student, ...]]:
        """The recipe with teachers that are trained on the same images, and those to train."""
        specs, students = list[Teacher](), list[Student]()
        for i, spec in enumerate(recipe.teachers):
            student = self._anew(spec, spec.name or f"teacher-{i}", data, size)
            if student is not None:
                run = str(self.out / student.folder / student.trial.name)
                spec = spec.model_copy(update={"recipe": None, "weights": run})
                students.append(student)
            specs.append(spec)
        return recipe.model_copy(update={"teachers": specs}), tuple(students)

    def _anew(self, spec: Teacher, name: str, data: Data, size: Size) -> Student | None:
        """The teacher trained on this size for its own steps; None where that is what it is."""
        own = _origin(spec)
        assert own is not None, "it was looked at before"
        images = len(self.images.of(own.data))
        shown = {key: getattr(own.data, key) for key in _SHOWN}
        live = own.cache and own.cache.model_copy(update={"path": None, "fill": False})
        moved = own.model_copy(update={"data": data.model_copy(update=shown), "cache": live})
        recipe, teachers = self._taught_anew(moved, data, size)
        recipe = resized(recipe, size, own=images)
        given = resized(own, Size(images, own.data.fraction), own=images)
        if not teachers and recipe.identity() == given.identity():
            return None
        return self._once(Trial(f"{_plain(name)}_{size.images}", recipe), "teachers", teachers)

    def _cache(self, recipe: Recipe, place: str, *, serves: bool) -> Cache | None:
        """What is kept of the teachers' answers about a size; where the recipe says if it serves.

        A cache serves a part of its images too, but not where they are mixed: in other pairs.
        """
        cache = recipe.cache
        path = cache.path if cache is not None and serves else None
        if not recipe.teachers:
            if path is None:
                raise RecipeError(
                    "cache.path: images are mixed, so that it serves all of them and no part",
                    hint="name its teachers, or leave data.mixup and data.cutmix out",
                )
            return cache
        if path is None and self.live:
            return cache and cache.model_copy(update={"path": None, "fill": False})
        kept = cache or Cache.model_validate({"views": recipe.default_views})
        precision = kept.precision or recipe.train.precision
        kept = kept.model_copy(update={"path": path, "fill": False, "precision": precision})
        if path is not None:
            return kept
        key = recipe.model_copy(update={"cache": kept}).model_dump_json(
            include={"data", "teachers", "cache"}
        )
        path = self._caches.setdefault(key, str(self.out / "caches" / place))
        return kept.model_copy(update={"path": path})


def _mixes(data: Data) -> bool:
    return data.mixup > 0 or data.cutmix > 0


def _plain(name: str) -> str:
    """The name as a part of a file's."""
    return str(re.sub(r"[^\w.+-]+", "-", name))
