"""`distill temperature-sweep` in a shell script: clean output, and errors before any work."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from distill.engine.train import train
from distill.recipe import Recipe
from tests.cli.conftest import ROOT, process
from tests.engine.conftest import STUDENT, TEACHER


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the recipe, whose teacher is trained."""
    found = tmp_path_factory.mktemp("sweep")
    (found / "teacher.yaml").write_text(TEACHER)
    (found / "student.yaml").write_text(STUDENT)
    train(Recipe.load(found / "teacher.yaml"), found / "teacher")
    return found


def test_a_script_reads_the_best_temperature(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "teacher", tmp_path / "runs" / "teacher")
    done = process(
        "temperature-sweep",
        folder / "student.yaml",
        "--temperatures",
        "1,4",
        "--json",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    found = json.loads(done.stdout)
    assert found["best"]["temperature"] in (1, 4)
    assert found["complete"]
    out = tmp_path / "runs" / "student-sweep"
    assert json.loads((out / "sweep.json").read_text()) == found
    rows = list(csv.DictReader((out / "sweep.csv").read_text().splitlines()))
    assert [row["temperature"] for row in rows] == ["1", "4"]
    assert float(rows[0]["val_top1"]) == pytest.approx(found["settings"][0]["val_top1"], abs=1e-6)
    again = process("train", out / "best.yaml", "--out", "again", "--json", cwd=tmp_path)
    assert json.loads(again.stdout)["top1"] == found["best"]["test_top1"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--temperatures", "1,x"], "--temperatures: numbers with commas between them"),
        (["--temperatures", "0"], "objective.1.temperature=0"),
        (["--seeds", "1.5"], "--seeds: whole numbers from 0"),
        (["--key", "optimizer.lr"], "--key optimizer.lr: must be KEY=V,V,..."),
        (["--key", "student.depth=1,2.5"], "student.depth=2.5"),
        (["--set", "objective=[{term: ce}]"], "no term has a temperature"),
        (["--shard", "3/2"], "--shard 3/2"),
    ],
)
def test_bad_values_are_refused_before_anything_is_made(
    distill: Callable[..., Result], folder: Path, tmp_path: Path, options: list[str], said: str
) -> None:
    found = distill("temperature-sweep", folder / "student.yaml", *options)
    assert found.exit_code == 2
    assert said in found.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_saves_every_student_and_the_sweep_goes_on(
    folder: Path, tmp_path: Path, signum: int, status: int
) -> None:
    shutil.copytree(folder / "teacher", tmp_path / "runs" / "teacher")
    arguments = ["temperature-sweep", str(folder / "student.yaml"), "--temperatures", "1,4"]
    arguments += ["--set", "train.epochs=60", "--set", "cache.views=4", "--workers", "0"]
    running = subprocess.Popen(
        [sys.executable, "-m", "distill", *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    trials = tmp_path / "runs" / "student-sweep" / "trials"
    while not any(file.stat().st_size for file in trials.glob("*/metrics.jsonl")):
        assert running.poll() is None
        time.sleep(0.01)
    running.send_signal(signum)
    said = running.communicate()[1]
    assert running.returncode == status, said
    steps = {path.name for path in trials.glob("*/checkpoint/step-*")}
    assert len(steps) == 1  # all were saved after the same step
    assert len(list(trials.glob("*/checkpoint/step-*"))) == 2
    again = process(*arguments, "--json", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert f"going on after step {int(steps.pop().removeprefix('step-'))}" in again.stderr
    assert json.loads(again.stdout)["complete"]
