"""`distill list`."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, get_args, get_origin

from typer import Argument, Option

from distill import console
from distill.cli._report import print_json, reporting

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from distill.component import Definition


class Kind(StrEnum):
    """What can be listed."""

    recipes = "recipes"
    models = "models"
    terms = "terms"
    datasets = "datasets"


class Item(NamedTuple):
    """A line of a list."""

    name: str
    summary: str
    keys: dict[str, str]  # the recipe's keys: type and default as text
    pairs: str | None = None  # which a term works for, teacher to student

    def to_json(self) -> dict[str, Any]:
        """The item as plain data."""
        return {key: value for key, value in self._asdict().items() if value is not None}


DATASETS = {
    "digits": "1,797 handwritten digits, 8 px, 10 classes; in the package, no download",
    "fashion-mnist": "70,000 pieces of clothing in gray, 28 px, 10 classes",
    "cifar10": "60,000 photographs, 32 px, 10 classes",
    "cifar100": "60,000 photographs, 32 px, 100 classes",
    "folder": "your own images, one folder a class; `distill init FOLDER` writes the recipe",
    "webdataset": "your own images in tar shards, as `distill pack` writes them",
    "hf": "images of the Hugging Face hub: hf/OWNER/NAME; or a folder of parquet files, as root",
}


def list_(
    kind: Annotated[Kind, Argument(help="What to list.")],
    pattern: Annotated[
        str,
        Argument(
            metavar="[PATTERN]",
            help="Names to show, such as 'resnet*'. Models that begin with timm/ or torchvision/ "
            "are those of that library.",
            show_default=False,
        ),
    ] = "*",
    copy: Annotated[
        str | None,
        Option(
            metavar="NAME",
            help="Recipes only: copy this one, and those its teachers name, into the current "
            "folder. Nothing is overwritten.",
        ),
    ] = None,
    as_json: Annotated[
        bool, Option("--json", help="Print the list as one line of JSON on stdout.")
    ] = False,
) -> None:
    """List the ready recipes, models, objective terms or data sets.

    Example: distill list models 'timm/vit_tiny*'
    """
    with reporting():
        if copy is not None:
            copied = _copy(kind, copy)
            if as_json:
                print_json({"copied": [str(path) for path in copied]})
            else:
                console.say("\n".join(f"copied {path}" for path in copied))
                console.say(f"next: distill train {console.typed(copied[0])}")
            return
        items = [item for item in _items(kind, pattern) if fnmatch.fnmatchcase(item.name, pattern)]
        if as_json:
            print_json({kind.value: [item.to_json() for item in items]})
        else:
            _show(items)
            if not items:
                console.say(f"no {kind.value} match {pattern!r}")


def _items(kind: Kind, pattern: str) -> Iterable[Item]:
    from distill import component
    from distill.recipe import OUTSIDE_MODELS, Data

    match kind:
        case Kind.recipes:
            folder = recipes()
            for path in sorted(folder.rglob("*.yaml"), key=lambda path: path.with_suffix("")):
                name = path.relative_to(folder).with_suffix("").as_posix()
                yield Item(name, _summary(path), {})
        case Kind.models if pattern.startswith(OUTSIDE_MODELS):
            yield from (Item(name, "", {}) for name in _outside(pattern))
        case Kind.models:
            yield from _components(component.find("models.zoo"))
        case Kind.terms:
            found = component.find("objectives")
            for item, definition in zip(_components(found), found.values(), strict=True):
                yield item._replace(pairs=str(definition.constants.get("directions", "any")))
        case Kind.datasets:
            for name in get_args(Data.model_fields["name"].annotation):
                yield Item(name, DATASETS[name], {})


def _components(found: Mapping[str, Definition]) -> Iterable[Item]:
    for name, definition in found.items():
        keys = {key: _key(field) for key, field in definition.keys.model_fields.items()}
        yield Item(name, definition.summary, keys)


def _key(field: FieldInfo) -> str:
    """A key's type, bounds and default, such as `float, > 0; default 4.0`."""
    text = ", ".join([_type(field.annotation), *map(_bound, field.metadata)])
    default = "null" if field.default is None else field.default
    return f"{text}; required" if field.is_required() else f"{text}; default {default}"


def _type(annotation: Any) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(map(str, args))
    if origin is Annotated:
        return ", ".join([_type(args[0]), *map(_bound, args[1:])])
    if annotation is type(None):
        return "null"
    if origin is list:
        return f"list of {_type(args[0])}"
    if args:  # a union
        return " | ".join(map(_type, args))
    return str(annotation.__name__)


def _bound(constraint: Any) -> str:
    signs = {"Gt": ">", "Ge": ">=", "Lt": "<", "Le": "<="}
    name = type(constraint).__name__
    return f"{signs[name]} {getattr(constraint, name.lower())}"


def _outside(pattern: str) -> list[str]:
    """Names of a library's models, with its prefix."""
    prefix, _, own = pattern.partition("/")
    if prefix == "timm":
        import timm

        # With a tag, such as resnet50.a1_in1k, there are pretrained weights.
        names = {*timm.list_models(own), *timm.list_models(own, pretrained=True)}
    else:
        from torchvision import models

        names = set(models.list_models(module=models))
    return sorted(f"{prefix}/{name}" for name in names)


def recipes() -> Path:
    """The folder of ready recipes: in an installed package, or beside it in a source checkout."""
    package = Path(__file__).parents[1]
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def _summary(path: Path) -> str:
    """The first line of a recipe, a comment."""
    with path.open(encoding="utf-8") as file:
        return file.readline().removeprefix("#").strip()


def _copy(kind: Kind, name: str) -> list[Path]:
    """Copy a ready recipe and those it names into the current folder; return the copies.

    Raises:
        RecipeError: If there is no such recipe.
        PreflightError: If another file lies where a copy would go; then nothing is copied.
    """
    from distill import component, storage
    from distill.errors import PreflightError, RecipeError

    if kind is not Kind.recipes:
        raise RecipeError("--copy is for recipes", hint=f"distill list recipes --copy {name}")
    folder = recipes()
    known = [item.name for item in _items(Kind.recipes, "*")]
    name = name.removesuffix(".yaml")
    if name not in known:
        raise RecipeError(f"no recipe {name!r}" + component.suggestion(name, known))
    first = folder / f"{name}.yaml"
    files = {source: Path(source.relative_to(first.parent)) for source in _with_teachers(first)}
    for source, target in files.items():
        if target.exists() and target.read_bytes() != source.read_bytes():
            raise PreflightError(
                f"{target}: there is another file of this name; nothing was copied",
                hint="move it away, or copy into another folder",
            )
    for source, target in files.items():
        storage.make_folder(target.parent)
        storage.sweep(target.parent, below=False)
        storage.write(target, source.read_bytes())
    return list(files.values())


def _with_teachers(path: Path) -> Iterable[Path]:
    """A recipe file and the recipe files that its teachers name, without repeats."""
    from distill import yamlio

    found, waiting = [path], [path]
    while waiting:
        here = waiting.pop()
        data, _ = yamlio.load(here.read_text(encoding="utf-8"))
        for teacher in data.get("teachers", ()):
            named = here.parent / teacher["recipe"] if "recipe" in teacher else here
            if named not in found:
                found.append(named)
                waiting.append(named)
    return found


def _show(items: Iterable[Item]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=False)
    for _ in range(2):
        table.add_column(overflow="fold")
    for item in items:
        table.add_row(f"[bold]{console.plain(item.name)}[/]", console.plain(item.summary))
        if item.pairs is not None:
            table.add_row("  [dim]for[/]", f"[dim]{item.pairs}{' pair' * (item.pairs == 'any')}[/]")
        for key, text in item.keys.items():
            table.add_row(f"  {console.plain(key)}", console.plain(text))
    console.out.print(table)
