"""`distill check`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from distill import console
from distill.cli._report import print_json, reporting

if TYPE_CHECKING:
    from distill.data.survey import Survey
    from distill.engine.preflight import Rehearsal
    from distill.recipe import Recipe

LISTED = 10  # of what was found of one kind


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
    data: Annotated[
        bool, Option("--data", help="Read every image whole instead, and tell what is wrong.")
    ] = False,
    manifest: Annotated[
        Path | None,
        Option(
            metavar="FILE",
            help="With --data: what is known of each image is written there, or compared with it.",
            show_default="the recipe's data.manifest",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        Option(min=0, help="Processes that read images.", show_default="one a processor"),
    ] = None,
    as_json: Annotated[
        bool, Option("--json", help="Print the findings as one line of JSON on stdout.")
    ] = False,
) -> None:
    """Find every fault of RECIPE and tell what its run costs, without training.

    Reads the data, builds student and teachers, and makes one step on two images. With --data it
    looks at the images alone, at all of them: bad ones, the same one twice, in train and in test.

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
        if data:
            _check_data(checked, manifest, workers, as_json=as_json)
            return
        if manifest is not None:
            raise RecipeError("--manifest: goes with --data")

        import torch

        from distill.engine.preflight import rehearse

        devices = max(1, torch.cuda.device_count())
        found = rehearse(checked, Path("runs") / recipe.stem, devices=devices)
    if as_json:
        print_json(found.to_json())
    else:
        _show(found)


def _check_data(
    recipe: Recipe, manifest: Path | None, workers: int | None, *, as_json: bool
) -> None:
    """Say what is found of all images.

    Raises:
        DamagedError: If they are not those of the manifest.
        PreflightError: If images that the recipe does not let be skipped cannot be used.
    """
    from distill.data.datasets import refuse_bad
    from distill.data.manifest import require_none
    from distill.data.survey import survey
    from distill.data.workers import cores

    path = manifest or (Path(recipe.data.manifest).expanduser() if recipe.data.manifest else None)
    there = path is not None and path.exists()
    found = survey(recipe.data, path, workers=cores() if workers is None else workers)
    if as_json:
        where = None if path is None else str(path)
        print_json({**found.to_json(), "manifest": where, "written": bool(path) and not there})
    else:
        _show_data(found)
    if path is not None:
        require_none(path, found.changed)
        console.say(f"{path}: all as it says" if there else f"wrote {path}")
        if recipe.data.manifest is None:
            console.say(
                f"the recipe's section `data` has `manifest: {path}` to hold them against it"
            )
    trained = next(name for name in found.images if name != "test")
    bad, count = found.bad, found.images[trained]
    refuse_bad(found.origin, recipe.data, count, bad[trained], bad["test"])


def _show_data(found: Survey) -> None:
    """What all images are, and what is wrong with some."""
    from distill.storage import size

    splits = ", ".join(f"{count:,} {name}" for name, count in found.images.items())
    lines = [f"{found.origin}: {splits} images, {size(found.size)}"]
    lines.append("  " + ", ".join(f"{count:,} {kind}" for kind, count in found.kinds.items()))
    if found.classes:
        counts = [*found.classes.items()]
        ends = [f"{count:,} ({name})" for name, count in (counts[0], counts[-1])]
        lines.append(f"  {len(counts):,} classes of {' to '.join(ends)} training images")
    if found.animated:
        lines.append(f"  {found.animated:,} animated: the first frame is used")
    if found.small:
        lines.append(f"  {found.small:,} with a shorter side below {found.needed} px: blown up")
    for what, pairs in (
        ("training images that stand there twice", found.repeated),
        ("of them with two classes", found.relabelled),
        ("test images that are trained on", found.leaked),
    ):
        lines += _listing(what, [f"{one} = {other}" for one, other in pairs])
    for name, bad in found.bad.items():
        lines += _listing(f"{name} images that cannot be used", bad)
    console.out.print(console.plain("\n".join(lines)), highlight=False, soft_wrap=True)


def _listing(what: str, items: list[str]) -> list[str]:
    if not items:
        return []
    more = [f"    and {len(items) - LISTED:,} more"] if len(items) > LISTED else []
    return [f"  {what}: {len(items):,}", *(f"    {item}" for item in items[:LISTED]), *more]


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
        table.add_row(f"[bold]{console.plain(name)}[/]", console.plain(text))
    console.out.print(table, highlight=False)
    for warning in found.warnings:
        console.warn(warning)
    console.say("no faults found")


def _cost(network: dict[str, object]) -> str:
    parameters, flops = network["parameters"], network["flops"]
    assert isinstance(parameters, int)
    assert isinstance(flops, int)
    return f"{network['model']}: {parameters:,} parameters, {flops / 1e6:,.1f} MFLOPs an image"
