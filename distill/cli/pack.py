"""`distill pack`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from distill import console
from distill.cli._options import AsJson, Overrides, RecipeFile
from distill.cli._report import print_json, reporting


class Format(StrEnum):
    """How the images of a pack are stored."""

    jpeg = "jpeg"
    raw = "raw"


Out = Annotated[
    Path, Option(metavar="DIR", help="Where the shards are put: a folder of their own.")
]
Size = Annotated[
    int,
    Option(min=1, metavar="PIXELS", help="Of the shorter side; no image is made larger."),
]
FormatOf = Annotated[
    Format,
    Option(
        "--format",
        help="jpeg is 6 times smaller; raw is read 1.6 times as fast, and only scaling costs.",
    ),
]
Quality = Annotated[int, Option(min=1, max=100, help="Of JPEG.")]
ShardBytes = Annotated[int, Option(min=1, metavar="BYTES", help="About how large a shard becomes.")]
Workers = Annotated[
    int | None, Option(min=0, help="Processes.", show_default="one a processor, less one")
]
Verify = Annotated[
    bool, Option("--verify", help="Read every byte of the pack that is there; make nothing.")
]


def pack(
    recipe: RecipeFile,
    out: Out,
    size: Size = 256,
    format_: FormatOf = Format.jpeg,
    quality: Quality = 90,
    shard_bytes: ShardBytes = 2**27,
    workers: Workers = None,
    verify: Verify = False,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Scale the recipe's images down once and put them into tar shards, so that epochs are faster.

    Image i of the recipe's folder is image i of the pack, so every split and subset is the same.
    Goes on where it stopped. What is printed in the end are the lines of the recipe to change.

    Example: distill pack recipe.yaml --out photos-256 --size 256
    """
    with reporting("the shards that were made are kept, and the same command goes on"):
        from distill.recipe import Recipe

        checked = Recipe.load(recipe, overrides or [])  # every fault, before torch is loaded

        from distill import pack as body
        from distill.data.packed import Settings
        from distill.data.workers import cores
        from distill.engine import machine

        processes = max(1, cores() - 1) if workers is None else workers
        if verify:
            found = body.verify(out, workers=processes)
        else:
            settings = Settings(size, format_.value, quality, shard_bytes)
            with machine.stop_request() as stop:
                found = body.pack(checked, out, settings, workers=processes, stop=stop)
    if as_json:
        print_json(found)
    else:
        _show(found)


def _show(found: dict[str, Any]) -> None:
    """What was written, and the lines of the recipe to change."""
    from distill import yamlio
    from distill.storage import size

    lines = []
    if "splits" in found:
        for split, about in found["splits"].items():
            bad = f", {about['bad']:,} of them bad and left empty" if about["bad"] else ""
            lines.append(
                f"{split}: {about['images']:,} images{bad}, {about['shards']:,} shards, "
                f"{size(about['bytes'])}"
            )
        lines.append("to train on them, the recipe's section `data` has")
        keys = {key.removeprefix("data."): value for key, value in found["recipe"].items()}
        lines += ["  " + line for line in yamlio.dump(keys).splitlines()]
    else:
        lines.append(f"{found['images']:,} images, {size(found['bytes'])}: all as written")
    for line in lines:
        console.out.print(console.plain(line), highlight=False, soft_wrap=True)
