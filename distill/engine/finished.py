"""Finished runs, as they can be run here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from distill import component, console, models
from distill.data import datasets
from distill.data.datasets import Dataset
from distill.engine.networks import facts, trained
from distill.engine.run import Result, Run
from distill.errors import DistillError, IncompatibleError, PreflightError
from distill.models import weights
from distill.models.network import Network
from distill.recipe import Recipe, Teacher


class Finished(NamedTuple):
    """A run that is done: what it was asked for, on what, and what came of it."""

    path: Path
    recipe: Recipe
    dataset: Dataset
    network: Network  # the student
    result: Result | None  # None: of an earlier state of the run

    @property
    def specs(self) -> list[Teacher]:
        """Its teachers, each with the weights it has by now."""
        return [trained(spec, self.path, i) for i, spec in enumerate(self.recipe.teachers)]

    def teachers(self) -> list[Network]:
        """The networks that taught it; none, with a warning, if they are not what they were."""
        if not self.recipe.teachers:
            return []
        try:
            networks = [models.build_teacher(spec, **facts(self.dataset)) for spec in self.specs]
        except DistillError as error:
            console.warn(f"{self.path}: its teacher cannot be asked: {error}")
            return []
        keys = [weights.fingerprint(network) for network in networks]
        if self.result is not None and self.result.identity.get("teachers") != keys:
            console.warn(
                f"{self.path}: its teacher has other weights now than when it taught: it is left "
                "out"
            )
            return []
        return networks


def require_finished(runs: Sequence[Path]) -> None:
    """Refuse what is no finished run, before anything is loaded.

    Raises:
        PreflightError: If a file is missing.
    """
    for run in runs:
        for name in ("recipe.yaml", "student.safetensors"):
            if not (run / name).is_file():
                raise PreflightError(
                    f"{run}: has no {name}",
                    hint="a run directory has both when `distill train` is done with it",
                )


class Loader:
    """Loads finished runs; equal data are loaded once.

    Args:
        root: Where the data lie now; None: as their recipes say.
    """

    def __init__(self, root: Path | None) -> None:
        self._root = root
        self._datasets: dict[str, Dataset] = {}

    def __call__(self, path: Path) -> Finished:
        """The run in `path`.

        Raises:
            PreflightError: If data or weights are not there.
            RecipeError: If it names code outside of distill that the user did not name.
            IncompatibleError: If the data have other classes than it was trained on.
        """
        recipe = Recipe.load(path / "recipe.yaml")
        for teacher in recipe.teachers:  # the run may be anybody's
            component.require_vouched(teacher.model or "", path)
        if self._root is not None:
            data = recipe.data.model_copy(update={"root": str(self._root)})
            recipe = recipe.model_copy(update={"data": data})
        if not torch.cuda.is_available():  # the run's own precision may need a GPU
            train = recipe.train.model_copy(update={"precision": "fp32"})
            recipe = recipe.model_copy(update={"train": train})
        key = recipe.data.model_dump_json()
        if key not in self._datasets:
            self._datasets[key] = datasets.load(recipe.data)
        network, result = weights.load(path), Run(path).finished()
        _require_classes(path, network.classes, self._datasets[key].classes)
        return Finished(path, recipe, self._datasets[key], network, result)


def _require_classes(path: Path, own: tuple[str, ...] | None, there: tuple[str, ...]) -> None:
    """Refuse to count a network's answers by the labels of other classes."""
    if own is None or own == there:
        return
    lacking = [name for name in own if name not in there]
    spare = [name for name in there if name not in own]
    what = [f"they lack {weights.listed(lacking)}"] if lacking else []
    what += [f"they have {weights.listed(spare)}"] if spare else []
    raise IncompatibleError(
        f"{path}: the data have other classes than it was trained on: "
        + ("; ".join(what) or "the same in another order"),
        hint="give the data that it was trained on, or some with the same classes in their order",
    )
