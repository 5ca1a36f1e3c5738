"""`distill evaluate`."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from distill import console, storage
from distill.cli._options import AsJson, DataRoot, DeviceBatchSize, Workers
from distill.cli._report import print_json, reporting
from distill.definitions import SUITES, definitions, shown

if TYPE_CHECKING:
    from distill.definitions import Number
    from distill.evidence import Evidence
    from distill.suites.subjects import Subject, Tested

DEFAULT = "clean,fidelity,cost"


def evaluate(
    runs: Annotated[list[Path], Argument(metavar="RUN...", help="Run directories.")],
    suite: Annotated[
        str,
        Option(metavar="NAME,...", help=f"What is measured: {', '.join(SUITES)}, or all of them."),
    ] = DEFAULT,
    out: Annotated[
        Path | None,
        Option(
            metavar="DIR",
            help="Where report.html and evaluation.json are written.",
            show_default="the run; of several, runs/evaluation",
        ),
    ] = None,
    images: Annotated[
        int,
        Option(min=1, metavar="N", help="Test images that are corrupted, spread over the split."),
    ] = 1000,
    corrupted: Annotated[
        Path | None,
        Option(metavar="DIR", help="Official files, CIFAR-10-C or CIFAR-100-C, to be read."),
    ] = None,
    masks: Annotated[
        Path | None,
        Option(metavar="DIR", help="Foreground masks of the test images, PNG, by the same names."),
    ] = None,
    reference: Annotated[
        Path | None,
        Option(
            metavar="RUN",
            help="The run that all are compared with, and that mCE is relative to.",
            show_default="the first; of mCE its student without teacher",
        ),
    ] = None,
    predictions: Annotated[
        Path | None,
        Option(
            metavar="FILE",
            help="Write a CSV with a row for every test image; with several runs one file each, "
            "such as FILE-RUN.csv.",
        ),
    ] = None,
    data_root: DataRoot = None,
    workers: Workers = None,
    device_batch_size: DeviceBatchSize = None,
    as_json: AsJson = False,
) -> None:
    """Measure trained students, their teachers, and the same students without one; write a report.

    Several runs are compared with the first, image by image. Those that differ in their seed alone
    count as one, and their intervals hold the seeds too.

    Example: distill evaluate runs/quickstart --suite all
    """
    with reporting():
        chosen = _suites(suite)
        from distill.engine import machine
        from distill.evidence import Options, gather

        if predictions is not None:
            storage.require_writable(predictions)
        here = machine.setup(workers=workers, device_batch_size=device_batch_size)
        place = out or (runs[0] if len(runs) == 1 else Path("runs/evaluation"))
        options = Options(chosen, images, corrupted, masks, data_root, reference)
        found = gather(runs, place, options, here)
        if console.err.quiet:  # another process prints the result
            return
        if predictions is not None:
            _write_predictions(predictions, found.subjects)
        console.say(f"wrote {place / 'report.html'} and {place / 'evaluation.json'}")
    if as_json:
        print_json(found.to_json(tables=False) | {"out": str(place)})
    else:
        _show(found)


def _suites(text: str) -> tuple[str, ...]:
    from distill.component import suggestion
    from distill.errors import RecipeError

    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in SUITES and name != "all":
            raise RecipeError(f"--suite {name}: no such suite{suggestion(name, [*SUITES, 'all'])}")
    return tuple(name for name in SUITES if name in names or "all" in names)


def _write_predictions(file: Path, subjects: list[Subject]) -> None:
    """A CSV for each run; the last part of its path tells them apart, or the whole if not."""
    runs = [
        (run, member)
        for subject in subjects
        if subject.role == "run"
        for run, member in zip(subject.runs, subject.members, strict=True)
    ]
    names = [run.resolve().name for run, _ in runs]
    if len(set(names)) < len(names):
        names = ["-".join(part for part in run.parts if part != run.anchor) for run, _ in runs]
    for name, (_, member) in zip(names, runs, strict=True):
        path = file if len(runs) == 1 else file.with_name(f"{file.stem}-{name}{file.suffix}")
        _write(path, member)
        console.say(f"wrote {path}")


def _write(path: Path, tested: Tested) -> None:
    """The answers as CSV: id, name of the file where there is one, and what was said of it."""
    from distill.report.files import cell

    told, classes, files = tested.predictions, tested.dataset.classes, tested.dataset.test.files
    text = io.StringIO(newline="")
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["id", "name", "label", "predicted", "confidence", "nll", "correct"])
    for i, number in enumerate(told.ids):
        table.writerow(
            [
                number,
                "" if files is None else cell(files.name(int(number))),
                cell(classes[told.labels[i]]),
                cell(classes[told.predicted[i]]),
                f"{told.confidence[i]:.6f}",
                f"{told.nll[i]:.6g}",
                int(told.correct[i]),
            ]
        )
    storage.sweep(path.parent, below=False)
    storage.write(path, text.getvalue().encode(errors="surrogateescape"))


def _cell(name: str, number: Number) -> str:
    return "" if number.value is None else console.plain(shown(name, number, interval=False))


def _show(found: Evidence) -> None:
    """The numbers, a table a suite, and what the comparisons come to."""
    from rich.table import Table

    for i, (suite, by_name) in enumerate(found.found.items()):
        table = Table(title=suite, title_justify="left", box=None, pad_edge=False)
        table.add_column("", overflow="fold")
        for subject in found.subjects:
            table.add_column(console.plain(subject.name), justify="right", overflow="fold")
        if i == 0:
            table.add_row("model", *(console.plain(subject.model) for subject in found.subjects))
        measures = dict.fromkeys(name for one in by_name.values() for name in one.numbers)
        for name in measures:
            numbers = [by_name[subject.name].numbers.get(name) for subject in found.subjects]
            cells = ["" if n is None else _cell(name, n) for n in numbers]
            if any(cells):
                table.add_row(definitions()[name].title, *cells)
        if table.rows:
            console.out.print(table, "", highlight=False)
    for one in found.comparisons:
        of = f"{console.plain(one.subject)} over {console.plain(one.reference)}"
        gain = shown("gain", one.numbers["gain"], interval=False)
        low, high = (100 * end for end in one.numbers["gain"].ci95 or ())
        seeds = one.numbers["gain"].seeds
        over = "images" if seeds == 1 else f"images and {seeds} seeds"
        p = one.numbers["mcnemar_p"].value
        console.out.print(
            f"gain of {of}: {gain} (95 % interval over {over} {low:+.2f} to {high:+.2f}; "
            f"McNemar p = {p:.2g})",
            highlight=False,
        )
