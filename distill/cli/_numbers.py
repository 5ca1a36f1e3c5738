"""Lists of numbers on the command line."""

from __future__ import annotations

from typing import Any


def numbers(text: str, option: str, *, whole: bool = False) -> list[Any]:
    """The numbers of a list such as 1,2.5,1e-3; whole ones stay whole.

    Raises:
        RecipeError: If one is none.
    """
    from distill import yamlio
    from distill.errors import RecipeError

    kinds = (int,) if whole else (int, float)
    found = []
    for item in text.split(","):
        try:
            value = yamlio.load(item)[0]
        except yamlio.YamlError:
            value = None
        if type(value) not in kinds or (whole and value < 0):
            wanted = "whole numbers from 0" if whole else "numbers"
            raise RecipeError(f"{option}: {wanted} with commas between them, got {text!r}")
        found.append(value)
    return found
