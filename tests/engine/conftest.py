"""A run small enough to be started a hundred times, with everything switched on."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

TEACHER = """
data: {name: digits, fraction: 0.1}
student: {model: resnet8}
objective: [{term: ce}]
optimizer: {name: sgd, lr: 0.05, momentum: 0.9}
train: {epochs: 1, batch_size: 30}
"""

STUDENT = """
data: {name: digits, fraction: 0.14, augment: [crop, flip], mixup: 0.5, val: 0.1}
teachers: [{recipe: teacher.yaml}]
student: {model: vit, patch_size: 4, width: 16, depth: 1, heads: 2, drop: 0.1}
objective:
  - {term: ce, weight: {start: 0.5, end: 0.1}}
  - {term: kd, weight: 0.9, temperature: 3}
optimizer: {name: adamw, lr: 2e-3, weight_decay: 0.05, warmup_epochs: 1, clip_norm: 1.0}
train: {epochs: 4, batch_size: 20, ema: 0.9, seed: 3}
"""


@pytest.fixture(autouse=True)
def nothing_runs_on() -> Iterator[None]:
    """End what a test that failed has left running."""
    yield
    for process in multiprocessing.active_children():
        process.kill()
        process.join()


@pytest.fixture
def recipes(tmp_path: Path) -> Callable[..., Path]:
    """Write the student's recipe and its teacher's into a folder; return the student's path."""

    def write(folder: Path | None = None, student: str = STUDENT) -> Path:
        folder = folder or tmp_path
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "teacher.yaml").write_text(TEACHER)
        path = folder / "student.yaml"
        path.write_text(student)
        return path

    return write
