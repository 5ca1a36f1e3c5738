"""Core ML: an ML program, for Apple's devices."""

from __future__ import annotations

import json
import sys
import tempfile
import uuid
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from distill.export import program
from distill.export.program import INPUT, OUTPUT, Logits, Precision, Student, Takes

PACKAGES: tuple[str, ...] = ("coremltools",)
PRECISIONS: tuple[Precision, ...] = ("fp32",)
TAKES: Takes = "squares"
MOST = 32  # images at once
_PACKAGE = "model.mlpackage"  # a folder


def file(precision: Precision) -> str:
    """The name of the archive, which holds the folder `model.mlpackage`: to be unpacked for use."""
    return f"{_PACKAGE}.zip"


def refusal(student: Student) -> str:
    """Why this student cannot be written: nothing is, where it could not be checked."""
    return "" if sys.platform == "darwin" else "its files can be run, and so checked, on macOS only"


def write(student: Student, path: Path, precision: Precision) -> None:
    """Write the student for iOS 17, macOS 14 and later, from one square to 32 at once.

    Raises:
        IncompatibleError: If the converter knows no way.
    """
    name = student.network.model
    exported = program.classifier(student, precision, most=MOST)
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / _PACKAGE
        with program.attempt(f"{name}: Core ML knows no way", hint="--format onnx,torch-export"):
            import coremltools

            coremltools.convert(
                exported.run_decompositions({}),
                convert_to="mlprogram",
                outputs=[coremltools.TensorType(name=OUTPUT)],
                minimum_deployment_target=coremltools.target.iOS17,
                compute_precision=coremltools.precision.FLOAT32,
                skip_model_load=True,
            ).save(str(package))
        _settle(package)
        with zipfile.ZipFile(path, "w") as archive:
            for inner in sorted(package.rglob("*")):
                if inner.is_file():  # under a fixed date
                    entry = zipfile.ZipInfo(inner.relative_to(folder).as_posix())
                    archive.writestr(entry, inner.read_bytes())


def answers(student: Student, path: Path, batches: Sequence[np.ndarray]) -> list[Logits]:
    """What Core ML says of each batch of at most 32 squares, on the CPU, where it is float32."""
    import coremltools

    with tempfile.TemporaryDirectory() as folder:
        zipfile.ZipFile(path).extractall(folder)
        units = coremltools.ComputeUnit.CPU_ONLY
        model = coremltools.models.MLModel(str(Path(folder) / _PACKAGE), compute_units=units)
        return [model.predict({INPUT: batch})[OUTPUT] for batch in batches]


def _settle(package: Path) -> None:
    """Make the same bytes of the same student: names are drawn, and maps written in any order."""
    from coremltools.models.utils import load_spec

    described = load_spec(str(package)).SerializeToString(deterministic=True)
    (package / "Data" / "com.apple.CoreML" / "model.mlmodel").write_bytes(described)
    for beside in package.glob("*.json"):
        if beside.name != "Manifest.json":
            beside.unlink()  # notes for debuggers, which the manifest does not list
    text = (package / "Manifest.json").read_text(encoding="utf-8")
    for drawn, item in json.loads(text)["itemInfoEntries"].items():
        text = text.replace(drawn, str(uuid.uuid5(uuid.NAMESPACE_URL, item["path"])))
    settled = json.dumps(json.loads(text), indent=4, sort_keys=True)
    (package / "Manifest.json").write_text(settled, encoding="utf-8")
