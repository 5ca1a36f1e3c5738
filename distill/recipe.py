"""The recipe: everything that decides a run's result, and nothing about the machine it runs on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, model_validator

from distill import component, recipe_file, yamlio
from distill.component import Count, Location, Positive
from distill.errors import RecipeError
from distill.sections import (
    OUTSIDE_MODELS,
    Augmentation,
    Cache,
    Component,
    Data,
    Model,
    Optimizer,
    Section,
    TermSpec,
    Train,
    is_published,
)

__all__ = [
    "OUTSIDE_MODELS",
    "Augmentation",
    "Cache",
    "Data",
    "Model",
    "Optimizer",
    "Recipe",
    "Teacher",
    "TermSpec",
    "Train",
    "is_published",
    "json_schema",
]

# Keys that earlier versions had not, and what says the same as none: digests stay what they were.
_LATER = [
    (name, key, section.model_fields[key].default)
    for name, section, keys in (
        ("data", Data, ("control", "shuffle_shards", "decoder")),
        ("optimizer", Optimizer, ("nesterov", "milestones", "gamma")),
        ("train", Train, ("sync_batchnorm",)),
    )
    for key in keys
]
MOST_VIEWS = 50  # as good as 400 over 150 epochs of ImageNet (Faghri et al. 2023, arXiv:2303.08983)


class Teacher(Component):
    """A trained network, or the recipe that trains one."""

    model: str | None = None
    weights: str | None = Field(
        None, description="a run directory, a .safetensors file, pretrained or hf-hub:NAME"
    )
    recipe: Recipe | None = Field(
        None, description="a recipe file, trained first if its run is not there yet"
    )
    name: str | None = Field(None, description="directory of the recipe's run, beside this run")
    weight: Positive = Field(1.0, description="share in an ensemble; shares need not sum to 1")
    input_size: Count | None = Field(
        None, description="pixels that it is shown images at; left out: what it was trained on"
    )

    @model_validator(mode="after")
    def _one_source(self) -> Teacher:
        if self.recipe is not None:
            if self.model or self.weights or self.arguments:
                raise ValueError("recipe stands alone: model and weights come from its run")
        elif self.weights is None:
            raise ValueError("a teacher needs weights, or a recipe that trains it")
        elif self.model is None and is_published(self.weights):
            raise ValueError("model is required with these weights")
        return self


class Recipe(Section):
    """A complete run. Field order is the order of the file."""

    data: Data
    teachers: list[Teacher] = Field([], description="none is training from labels alone")
    ensemble: Literal["probability", "logit"] = Field(
        "probability", description="what is averaged where there are several teachers"
    )
    student: Model
    generations: Count = Field(
        1, description="students in turn, each the next one's teacher; the last is the result"
    )
    objective: Annotated[list[TermSpec], Field(min_length=1)]
    cache: Cache | None = None
    optimizer: Optimizer
    train: Train

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
        """Read a recipe file and apply `key.path=value` overrides.

        Raises:
            RecipeError: Listing every problem with its file, line and key.
        """
        return cls._checked(*recipe_file.read(Path(path), overrides))

    def changed(self, values: Mapping[str, Any]) -> Recipe:
        """The recipe with other values at some `key.path`s, checked as a file is.

        Raises:
            RecipeError: If a key or a value is wrong.
        """
        data, places = self.model_dump(), recipe_file.Places()
        for key, value in values.items():
            recipe_file.put(data, key, value, places)
        return self._checked(data, places)

    @classmethod
    def _checked(cls, data: dict[str, Any], places: recipe_file.Places) -> Recipe:
        problems = [*component.check(cls, data), *_component_problems(data, ())]
        if not problems:
            _spell_out(data)
            recipe = cls.model_validate(data)
            problems = list(_contradictions(recipe, ()))
        if problems:
            lines = [recipe_file.line(place, what, places) for place, what in problems]
            raise RecipeError("\n".join(lines))
        return recipe

    def to_yaml(self) -> str:
        """The complete recipe, every default spelled out, as text that `load` reads."""
        return yamlio.dump(self.model_dump())

    def identity(self) -> dict[str, Any]:
        """All that decides the result, as plain data: the recipe without places on disk."""
        data = self.model_dump()
        for key in ("root", "download", "split_file", "transfer", "manifest", "max_bad"):
            del data["data"][key]  # the last two only refuse
        if self.transfers:
            data["data"]["transfer"] = True
        for section, name, default in _LATER:
            if data[section][name] == default:
                del data[section][name]
        del data["train"]["deterministic"]  # of last bits; checkpoints compare it
        if self.cache is None:
            del data["cache"]
        else:
            del data["cache"]["path"], data["cache"]["fill"]
        if len(self.teachers) < 2:
            del data["ensemble"]
        for spec in (data["student"], *data["teachers"]):
            if spec["weights"] and not is_published(spec["weights"]):
                del spec["weights"]  # the run compares their content instead
        for spec, teacher in zip(data["teachers"], self.teachers, strict=True):
            del spec["name"]
            if teacher.recipe is not None:
                spec["recipe"] = teacher.recipe.identity()
        return data

    @property
    def transfers(self) -> bool:
        """Whether the training images have no labels."""
        return self.data.transfer is not None

    @property
    def num_views(self) -> int | None:
        """How many views of every image there are; None: each epoch has its own."""
        return None if self.cache is None else self.cache.views or self.default_views

    @property
    def default_views(self) -> int:
        """How many views a cache has of every image, where the recipe does not say."""
        return min(self.train.epochs, MOST_VIEWS)

    def digest(self) -> str:
        """SHA-256 of `identity`, as 64 hex digits."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()

    def without_teacher(self) -> Recipe:
        """The same run from labels alone: same student, seed, order, views and steps.

        Raises:
            RecipeError: If there are no labels.
        """
        if self.transfers:
            raise RecipeError(
                "data.transfer: without a teacher there is nothing to learn from images that have "
                "no labels",
                hint="leave --baseline out, or train on labelled images",
            )
        labels = [
            spec.model_copy(update={"weight": 1.0}) for spec in self.objective if spec.term == "ce"
        ]
        alone = labels[:1] or [TermSpec(term="ce", name=None, teacher=None)]
        nobody: dict[str, Any] = {"path": None, "fill": False, "features": []}
        cache = self.cache and self.cache.model_copy(update=nobody)  # the same views all the same
        return self.model_copy(update={"teachers": [], "objective": alone, "cache": cache})


def json_schema() -> dict[str, Any]:
    """A JSON schema of the recipe for editors, with the keys of every built-in component."""
    schema = Recipe.model_json_schema()
    definitions = schema["$defs"]
    definitions["Teacher"]["properties"]["recipe"]["anyOf"].append({"type": "string"})
    for kind in _KINDS.values():
        branches = []
        for name, definition in component.find(kind.package).items():
            own = definition.keys.model_json_schema()
            definitions.update(own.pop("$defs", {}))
            rule = {"properties": own.get("properties", {}), "required": own.get("required", [])}
            condition = {"properties": {kind.key: {"const": name}}, "required": [kind.key]}
            branches.append({"if": condition, "then": rule})
        definitions[kind.section.__name__]["allOf"] = branches
    definitions["Augmentation"] = {"anyOf": [{"type": "string"}, definitions["Augmentation"]]}
    return schema


class _Kind(NamedTuple):
    """A kind of component: its section of the recipe, the key that names it, its package."""

    section: type[Component]
    key: str
    package: str


# By the last key of the place where they stand.
_KINDS = {
    "augment": _Kind(Augmentation, "name", "data.augment"),
    "teachers": _Kind(Teacher, "model", "models.zoo"),
    "student": _Kind(Model, "model", "models.zoo"),
    "objective": _Kind(TermSpec, "term", "objectives"),
}


def _component_problems(data: Any, at: Location) -> Iterator[tuple[Location, str]]:
    """Unknown components and wrong arguments, in raw data that may be wrong in other ways too."""
    for place, spec, kind in _specs(data):
        name, known = spec.get(kind.key), component.find(kind.package)
        if not isinstance(name, str) or ":" in name or name.startswith(OUTSIDE_MODELS):
            continue
        if name not in known:
            yield (
                (*at, *place, kind.key),
                f"unknown {kind.key} {name!r}" + component.suggestion(name, sorted(known)),
            )
            continue
        for below, what in component.check(known[name].keys, _own(spec, kind)):
            yield (*at, *place, *below), what
    for i, recipe in _nested(data):
        yield from _component_problems(recipe, (*at, "teachers", i, "recipe"))


def _spell_out(data: Any) -> None:
    """Write the defaults of every built-in component's arguments into data that is right."""
    augment = data["data"].get("augment", [])
    augment[:] = [{"name": spec} if isinstance(spec, str) else spec for spec in augment]
    for _, spec, kind in _specs(data):
        if definition := component.find(kind.package).get(str(spec.get(kind.key))):
            spec |= definition.keys.model_validate(_own(spec, kind)).model_dump()
    cache, train = data.get("cache"), data["train"]
    if cache is not None:
        cache.setdefault("views", min(train["epochs"], MOST_VIEWS))
        cache.setdefault("precision", train.get("precision", "fp32"))
    names = [spec.get("name") for spec in data.get("teachers", [])]
    for spec in data["objective"]:
        if spec.get("teacher") in [name for name in names if name]:
            spec["teacher"] = names.index(spec["teacher"])
    for _, recipe in _nested(data):
        _spell_out(recipe)


def _specs(data: Any) -> Iterator[tuple[Location, dict[str, Any], _Kind]]:
    """The components of raw data, and where they stand; not those of nested recipes."""
    section = data.get("data")
    holders: dict[Location, Any] = {
        ("data", "augment"): section.get("augment") if isinstance(section, dict) else None,
        ("teachers",): data.get("teachers"),
        ("objective",): data.get("objective"),
    }
    for place, specs in holders.items():
        kind = _KINDS[str(place[-1])]
        for i, spec in enumerate(specs if isinstance(specs, list) else ()):
            spec = {"name": spec} if isinstance(spec, str) and kind.key == "name" else spec
            if isinstance(spec, dict):
                yield (*place, i), spec, kind
    if isinstance(data.get("student"), dict):
        yield ("student",), data["student"], _KINDS["student"]


def _own(spec: dict[str, Any], kind: _Kind) -> dict[str, Any]:
    """A component's own arguments."""
    return {key: value for key, value in spec.items() if key not in kind.section.model_fields}


def _nested(data: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    """The recipes of teachers, and which teachers' they are."""
    teachers = data.get("teachers")
    for i, spec in enumerate(teachers if isinstance(teachers, list) else ()):
        if isinstance(spec, dict) and isinstance(spec.get("recipe"), dict):
            yield i, spec["recipe"]


def _constant(term: str, name: str, default: bool) -> bool:
    """What a built-in term's class says of itself; the default for a user's own."""
    definition = component.find("objectives").get(term)
    return default if definition is None else bool(definition.constants.get(name, default))


def _contradictions(recipe: Recipe, at: Location) -> Iterator[tuple[Location, str]]:
    """Keys that are right one by one and wrong together."""
    data, train, cache = recipe.data, recipe.train, recipe.cache
    kept = cache is not None and cache.path is not None
    taught = bool(recipe.teachers) or kept or recipe.generations > 1
    if recipe.generations > 1 and kept:
        yield (*at, "cache", "path"), "each of the generations has a teacher of its own"
    seen: set[str] = set()
    for i, spec in enumerate(recipe.objective):
        if spec.key in seen:
            yield (*at, "objective", i), f"a second term {spec.key!r}: give one a `name:`"
        seen.add(spec.key)
        if ":" in spec.term:
            continue
        if isinstance(spec.teacher, str):
            names = [teacher.name for teacher in recipe.teachers if teacher.name]
            yield (
                (*at, "objective", i, "teacher"),
                f"no teacher is named {spec.teacher!r}" + component.suggestion(spec.teacher, names),
            )
        elif spec.teacher is not None and spec.teacher >= max(len(recipe.teachers), 1):
            yield (
                (*at, "objective", i, "teacher"),
                f"there are {len(recipe.teachers)} teachers, counted from 0",
            )
        if not taught and _constant(spec.term, "needs_teacher", True):
            yield (
                (*at, "objective", i, "term"),
                f"{spec.term} needs a teacher, and teachers is empty",
            )
        if data.transfer and _constant(spec.term, "needs_labels", False):
            yield (
                (*at, "objective", i, "term"),
                f"{spec.term} needs labels, and the images of data.transfer have none",
            )
    if (data.mixup or data.cutmix) and train.batch_size % 2:
        yield (
            (*at, "train", "batch_size"),
            "must be even: mixup and cutmix pair the images of a batch",
        )
    for place, what in recipe.optimizer.contradictions(train.epochs):
        yield (*at, "optimizer", *place), what
    if data.name != "digits" and not data.name.startswith("hf/") and data.root is None:
        yield (*at, "data", "root"), f"required for {data.name}"
    for place, what in data.contradictions():
        yield (*at, "data", *place), what
    if data.transfer and data.val:
        yield (
            (*at, "data", "val"),
            "is held out of labelled images, and those of data.transfer have no labels",
        )
    if data.transfer and data.omit:
        yield (*at, "data", "omit"), "the images of data.transfer have no classes to leave out"
    if data.transfer and data.control == "permuted-labels":
        yield (*at, "data", "control"), "the images of data.transfer have no labels to permute"
    if cache is not None and cache.fill and not recipe.teachers:
        yield (*at, "cache", "fill"), "there is no teacher to ask: teachers is empty"
    runs: dict[str, Recipe] = {}
    for i, teacher in enumerate(recipe.teachers):
        if teacher.recipe is None:
            continue
        yield from _contradictions(teacher.recipe, (*at, "teachers", i, "recipe"))
        if teacher.name and runs.setdefault(teacher.name, teacher.recipe) != teacher.recipe:
            yield (
                (*at, "teachers", i),
                f"another recipe has its run in {teacher.name!r}: give one a `name:`",
            )
