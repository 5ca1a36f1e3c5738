"""The recipe: everything that decides a run's result, and nothing about the machine it runs on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, ConfigDict, Field, model_validator

from distill import component, recipe_file, yamlio
from distill.component import Count, Location, NonNegative, Positive
from distill.errors import RecipeError
from distill.schedule import Schedule

# Names of models that other libraries hold, and that only those libraries can check.
OUTSIDE_MODELS = ("timm/", "torchvision/")


def is_published(weights: str | None) -> bool:
    """Whether weights are known by their name, and not by a place on this disk."""
    return weights is not None and (weights == "pretrained" or weights.startswith("hf-hub:"))


class Section(BaseModel):
    """A part of the recipe. Unknown keys are errors, values are never guessed."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Component(BaseModel):
    """A named component; the keys beside the declared ones are its own arguments."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    @property
    def arguments(self) -> dict[str, Any]:
        """The component's own arguments."""
        return dict(self.__pydantic_extra__ or {})


class Augmentation(Component):
    """One augmentation by name; a bare word is a name without arguments."""

    name: str

    @model_validator(mode="before")
    @classmethod
    def _word(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class Data(Section):
    """Images and labels, and how training images are augmented."""

    name: Literal["digits", "fashion-mnist", "cifar10", "cifar100", "folder"]
    root: str | None = Field(None, description="where the files lie, or are downloaded to")
    download: bool = Field(False, description="fetch the files if they are not at root")
    split_file: str | None = Field(
        None, description="folder only: a CSV of path,split beside images that lie in one folder"
    )
    image_size: Count | None = Field(None, description="pixels; left out: as the set has them")
    eval_crop: Annotated[float, Gt(0), Le(1)] = Field(
        1.0, description="centre part of an evaluation image that is kept; ImageNet's is 0.875"
    )
    augment: list[Augmentation] = Field([], description="in the order they are applied")
    mixup: NonNegative = Field(0.0, description="alpha of the Beta distribution; 0 is off")
    cutmix: NonNegative = Field(0.0, description="alpha of the Beta distribution; 0 is off")
    fraction: Annotated[float, Gt(0), Le(1)] = Field(
        1.0, description="part of the training images that is used; class-balanced and nested"
    )
    val: Annotated[float, Ge(0), Lt(1)] = Field(
        0.0, description="part of the training split held out for choices; class-balanced"
    )
    on_bad_image: Literal["error", "skip"] = "error"
    max_pixels: Count = Field(64_000_000, description="an image with more counts as bad")
    seed: Annotated[int, Ge(0)] = Field(0, description="decides splits and views")


class Model(Component):
    """A network by name: our own, `timm/NAME`, `torchvision/NAME` or `module:function`."""

    model: str
    weights: str | None = Field(
        None, description="a run directory, a .safetensors file, pretrained or hf-hub:NAME"
    )


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


class TermSpec(Component):
    """One term of the objective: `weight` times the named loss."""

    term: str
    name: str | None = Field(None, description="needed where one loss stands twice")
    weight: Schedule = 1.0

    @property
    def key(self) -> str:
        """The name under which the term is logged."""
        return self.name or self.term


class Optimizer(Section):
    """How the weights move."""

    name: Literal["sgd", "adamw", "lamb", "muon"] = "adamw"
    lr: Annotated[float, Gt(0), Lt(3.4e38)] = Field(
        description="peak learning rate, for the global batch"
    )
    momentum: Annotated[float, Ge(0), Lt(1)] = Field(0.9, description="sgd (Nesterov) and muon")
    weight_decay: NonNegative = 0.0
    decay: Literal["all", "matrices"] | None = Field(
        None, description="what decays; left out: all for sgd, matrices for the others"
    )
    warmup_epochs: NonNegative = 0.0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    clip_norm: Positive | None = Field(None, description="limit on the norm of all gradients")


class Train(Section):
    """How long, in what batches and in what numbers."""

    epochs: Count
    batch_size: Count = Field(description="images an optimizer step, over all devices")
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    ema: Annotated[float, Ge(0), Lt(1)] = Field(
        0.0, description="decay of the averaged weights that are evaluated and saved; 0 is off"
    )
    eval_epochs: Count = Field(1, description="epochs between two looks at the validation split")
    seed: Annotated[int, Ge(0)] = Field(0, description="decides initial weights, order, dropout")


class Recipe(Section):
    """A complete run. Field order is the order of the file."""

    data: Data
    teachers: list[Teacher] = []
    student: Model
    objective: Annotated[list[TermSpec], Field(min_length=1)]
    optimizer: Optimizer
    train: Train

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
        """Read a recipe file and apply `key.path=value` overrides.

        Raises:
            RecipeError: Listing every problem with its file, line and key.
        """
        data, places = recipe_file.read(Path(path), overrides)
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
        for key in ("root", "download", "split_file"):
            del data["data"][key]
        for spec in (data["student"], *data["teachers"]):
            if spec["weights"] and not is_published(spec["weights"]):
                del spec["weights"]  # the run compares their content instead
        for spec, teacher in zip(data["teachers"], self.teachers, strict=True):
            del spec["name"]
            if teacher.recipe is not None:
                spec["recipe"] = teacher.recipe.identity()
        return data

    def digest(self) -> str:
        """SHA-256 of `identity`, as 64 hex digits."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()

    def without_teacher(self) -> Recipe:
        """The same run from labels alone: same student, seed, order, views and steps."""
        labels = [
            spec.model_copy(update={"weight": 1.0})
            for spec in self.objective
            if not _needs_teacher(spec.term)
        ]
        alone = labels[:1] or [TermSpec(term="ce", name=None)]
        return self.model_copy(update={"teachers": [], "objective": alone})


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


def _needs_teacher(term: str) -> bool:
    definition = component.find("objectives").get(term)
    return definition is None or bool(definition.constants.get("needs_teacher", True))


def _contradictions(recipe: Recipe, at: Location) -> Iterator[tuple[Location, str]]:
    """Keys that are right one by one and wrong together."""
    data, train = recipe.data, recipe.train
    seen: set[str] = set()
    for i, spec in enumerate(recipe.objective):
        if spec.key in seen:
            yield (*at, "objective", i), f"a second term {spec.key!r}: give one a `name:`"
        seen.add(spec.key)
        if not recipe.teachers and ":" not in spec.term and _needs_teacher(spec.term):
            yield (
                (*at, "objective", i, "term"),
                f"{spec.term} needs a teacher, and teachers is empty",
            )
    if (data.mixup or data.cutmix) and train.batch_size % 2:
        yield (
            (*at, "train", "batch_size"),
            "must be even: mixup and cutmix pair the images of a batch",
        )
    if recipe.optimizer.warmup_epochs > train.epochs:
        yield (*at, "optimizer", "warmup_epochs"), f"longer than the run's {train.epochs} epochs"
    if data.name != "digits" and data.root is None:
        yield (*at, "data", "root"), f"required for {data.name}"
    if data.split_file and data.name != "folder":
        yield (*at, "data", "split_file"), "only a folder of images has one"
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
