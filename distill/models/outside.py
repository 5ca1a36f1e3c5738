"""What holds for the models of every other library."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from distill.errors import DistillError, IncompatibleError, RecipeError


def check_name(library: str, name: str, known: Sequence[str]) -> None:
    """Refuse a name that is not `known`, and show the nearest that are.

    Raises:
        RecipeError: If the library has no such model.
    """
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3)
        raise RecipeError(
            f"{library} has no classifier {name!r}",
            hint=f"the nearest are {', '.join(close)}" if close else "see the library's own list",
        )


def check_arguments(model: str, arguments: Mapping[str, Any], decided: Collection[str]) -> None:
    """Refuse arguments that the data or another key of the recipe decide.

    Raises:
        RecipeError: If one of them is among `arguments`.
    """
    if given := [key for key in arguments if key in decided]:
        raise RecipeError(
            f"{model}: {', '.join(given)}: decided by data, model and weights",
            hint="leave it out of the model's arguments",
        )


@contextmanager
def building(model: str, image_size: int) -> Iterator[None]:
    """Turn a library's complaints about arguments and sizes into errors of one sentence.

    Raises:
        RecipeError: If it does not know an argument.
        IncompatibleError: If it knows them all and cannot build the model.
    """
    try:
        yield
    except TypeError as error:
        raise RecipeError(f"{model}: {error}") from error
    except DistillError:
        raise
    except (
        ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, RuntimeError,
        ValueError,
    ) as error:  # fmt: skip
        reason = " ".join(str(error).split()) or type(error).__name__
        raise IncompatibleError(
            f"{model}: cannot be built for images of {image_size} px: {reason:.300}",
            hint="set data.image_size to a size it takes, or change the model's arguments",
        ) from error
