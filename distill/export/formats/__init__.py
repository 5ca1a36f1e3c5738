"""What a student can be written as; one file a format."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from distill.export.formats import (
    coreml,
    executorch,
    onnx,
    openvino,
    safetensors,
    timm,
    torch_export,
)
from distill.export.program import Logits, Precision, Student, Takes


class Format(Protocol):
    """What the module of a format has."""

    PACKAGES: tuple[str, ...]  # that it needs beyond those that the toolkit needs
    PRECISIONS: tuple[Precision, ...]  # that it can be written in, here
    TAKES: Takes  # what is put in

    def file(self, precision: Precision) -> str:
        """The name of what it writes: one file, whatever lies beside it."""
        ...

    def refusal(self, student: Student) -> str:
        """Why this student cannot be written; empty if nothing is known against it."""
        ...

    def write(self, student: Student, path: Path, precision: Precision) -> None:
        """Write the student to `path`."""
        ...

    def answers(self, student: Student, path: Path, batches: Sequence[np.ndarray]) -> list[Logits]:
        """What the runtime, with the file at `path`, says of each batch of what the file takes."""
        ...


class Graph(Format, Protocol):
    """What the module of a format has that gives maps besides the logits."""

    def told(
        self, path: Path, batches: Sequence[np.ndarray], outputs: Sequence[str]
    ) -> list[list[np.ndarray]]:
        """What the file gives of each batch, by the names of outputs."""
        ...


FORMATS: dict[str, Format] = {
    "onnx": onnx,
    "torch-export": torch_export,
    "safetensors": safetensors,
    "timm": timm,
    "openvino": openvino,
    "executorch": executorch,
    "coreml": coreml,
}
GRAPHS: dict[str, Graph] = {"onnx": onnx, "torch-export": torch_export}
DEFAULT = ("onnx", "torch-export", "safetensors", "timm")  # where none is asked for


def lacking(name: str) -> list[str]:
    """The packages of a format that are not installed."""
    return [p for p in FORMATS[name].PACKAGES if importlib.util.find_spec(p) is None]
