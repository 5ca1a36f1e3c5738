"""`distill export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from typer import Argument, Option

from distill import console
from distill.cli._options import AsJson, DataRoot, Workers
from distill.cli._report import print_json, reporting

if TYPE_CHECKING:
    from collections.abc import Sequence

    from distill.export.program import Precision

FORMATS = "onnx, torch-export, safetensors, timm, openvino, executorch, coreml"
QUANTIZE = ("fp16", "int8")


Formats = Annotated[
    str | None,
    Option(
        "--format",
        metavar="NAME,...",
        help=f"Of {FORMATS}.",
        show_default="the first four, as far as they can hold the student and are installed",
    ),
]
Quantize = Annotated[
    str | None,
    Option(
        metavar="fp16,int8",
        help="Smaller copies beside the graphs; int8 is static, set on training images.",
    ),
]
Steps = Annotated[
    str,
    Option(
        metavar="graph|sidecar",
        help="graph: files take bytes of pictures of any size; sidecar: normalised squares, and "
        "preprocessing.json says how they are made.",
    ),
]
Features = Annotated[
    bool,
    Option(
        "--features",
        help="onnx and torch-export also give the maps of the student's stages, stage0 (the "
        "finest), stage1, ..., as the backbone of a detector. Not in int8; all other files, "
        "serve.py too, are as without it.",
    ),
]
Repository = Annotated[
    str | None,
    Option(
        metavar="OWNER/NAME",
        help="Send the files to this repository of the Hugging Face hub, in one commit.",
    ),
]


def export(
    run: Annotated[Path, Argument(metavar="RUN", help="Run directory.")],
    format_: Formats = None,
    quantize: Quantize = None,
    preprocessing: Steps = "graph",
    features: Features = False,
    out: Annotated[
        Path | None,
        Option(metavar="DIR", help="Where the files are put.", show_default="RUN/export"),
    ] = None,
    max_drop: Annotated[
        float,
        Option(min=0, max=100, metavar="POINTS", help="Test accuracy that rounding may cost."),
    ] = 1.0,
    images: Annotated[
        int,
        Option(min=1, metavar="N", help="Test images that accuracy is compared on, spread evenly."),
    ] = 1000,
    calibration: Annotated[
        int, Option(min=1, metavar="N", help="Training images by which int8 sets its ranges.")
    ] = 256,
    latency: Annotated[
        bool, Option(help="Time each way to run the student, and its teachers, here.")
    ] = True,
    push_to_hub: Repository = None,
    public: Annotated[
        bool, Option("--public", help="The repository is public, if it is made now.")
    ] = False,
    dry_run: Annotated[
        bool, Option("--dry-run", help="With --push-to-hub: show what would be sent, send nothing.")
    ] = False,
    data_root: DataRoot = None,
    workers: Workers = None,
    as_json: AsJson = False,
) -> None:
    """Write a trained student as files that run without the toolkit, each checked against it.

    Every file answers real images in its own runtime first. If one does not say what the student
    says in PyTorch, nothing is written.

    Example: distill export runs/quickstart --format onnx,torch-export --quantize int8
    """
    with reporting():
        formats = None if format_ is None else _names(format_, "--format", FORMATS.split(", "))
        precisions = () if quantize is None else _names(quantize, "--quantize", QUANTIZE)
        (kind,) = _names(preprocessing, "--preprocessing", ("graph", "sidecar"))
        from distill.engine import machine
        from distill.export import Options, hub
        from distill.export import export as write

        place = out or run / "export"
        if push_to_hub is not None:
            hub.plan(place, push_to_hub, [])  # a wrong name should not cost the export first
        options = Options(
            formats,
            cast("tuple[Precision, ...]", precisions),
            cast("Literal['graph', 'sidecar']", kind),
            max_drop / 100,
            images,
            calibration,
            latency,
            data_root,
            features,
        )
        here = machine.setup(workers=workers)
        if not here.main:  # started several times; one exports
            return
        found = write(run, place, options, here)
        if push_to_hub is not None:
            planned = hub.plan(place, push_to_hub, _all(found), private=not public)
            for line in hub.lines(planned):
                console.say(line)
            found["hub"] = None if dry_run else hub.push(planned)
            console.say("nothing was sent (--dry-run)" if dry_run else f"sent: {found['hub']}")
    if as_json:
        print_json(found)
    else:
        _show(found)


def _names(text: str, option: str, known: Sequence[str]) -> tuple[str, ...]:
    """The names in a list with commas, in the order that they are known in."""
    from distill.component import suggestion
    from distill.errors import RecipeError

    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise RecipeError(
                f"{option} {name}: not known{suggestion(name, known)}",
                hint=f"known are {', '.join(known)}",
            )
    return tuple(name for name in known if name in names)


def _all(found: dict[str, Any]) -> list[str]:
    """The names of the files that an export consists of."""
    return [entry["file"] for entry in (*found["companions"], *found["files"])] + ["export.json"]


def _show(found: dict[str, Any]) -> None:
    """What was written, how it compares, and how fast it is here."""
    from rich.table import Table

    from distill.storage import size

    table = Table(title=console.plain(found["out"]), title_justify="left", box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    for title in ("precision", "size", "largest difference", "same class", "test top-1"):
        table.add_column(title, justify="right")
    for file in found["files"]:
        parity = file["parity"]
        accuracy = f"{parity['accuracy']:.2%}"
        if parity["drop"]:
            accuracy += f" ({-100 * parity['drop']:+.2f})"
        table.add_row(
            file["file"],
            file["precision"],
            size(file["bytes"]),
            f"{parity['max_abs']:.1e}",
            f"{parity['agreement']:.2%}",
            accuracy,
        )
    console.out.print(table, highlight=False)
    maps: list[dict[str, Any]] = next(
        (file["stages"] for file in found["files"] if "stages" in file), []
    )
    for one in maps:
        channels, rows, columns = one["shape"][1:]
        text = f"{one['name']}: {channels} x {rows} x {columns}, stride {one['stride']:g}, of "
        console.out.print(console.plain(text + one["module"]), highlight=False)
    beside = ", ".join(file["file"] for file in found["companions"])
    console.out.print(f"beside them: {beside}, export.json", "", highlight=False)
    if rows := found["latency"]:
        threads = found["environment"]["threads"]
        table = Table(
            title=f"milliseconds a batch on this CPU, {threads} threads",
            title_justify="left",
            box=None,
            pad_edge=False,
        )
        table.add_column("", overflow="fold")
        for title in ("batch 1", "batch 32", "on disk"):
            table.add_column(title, justify="right", no_wrap=True)
        for row in rows:
            times = [f"{row[key]:.3g}" if row[key] else "" for key in ("batch_1_ms", "batch_32_ms")]
            table.add_row(console.plain(row["what"]), *times, size(row["bytes"]))
        console.out.print(table, "", highlight=False)
        for row in rows:
            if row["reason"]:
                console.out.print(console.plain(f"{row['what']}: not timed: {row['reason']}"))
    for one in found["left_out"]:
        console.out.print(console.plain(f"left out: {one['format']}: {one['reason']}"))
