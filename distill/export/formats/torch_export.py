"""A `.pt2` file: a program of `torch.export`, for any process that has PyTorch."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from distill.errors import VerificationError
from distill.export import program
from distill.export.program import Logits, Precision, Student, Takes

PACKAGES: tuple[str, ...] = ()
PRECISIONS: tuple[Precision, ...] = ("fp32",)
TAKES: Takes = "pictures"

# A process of its own, that neither sees the toolkit's packages nor imports them.
_ANSWER = """
import sys
import numpy, torch
program, batches, logits = sys.argv[1:]
student = torch.export.load(program).module()
with numpy.load(batches, allow_pickle=False) as stored, torch.no_grad():
    found = {name: student(torch.from_numpy(stored[name])).numpy() for name in stored.files}
assert not any(name.partition(".")[0] in ("distill", "timm") for name in sys.modules)
numpy.savez(logits, **found)
"""


def file(precision: Precision) -> str:
    """The file's name."""
    return "model.pt2"


def refusal(student: Student) -> str:
    """Nothing is known beforehand."""
    return ""


def write(student: Student, path: Path, precision: Precision) -> None:
    """Write the student as a program that takes any number of images, class names beside it.

    Raises:
        IncompatibleError: If torch.export cannot follow the student.
    """
    names = {"classes.json": json.dumps(student.classes)}
    torch.export.save(program.whole(student), path, extra_files=names)


def answers(student: Student, path: Path, batches: Sequence[np.ndarray]) -> list[Logits]:
    """What a fresh process says of each batch, in which nothing but PyTorch was imported.

    Raises:
        VerificationError: If that process cannot load or run the file.
    """
    with tempfile.TemporaryDirectory() as folder:
        stored, logits = Path(folder) / "batches.npz", Path(folder) / "logits.npz"
        names = [f"{i}" for i in range(len(batches))]
        np.savez(stored, allow_pickle=False, **dict(zip(names, batches, strict=True)))
        done = subprocess.run(
            [sys.executable, "-I", "-c", _ANSWER, path.resolve(), stored, logits],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise VerificationError(f"{path.name}: a fresh process cannot run it: {last}")
        with np.load(logits, allow_pickle=False) as found:
            return [found[name] for name in names]
