"""`distill teacher-cache`."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Exit, Option

from distill import console
from distill.cli._options import AsJson, Overrides, RecipeFile
from distill.cli._report import print_json, reporting
from distill.cli._shard import Shard, part_of
from distill.cli._verdict import Level, status, verdict

if TYPE_CHECKING:
    from distill.engine.precompute import Built
    from distill.recipe import Recipe


Out = Annotated[
    str | None,
    Option(
        metavar="DIR",
        help="Where the cache lies: a folder, s3://... or gs://....",
        show_default="the recipe's cache.path, or runs/RECIPE's name-cache",
    ),
]
Views = Annotated[
    int | None,
    Option(
        min=1,
        help="Views of every training image; more can be added to a cache later.",
        show_default="the recipe's cache.views",
    ),
]
Codec = Annotated[
    str | None,
    Option(
        metavar="auto|fp16|int8|topk:K",
        help="How logits are kept.",
        show_default="the recipe's cache.codec",
    ),
]
TimeLimit = Annotated[
    str | None,
    Option(metavar="T", help="Stop in time, such as 3h50m or 90s; exit status 75."),
]
DryRun = Annotated[
    bool, Option("--dry-run", help="Tell units, bytes, free disk and time; write nothing.")
]
ShowStatus = Annotated[
    bool, Option("--status", help="Tell what is there and what is missing; needs no torch.")
]
Verify = Annotated[
    Level | None,
    Option(
        help="Give a verdict: quick looks at names and sizes, full at every byte, replay at "
        "pixels, teacher asks the teacher again."
    ),
]
Sample = Annotated[int, Option(min=1, help="Views that --verify teacher asks about.")]
Repair = Annotated[
    bool,
    Option("--repair", help="With --verify: remove what is bad, so that it is made again."),
]
Run = Annotated[
    Path | None,
    Option(
        metavar="DIR",
        help="Run directory of the recipe; its teachers' runs lie beside it.",
        show_default="runs/RECIPE's name",
    ),
]
BatchSize = Annotated[int | None, Option(min=1, help="Images that a teacher answers at once.")]
Workers = Annotated[int | None, Option(min=0, help="Image-decoding processes.")]
ViewsPerRead = Annotated[
    int, Option(min=1, help="Views that are made of a decoded image before the next.")
]
UnitRows = Annotated[
    int | None,
    Option(min=1, help="Rows of a file.", show_default="about 16 MB, or a minute's work"),
]
Compile = Annotated[
    bool, Option("--compile", help="Compile the teachers with torch.compile; pays on GPUs.")
]
MinTeacherTop1 = Annotated[
    float | None,
    Option(min=0, max=1, help="Refuse a teacher that is right on less of the test images."),
]


def teacher_cache(
    recipe: RecipeFile,
    out: Out = None,
    views: Views = None,
    codec: Codec = None,
    shard: Shard = None,
    time_limit: TimeLimit = None,
    dry_run: DryRun = False,
    show_status: ShowStatus = False,
    verify: Verify = None,
    sample: Sample = 512,
    repair: Repair = False,
    overrides: Overrides = None,
    run: Run = None,
    batch_size: BatchSize = None,
    workers: Workers = None,
    views_per_read: ViewsPerRead = 4,
    unit_rows: UnitRows = None,
    compile: Compile = False,
    min_teacher_top1: MinTeacherTop1 = None,
    as_json: AsJson = False,
) -> None:
    """Write what the recipe's teachers say of some views of every image, once and for all.

    Goes on where it stopped; any number of processes may work on one cache. `distill train` reads
    it with --cache DIR, or `cache: {path: DIR}` in the recipe.

    Example: distill teacher-cache recipe.yaml --views 8 --out runs/cache
    """
    with reporting("what was made is kept, and the same command goes on"):
        from distill.errors import RecipeError
        from distill.recipe import Recipe

        checked = Recipe.load(recipe, overrides or [])  # every fault, before torch is loaded
        part = part_of(shard)
        limit = None if time_limit is None else _seconds(time_limit)
        place = out or (checked.cache and checked.cache.path) or f"runs/{recipe.stem}-cache"
        asked = _with_cache(checked, place, views, codec)
        run = run or Path("runs") / recipe.stem
        if show_status:
            raise Exit(status(asked, place, as_json=as_json))
        if not asked.teachers and verify in (None, Level.teacher):
            raise RecipeError("teachers: empty, and there is nobody to ask")
        if verify is not None:
            raise Exit(
                verdict(asked, place, run, verify, sample=sample, repair=repair, as_json=as_json)
            )

        from distill.engine import launch

        if not dry_run and (code := launch.spread_shards(sys.argv[1:], part)) is not None:
            raise Exit(code)
        part = launch.stand_alone(part)

        from distill.engine.jobs import Settings

        settings = Settings(
            shard=part,
            time_limit=limit,
            batch_size=batch_size,
            views_per_read=views_per_read,
            unit_rows=unit_rows,
            compile=compile,
            min_top1=min_teacher_top1,
        )
        if dry_run:
            _show_plan(_plan(asked, place, run, settings, workers), as_json=as_json)
            return
        built = _build(asked, place, run, settings, workers)
    if as_json:
        print_json({**built._asdict(), "complete": built.complete})
    else:
        _show(built, recipe, place)


def _with_cache(recipe: Recipe, place: str, views: int | None, codec: str | None) -> Recipe:
    """The recipe with what the command line says of its cache."""
    from distill.errors import RecipeError
    from distill.recipe import Cache

    cache: dict[str, Any] = {"views": recipe.default_views}
    if recipe.cache is not None:
        cache |= recipe.cache.model_dump()
    cache |= {"path": place, "fill": False}
    if views is not None:
        cache["views"] = views
    if codec is not None:
        cache["codec"] = codec
    try:
        return recipe.model_copy(update={"cache": Cache.model_validate(cache)})
    except ValueError as error:
        raise RecipeError(f"--codec: {str(error).splitlines()[2].strip()}") from None


def _seconds(text: str) -> float:
    """3h50m, 90s, 1d or HH:MM:SS in seconds."""
    from distill.errors import RecipeError

    if re.fullmatch(r"(\d+[dhms])+", text):
        seconds = {"d": 86_400, "h": 3_600, "m": 60, "s": 1}
        return float(sum(int(n) * seconds[unit] for n, unit in re.findall(r"(\d+)(\D)", text)))
    if re.fullmatch(r"\d+(:\d{2}){1,2}", text):
        parts = [int(part) for part in text.split(":")]
        return float(sum(part * 60**i for i, part in enumerate(reversed(parts))))
    raise RecipeError(f"--time-limit {text}: must be such as 3h50m, 90s or 03:50:00")


def _build(recipe: Recipe, place: str, run: Path, settings: Any, workers: int | None) -> Built:
    from distill.engine import machine
    from distill.engine.caches import build_caches

    here = machine.setup(workers=workers)
    return build_caches(recipe, place, run, here, settings)


def _plan(
    recipe: Recipe, place: str, run: Path, settings: Any, workers: int | None
) -> dict[str, Any]:
    from distill.data import datasets
    from distill.engine import machine
    from distill.engine.jobs import build_jobs, plan

    here = machine.setup(workers=workers)
    dataset = datasets.load(recipe.data)
    jobs = build_jobs(recipe, place, run, dataset, here, unit_rows=settings.unit_rows)
    return plan(recipe, jobs, dataset, here, settings)


def _show_plan(found: dict[str, Any], *, as_json: bool) -> None:
    from distill.storage import size

    if as_json:
        print_json(found)
        return
    for teacher in found["teachers"]:
        rows = min(teacher["unit_rows"], teacher["samples"])
        text = (
            f"{teacher['path']}: {teacher['model']}, {teacher['codec']}, {teacher['views']} views "
            f"of {teacher['samples']:,} images, {teacher['units']:,} units of up to {rows:,} rows, "
            f"{size(teacher['bytes'])}; missing {teacher['missing']:,} units, "
            f"{size(teacher['missing_bytes'])}"
        )
        console.out.print(console.plain(text), highlight=False, soft_wrap=True)
    free = "" if found["free_bytes"] is None else f"; {size(found['free_bytes'])} of disk are free"
    console.out.print(
        f"{found['views_per_second']:,.0f} views/s here, about {_duration(found['seconds'])} for "
        f"part {found['shard']}{free}; nothing was written",
        highlight=False,
        soft_wrap=True,
    )


def _show(built: Built, recipe: Path, place: str) -> None:
    from rich.table import Table

    from distill.storage import size

    table = Table(box=None, pad_edge=False)
    table.add_column("cache", overflow="fold")
    table.add_column("teacher", overflow="fold")
    for heading in ("views", "units", "size", "test top-1", "NLL"):
        table.add_column(heading, justify="right", no_wrap=True)
    for teacher in built.teachers:
        units, missing = int(teacher["units"]), int(teacher["missing"])  # type: ignore[call-overload]
        scores: Any = teacher["scores"]
        test = scores.get("test")
        table.add_row(
            console.plain(str(teacher["path"])),
            console.plain(str(teacher["model"])),
            str(teacher["views"]),
            f"{units - missing:,} of {units:,}",
            size(float(str(teacher["bytes"]))),
            f"{test['top1']:.2%}" if test else "",
            f"{test['nll']:.3f}" if test else "",
        )
    console.out.print(table)
    rate = built.images / max(built.seconds, 1e-9)
    console.say(
        f"{built.units:,} units made in {_duration(built.seconds)}, {rate:,.0f} answers/s, waiting "
        f"for pixels {built.data_wait:.0%}"
    )
    if built.complete:
        console.say(f"next: distill train {console.typed(recipe)} --cache {console.typed(place)}")
    else:
        console.say("this part is done; others are missing: --status shows which")


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
