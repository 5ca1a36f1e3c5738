"""Recipes that differ in a few numbers: the points of a grid, each checked before it is trained."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from distill import component
from distill.errors import RecipeError
from distill.recipe import Recipe, TermSpec

TEMPERATURES = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)


class Trial(NamedTuple):
    """A run among others."""

    name: str  # of its directory
    recipe: Recipe


class Axis(NamedTuple):
    """What is varied."""

    name: str  # temperature, weight, or a key of the recipe
    keys: tuple[str, ...]  # that it sets
    values: tuple[float, ...]


class Setting(NamedTuple):
    """One point of the grid, over all its seeds."""

    values: dict[str, float]  # by axis
    trials: list[Trial]  # one a seed


def points(recipe: Recipe, axes: Sequence[Axis], seeds: Sequence[int]) -> list[Setting]:
    """The points of the grid.

    Raises:
        RecipeError: If a key or a value is wrong, or a value stands twice.
    """
    for axis in axes:
        if len(set(axis.values)) < len(axis.values):
            raise RecipeError(f"{axis.name}: a value stands twice in {list(axis.values)}")
    found = []
    for values in itertools.product(*(axis.values for axis in axes)):
        named = {axis.name: value for axis, value in zip(axes, values, strict=True)}
        keys = {key: value for axis, value in zip(axes, values, strict=True) for key in axis.keys}
        trials = [
            Trial(_name(named, seed), recipe.changed({**keys, "train.seed": seed}))
            for seed in seeds
        ]
        found.append(Setting(named, trials))
    return found


def temperature_axis(recipe: Recipe, values: Sequence[float]) -> Axis:
    """The temperature of every term that softens a teacher's classes.

    Raises:
        RecipeError: If there is none.
    """
    keys = tuple(f"objective.{i}.temperature" for i in softened(recipe))
    if not keys:
        raise RecipeError(
            "objective: no term has a temperature at which it hears a teacher's classes",
            hint="add {term: kd}, or vary something else: --key optimizer.lr=0.1,0.2",
        )
    return Axis("temperature", keys, tuple(values))


def weight_axis(recipe: Recipe, values: Sequence[float]) -> Axis:
    """The weight of every term that softens a teacher's classes, or of every one that hears it.

    Raises:
        RecipeError: If there is none.
    """
    chosen = softened(recipe) or [i for i, spec in enumerate(recipe.objective) if _taught(spec)]
    if not chosen:
        raise RecipeError("objective: no term hears a teacher, and --weights are theirs")
    return Axis("weight", tuple(f"objective.{i}.weight" for i in chosen), tuple(values))


def softened(recipe: Recipe) -> list[int]:
    """The numbers of the objective's terms that have a temperature for a teacher's classes."""
    found = component.find("objectives")
    return [
        i
        for i, spec in enumerate(recipe.objective)
        if _taught(spec)
        and spec.term in found
        and found[spec.term].constants.get("reads_classes", True)
        and "temperature" in found[spec.term].keys.model_fields
    ]


def _taught(spec: TermSpec) -> bool:
    known = component.find("objectives").get(spec.term)
    return known is None or bool(known.constants.get("needs_teacher", True))


def _name(values: Mapping[str, float], seed: int) -> str:
    return "_".join([*(f"{name}-{value:.10g}" for name, value in values.items()), f"seed-{seed}"])
