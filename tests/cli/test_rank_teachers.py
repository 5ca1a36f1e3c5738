"""`distill rank-teachers` in a shell script: clean output, and errors before any work."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from distill.engine.train import train
from distill.recipe import Recipe
from tests.cli.conftest import process
from tests.engine.conftest import STUDENT, TEACHER


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the recipe, and its teacher trained as `runs/teacher`."""
    found = tmp_path_factory.mktemp("rank")
    (found / "teacher.yaml").write_text(TEACHER)
    (found / "student.yaml").write_text(STUDENT)
    train(Recipe.load(found / "teacher.yaml"), found / "runs" / "teacher", workers=0)
    return found


def test_a_script_reads_the_best_teacher(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "runs", tmp_path / "runs")
    done = process(
        "rank-teachers",
        folder / "student.yaml",
        "--teacher",
        "runs/teacher",
        "--teacher",
        folder / "teacher.yaml",  # the very recipe: another candidate, trained for it
        "--set",
        "data.val=0.2",
        "--proxy-epochs",
        "1",
        "--json",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    found = json.loads(done.stdout)
    assert {row["name"] for row in found["ranking"]} == {
        "teacher",
        "teacher-2",
        "teacher + teacher-2",
    }
    out = tmp_path / "runs" / "student-teachers"
    assert json.loads((out / "ranking.json").read_text()) == found
    rows = list(csv.DictReader((out / "ranking.csv").read_text().splitlines()))
    assert [row["rank"] for row in rows] == ["1", "2", "3"]
    for name in ("ranking.html", "ranking.svg", "ranking.png", "best.yaml"):
        assert (out / name).stat().st_size
    shown = process(
        "rank-teachers",
        folder / "student.yaml",
        *("--teacher", "runs/teacher", "--teacher", folder / "teacher.yaml"),
        *("--set", "data.val=0.2", "--proxy-epochs", "1", "--goal", "mobile"),
        cwd=tmp_path,
    )
    assert shown.returncode == 0, shown.stderr
    assert "First for mobile: " in shown.stdout
    assert json.loads((out / "ranking.json").read_text())["goal"] == "mobile"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ["--set", "teachers=[]", "--set", "objective=[{term: ce}]"],
            "teachers: empty, and there is none to rank",
        ),
        (["--teacher", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["--seeds", "a"], "--seeds: whole numbers from 0"),
        (["--goal", "fame"], "fame"),
    ],
)
def test_bad_values_are_refused_before_anything_is_made(
    distill: Callable[..., Result], folder: Path, tmp_path: Path, options: list[str], said: str
) -> None:
    found = distill("rank-teachers", folder / "student.yaml", *options)
    assert found.exit_code == 2
    assert said in found.stderr
    assert not (tmp_path / "runs").exists()
