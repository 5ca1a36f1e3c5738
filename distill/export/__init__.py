"""The student as files that run elsewhere, each checked against it before it is called done."""

from __future__ import annotations

import importlib.metadata
import json
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Int, UInt8

from distill import console, jsonio, storage
from distill.data import encoded
from distill.data.datasets import Source
from distill.engine import machine
from distill.engine.finished import Finished, Loader, require_finished
from distill.engine.machine import Machine
from distill.engine.session import batches_of
from distill.errors import (
    DistillError,
    IdentityError,
    IncompatibleError,
    PreflightError,
    RecipeError,
    VerificationError,
)
from distill.export import companions, latency, parity
from distill.export.formats import DEFAULT, FORMATS, GRAPHS, lacking, onnx, torch_export
from distill.export.program import Pixels, Precision, Preprocessing, Student, stages
from distill.identity import require_known
from distill.models import cost
from distill.suites.subjects import evenly

FORMAT = 1  # of export.json
MARK = "export.json"
_HINTS = {
    "fp16": "without fp16 in --quantize the other files are written",
    "int8": "more --calibration images, or a larger --max-drop, lets it pass",
}
_BATCH = 32  # training images that int8 sees at once
_SIZE = {"fp32": 4, "fp16": 2, "int8": 1}  # bytes of a parameter
_FULL = 65_536  # bytes free, below which a disk is what makes writers fail


class Options(NamedTuple):
    """What is exported, and how it is checked."""

    formats: tuple[str, ...] | None = None  # None: the usual ones, as far as can be, here
    quantize: tuple[Precision, ...] = ()
    preprocessing: Literal["graph", "sidecar"] = "graph"
    max_drop: float = 0.01  # accuracy that rounding may cost, as a fraction
    images: int = 1000  # of the test split, that accuracy is compared on
    calibration: int = 256  # training images by which int8 sets its ranges
    latency: bool = True
    data_root: Path | None = None
    features: bool = False  # whether graphs give the maps of the student's stages too


def export(run: Path, out: Path, options: Options, here: Machine) -> dict[str, Any]:
    """Write a finished run's student in several formats into `out`, with all that belongs to it.

    Every file is made aside, answers real images in its own runtime, and takes its place only when
    all of them say what the student says: until then `out` is as it was.

    Returns:
        What `export.json` holds: the files with size, SHA-256 and parity, and what was measured;
        and the paths of both, which stay on this machine.

    Raises:
        RecipeError: If features are asked for in what cannot give them.
        PreflightError: If the run is not finished, a package is missing, or `out` is not ours.
        IncompatibleError: If a format that was asked for cannot hold this student.
        VerificationError: If a file does not say the same.
    """
    _refuse_contradictions(options)
    require_finished([run])
    earlier = _listed(out)
    here = here._replace(device=torch.device("cpu"), rank=0, world=1)
    one = Loader(options.data_root)(run)
    student = _student(one, options, here)
    for name in options.formats or ():
        if (error := _obstacle(name, student)) is not None:
            raise error
    ids = evenly(len(one.dataset.test), options.images)
    shown = _pixels(one, one.dataset.test, ids, here)
    labels = one.dataset.test.labels[ids]
    known = parity.known(student.network, shown, labels, student.stages)
    whole = _pictures(one, ids) if student.inside else Whole([], ids)
    about: dict[str, Any] = {
        "format": FORMAT,
        "run": run.resolve().name,
        "student": student.network.model,
        "weights": _whose(one),
        "preprocessing": options.preprocessing,
        "classes": list(student.classes),
    }
    with storage.lock(out), storage.staged(out) as aside:
        storage.require_room(out, _bytes(student, options))
        about["files"], about["left_out"] = _written(student, known, whole, aside, options)
        about["latency"] = []
        if options.latency:
            about["latency"] = _timed(one, student, known, about["files"], aside)
        about["environment"] = machine.environment(here) | _versions(about["files"])
        about["companions"] = companions.write(aside, about, one, student)
        (aside / MARK).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        storage.publish(aside, out, first=MARK, stale=earlier)
    return about | {"run": str(run), "out": str(out)}


def _refuse_contradictions(options: Options) -> None:
    formats = options.formats or DEFAULT
    if options.features and not set(GRAPHS).intersection(formats):
        raise RecipeError(
            f"--features: {' and '.join(formats)} give no maps",
            hint=f"--format {','.join(GRAPHS)}",
        )
    if options.features and "int8" in options.quantize:
        raise RecipeError(
            "--features: not with --quantize int8: what eight bits do to accuracy is measured "
            "here, what they do to a detector that is still to be trained is not",
            hint="--quantize fp16, or the logits alone in int8, without --features",
        )


def _bytes(student: Student, options: Options) -> int:
    """Of all files together, about."""
    kinds = [
        precision
        for name in options.formats or DEFAULT
        if _obstacle(name, student) is None
        for precision in FORMATS[name].PRECISIONS
        if precision == "fp32" or precision in options.quantize
    ]
    return cost.parameters(student.network) * sum(_SIZE[kind] for kind in kinds)


def _obstacle(name: str, student: Student) -> DistillError | None:
    """What stands against this format before anything is tried."""
    if packages := lacking(name):
        return PreflightError(
            f"--format {name}: needs {', '.join(packages)}",
            hint=f"pip install 'distill-kd[{name}]'",
        )
    why = FORMATS[name].refusal(student)
    return IncompatibleError(f"--format {name}: {why}") if why else None


def _listed(out: Path) -> list[str]:
    """The files of an earlier export into this folder, which may be replaced.

    Raises:
        PreflightError: If files lie there that no export put there.
        IdentityError: If a newer version put them there.
    """
    try:
        earlier = jsonio.mapping((out / MARK).read_text(encoding="utf-8"))
        require_known(earlier["format"], FORMAT, str(out / MARK))
        return [Path(entry["file"]).name for entry in (*earlier["files"], *earlier["companions"])]
    except FileNotFoundError:
        if out.is_dir() and any(not path.name.startswith(".") for path in out.iterdir()):
            raise PreflightError(
                f"{out}: holds files and no {MARK}, so it is no earlier export",
                hint="give an --out that is empty or not there yet",
            ) from None
        return []
    except IdentityError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PreflightError(
            f"{out / MARK}: cannot be read: {error}",
            hint="remove the folder, or give another --out",
        ) from None


def _student(one: Finished, options: Options, here: Machine) -> Student:
    data, network = one.recipe.data, one.network.eval().requires_grad_(False)
    if data.control == "permuted-pixels":
        raise IncompatibleError(
            f"{one.path}: it was trained on rearranged pixels (data.control), a control of "
            "experiments that no picture is shown like"
        )
    size = one.dataset.image_size
    means = network.description.mean, network.description.std
    steps = Preprocessing(size, round(size / data.eval_crop), *means)
    ids = one.dataset.train_ids[evenly(len(one.dataset.train_ids), options.calibration)]
    pixels = _pixels(one, one.dataset.train, ids, here) if "int8" in options.quantize else None
    batches = () if pixels is None else np.array_split(pixels, range(_BATCH, len(pixels), _BATCH))
    inside = options.preprocessing == "graph"
    maps = stages(network, size) if options.features else ()
    return Student(network, one.dataset.classes, steps, inside, tuple(batches), maps)


def _pixels(one: Finished, source: Source, ids: Int[np.ndarray, " n"], here: Machine) -> Pixels:
    """Images of a split as they are evaluated, as bytes."""
    batches = batches_of(source, ids, one.recipe, one.dataset, here)
    levels = [(batch * 255).round().byte().permute(0, 2, 3, 1) for batch, _, _ in batches]
    pixels: np.ndarray = torch.cat(levels).contiguous().numpy()
    return pixels


class Whole(NamedTuple):
    """Pictures as their files hold them, and which of the known images they are."""

    pictures: Sequence[UInt8[np.ndarray, "H W 3"]]
    rows: Int[np.ndarray, " n"]


def _pictures(one: Finished, ids: Int[np.ndarray, " n"]) -> Whole:
    """Some of these test images whole; none where they are not files."""
    files, most = one.dataset.test.files, one.dataset.max_pixels
    rows = evenly(len(ids), parity.FIRST)
    if files is None:
        return Whole([], rows)
    pictures = [np.array(encoded.decode(files, i, max_pixels=most)) for i in ids[rows].tolist()]
    return Whole(pictures, rows)


def _versions(files: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Of the packages that wrote and ran the files."""
    packages = {package for file in files for package in FORMATS[file["format"]].PACKAGES}
    if any((file["format"], file["precision"]) == ("torch-export", "int8") for file in files):
        packages.add(torch_export.QUANTISER)
    return {package: importlib.metadata.version(package) for package in sorted(packages)}


def _whose(one: Finished) -> str:
    decay = one.recipe.train.ema
    return f"exponential moving average, decay {decay:g}" if decay else "last epoch"


def _written(
    student: Student, known: parity.Known, whole: Whole, aside: Path, options: Options
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """The files, each checked, and the formats that are left out."""
    files, left_out = [], []
    for name in options.formats or DEFAULT:
        form = FORMATS[name]
        given = student if name in GRAPHS else student._replace(stages=())
        obstacle = _obstacle(name, student)
        try:
            for precision in () if obstacle else form.PRECISIONS:
                if precision == "fp32" or precision in options.quantize:
                    path = aside / form.file(precision)
                    console.say(f"{path.name}: {name}, {precision}")
                    before = set(aside.iterdir())
                    with _room_blamed(aside):
                        form.write(given, path, precision)
                        found = _checked(given, name, precision, path, known, whole, options)
                    about = companions.entry(path) | found
                    weights = set(aside.iterdir()) - before - {path}  # where they lie beside it
                    about["bytes"] += sum(file.stat().st_size for file in weights)
                    files.append(about)
        except IncompatibleError as error:
            if options.formats is not None:
                raise
            obstacle = error
        if obstacle:
            why = "; ".join(filter(None, (str(obstacle), obstacle.hint)))
            left_out.append({"format": name, "reason": why.removeprefix(f"--format {name}: ")})
            console.warn(f"left out: {name}: {left_out[-1]['reason']}")
    return files, left_out


@contextmanager
def _room_blamed(aside: Path) -> Generator[None]:
    """Say that a disk is full where that is why something failed, whatever a library calls it."""
    try:
        yield
    except Exception as error:
        for folder in (aside.parent, Path(tempfile.gettempdir())):
            if storage.free_bytes(folder) < _FULL:
                raise PreflightError(
                    f"{folder}: no room, {storage.size(storage.free_bytes(folder))} are free; "
                    "nothing was replaced",
                    hint="make room and run the same command again",
                ) from error
        raise


def _checked(
    student: Student,
    name: str,
    precision: Precision,
    path: Path,
    known: parity.Known,
    whole: Whole,
    options: Options,
) -> dict[str, Any]:
    """How a file compares that says what the student says.

    Raises:
        VerificationError: If it does not.
    """
    answer = partial(FORMATS[name].answers, student, path)
    try:
        show = partial(student.shown, takes=FORMATS[name].TAKES)
        found = parity.compare(answer, show, known)
        parity.require(found, precision, known, max_drop=options.max_drop)
        about: dict[str, Any] = {
            "format": name,
            "precision": precision,
            "input": student.input(FORMATS[name].TAKES),
            "parity": found.to_json(),
        }
        if name == "onnx":
            about["opset"] = onnx.OPSET
        if student.stages:
            told = partial(GRAPHS[name].told, path, outputs=student.outputs[1:])
            gaps = parity.compare_maps(told, show, known, precision)
            about["stages"] = [
                stage.to_json() | {"max_abs": gap}
                for stage, gap in zip(student.stages, gaps, strict=True)
            ]
        if FORMATS[name].TAKES == "pictures" and whole.pictures:
            files = parity.compare_files(answer, whole.pictures, known.logits[whole.rows])
            about["files"] = files._asdict()
        return about
    except VerificationError as error:
        raise VerificationError(
            f"{path.name}: {error}; nothing was written", hint=_HINTS.get(precision, "")
        ) from error


def _timed(
    one: Finished,
    student: Student,
    known: parity.Known,
    files: Sequence[dict[str, Any]],
    aside: Path,
) -> list[dict[str, Any]]:
    console.say("latency: each way to run the student, and its teachers")
    graphs = {f["precision"]: aside / f["file"] for f in files if f["format"] == "onnx"}
    rows = latency.table(student, one.teachers(), graphs, known.pixels[: max(latency.BATCHES)])
    return [row.to_json() for row in rows]
