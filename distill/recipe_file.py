"""A recipe file as plain data, with the recipes it names, changed by `--set`; where each key is."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from distill import component, remote, yamlio
from distill.component import Location
from distill.errors import RecipeError

MOST_RECIPES = 100  # of teachers, and of their teachers: files that name files can be endless

_SECRET = "an address with a password or a signature in it, which would be copied"

Places = dict[Location, str]  # of a key: `file:line`, or the `--set` that gave it


def read(path: Path, overrides: Sequence[str]) -> tuple[dict[str, Any], Places]:
    """The data of a recipe file, overrides applied and its teachers' recipes read in.

    Raises:
        RecipeError: If a file is missing, is not YAML or names itself, an override has no place to
            go, or a value is none to be kept: a recipe is copied into its run.
    """
    data, places = _parse(path)
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise RecipeError(f"--set {text}: must be KEY=VALUE, such as --set optimizer.lr=0.1")
        place = _place(key)
        if "recipe" in place[:-1]:
            _inline(data, places, path, (), [])
        try:
            parsed = yamlio.load(value)[0] if value else None
        except yamlio.YamlError as error:
            raise RecipeError(f"--set {text}: {error.problems[0][1]}") from None
        _override(data, place, parsed, f"--set {text}")
        for known in [known for known in places if known[: len(place)] == place]:
            del places[known]
        places[place] = f"--set {text}"
    _inline(data, places, path, (), [])
    if problems := [line(*problem, places) for problem in _unfit(data, ())]:
        secret = any(_SECRET in problem for problem in problems)
        where = "give credentials in the environment, in ~/.netrc or in the store's own settings"
        raise RecipeError("\n".join(problems), hint=where if secret else "")
    return data, places


def put(data: dict[str, Any], key: str, value: Any, places: Places) -> None:
    """Change one `key.path` of a recipe's data.

    Raises:
        RecipeError: If there is no such place.
    """
    place, label = _place(key), f"--set {key}={value}"
    _override(data, place, value, label)
    places[place] = label


def line(place: Location, what: str, places: Places) -> str:
    """A problem as a line for the user: `file:line: key: what`."""
    known = place
    while known and known not in places:
        known = known[:-1]
    key = component.dotted(place)
    source = places.get(known, "")
    if source.startswith("--set"):
        return f"{source}: {what}"
    return f"{source}: {key}: {what}" if key else f"{source}: {what}"


def _parse(path: Path) -> tuple[dict[str, Any], Places]:
    try:
        with path.open("rb") as file:  # it may be /dev/zero
            content = file.read(4 * yamlio.MAX_CHARACTERS + 1)
        text = content.decode()
    except OSError as error:
        raise RecipeError(
            f"{path}: {(error.strerror or 'cannot be read').lower()}",
            hint="`distill list recipes` shows the ready ones",
        ) from None
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise RecipeError(f"{path}:{number}: not a text file in UTF-8") from None
    try:
        data, lines = yamlio.load(text)
    except yamlio.YamlError as error:
        raise RecipeError("\n".join(f"{path}:{n}: {what}" for n, what in error.problems)) from None
    if not isinstance(data, dict):
        raise RecipeError(f"{path}:1: a recipe is a mapping of keys, got {data!r:.60}")
    return data, {place: f"{path}:{number}" for place, number in lines.items()}


def _inline(
    data: dict[str, Any],
    places: Places,
    path: Path,
    parents: tuple[Path, ...],
    inlined: list[int],
) -> None:
    """Put the recipes that teachers name, relative to `path`, in the place of their names.

    `inlined` has how many values there are in each of those that were read so far.
    """
    teachers = data.get("teachers")
    for i, spec in enumerate(teachers if isinstance(teachers, list) else ()):
        if isinstance(spec, dict) and isinstance(spec.get("recipe"), str):
            place: Location = ("teachers", i, "recipe")
            other = path.parent / spec["recipe"]
            chain = (Path(os.path.realpath(path)), *parents)
            try:
                again = Path(os.path.realpath(other)) in chain
            except (OSError, ValueError) as error:  # \0 in it, or a name that is too long
                raise RecipeError(line(place, f"no name of a file: {error}", places)) from None
            if again:
                raise RecipeError(line(place, "names itself", places))
            if len(inlined) == MOST_RECIPES or sum(inlined) > yamlio.MAX_NODES:
                what = f"more than {MOST_RECIPES} recipes, or {yamlio.MAX_NODES:,} values in them"
                raise RecipeError(line(place, what, places))
            spec["recipe"], inner = _parse(other)
            inlined.append(len(inner))
            _inline(spec["recipe"], inner, other, chain, inlined)
            spec.setdefault("name", other.stem)
            places |= {(*place, *below): source for below, source in inner.items()}


def _unfit(data: Any, at: Location) -> Iterator[tuple[Location, str]]:
    """The texts that no recipe may hold, and where they stand."""
    if isinstance(data, dict | list):
        for key, value in data.items() if isinstance(data, dict) else enumerate(data):
            yield from _unfit(value, (*at, key))
    elif isinstance(data, str) and remote.tells_a_secret(data):
        yield at, _SECRET
    elif isinstance(data, str) and any(c == "\0" or "\ud800" <= c <= "\udfff" for c in data):
        yield at, "holds a character that no text file may hold"


def _place(key: str) -> Location:
    return tuple(int(part) if part.isdecimal() else part for part in key.split("."))


def _override(data: Any, place: Location, value: Any, label: str) -> None:
    """Put `value` at `place`."""
    for i, part in enumerate(place):
        if isinstance(data, list):
            if not isinstance(part, int) or part >= len(data):
                raise RecipeError(
                    f"{label}: {component.dotted(place[:i])} is a list of {len(data)}"
                    f", counted from 0; got {part!r}"
                )
        elif not isinstance(data, dict):
            raise RecipeError(f"{label}: {component.dotted(place[:i])} has no keys below it")
        if i < len(place) - 1:
            data = data.setdefault(part, {}) if isinstance(data, dict) else data[part]
    data[place[-1]] = value
