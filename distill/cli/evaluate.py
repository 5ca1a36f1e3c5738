"""`distill evaluate`."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from typer import Argument, Option

from distill import console
from distill.cli._report import print_json, reporting

if TYPE_CHECKING:
    from distill.data.datasets import Dataset
    from distill.engine.machine import Machine
    from distill.evaluate import Predictions


class Evaluated(NamedTuple):
    """A run's student on its test split."""

    run: Path
    student: str
    parameters: int
    flops: int
    predictions: Predictions
    dataset: Dataset
    names: list[str]  # of the images' files; empty where the data set is not a folder


def evaluate(
    runs: Annotated[list[Path], Argument(metavar="RUN...", help="Run directories.")],
    predictions: Annotated[
        Path | None,
        Option(
            metavar="FILE",
            help="Write a CSV with a row for every test image; with several runs one file each, "
            "such as FILE-RUN.csv.",
        ),
    ] = None,
    data_root: Annotated[
        Path | None,
        Option(metavar="DIR", help="Where the data lie now; left out: as the recipe says."),
    ] = None,
    as_json: Annotated[
        bool, Option("--json", help="Print the scores as one line of JSON on stdout.")
    ] = False,
) -> None:
    """Accuracy and calibration of trained students on their test split.

    Several runs are compared with the first, image by image: the gain in top-1 comes with a 95 %
    interval over the test images.

    Example: distill evaluate runs/quickstart/baseline runs/quickstart
    """
    with reporting():
        for run in runs:
            _require_finished(run)
        from distill.engine import machine

        here = machine.setup()
        done = [_evaluated(run, data_root, here) for run in runs]
        _require_same_data(done)
        rows = [_row(one, done[0]) for one in done]
        if console.err.quiet:  # another process prints the result
            return
        if predictions is not None:
            for one, path in zip(done, _paths(predictions, runs), strict=True):
                _write(path, one)
                console.say(f"wrote {path}")
    if as_json:
        print_json({"runs": rows})
    else:
        _show(rows)


def _require_finished(run: Path) -> None:
    from distill.errors import PreflightError

    for name in ("recipe.yaml", "student.safetensors"):
        if not (run / name).is_file():
            raise PreflightError(
                f"{run}: has no {name}",
                hint="a run directory has both when `distill train` is done with it",
            )


def _evaluated(run: Path, data_root: Path | None, here: Machine) -> Evaluated:
    """Run the student that `run` saved over its test split."""
    from distill.data import datasets, folder
    from distill.engine.session import answers
    from distill.models import cost, weights
    from distill.recipe import Recipe

    recipe = Recipe.load(run / "recipe.yaml")
    if data_root is not None:
        data = recipe.data.model_copy(update={"root": str(data_root)})
        recipe = recipe.model_copy(update={"data": data})
    if here.device.type == "cpu":  # the run's own precision may be one that a GPU is needed for
        train = recipe.train.model_copy(update={"precision": "fp32"})
        recipe = recipe.model_copy(update={"train": train})
    dataset = datasets.load(recipe.data)
    network = weights.load(run).to(here.device)
    names = []
    if recipe.data.name == "folder":
        root = Path(str(recipe.data.root)).expanduser().absolute()
        names = [entry.name for entry in folder.scan(root, recipe.data.split_file).test]
    return Evaluated(
        run=run,
        student=network.model,
        parameters=cost.parameters(network),
        flops=cost.flops(network, dataset.image_size),
        predictions=answers(network, "test", recipe, dataset, here),
        dataset=dataset,
        names=names,
    )


def _require_same_data(done: list[Evaluated]) -> None:
    from distill.errors import IncompatibleError

    first = done[0]
    for one in done[1:]:
        if one.dataset.fingerprint != first.dataset.fingerprint:
            raise IncompatibleError(
                f"{one.run}: its data ({one.dataset.name}, {len(one.dataset.test):,} test images) "
                f"are not those of {first.run} ({first.dataset.name}, "
                f"{len(first.dataset.test):,})",
                hint="runs are compared image by image; evaluate these one at a time",
            )


def _row(one: Evaluated, first: Evaluated) -> dict[str, Any]:
    """The scores of a run, and its gain over the first one."""
    from distill.evaluate import paired_gain, scores

    row = {
        "run": str(one.run),
        "student": one.student,
        "parameters": one.parameters,
        "flops": one.flops,
        "images": len(one.predictions.ids),
        **scores(one.predictions)._asdict(),
    }
    if one is not first:
        gain, interval = paired_gain(one.predictions, first.predictions)
        row |= {"gain": gain, "gain_ci95": list(interval)}
    return row


def _paths(file: Path, runs: list[Path]) -> list[Path]:
    """One file for each run; the last part of its path tells them apart, or the whole if not."""
    if len(runs) == 1:
        return [file]
    names = [run.resolve().name for run in runs]
    if len(set(names)) < len(names):
        names = ["-".join(part for part in run.parts if part != run.anchor) for run in runs]
    return [file.with_name(f"{file.stem}-{name}{file.suffix}") for name in names]


def _write(path: Path, one: Evaluated) -> None:
    """The answers as CSV: id, name of the file where there is one, and what was said of it."""
    from distill import storage

    told, dataset = one.predictions, one.dataset
    text = io.StringIO(newline="")
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["id", "name", "label", "predicted", "confidence", "correct"])
    for i in range(len(told.ids)):
        table.writerow(
            [
                told.ids[i],
                one.names[told.ids[i]] if one.names else "",
                dataset.classes[told.labels[i]],
                dataset.classes[told.predicted[i]],
                f"{told.confidence[i]:.6f}",
                int(told.correct[i]),
            ]
        )
    storage.write(path, text.getvalue().encode(errors="surrogateescape"))


def _show(rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("run", "student"):
        table.add_column(heading, overflow="fold")
    for heading in ("parameters", "top-1", "top-5", "NLL", "ECE"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            console.plain(row["run"]),
            console.plain(row["student"]),
            f"{row['parameters']:,}",
            f"{row['top1']:.2%}",
            f"{row['top5']:.2%}",
            f"{row['nll']:.3f}",
            f"{row['ece']:.3f}",
        )
    console.out.print(table)
    for row in rows[1:]:
        low, high = (100 * end for end in row["gain_ci95"])
        runs = f"{console.plain(row['run'])} over {console.plain(rows[0]['run'])}"
        gain = f"{100 * row['gain']:+.2f} points"
        interval = f"95 % interval over images {low:+.2f} to {high:+.2f}"
        console.out.print(f"gain of {runs}: {gain} ({interval})", highlight=False)
