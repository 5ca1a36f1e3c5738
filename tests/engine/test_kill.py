"""A run that is killed goes on as if nothing had been: whatever is switched on, wherever it is."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from distill.engine.machine import has_fast_bf16
from distill.engine.train import train
from distill.recipe import Recipe
from tests.engine import processes
from tests.engine.conftest import STUDENT, TEACHER
from tests.engine.processes import Strike
from tests.promises import Measured

STEPS = 5  # of an epoch of STUDENT
TOTAL = 4 * STEPS

# What is cut anew in every view stays in its file.
FOLDER = "data: {name: folder, root: photos, image_size: 8, augment: [resized_crop], val: 0.1}"
STATE = """
  - {term: crd, weight: 0.1, negatives: 16, dim: 8}
  - {term: features, weight: 0.3}
  - {term: ctkd}
optimizer:"""


def _with(old: str, new: str) -> str:
    assert old in STUDENT
    return STUDENT.replace(old, new)


def _in_files() -> str:
    lines = STUDENT.strip().splitlines()
    return "\n".join([FOLDER, *lines[1:]]) + "\n"


GRID = {
    "cached teacher": (STUDENT + "cache: {path: answers, views: 2}\n", {}),
    "cache.fill": (STUDENT + "cache: {fill: true, views: 2}\n", {}),
    "terms with state of their own": (_with("\noptimizer:", STATE), {}),
    "files, no workers": (_in_files(), {"workers": 0}),
    "files, 2 workers": (_in_files(), {"workers": 2}),
    "bf16": (_with("seed: 3", "seed: 3, precision: bf16"), {}),
}


def photos(root: Path) -> None:
    """Two classes of small pictures in files."""
    draw = np.random.default_rng(0)
    for split, count in (("train", 60), ("test", 20)):
        for name in ("one", "two"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = draw.integers(0, 256, (12, 12, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")


@pytest.mark.promise("R1")
@pytest.mark.parametrize(
    "kills", [2, pytest.param(20, marks=[pytest.mark.soak, pytest.mark.timeout(3600)])]
)
@pytest.mark.parametrize("name", GRID)
def test_kill_9_leaves_no_trace_whatever_is_switched_on(
    tmp_path: Path, name: str, kills: int, measured: Measured
) -> None:
    if name == "bf16" and not has_fast_bf16(torch.cpu.get_capabilities()):
        pytest.skip("this CPU imitates bf16, 12 to 21 times slower, and a run refuses it")
    text, options = GRID[name]
    teacher = TEACHER
    if "files" in name:
        photos(tmp_path / "photos")
        text = text.replace("root: photos", f"root: {tmp_path / 'photos'}")
        data = next(line for line in text.splitlines() if line.startswith("data:"))
        teacher = "\n".join([data.replace(", val: 0.1", ""), *TEACHER.strip().splitlines()[1:]])
    text = text.replace("path: answers", f"path: {tmp_path / 'answers'}")
    (tmp_path / "teacher.yaml").write_text(teacher + "\n")
    recipe = tmp_path / "student.yaml"
    recipe.write_text(text)
    train(Recipe.load(tmp_path / "teacher.yaml"), tmp_path / "teacher", workers=0)
    if "path:" in text:
        first = processes.command(
            tmp_path, "teacher-cache", recipe, "--workers", 0, said=tmp_path / "said"
        )
        first.join()
        assert first.exitcode == 0, (tmp_path / "said").read_text()

    def start(place: Path) -> ForkServerProcess:
        if not place.exists():
            shutil.copytree(tmp_path / "teacher", place / "teacher")
        return processes.start(recipe, place / "run", checkpoint_seconds=0, **options)

    seconds = processes.timed(start, tmp_path / "whole")
    expected = processes.traces(tmp_path / "whole" / "run")
    for place in processes.killed(start, tmp_path, kills, seconds=seconds):
        assert processes.traces(place / "run") == expected
        assert not list(place.rglob("*.tmp"))
    measured(f"kill -9 while training, {name}", f"{kills} kills, every file the same to the bit")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """The recipe, with its teacher beside it, and what a run with --baseline leaves behind."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "teacher.yaml").write_text(TEACHER)
    (folder / "student.yaml").write_text(STUDENT)
    train(Recipe.load(folder / "teacher.yaml"), folder / "teacher")
    process = processes.start(folder / "student.yaml", folder / "run", baseline=True)
    process.join()
    assert process.exitcode == 0
    return folder / "student.yaml", both(folder / "run")


def both(run: Path) -> dict[str, bytes]:
    """The traces of a run and of its baseline, but for the clock's in the result of both."""
    import json

    found = processes.traces(run)
    found |= {f"baseline/{n}": x for n, x in processes.traces(run / "baseline").items()}
    result = json.loads(found["result.json"])
    for clock in ("seconds", "images_per_second", "data_wait", "memory", "run"):
        del result["baseline"][clock]
    return found | {"result.json": json.dumps(result).encode()}


TAKE = "distill.engine.fit.Training.take"
POINTS = {
    "in the first step": (TAKE, 1),
    "after the checkpoint of step 1": (TAKE, 2),
    "before the checkpoint's folder is named": ("pathlib.Path.rename", 3),
    "mid-epoch": (TAKE, STEPS // 2),
    "in the last step of an epoch": (TAKE, STEPS),
    "during validation": ("distill.engine.fit.answers", 2),
    "in the first step of the next epoch": (TAKE, 2 * STEPS + 1),
    "after the last checkpoint": ("distill.engine.train.finish", 1),
    "between student.safetensors and result.json": ("distill.engine.run.Run.finish", 1),
    "before the baseline begins": ("distill.engine.train.prepare", 2),
    "in the baseline": (TAKE, TOTAL + 5),
    "after the baseline": ("distill.engine.train._with_baseline", 1),
}


@pytest.mark.promise("R1")
@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.soak)])
def test_kill_9_at_named_points_leaves_no_trace(
    whole: tuple[Path, dict[str, bytes]], tmp_path: Path, every: int, measured: Measured
) -> None:
    recipe, expected = whole
    shutil.copytree(recipe.parent / "teacher", tmp_path / "teacher")
    points = list(POINTS)[::every]
    for name in points:
        where, call = POINTS[name]
        out = tmp_path / name
        options = {"checkpoint_seconds": 0, "baseline": True}
        process = processes.struck(recipe, out, Strike(where, call, signal.SIGKILL), **options)
        process.join()
        assert process.exitcode == -signal.SIGKILL, name
        process = processes.start(recipe, out, baseline=True)
        process.join()
        assert process.exitcode == 0, name
        assert both(out) == expected, name
        assert not list(out.rglob("*.tmp")), name
    measured(
        "kill -9 at named points, from the first step to the end of --baseline",
        f"{len(points)} of {len(points)} points without a trace",
    )


@pytest.mark.promise("R1")
def test_decoding_processes_end_with_the_run_that_is_killed(
    tmp_path: Path, measured: Measured
) -> None:
    """And the folder is free at once."""
    photos(tmp_path / "photos")
    recipe = tmp_path / "recipe.yaml"
    data = FOLDER.replace("root: photos", f"root: {tmp_path / 'photos'}")
    recipe.write_text("\n".join([data, *TEACHER.strip().splitlines()[1:]]) + "\n")
    log = tmp_path / "log"
    words = ("train", recipe, "--out", "run", "--workers", 2, "--set", "train.epochs=1000")
    process = processes.command(tmp_path, *words, said=tmp_path / "said", log=log)
    wait_for(lambda: log.exists() and log.read_text().count("\n") > 2)
    workers = psutil.Process(process.pid).children()
    assert len(workers) >= 2
    process.kill()
    began = time.monotonic()
    process.join()
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive
    seconds = time.monotonic() - began
    again = processes.command(
        tmp_path, *words[:-1], "train.epochs=1000", "--checkpoint-seconds", 0, said=tmp_path / "b"
    )
    wait_for(lambda: list((tmp_path / "run" / "checkpoint").glob("step-*")) or not again.is_alive())
    assert again.is_alive(), (tmp_path / "b").read_text()
    again.kill()
    again.join()
    measured("decoding processes end after kill -9 of their run", f"in {seconds:.2f} s")
    assert seconds < 3


def wait_for(done: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.005)
