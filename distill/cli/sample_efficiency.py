"""`distill sample-efficiency`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

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
    Seeds,
    Workers,
)
from distill.cli._report import print_json, reporting
from distill.cli._shard import Memory, Shard, begin, part_of, show_part

if TYPE_CHECKING:
    from distill.efficiency import Efficiency
    from distill.recipe import Recipe


CELL = 22  # columns of a terminal that an accuracy and its interval take on one line


class Seen(StrEnum):
    """The images that teachers have seen."""

    all = "all"
    same = "same"
    both = "both"


RecipeFiles = Annotated[list[Path], Argument(metavar="RECIPE", help="Recipe files, YAML.")]
Sizes = Annotated[
    str | None,
    Option(
        metavar="N,N,...",
        help="Numbers of training images.",
        show_default="1, 2, 5, 10, ... from a 50th of the images, 10 of each class and a batch on, "
        "up to 80 %, and all",
    ),
]
Out = Annotated[
    Path | None,
    Option(help="Where all is kept.", show_default="runs/FIRST RECIPE's name-efficiency"),
]
Teacher = Annotated[
    Seen,
    Option(
        help="all: teachers as the recipes give them; same: trained anew on the same images as "
        "their students; both: a curve for each, where a teacher can be trained anew."
    ),
]
Baseline = Annotated[
    bool, Option("--baseline", help="Also train students with teachers from labels alone.")
]


def sample_efficiency(
    recipes: RecipeFiles,
    sizes: Sizes = None,
    seeds: Seeds = None,
    teacher: Teacher = Seen.both,
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
    """Train recipes on more and more of the same images, and say which needs fewer of them.

    Every student takes the same steps on a class-balanced part of the images, and is measured by
    the test split. Goes on where it stopped.

    Example: distill sample-efficiency cnn.yaml vit.yaml cnn-to-vit.yaml --baseline --seeds 0,1,2
    """
    with reporting("what was trained is kept, and the same command goes on"):
        from distill.subsets import require_comparable

        checked = _loaded(recipes, overrides or [])
        asked = numbers(sizes, "--sizes", whole=True) if sizes else []
        chosen = numbers(seeds, "--seeds", whole=True) if seeds else []
        require_comparable(checked, teacher=teacher.value)  # every fault, before torch is loaded
        part, spawned = begin(part_of(shard))

        from distill.efficiency import Efficiency, efficiency

        found = efficiency(
            checked,
            out or Path("runs") / f"{recipes[0].stem}-efficiency",
            sizes=asked,
            seeds=chosen,
            teacher=teacher.value,
            baseline=baseline,
            shard=part,
            live=live,
            memory=None if memory is None else memory * 1e9,
            conclude=not spawned,
            workers=workers,
            device_batch_size=device_batch_size,
            compile=compile,
            cuda_graph=cuda_graph,
            checkpoint_seconds=checkpoint_seconds,
        )
        if isinstance(found, Efficiency):
            from distill.report.efficiency import write

            write(found.to_json(), Path(found.out))
    if spawned:  # the command that started this process prints
        return
    if not isinstance(found, Efficiency):
        show_part(found, as_json=as_json)
    elif as_json:
        print_json(found.to_json())
    else:
        _show(found)


def _loaded(paths: list[Path], overrides: list[str]) -> dict[str, Recipe]:
    """The recipes by name, which is that of the file where they differ in it.

    Raises:
        RecipeError: With the faults of all of them.
    """
    from distill.errors import RecipeError
    from distill.recipe import Recipe

    stems = [path.stem for path in paths]
    alike = len(set(stems)) < len(stems)
    found: dict[str, Recipe] = {}
    problems = []
    for path in paths:
        name = str(path.with_suffix("")) if alike else path.stem
        if name in found:
            problems.append(f"{path}: stands twice among the recipes")
        try:
            found[name] = Recipe.load(path, overrides)
        except RecipeError as error:
            problems.append(str(error))
    if problems:
        raise RecipeError("\n".join(dict.fromkeys(problems)))
    return found


def _show(found: Efficiency) -> None:
    from rich.table import Table

    from distill.report.efficiency import cell, verdict

    known = found.to_json()
    table = Table(box=None, pad_edge=False)
    for heading in ("images", *(curve["name"] for curve in found.curves)):
        table.add_column(console.plain(heading), justify="right")
    wide = console.out.width >= CELL * (1 + len(found.curves))
    for i, size in enumerate(found.sizes):
        cells = [cell(curve["points"][i]) for curve in found.curves]
        table.add_row(f"{size:,}", *(c if wide else c.replace(" (", "\n(") for c in cells))
    console.out.print(table)
    for line in verdict(known):
        console.out.print(console.plain(line), highlight=False)
    console.out.print(
        console.plain(f"next: open {found.out}/efficiency.html"), highlight=False, soft_wrap=True
    )
