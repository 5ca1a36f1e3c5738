"""Students that teach the next of their kind.

Furlanello, Lipton, Tschannen, Itti, Anandkumar: Born-Again Neural Networks, ICML 2018,
arXiv:1805.04770.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distill import evaluate
from distill.data import datasets
from distill.engine.machine import Machine
from distill.engine.networks import Together
from distill.engine.run import Result, Run
from distill.engine.session import answers
from distill.errors import PreflightError
from distill.models import weights
from distill.recipe import Recipe, Teacher


def last(recipe: Recipe, out: Path) -> Recipe:
    """The recipe of the last generation, whose teacher is the recipe of the one before, and so on.

    The first has the recipe's own teachers, or learns from labels alone where there are none. Every
    generation begins at initial weights of its own: its seed is one more than the last one's.
    """
    alone = recipe.model_copy(update={"generations": 1})
    if recipe.generations == 1:
        return alone
    found = alone if recipe.teachers else alone.without_teacher()
    for number in range(2, recipe.generations + 1):
        name = run_of(out, number - 1).name
        train = recipe.train.model_copy(update={"seed": recipe.train.seed + number - 1})
        teachers = [Teacher.model_validate({"recipe": found, "name": name})]
        # One of the recipe's several teachers can be named in the first generation alone.
        terms = [spec.model_copy(update={"teacher": None}) for spec in recipe.objective]
        changes = {"teachers": teachers, "train": train, "objective": terms}
        found = alone.model_copy(update=changes)
    return found


def run_of(out: Path, number: int) -> Path:
    """Where a generation before the last has its run, counted from 1: beside the last one's."""
    return out.with_name(f"{out.name}-generation-{number}")


def together(recipe: Recipe, result: Result, here: Machine) -> Result:
    """The result with the earlier generations beside it, and with all of them as one classifier."""
    out = Path(result.run)
    runs = [*(run_of(out, number) for number in range(1, recipe.generations)), out]
    found: list[dict[str, Any]] = []
    for run in runs:
        one = result if run == out else Run(run).finished()
        if one is None:
            raise PreflightError(f"{run}: has no result", hint="run the same command again")
        scores = {name: getattr(one, name) for name in evaluate.Scores._fields}
        found.append({"run": str(run), **scores})
    dataset = datasets.load(recipe.data)
    own = [recipe.student.model]
    networks = Together([weights.load(run, vouched=own).to(here.device) for run in runs])
    told = answers(networks, "test", recipe, dataset, here)
    return result._replace(generations=found, ensemble=evaluate.scores(told)._asdict())
