"""Runs that are evaluated: a student of two seeds, its teacher, and itself without one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import process

TEACHER = """
data: {name: digits, fraction: 0.2}
student: {model: resnet8}
objective: [{term: ce}]
optimizer: {name: sgd, lr: 0.1}
train: {epochs: 2, batch_size: 16}
"""
STUDENT = """
data: {name: digits, fraction: 0.1, augment: [crop]}
teachers: [{recipe: teacher.yaml, name: teacher}]
student: {model: vit, width: 16, depth: 2, heads: 2}
objective: [{term: ce, weight: 0.5}, {term: kd, weight: 0.5}]
optimizer: {lr: 1e-3}
train: {epochs: 2, batch_size: 16}
"""


@pytest.fixture(scope="session")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs `one` and `two`, which differ in their seed, each with a baseline."""
    folder = tmp_path_factory.mktemp("evaluated")
    (folder / "teacher.yaml").write_text(TEACHER)
    (folder / "student.yaml").write_text(STUDENT)
    for seed, name in enumerate(("one", "two")):
        done = process(
            "train", "student.yaml", "--out", name, "--baseline", "--set", f"train.seed={seed}",
            cwd=folder,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    return folder
