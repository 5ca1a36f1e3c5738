"""What a run leaves behind, and what it says of its teacher."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

import distill
from distill import evaluate
from distill.data import datasets
from distill.engine import machine
from distill.engine.session import answers
from distill.engine.train import train
from distill.recipe import Recipe

PROMISED = {"top1", "top5", "nll", "ece", "val_top1", "epochs", "steps", "seconds"}
PROMISED |= {"images_per_second", "student", "teachers", "parameters", "flops", "run"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """A recipe, its run with a baseline through the real command, and what it printed."""
    from tests.engine.conftest import STUDENT, TEACHER

    folder = tmp_path_factory.mktemp("train")
    (folder / "teacher.yaml").write_text(TEACHER)
    recipe = folder / "student.yaml"
    recipe.write_text(STUDENT)
    command = [sys.executable, "-m", "distill", "distill", "student.yaml", "--baseline", "--json"]
    done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    return recipe, folder / "runs" / "student", done.stdout


def test_the_run_directory_holds_what_is_promised(run: tuple[Path, Path, str]) -> None:
    _, out, printed = run
    result = json.loads((out / "result.json").read_text())
    assert printed.count("\n") == 1
    assert json.loads(printed) == result
    assert result.keys() >= PROMISED | {"baseline", "gain", "gain_ci95"}
    assert result["epochs"] == 4
    assert result["steps"] == 4 * (112 // 20)
    assert all(0 <= result[rate] <= 1 for rate in ("top1", "top5", "ece", "val_top1"))
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert {row["split"] for row in rows} == {"train", "val"}
    assert all({"step", "epoch", "split"} <= row.keys() for row in rows)
    assert [row["step"] for row in rows if row["split"] == "train"][-1] == result["steps"]
    assert all(row["gradient_ratio"] > 0 for row in rows if row["split"] == "train")


def test_the_saved_student_is_the_averaged_one_alone(run: tuple[Path, Path, str]) -> None:
    _, out, _ = run
    student = distill.load(out)
    saved = safetensors.torch.load_file(out / "student.safetensors")
    assert saved.keys() == student.backbone.state_dict().keys()
    newest = max((out / "checkpoint").glob("step-*"))
    average = safetensors.torch.load_file(newest / "ema.safetensors")
    for name, tensor in saved.items():
        torch.testing.assert_close(tensor, average[f"backbone.{name}"], rtol=0, atol=0)


def test_the_scores_are_those_of_the_saved_student(run: tuple[Path, Path, str]) -> None:
    path, out, _ = run
    recipe, result = Recipe.load(path), json.loads((out / "result.json").read_text())
    dataset, here = datasets.load(recipe.data), machine.setup()
    told, alone = (
        answers(distill.load(folder), "test", recipe, dataset, here)
        for folder in (out, out / "baseline")
    )
    assert len(told.ids) == len(dataset.test)
    assert evaluate.scores(told)._asdict() == pytest.approx(
        {name: result[name] for name in ("top1", "top5", "nll", "ece")}, abs=1e-6
    )
    assert result["gain"] == pytest.approx(result["top1"] - result["baseline"]["top1"])
    gain, interval = evaluate.paired_gain(told, alone)
    assert [gain, *interval] == [result["gain"], *result["gain_ci95"]]


def test_the_baseline_differs_in_its_teacher_alone(run: tuple[Path, Path, str]) -> None:
    path, out, _ = run
    recipe = Recipe.load(path)
    alone = Recipe.load(out / "baseline" / "recipe.yaml")
    assert alone.teachers == []
    assert [(spec.term, spec.weight) for spec in alone.objective] == [("ce", 1.0)]
    for section in ("data", "student", "optimizer", "train"):
        assert getattr(alone, section) == getattr(recipe, section)


def test_a_term_of_weight_0_changes_nothing(run: tuple[Path, Path, str], tmp_path: Path) -> None:
    path, out, _ = run
    weights = ["objective.0.weight=1", "objective.1.weight=0"]
    train(Recipe.load(path, weights), tmp_path / "unheard")
    unheard, alone = (
        (folder / "student.safetensors").read_bytes()
        for folder in (tmp_path / "unheard", out / "baseline")
    )
    assert unheard == alone


def test_the_complete_recipe_trains_the_same_student(
    run: tuple[Path, Path, str], tmp_path: Path
) -> None:
    _, out, _ = run
    again = tmp_path / "again"
    train(Recipe.load(out / "recipe.yaml"), again)
    assert (again / "student.safetensors").read_bytes() == (
        out / "student.safetensors"
    ).read_bytes()


def test_a_teacher_that_knows_nothing_is_warned_about(
    recipes: Callable[..., Path], tmp_path: Path
) -> None:
    overrides = ["teachers.0.recipe.optimizer.lr=1e-9", "train.epochs=1"]
    result = train(Recipe.load(recipes(), overrides), tmp_path / "run")
    (warning,) = [text for text in result.warnings if "chance" in text]
    assert warning.startswith("teacher resnet8 is right on")


def test_a_teacher_worse_than_the_student_alone_is_warned_about(
    recipes: Callable[..., Path], tmp_path: Path
) -> None:
    overrides = ["teachers.0.recipe.optimizer.lr=1e-9", "student.patch_size=2"]
    overrides += ["train.epochs=12", "train.ema=0", "optimizer.lr=5e-3", "data.mixup=0"]
    result = train(Recipe.load(recipes(), overrides), tmp_path / "run", baseline=True)
    assert result.baseline is not None
    assert result.baseline["top1"] > result.teachers[0]["top1"]
    assert any("worse than the student without it" in text for text in result.warnings)
    # So much worse that it shows in the student that was taught, without a baseline.
    assert result.top1 > result.teachers[0]["top1"] + 0.02
    assert any("no teacher on more than" in text for text in result.warnings)


def test_an_unbalanced_objective_is_warned_about(
    recipes: Callable[..., Path], tmp_path: Path
) -> None:
    overrides = ["objective.1.weight=1e5", "train.epochs=10", "data.mixup=0"]
    result = train(Recipe.load(recipes(), overrides), tmp_path / "run")
    (warning,) = [text for text in result.warnings if "gradient" in text]
    assert "from the teacher" in warning
    assert not any("no teacher on more than" in text for text in result.warnings)


def test_several_teachers_are_one_ensemble(recipes: Callable[..., Path], tmp_path: Path) -> None:
    path = recipes()
    text = path.read_text().replace(
        "teachers: [{recipe: teacher.yaml}]",
        "teachers: [{recipe: teacher.yaml}, {recipe: teacher.yaml, name: second, weight: 3.0}]",
    )
    path.write_text(text)
    overrides = ["teachers.1.recipe.train.seed=5", "train.epochs=1"]
    result = train(Recipe.load(path, overrides), tmp_path / "run")
    assert [teacher["weight"] for teacher in result.teachers] == [1.0, 3.0]
    assert (tmp_path / "second" / "result.json").exists()
    assert result.identity["teachers"][0] != result.identity["teachers"][1]


@pytest.mark.soak
def test_a_compiled_run_learns_the_same(run: tuple[Path, Path, str], tmp_path: Path) -> None:
    recipe, out, _ = run
    command = [sys.executable, "-m", "distill", "train", str(recipe), "--compile"]
    subprocess.run([*command, "--out", str(tmp_path / "run")], check=True)
    eager, compiled = (
        json.loads((folder / "result.json").read_text()) for folder in (out, tmp_path / "run")
    )
    assert compiled["steps"] == eager["steps"]
    assert compiled["nll"] == pytest.approx(eager["nll"], abs=1e-2)
