"""`distill rank-teachers`."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from distill import console
from distill.cli._numbers import numbers
from distill.cli._options import AsJson, CheckpointSeconds, Overrides, RecipeFile, Seeds, Workers
from distill.cli._report import print_json, reporting
from distill.cli._shard import Memory, Shard, begin, part_of, show_part

if TYPE_CHECKING:
    from distill.rank import Ranking
    from distill.recipe import Recipe


class Goal(StrEnum):
    """What a teacher is wanted for."""

    accuracy = "accuracy"
    mobile = "mobile"
    time = "time"


Teachers = Annotated[
    list[str] | None,
    Option(
        "--teacher",
        metavar="NAME",
        help="A candidate: timm/NAME or torchvision/NAME (pretrained), a run directory, a "
        ".safetensors file, or a recipe; repeatable. Left out: the recipe's teachers.",
    ),
]
GoalOption = Annotated[
    Goal,
    Option(
        "--goal",
        help="accuracy: the best student; mobile: the smallest, time: the quickest of the teachers "
        "whose students are as good.",
    ),
]
ProxyEpochs = Annotated[
    int | None,
    Option(
        min=1,
        help="Of each candidate's student.",
        show_default="5, or a tenth of the recipe's where that is more",
    ),
]
Ensembles = Annotated[
    int, Option(min=1, help="Also try the best two, three, up to so many teachers together.")
]
Out = Annotated[
    Path | None, Option(help="Where all is kept.", show_default="runs/RECIPE's name-teachers")
]


def rank_teachers(
    recipe: RecipeFile,
    teachers: Teachers = None,
    goal: GoalOption = Goal.accuracy,
    proxy_epochs: ProxyEpochs = None,
    ensembles: Ensembles = 3,
    seeds: Seeds = None,
    out: Out = None,
    overrides: Overrides = None,
    shard: Shard = None,
    memory: Memory = None,
    workers: Workers = None,
    checkpoint_seconds: CheckpointSeconds = 300.0,
    as_json: AsJson = False,
) -> None:
    """Measure candidate teachers on the recipe's own data, and by a short student of each.

    Accuracy, calibration, entropy, size and speed of each and of the best together; then a student
    from each, and one alone. No answer is known in advance. Goes on where it stopped.

    Example: distill rank-teachers recipe.yaml --teacher runs/big --teacher runs/small --goal mobile
    """
    with reporting("what was trained is kept, and the same command goes on"):
        from distill.recipe import Recipe

        checked = _with_teachers(Recipe.load(recipe, overrides or []), teachers or [])
        chosen = numbers(seeds, "--seeds", whole=True) if seeds else []
        part, spawned = begin(part_of(shard))

        from distill.rank import Ranking, rank

        found = rank(
            checked,
            out or Path("runs") / f"{recipe.stem}-teachers",
            goal=goal.value,
            epochs=proxy_epochs,
            ensembles=ensembles,
            seeds=chosen,
            shard=part,
            memory=None if memory is None else memory * 1e9,
            conclude=not spawned,
            workers=workers,
            checkpoint_seconds=checkpoint_seconds,
        )
        if isinstance(found, Ranking):
            from distill.report.rank import write

            write(found.to_json(), Path(found.out))
    if spawned:  # the command that started this process prints
        return
    if not isinstance(found, Ranking):
        show_part(found, as_json=as_json)
    elif as_json:
        print_json(found.to_json())
    else:
        _show(found)


def _with_teachers(recipe: Recipe, names: list[str]) -> Recipe:
    """The recipe with these candidates as its teachers."""
    from distill.errors import RecipeError
    from distill.recipe import OUTSIDE_MODELS, Recipe, Teacher

    if not names:
        if not recipe.teachers:
            raise RecipeError("teachers: empty, and there is none to rank", hint="--teacher NAME")
        return recipe
    found = []
    spec: dict[str, Any]
    for name in names:
        if name.startswith(OUTSIDE_MODELS):
            spec = {"model": name, "weights": "pretrained"}
        elif name.endswith((".yaml", ".yml")):
            spec = {"recipe": Recipe.load(name), "name": Path(name).stem}
        else:
            spec = {"weights": name}
        found.append(Teacher.model_validate(spec))
    return recipe.model_copy(update={"teachers": found})


def _show(found: Ranking) -> None:
    from distill.report.rank import HEADS, STUDENT_HEADS, cells, verdict

    known = found.to_json()
    rows = [cells(row) for row in known["ranking"]]
    own = len(HEADS)
    _print(HEADS, [row[:own] for row in rows])
    console.out.print()
    _print(("", "teacher", *STUDENT_HEADS), [row[:2] + row[own:] for row in rows])
    for line in verdict(known):
        console.out.print(console.plain(line), highlight=False)
    best = console.typed(found.best["recipe"])
    following = f"next: distill train {best}\n      open {found.out}/ranking.html"
    console.out.print(console.plain(following), highlight=False, soft_wrap=True)


def _print(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table in which the second column is a name; the first row is bold."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in heads:
        if heading == "teacher":
            table.add_column(heading, overflow="fold")
        else:
            table.add_column(heading, justify="right", no_wrap=True)
    for i, row in enumerate(rows):
        table.add_row(*map(console.plain, row), style="bold" if i == 0 else None)
    console.out.print(table)
