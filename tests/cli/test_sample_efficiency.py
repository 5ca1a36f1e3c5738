"""`distill sample-efficiency` in a shell script: clean output, and errors before any work."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from tests.cli.conftest import ROOT, process
from tests.engine.conftest import STUDENT, TEACHER


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with recipes: one with a teacher, and one that differs in its images."""
    found = tmp_path_factory.mktemp("efficiency")
    (found / "teacher.yaml").write_text(TEACHER)
    (found / "student.yaml").write_text(STUDENT)
    return found


def test_a_script_reads_the_curves(folder: Path, tmp_path: Path) -> None:
    command = ["sample-efficiency", folder / "student.yaml", "--sizes", "40,60", "--baseline"]
    command += ["--teacher", "all"]
    done = process(*command, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    found = json.loads(done.stdout)
    assert found["complete"]
    assert [curve["name"] for curve in found["curves"]] == ["student", "student alone"]
    assert [one["over"] for one in found["multipliers"]] == ["student alone", "student"]
    out = tmp_path / "runs" / "student-efficiency"
    assert json.loads((out / "efficiency.json").read_text()) == found
    for name in ("svg", "png", "html"):
        assert (out / f"efficiency.{name}").stat().st_size > 1_000
    rows = list(csv.DictReader((out / "efficiency.csv").read_text().splitlines()))
    assert [(row["curve"], row["size"], row["seed"]) for row in rows] == [
        (name, size, "3") for name in ("student", "student alone") for size in ("40", "60")
    ]
    (run,) = found["curves"][0]["points"][1]["runs"]
    assert float(rows[1]["top1"]) == pytest.approx(run["top1"], abs=1e-6)
    assert json.loads((out.parent / "teacher" / "result.json").read_text())["epochs"] == 1
    # The same command for people: nothing is trained again, and it says what to open.
    shown = process(*command, cwd=tmp_path)
    assert shown.returncode == 0
    lines = shown.stdout.splitlines()
    assert lines[0].split() == ["images", "student", "student", "alone"]
    assert lines[1].split()[:2] == ["40", f"{found['curves'][0]['points'][0]['top1']:.1%}"]
    assert lines[-1] == "next: open runs/student-efficiency/efficiency.html"
    assert "students side by side" not in shown.stderr


def test_a_part_says_how_far_all_are(folder: Path, tmp_path: Path) -> None:
    done = process(
        "sample-efficiency",
        folder / "teacher.yaml",
        "--sizes",
        "30,60",
        "--shard",
        "1/2",
        "--json",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    expected = {"complete": False, "done": 1, "trials": 2, "out": "runs/teacher-efficiency"}
    assert json.loads(done.stdout) == expected


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--sizes", "1,x"], "--sizes: whole numbers from 0 with commas between them"),
        (["--sizes", "40,1000"], "1,000 images: there are 111 to train on"),
        (["--sizes", "5"], "5 images: less than one of each of the 10 classes"),
        (["--sizes", "25"], "25 images: less than train.batch_size 30 of student, teachers.0"),
        (["--seeds", "1.5"], "--seeds: whole numbers from 0"),
        (["--teacher", "none"], "'none' is not one of"),
        (["--set", "optimizer.lrr=1"], "did you mean 'lr'"),
        (["--set", "generations=2"], "student: generations"),
        (["--shard", "3/2"], "--shard 3/2"),
    ],
)
def test_bad_values_are_refused_before_anything_is_made(
    distill: Callable[..., Result], folder: Path, tmp_path: Path, options: list[str], said: str
) -> None:
    found = distill("sample-efficiency", folder / "student.yaml", *options)
    assert found.exit_code == 2
    assert said in found.stderr
    assert not (tmp_path / "runs").exists()


def test_faults_of_all_recipes_are_told_at_once(
    distill: Callable[..., Result], folder: Path, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.yaml").write_text(TEACHER.replace("lr:", f"lr_{name}:"))
    found = distill("sample-efficiency", tmp_path / "a.yaml", tmp_path / "b.yaml")
    assert found.exit_code == 2
    assert "lr_a" in found.stderr
    assert "lr_b" in found.stderr
    twice = distill("sample-efficiency", folder / "teacher.yaml", folder / "teacher.yaml")
    assert twice.exit_code == 2
    assert "stands twice" in twice.stderr


def test_recipes_of_the_same_name_are_told_apart_by_their_folders(
    distill: Callable[..., Result], tmp_path: Path
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "plain.yaml").write_text(TEACHER)
    found = distill(
        "sample-efficiency", "a/plain.yaml", "b/plain.yaml", "--sizes", "30,60", "--json"
    )
    assert found.exit_code == 0, found.stderr
    curves = json.loads(found.stdout)["curves"]
    assert [curve["name"] for curve in curves] == ["a/plain", "b/plain"]
    assert curves[0]["points"] == curves[1]["points"]  # trained once


def test_recipes_of_other_images_are_refused_without_torch(folder: Path, tmp_path: Path) -> None:
    script = (
        "import sys\nfrom distill.cli import app\n"
        "try:\n    app()\nfinally:\n    print('torch' in sys.modules)"
    )
    files = [str(folder / f"{name}.yaml") for name in ("student", "teacher")]
    done = subprocess.run(
        [sys.executable, "-c", script, "sample-efficiency", *files],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "student and teacher have not the same images: data.fraction: 0.14 -> 0.1" in done.stderr
    assert done.stdout == "False\n"
