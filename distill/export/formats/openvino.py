"""OpenVINO: a graph and its weights, for Intel's runtime."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distill.export import program
from distill.export.formats import onnx
from distill.export.program import OUTPUT, Logits, Precision, Student, Takes

PACKAGES: tuple[str, ...] = ("openvino", *onnx.PACKAGES)
PRECISIONS: tuple[Precision, ...] = ("fp32", "int8")
TAKES: Takes = "pictures"


def file(precision: Precision) -> str:
    """The graph's name; the weights lie beside it, with `.bin` in place of `.xml`."""
    return "model.xml" if precision == "fp32" else f"model.{precision}.xml"


def refusal(student: Student) -> str:
    """Why this student cannot be written, by way of ONNX; empty if it may."""
    return onnx.refusal(student)


def write(student: Student, path: Path, precision: Precision) -> None:
    """Write what the ONNX file holds, int8 too, as a graph and its weights.

    Raises:
        IncompatibleError: If the converter knows no way.
    """
    openvino, name = _library(), student.network.model
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / onnx.file(precision)
        onnx.write(student, source, precision)
        with program.attempt(f"{name}: OpenVINO knows no way", hint="--format onnx"):
            model = openvino.convert_model(source)
    model.set_friendly_name(name)
    for i, operator in enumerate(model.get_ordered_ops()):  # else numbered through the process
        operator.set_friendly_name(f"{operator.get_type_name()}_{i}")
    openvino.save_model(model, path, compress_to_fp16=False)


def answers(student: Student, path: Path, batches: Sequence[np.ndarray]) -> list[Logits]:
    """What the runtime says of each batch, computing in float32."""
    model = opened(path)
    return [model(batch)[OUTPUT] for batch in batches]


def opened(path: Path, *, threads: int = 0) -> Any:
    """The compiled model, on the CPU.

    Without the hint to stay in float32, a CPU that has bfloat16 computes in it, and logits are off
    by some percent.

    Args:
        path: The graph.
        threads: Cores that it uses; 0: all.
    """
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    return _library().Core().compile_model(path, "CPU", settings)


def _library() -> Any:
    """OpenVINO, without the package by which its import would report to its makers."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino
