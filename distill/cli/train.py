"""`distill train`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Exit, Option

from distill import console
from distill.cli._options import (
    AsJson,
    CheckpointSeconds,
    Compile,
    CudaGraph,
    DeviceBatchSize,
    Overrides,
    RecipeFile,
    ShardWeights,
    Workers,
)
from distill.cli._report import print_json, reporting

if TYPE_CHECKING:
    from distill.engine.run import Result


def train(
    recipe: RecipeFile,
    out: Annotated[
        Path | None, Option(help="Run directory.", show_default="runs/RECIPE's name")
    ] = None,
    cache: Annotated[
        str | None,
        Option(
            metavar="DIR",
            help="Read the teachers' answers from this cache, a folder or s3://....",
            show_default="the recipe's cache.path",
        ),
    ] = None,
    overrides: Overrides = None,
    restart: Annotated[
        bool, Option("--restart", help="Forget what the run directory holds; do not go on.")
    ] = False,
    baseline: Annotated[
        bool,
        Option("--baseline", help="Also train the same student without teacher; report the gain."),
    ] = False,
    workers: Workers = None,
    device_batch_size: DeviceBatchSize = None,
    compile: Compile = False,
    cuda_graph: CudaGraph = True,
    shard_weights: ShardWeights = False,
    checkpoint_seconds: CheckpointSeconds = 300.0,
    as_json: AsJson = False,
) -> None:
    """Train the student as RECIPE says; a run that was cut short goes on where it stopped.

    Example: distill train recipes/quickstart.yaml --baseline
    """
    with reporting("the last checkpoint is whole, and the same command goes on"):
        from distill.recipe import Recipe

        changes = [*(overrides or []), *(_cached(recipe, overrides or [], cache) if cache else [])]
        checked = Recipe.load(recipe, changes)  # every fault, before torch is loaded

        from distill.engine import launch
        from distill.engine.train import train as run
        from distill.report import run as report

        if (status := launch.spread(sys.argv[1:])) is not None:
            raise Exit(status)
        result = run(
            checked,
            out or Path("runs") / recipe.stem,
            restart=restart,
            baseline=baseline,
            workers=workers,
            device_batch_size=device_batch_size,
            compile=compile,
            cuda_graph=cuda_graph,
            shard_weights=shard_weights,
            checkpoint_seconds=checkpoint_seconds,
        )
        if console.err.quiet:  # another process prints the result
            return
        report.write(Path(result.run))
    if as_json:
        print_json(result.document())
    else:
        _show(result)


def _cached(recipe: Path, overrides: list[str], place: str) -> list[str]:
    """The overrides that make a recipe read this cache: its views too, where it says nothing."""
    from distill import recipe_file
    from distill.cache.store import open_store
    from distill.cache.write import read_manifest
    from distill.recipe import Recipe

    here = f"cache.path={json.dumps(place)}"
    asked = Recipe.load(recipe, [*overrides, here])
    written = recipe_file.read(recipe, overrides)[0].get("cache") or {}
    if "views" in written or len(asked.teachers) > 1:
        return [here]
    manifest = read_manifest(open_store(place))
    if manifest is None or manifest.views >= asked.default_views:
        return [here]
    console.say(f"{place}: has {manifest.views} views of every image, and the epochs take turns")
    return [here, f"cache.views={manifest.views}"]


def _show(result: Result) -> None:
    """The box at the end: who is how good, at what size, and what to do next."""
    from rich.console import Group
    from rich.panel import Panel
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("", "model", "test top-1", "NLL", "parameters", "MFLOPs"):
        table.add_column(heading, justify="left" if heading in ("", "model") else "right")
    student = {"model": result.student, **result.to_json()}
    networks = [("teacher", teacher) for teacher in result.teachers] + [("student", student)]
    if result.ensemble is not None and result.generations is not None:
        count = len(result.generations)
        costs = {"parameters": count * result.parameters, "flops": count * result.flops}
        together = {"model": f"all {count} generations", **costs, **result.ensemble}
        networks.append(("ensemble", together))
    if result.baseline is not None:
        networks.append(("  alone", {"model": result.student, **result.baseline}))
    for role, network in networks:
        table.add_row(
            role,
            console.plain(network["model"]),
            f"{network['top1']:.2%}",
            f"{network['nll']:.3f}",
            f"{network['parameters']:,}",
            f"{network['flops'] / 1e6:,.1f}",
            style="bold" if role == "student" else None,
        )
    lines: list[str] = []
    if result.gain is not None and result.gain_ci95 is not None:
        low, high = (100 * end for end in result.gain_ci95)
        lines.append(
            f"gain from the teacher: [bold]{100 * result.gain:+.2f} points[/] "
            f"(95 % interval over test images {low:+.2f} to {high:+.2f}; one seed)"
        )
    elif result.teachers:
        lines.append("gain from the teacher: not measured; --baseline trains the student alone too")
    lines.append(
        f"{result.epochs} epochs, {result.steps:,} steps in {result.seconds:.1f} s, "
        f"{result.images_per_second:,.0f} images/s, {result.data_wait or 0:.0%} of the time "
        f"waiting for images, {(result.memory or 0) / 1e9:.1f} GB at most"
    )
    run = console.plain(result.run)
    next_ = console.plain(console.typed(result.run))
    following = f"page: {run}/report.html\nnext: distill evaluate {next_}\n      "
    following += f"distill export {next_}"
    console.out.print(
        Panel(Group(table, "", *lines, "", following), title=run, title_align="left", expand=False)
    )
