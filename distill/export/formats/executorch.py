"""ExecuTorch: one file, for PyTorch's runtime on phones and small devices."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from distill.export import program
from distill.export.program import Logits, Precision, Student, Takes

PACKAGES: tuple[str, ...] = ("executorch",)
PRECISIONS: tuple[Precision, ...] = ("fp32",)
TAKES: Takes = "squares"
MOST = 32  # images at once: the file plans its memory for so many


def file(precision: Precision) -> str:
    """The file's name."""
    return "model.pte"


def refusal(student: Student) -> str:
    """Nothing is known beforehand."""
    return ""


def write(student: Student, path: Path, precision: Precision) -> None:
    """Write the student for XNNPACK, from one square to 32 at once; it resizes no pictures.

    Raises:
        IncompatibleError: If the compiler knows no way.
    """
    name = student.network.model
    exported = program.classifier(student, precision, most=MOST)
    with program.attempt(f"{name}: ExecuTorch knows no way", hint="--format onnx,torch-export"):
        from executorch.backends.xnnpack.partition import xnnpack_partitioner
        from executorch.exir import to_edge_transform_and_lower

        parts = [xnnpack_partitioner.XnnpackPartitioner()]
        lowered = to_edge_transform_and_lower(exported, partitioner=parts)
        path.write_bytes(lowered.to_executorch().buffer)


def answers(student: Student, path: Path, batches: Sequence[np.ndarray]) -> list[Logits]:
    """What the runtime says of each batch of at most 32 squares."""
    with program.quiet():
        from executorch.runtime import Runtime

        loaded = Runtime.get().load_program(path)
        method = loaded.load_method("forward")  # reads from `loaded`, which has to outlive it
        return [method.execute([torch.from_numpy(batch)])[0].numpy() for batch in batches]
