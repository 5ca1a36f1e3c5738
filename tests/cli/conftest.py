from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from distill.cli import app

ROOT = Path(__file__).parents[2]


@pytest.fixture
def distill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run `distill ARGUMENTS` in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    runner = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"})

    def run(*arguments: object) -> Result:
        result = runner.invoke(app, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run


def process(
    *arguments: object, cwd: Path, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `distill ARGUMENTS` as a user does."""
    return subprocess.run(
        [sys.executable, "-m", "distill", *map(str, arguments)],
        cwd=cwd,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "200",
            "PYTHONPATH": str(ROOT),
            **(env or {}),
        },
        capture_output=True,
        text=True,
        check=False,
    )


def picture(size: tuple[int, int], seed: int) -> bytes:
    """A PNG of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def images(root: Path, *folders: str, count: int, size: tuple[int, int] = (20, 16)) -> Path:
    """Write `count` images into each of `folders` below `root`."""
    for number, name in enumerate(folders):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            (root / name / f"{i}.png").write_bytes(picture(size, 1000 * number + i))
    return root


def listing(folder: Path) -> dict[str, bytes]:
    """All files below a folder, with their content."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def write_recipe(tmp_path: Path) -> Callable[..., Path]:
    """Write a recipe that trains in seconds."""

    def write(name: str = "recipe.yaml", **sections: Any) -> Path:
        from distill import yamlio

        data = {
            "data": {"name": "digits", "fraction": 0.1},
            "student": {"model": "resnet8"},
            "objective": [{"term": "ce"}],
            "optimizer": {"name": "sgd", "lr": 0.05},
            "train": {"epochs": 1, "batch_size": 16},
        }
        path = tmp_path / name
        path.write_text(yamlio.dump(data | sections))
        return path

    return write


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs on the same digits, made by the real command: `kd`, `kd/baseline`."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "teacher.yaml").write_text(
        """
        data: {name: digits, fraction: 0.2}
        student: {model: resnet8}
        objective: [{term: ce}]
        optimizer: {name: sgd, lr: 0.1}
        train: {epochs: 1, batch_size: 16}
        """
    )
    (folder / "student.yaml").write_text(
        """
        data: {name: digits, fraction: 0.1}
        teachers: [{recipe: teacher.yaml}]
        student: {model: vit, width: 16, depth: 1, heads: 2}
        objective: [{term: ce, weight: 0.5}, {term: kd, weight: 0.5}]
        optimizer: {lr: 1e-3}
        train: {epochs: 1, batch_size: 16}
        """
    )
    done = process("train", "student.yaml", "--out", "kd", "--baseline", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder
