"""How long the student takes in what it was exported to, beside PyTorch and its teachers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from distill.diagnostics.timing import time_network
from distill.export.formats import onnx
from distill.export.program import INPUT, OUTPUT, Pixels, Student, in_unit, quiet, reason
from distill.models import cost
from distill.models.network import Network

BATCHES = (1, 32)
ROUNDS = 3  # in which all take turns, so that a busy moment does not hit one of them alone
SECONDS = 0.2  # of a turn
SLOW = 500.0  # milliseconds a batch, from which on one turn is enough


class Row(NamedTuple):
    """One way to run a network. Times are medians, in milliseconds a batch."""

    what: str
    batch_1_ms: float | None
    batch_32_ms: float | None
    bytes: int | None  # on disk
    reason: str = ""  # why there is no time

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return self._asdict()


class _Session(nn.Module):
    """ONNX Runtime as something that can be timed as a network is."""

    def __init__(self, path: Path, batches: Sequence[np.ndarray]) -> None:
        super().__init__()
        self._run = onnx.opened(path, threads=torch.get_num_threads()).run
        self._inputs = {len(batch): {INPUT: batch} for batch in batches}

    def forward(self, images: Tensor) -> None:
        """Run it on as many pictures; bringing them into its form is not its time."""
        self._run([OUTPUT], self._inputs[len(images)])


def table(
    student: Student, teachers: Sequence[Network], files: Mapping[str, Path], pixels: Pixels
) -> list[Row]:
    """Time the student in PyTorch, eager and compiled, in ONNX Runtime, and its teachers.

    All on the CPU, each with as many threads as PyTorch has.

    Args:
        student: What was exported.
        teachers: Its teachers.
        files: ONNX files by their precision.
        pixels: At least one picture; repeated to fill a batch.
    """
    network = student.network
    batches = [np.resize(pixels, (size, *pixels.shape[1:])) for size in BATCHES]
    compiled: Any = torch.compile(network, dynamic=False)
    subjects: dict[str, tuple[nn.Module, int]] = {
        "student, PyTorch eager": (network, cost.file_bytes(network)),
        "student, PyTorch compiled": (compiled, cost.file_bytes(network)),
    }
    for precision, path in files.items():
        session = _Session(path, [student.shown(batch, "pictures") for batch in batches])
        subjects[f"student, ONNX Runtime {precision}"] = session, path.stat().st_size
    for teacher in teachers:
        name = f"teacher {teacher.model}, PyTorch eager"
        subjects[name] = teacher.eval(), cost.file_bytes(teacher)
    shown = [torch.from_numpy(in_unit(batch)) for batch in batches]
    times: dict[tuple[str, int], list[float]] = {}
    failed: dict[str, str] = {}
    for _ in range(ROUNDS):
        for name, (module, _) in subjects.items():
            for batch in shown if name not in failed else ():
                if times.get((name, len(batch)), [0.0])[0] > SLOW:
                    continue
                try:
                    with quiet():  # a compiler's remarks on the machine
                        timing = time_network(module, batch, seconds=SECONDS)
                except Exception as error:  # a compiler that is not there, or that gives up
                    failed[name] = reason(error)
                    break
                times.setdefault((name, len(batch)), []).append(1000 * timing.p50)
    rows = []
    for name, (_, size) in subjects.items():
        if name in failed:
            rows.append(Row(name, None, None, size, failed[name]))
        else:
            one, many = (median(times[name, batch]) for batch in BATCHES)
            rows.append(Row(name, one, many, size))
    return rows
