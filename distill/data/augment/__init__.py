"""Augmentations.

Each module beside this one is an augmentation: `crop.py` is `augment: [crop]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from jaxtyping import Float, Int
from numpy import ndarray

from distill import component, recipe
from distill.data import views
from distill.data.augment._augmentation import Augmentation


class Stage(NamedTuple):
    """An augmentation at its place in a recipe, with the random numbers that belong to it."""

    augmentation: Augmentation
    seed: int
    stream: int

    def uniforms(
        self, ids: Int[ndarray, " n"], numbers: Int[ndarray, " n"] | int
    ) -> Float[ndarray, "n D"]:
        """What the augmentation draws from for these samples, in views of these numbers."""
        return views.uniform(
            self.seed, ids, numbers, stream=self.stream, num=self.augmentation.num_draws
        )

    def plan(
        self, ids: Int[ndarray, " n"], numbers: Int[ndarray, " n"] | int, *, size: int
    ) -> dict[str, ndarray]:
        """What is drawn for these samples, at square images of `size` pixels."""
        return self.augmentation.plan(self.uniforms(ids, numbers), height=size, width=size)


def build(specs: Sequence[recipe.Augmentation], *, seed: int) -> list[Stage]:
    """The augmentations of a recipe's `data.augment`, in order, those of the student alone last.

    So what the teacher is shown, and every number that is drawn for it, are the same with and
    without them.

    Args:
        specs: Names and arguments.
        seed: The recipe's `data.seed`.

    Raises:
        RecipeError: If a name is unknown or an argument is wrong.
    """
    built = [component.build("data.augment", spec.name, spec.arguments) for spec in specs]
    built.sort(key=lambda augmentation: augmentation.student_only)
    # Stream 0 belongs to mixing.
    return [Stage(each, seed, stream) for stream, each in enumerate(built, start=1)]
