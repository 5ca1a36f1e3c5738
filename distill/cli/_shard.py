"""A part of a job that several processes do, which know nothing of each other."""

from __future__ import annotations

import os
import re
from typing import Annotated

from typer import Option

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
