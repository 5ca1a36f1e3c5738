"""A finished run's page: the verdict first, its curves, its recipe; an evaluation's page stays."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from distill.report import run as report
from tests.cli.conftest import process


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a baseline, made by the real command."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "teacher.yaml").write_text(
        """
        data: {name: digits, fraction: 0.1}
        student: {model: resnet8}
        objective: [{term: ce}]
        optimizer: {name: sgd, lr: 0.1}
        train: {epochs: 1, batch_size: 16}
        """
    )
    (folder / "recipe.yaml").write_text(
        """
        data: {name: digits, fraction: 0.1, val: 0.2}
        teachers: [{recipe: teacher.yaml}]
        student: {model: resnet8}
        objective: [{term: ce, weight: 0.5}, {term: kd, weight: 0.5}]
        optimizer: {name: sgd, lr: 0.1}
        train: {epochs: 2, batch_size: 16}
        """
    )
    done = process("train", "recipe.yaml", "--out", "run", "--baseline", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def test_training_ends_with_a_page(finished: Path) -> None:
    html = (finished / "report.html").read_text()
    result = json.loads((finished / "result.json").read_text())
    assert f"{result['top1']:.2%}" in html
    assert f"{100 * result['gain']:+.2f} points" in html
    for text in ("In training", "Accuracy on the validation split", "Speed of training",
        "temperature: 4", "resnet8",
    ):  # fmt: skip
        assert text in html
    assert "://" not in html.replace("http://www.w3.org/2000/svg", "")


def test_a_page_that_is_newer_than_the_result_stays(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    page, result = tmp_path / "run" / "report.html", tmp_path / "run" / "result.json"
    page.write_text("an evaluation")
    report.write(tmp_path / "run")
    assert page.read_text() == "an evaluation"
    os.utime(page, ns=(0, result.stat().st_mtime_ns - 1))
    report.write(tmp_path / "run")
    assert "points" in page.read_text()


def result(**changes: Any) -> dict[str, Any]:
    alone = {"top1": 0.8, "top5": 0.9, "nll": 0.5, "ece": 0.1, "parameters": 10, "flops": 1000}
    own = {**alone, "top1": 0.85, "student": "vit", "teachers": [], "warnings": []}
    return {**own, "baseline": alone, "gain": 0.05, "gain_ci95": [0.01, 0.09], **changes}


@pytest.mark.parametrize(
    ("changes", "first"),
    [
        ({}, "The teacher helped: +5.00 points."),
        ({"gain": -0.05, "gain_ci95": [-0.09, -0.01]}, "The teacher hurt: -5.00 points."),
        (
            {"gain": 0.05, "gain_ci95": [-0.01, 0.09]},
            "No difference is shown: +5.00 points, and 0 is within the interval.",
        ),
        ({"gain": None}, "vit is right on 85.00% of the test images."),
    ],
)
def test_the_verdict_says_no_more_than_is_known(changes: dict[str, Any], first: str) -> None:
    lines = report.verdict(result(**changes))
    assert lines[0] == first
    assert any("One seed" in line for line in lines) == (changes.get("gain", 1) is not None)


def test_speed_is_the_first_step_at_the_accuracy_that_all_reach() -> None:
    found = report.speed(
        {
            "taught": [(10, 0.5), (20, 0.9), (40, 0.8)],
            "alone": [(10, 0.1), (20, 0.4), (40, 0.7)],
            "short": [(10, 0.7)],
        }
    )
    assert found.heads[1] == "steps to 70.00%"
    assert [list(row) for row in found.rows] == [
        ["taught", "20", "40", "80.00%", "80.00%"],  # (10 * 0.7 + 20 * 0.85) / 30
        ["alone", "40", "40", "45.00%", "70.00%"],
        ["short", "10", "10", "70.00%", "70.00%"],
    ]
    # The lowest goal is reached by all, and a higher one never sooner.
    points = {"one": [(i, i / 10) for i in range(1, 9)]}
    steps = [
        int(report.speed(points | {"low": [(1, goal / 10)]}).rows[0][1]) for goal in range(1, 9)
    ]
    assert steps == sorted(steps) == [*range(1, 9)]


def test_many_steps_are_thinned_to_means() -> None:
    rows = [{"step": i, "loss": float(i)} for i in range(1, 1001)]
    steps, losses = report._thinned(rows, "loss")
    assert len(steps) == 200
    assert steps[0] == losses[0] == 3.0
    assert report._thinned([{"step": 1}], "loss") == ([], [])
