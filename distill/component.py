"""Named components: a name is a module or function, a signature is a schema.

`term: kd` is the class in `distill/objectives/kd.py`; `model: resnet20` is the function of that
name in `distill/models/zoo/`. The keyword-only parameters are the keys of the recipe. There is no
registry: what lies in the package is what there is. Signatures are read from the source without
importing it, so that a wrong recipe is refused before torch is loaded.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
import os
import re
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_type_hints

from annotated_types import Ge, Gt, Le
from pydantic import BaseModel, ConfigDict, ValidationError, create_model
from pydantic_core import ErrorDetails

from distill.errors import RecipeError

# The vocabulary of signatures: a component imports its annotations from here.
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Count = Annotated[int, Ge(1)]
Fraction = Annotated[float, Ge(0), Le(1)]

# Shared by the terms that compare features.
Stages = Literal["last2", "all", "lg", "penultimate"]
Projector = Literal["linear", "mlp", "conv", "attention", "orthogonal"]

CODE = "DISTILL_CODE"  # of the environment: code that files may name, with commas between

LISTED = 40  # known names that an error shows: a network's modules can be thousands

Location = tuple[str | int, ...]  # keys and list positions from the top of the data

_STRICT = ConfigDict(extra="forbid", frozen=True, strict=True)
_TORCH_FREE = ("distill.component", "distill.schedule", "typing")


class Definition(NamedTuple):
    """Where a built-in component is defined, and what it accepts."""

    name: str
    module: str
    attribute: str
    summary: str  # first line of the docstring
    keys: type[BaseModel]
    constants: dict[str, Any]  # literals assigned in a class's body


@cache
def find(package: str) -> dict[str, Definition]:
    """The built-in components of `distill.<package>` by name, without importing any of them.

    A module that defines one public class is a component of the module's name; elsewhere every
    public function is a component of its own name. Modules and names with a leading underscore
    are private.
    """
    folder = Path(__file__).parent.joinpath(*package.split("."))
    found: dict[str, Definition] = {}
    for path in sorted(folder.glob("[!_]*.py")):
        module = f"distill.{package}.{path.stem}"
        tree = ast.parse(path.read_text(encoding="utf-8"))
        public = [
            node
            for node in tree.body
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_")
        ]
        classes = [node for node in public if isinstance(node, ast.ClassDef)]
        chosen = classes or public
        for node in chosen:
            name = path.stem if isinstance(node, ast.ClassDef) else node.name
            summary = (ast.get_docstring(node) or "").partition("\n")[0]
            keys, constants = _keys(node, tree), _constants(node)
            found[name] = Definition(name, module, node.name, summary, keys, constants)
    return found


def build(package: str, name: str, arguments: Mapping[str, Any], *args: Any) -> Any:
    """The component `name`, called as `component(*args, **arguments)`, the arguments checked.

    `name` is a built-in of `distill.<package>`, or `module:attribute` for a user's own.

    Raises:
        RecipeError: If the name is unknown or an argument is unknown, missing or wrong.
    """
    target = load(package, name)
    keys = schema(target)
    if problems := check(keys, dict(arguments)):
        raise RecipeError("\n".join(f"{name}: {dotted(place)}: {what}" for place, what in problems))
    checked = keys.model_validate(dict(arguments))
    return target(*args, **{key: getattr(checked, key) for key in type(checked).model_fields})


def load(package: str, name: str) -> Callable[..., Any]:
    """The class or function that `name` stands for.

    Raises:
        RecipeError: If there is none.
    """
    if ":" in name:
        module_name, _, attribute = name.partition(":")
        try:
            return typing.cast(
                Callable[..., Any], getattr(importlib.import_module(module_name), attribute)
            )
        except (ImportError, AttributeError, ValueError) as error:
            raise RecipeError(
                f"{name}: {error}", hint="a user's own part is named as module:attribute"
            ) from None
    known = find(package)
    if name not in known:
        raise RecipeError(f"unknown name {name!r}" + suggestion(name, sorted(known)))
    definition = known[name]
    return typing.cast(
        Callable[..., Any],
        getattr(importlib.import_module(definition.module), definition.attribute),
    )


def require_vouched(name: str, origin: object, vouched: Collection[str] = ()) -> None:
    """Refuse code outside of distill that a file names, unless the user named it too.

    A file of weights or a run directory may come from anywhere: to read it must not run code that
    it chose.

    Args:
        name: Of a component, as the file has it.
        origin: The file.
        vouched: What the user's own recipe names; `DISTILL_CODE` in the environment adds to it.

    Raises:
        RecipeError: If it is `module:attribute`, and nobody but the file says so.
    """
    if ":" in name and name not in (*vouched, *os.environ.get(CODE, "").split(",")):
        raise RecipeError(
            f"{origin}: belongs to {name}, which is code outside distill",
            hint=f"if you trust that code: {CODE}={name} before the command; in a recipe, "
            f"model: {name} beside weights",
        )


def schema(fn: Callable[..., Any]) -> type[BaseModel]:
    """A pydantic model of the keyword-only parameters of an imported class or function."""
    target = fn.__init__ if inspect.isclass(fn) else fn
    hints = get_type_hints(target, include_extras=True)
    fields: dict[str, Any] = {
        p.name: (hints.get(p.name, Any), ... if p.default is p.empty else p.default)
        for p in inspect.signature(target).parameters.values()
        if p.kind is p.KEYWORD_ONLY
    }
    return create_model(getattr(fn, "__name__", "component"), __config__=_STRICT, **fields)


def check(keys: type[BaseModel], arguments: Any) -> list[tuple[Location, str]]:
    """What is wrong with `arguments` under the schema `keys`; empty if nothing is.

    Each problem is the place, as keys and list positions from the top of `arguments`, and a
    message without the place.
    """
    try:
        keys.model_validate(arguments)
    except ValidationError as error:
        problems = {_place(e, arguments): _message(e, keys) for e in reversed(error.errors())}
        # The branches of a union share one place; one that came further says more.
        shallow = {place[:i] for place in problems for i in range(len(place))}
        return [problem for problem in reversed(problems.items()) if problem[0] not in shallow]
    return []


def suggestion(name: str, known: Sequence[str]) -> str:
    """A clause that names the known name nearest to `name`, or lists the first of them."""
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    more = f" and {len(known) - LISTED:,} more" if len(known) > LISTED else ""
    return f"; known: {', '.join(known[:LISTED])}{more}" if known else ""


def _place(error: ErrorDetails, data: Any) -> Location:
    """Pydantic's location without the names of union branches, which are no keys of the data."""
    place: list[str | int] = []
    for part in error["loc"]:
        inside = part in data if isinstance(data, dict) else isinstance(part, int)
        if inside and isinstance(data, dict | list):
            place.append(part)
            data = data[part]  # type: ignore[index]
        elif error["type"] == "missing" and part == error["loc"][-1]:
            place.append(part)
    return tuple(place)


def _message(error: ErrorDetails, keys: type[BaseModel]) -> str:
    match error["type"]:
        case "missing":
            return "required, but not given"
        case "extra_forbidden":
            name = str(error["loc"][-1])
            return "unknown key" + suggestion(name, _known_keys(keys, error["loc"][:-1]))
        case "value_error":
            return error["msg"].removeprefix("Value error, ")
    message = error["msg"].removeprefix("Input ").replace("valid dictionary", "mapping of keys")
    message = f"{message}, got {error['input']!r}"
    if error["type"] == "literal_error":
        allowed = re.findall(r"'([^']*)'", error["ctx"]["expected"])
        close = difflib.get_close_matches(str(error["input"]), allowed, n=1)
        message += f"; did you mean {close[0]!r}?" if close else ""
    return message


def _known_keys(annotation: Any, location: Location) -> list[str]:
    """The keys allowed at `location`, found by following the annotations down."""
    for part in location:
        models = _models(annotation)
        holder = next((m for m in models if part in m.model_fields), None)
        if holder is not None:
            annotation = holder.model_fields[str(part)].annotation
    return [key for model in _models(annotation) for key in model.model_fields]


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for arg in get_args(annotation) for model in _models(arg)]


def dotted(place: Location) -> str:
    """A place as it is written in `--set`: `objective.1.temperature`."""
    return ".".join(map(str, place))


def _constants(node: ast.ClassDef | ast.FunctionDef) -> dict[str, Any]:
    found = {}
    for line in node.body if isinstance(node, ast.ClassDef) else ():
        target = line.targets[0] if isinstance(line, ast.Assign) else getattr(line, "target", None)
        if isinstance(target, ast.Name) and isinstance(getattr(line, "value", None), ast.Constant):
            found[target.id] = ast.literal_eval(line.value)  # type: ignore[attr-defined]
    return found


def _keys(node: ast.ClassDef | ast.FunctionDef, tree: ast.Module) -> type[BaseModel]:
    """The schema of a class or function from its syntax tree."""
    name, init = node.name, node
    if isinstance(node, ast.ClassDef):
        inits = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
        if not inits:
            return create_model(name, __config__=_STRICT)
        init = inits[0]
    assert isinstance(init, ast.FunctionDef)
    fields: dict[str, Any] = {}
    for arg, default in zip(init.args.kwonlyargs, init.args.kw_defaults, strict=True):
        assert arg.annotation is not None, f"{name}.{arg.arg} has no annotation"
        annotation = _annotation(arg.annotation, tree)
        fields[arg.arg] = (annotation, ... if default is None else ast.literal_eval(default))
    return create_model(name, __config__=_STRICT, **fields)


def _annotation(node: ast.expr, tree: ast.Module) -> Any:
    """The type that an annotation of the vocabulary stands for."""
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name):
            builtin = {"int": int, "float": float, "str": str, "bool": bool, "list": list}
            return builtin[name] if name in builtin else _imported(name, tree)
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _annotation(left, tree) | _annotation(right, tree)
        case ast.Tuple(elts=elements):
            return tuple(_annotation(element, tree) for element in elements)
        case ast.Subscript(value=value, slice=inner):
            return _annotation(value, tree)[_annotation(inner, tree)]
    raise TypeError(f"{ast.unparse(node)}: not in the vocabulary of signatures")


def _imported(name: str, tree: ast.Module) -> Any:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in _TORCH_FREE:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return getattr(importlib.import_module(node.module), alias.name)
    raise TypeError(f"{name}: a recipe key's type comes from {' or '.join(_TORCH_FREE)}")
