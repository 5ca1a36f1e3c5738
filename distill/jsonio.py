"""JSON as it lies on disk, where anybody may have put it."""

from __future__ import annotations

import json
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")


def load(text: str | bytes) -> Any:
    """What a text says.

    Raises:
        ValueError: If it is no JSON, or nested too deeply to be any of ours.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def mapping(text: str | bytes) -> dict[str, Any]:
    """The object that a text holds.

    Raises:
        ValueError: If it holds something else.
    """
    found = load(text)
    if not isinstance(found, dict):
        raise ValueError(f"a mapping of names to values was expected, got {found!r:.60}")
    return found


def checked(kind: type[T], data: Any) -> T:
    """Plain data as what it should be: a model, a named tuple, a list of numbers, ...

    Raises:
        ValueError: If a value has another type, or one is missing or unknown; the first is named.
    """
    try:
        return TypeAdapter(kind).validate_python(data, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        what = first["msg"].removeprefix("Input ")
        raise ValueError(f"{place}: {what}" if place else what) from None
