"""`distill check`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from distill import console
from distill.cli._report import print_json, reporting

if TYPE_CHECKING:
    from distill.engine.preflight import Rehearsal


def check(
    recipe: Annotated[
        Path | None, Argument(metavar="RECIPE", help="Recipe file, YAML.", show_default=False)
    ] = None,
    overrides: Annotated[
        list[str] | None,
        Option("--set", metavar="KEY=VALUE", help="Change one key of the recipe; repeatable."),
    ] = None,
    schema: Annotated[
        bool,
        Option("--schema", help="Print the JSON schema of recipes, for editors; needs no RECIPE."),
    ] = False,
    as_json: Annotated[
        bool, Option("--json", help="Print the findings as one line of JSON on stdout.")
    ] = False,
) -> None:
    """Find every fault of RECIPE and tell what its run costs, without training.

    Reads the data, builds student and teachers, and makes one step on two images.

    Example: distill check recipes/quickstart.yaml --set train.batch_size=64
    """
    with reporting():
        from distill.errors import RecipeError
        from distill.recipe import Recipe, json_schema

        if schema:
            print(json.dumps(json_schema(), indent=None if as_json else 2))
            return
        if recipe is None:
            raise RecipeError("which recipe?", hint="distill check RECIPE")
        checked = Recipe.load(recipe, overrides or [])  # every fault, before torch is loaded

        import torch

        from distill.engine.preflight import rehearse

        devices = max(1, torch.cuda.device_count())
        found = rehearse(checked, Path("runs") / recipe.stem, devices=devices)
    if as_json:
        print_json(found.to_json())
    else:
        _show(found)


def _show(found: Rehearsal) -> None:
    """What takes part, what it costs, and what to do next."""
    from rich.table import Table

    from distill.storage import size

    table = Table(box=None, pad_edge=False, show_header=False)
    for _ in range(2):
        table.add_column(overflow="fold")
    data = found.data
    rows = [
        (
            "data",
            f"{data['name']}: {data['num_classes']:,} classes, {data['train']:,} train, "
            f"{data['val']:,} val, {data['test']:,} test images, {data['image_size']} px",
        )
    ]
    for teacher in found.teachers:
        first = f", will be trained first ({teacher['steps']:,} steps)"
        rows.append(("teacher", _cost(teacher) + (first if teacher["trained_first"] else "")))
    rows.append(("student", _cost(found.student)))
    rows += [(name, f"reads {what}") for name, what in found.reads.items()]
    rows.append(
        (
            "training",
            f"{found.epochs:,} epochs, {found.steps:,} steps of {found.batch_size:,} images"
            + (
                f", {found.device_batch_size:,} on each device"
                if found.device_batch_size < found.batch_size
                else ""
            ),
        )
    )
    parts = [f"{name} {size / 1e6:,.1f}" for name, size in found.memory._asdict().items() if size]
    total = f"about {found.memory.total / 1e6:,.1f} MB a device"
    rows.append(("memory", f"{total}: {', '.join(parts)}"))
    for cache in found.caches:
        state = f"{cache['missing']:,} of {cache['units']:,} units missing"
        text = f"{cache['path']}: {cache['codec']}, {cache['views']} views"
        rows.append(("cache", f"{text}, {size(cache['bytes'])}; {state}"))
    rows.append(
        ("checkpoint", f"{found.checkpoint / 1e6:,.1f} MB; a run keeps two while it writes a third")
    )
    for name, text in rows:
        table.add_row(f"[bold]{name}[/]", console.plain(text))
    console.out.print(table, highlight=False)
    for warning in found.warnings:
        console.warn(warning)
    console.say("no faults found")


def _cost(network: dict[str, object]) -> str:
    parameters, flops = network["parameters"], network["flops"]
    assert isinstance(parameters, int)
    assert isinstance(flops, int)
    return f"{network['model']}: {parameters:,} parameters, {flops / 1e6:,.1f} MFLOPs an image"
