"""A part of a job that several processes do, which know nothing of each other."""

from __future__ import annotations

import os
import re
import sys
from typing import TYPE_CHECKING, Annotated

from typer import Exit, Option

from distill import console
from distill.cli._report import print_json

if TYPE_CHECKING:
    from distill.sweep import Part

Shard = Annotated[
    str | None,
    Option(
        metavar="I/N",
        help="Make part I of N, from 1/N to N/N.",
        show_default="of a SLURM array, its task; else 1/1",
    ),
]
Memory = Annotated[
    float | None,
    Option(
        min=0,
        metavar="GB",
        help="For students that are trained side by side, and their optimizers.",
        show_default="half of what is free",
    ),
]


def part_of(text: str | None) -> tuple[int, int]:
    """Which part of how many: as given, or the task of a SLURM array, or the whole."""
    from distill.errors import RecipeError

    task, count = (os.environ.get(f"SLURM_ARRAY_TASK_{key}") for key in ("ID", "COUNT"))
    if text is None and task and count:
        first, step = (
            int(os.environ.get(f"SLURM_ARRAY_TASK_{key}", default))
            for key, default in (("MIN", "0"), ("STEP", "1"))
        )
        text = f"{(int(task) - first) // step + 1}/{count}"
    found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text or "1/1")
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise RecipeError(f"--shard {text}: must be I/N with I from 1 to N, such as --shard 1/8")
    return int(found[1]), int(found[2])


def begin(part: tuple[int, int]) -> tuple[tuple[int, int], bool]:
    """Do this part on every visible GPU, or find which of another command's parts this is.

    Returns:
        The part of this process, and whether another command started it, which then concludes and
        prints. Where the GPUs have done their parts, the rest of this command finds them done.

    Raises:
        Exit: If a GPU's part failed.
    """
    from distill.engine import launch

    if failed := launch.spread_shards(sys.argv[1:], part):
        raise Exit(failed)
    spawned = launch.is_spawned()
    return launch.stand_alone(part), spawned


def show_part(found: Part, *, as_json: bool) -> None:
    """Say how far all parts of a job are."""
    if as_json:
        print_json(found.to_json())
    else:
        console.say(f"{found.out}: {found.done} of {found.trials} trials are done, the others not")
