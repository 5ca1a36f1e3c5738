"""`distill temperature-sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from distill import console
from distill.cli._numbers import numbers
from distill.cli._options import (
    AsJson,
    CheckpointSeconds,
    Compile,
    CudaGraph,
    DeviceBatchSize,
    Live,
    Overrides,
    RecipeFile,
    Seeds,
    Workers,
)
from distill.cli._report import print_json, reporting
from distill.cli._shard import Memory, Shard, begin, part_of, show_part

if TYPE_CHECKING:
    from distill.grid import Axis
    from distill.recipe import Recipe
    from distill.sweep import Sweep


Temperatures = Annotated[
    str | None,
    Option(
        metavar="T,T,...",
        help="Of every term that softens a teacher's classes.",
        show_default="1,2,3,4,5,6,8,10",
    ),
]
Weights = Annotated[
    str | None, Option(metavar="W,W,...", help="Of the same terms; others keep theirs.")
]
Keys = Annotated[
    list[str] | None,
    Option(
        "--key",
        metavar="KEY=V,V,...",
        help="Vary any other number of the recipe, such as optimizer.lr=0.1,0.2; repeatable. "
        "Temperatures are then varied only if they are given too.",
    ),
]
Out = Annotated[
    Path | None, Option(help="Where all is kept.", show_default="runs/RECIPE's name-sweep")
]
Baseline = Annotated[bool, Option("--baseline", help="Also train the student from labels alone.")]


def temperature_sweep(
    recipe: RecipeFile,
    temperatures: Temperatures = None,
    weights: Weights = None,
    keys: Keys = None,
    seeds: Seeds = None,
    out: Out = None,
    overrides: Overrides = None,
    baseline: Baseline = False,
    live: Live = False,
    shard: Shard = None,
    memory: Memory = None,
    workers: Workers = None,
    device_batch_size: DeviceBatchSize = None,
    compile: Compile = False,
    cuda_graph: CudaGraph = True,
    checkpoint_seconds: CheckpointSeconds = 300.0,
    as_json: AsJson = False,
) -> None:
    """Train a student at each temperature, and choose by the validation split.

    Teachers answer once, into a cache; students are trained side by side on the same batches. The
    test split is read for the best one alone. Goes on where it stopped.

    Example: distill temperature-sweep recipe.yaml --temperatures 1,2,4,8 --seeds 0,1
    """
    with reporting("what was trained is kept, and the same command goes on"):
        from distill.grid import points
        from distill.recipe import Recipe

        changes = overrides or []
        checked = Recipe.load(recipe, changes)
        axes = _axes(checked, temperatures, weights, keys or [])
        chosen = numbers(seeds, "--seeds", whole=True) if seeds else []
        points(checked, axes, chosen or [0])  # every fault, before torch is loaded
        part, spawned = begin(part_of(shard))

        from distill.sweep import Sweep, sweep

        found = sweep(
            checked,
            axes,
            out or Path("runs") / f"{recipe.stem}-sweep",
            seeds=chosen,
            shard=part,
            live=live,
            baseline=baseline,
            memory=None if memory is None else memory * 1e9,
            conclude=not spawned,
            workers=workers,
            device_batch_size=device_batch_size,
            compile=compile,
            cuda_graph=cuda_graph,
            checkpoint_seconds=checkpoint_seconds,
        )
        if isinstance(found, Sweep):
            from distill.report.sweep import write

            write(found.to_json(), Path(found.out))
    if spawned:  # the command that started this process prints
        return
    if not isinstance(found, Sweep):
        show_part(found, as_json=as_json)
    elif as_json:
        print_json(found.to_json())
    else:
        _show(found)


def _axes(
    recipe: Recipe, temperatures: str | None, weights: str | None, keys: list[str]
) -> list[Axis]:
    from distill import grid
    from distill.errors import RecipeError

    axes = []
    if temperatures or not keys:
        known = numbers(temperatures, "--temperatures") if temperatures else grid.TEMPERATURES
        axes.append(grid.temperature_axis(recipe, known))
    if weights:
        axes.append(grid.weight_axis(recipe, numbers(weights, "--weights")))
    for text in keys:
        key, equals, values = text.partition("=")
        if not equals or not key:
            raise RecipeError(
                f"--key {text}: must be KEY=V,V,..., such as --key optimizer.lr=0.1,0.2"
            )
        axes.append(grid.Axis(key, (key,), tuple(numbers(values, f"--key {key}"))))
    return axes


def _show(found: Sweep) -> None:
    from rich.table import Table

    from distill.report.sweep import scored, verdict

    known = found.to_json()
    table = Table(box=None, pad_edge=False)
    for heading in (*found.axes, "val top-1", "95 % interval", "NLL"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("")
    for row in known["settings"]:
        cells = [f"{row[name]:.10g}" for name in found.axes] + scored(row, known)
        best = row["runs"] == found.best["runs"]
        table.add_row(*map(console.plain, cells), style="bold" if best else None)
    console.out.print(table)
    for line in verdict(known):
        console.out.print(console.plain(line), highlight=False)
    best = console.typed(found.best["recipe"])
    following = f"next: distill train {best}\n      open {found.out}/sweep.html"
    console.out.print(console.plain(following), highlight=False, soft_wrap=True)
