"""A ranking is made of what was measured, and of students that are runs like any other."""

from __future__ import annotations

import json
from collections.abc import Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from distill import evaluate
from distill.data import datasets
from distill.engine import jobs, machine
from distill.engine.session import answers
from distill.engine.train import train
from distill.engine.trials import Outcome
from distill.errors import DivergedError, IncompatibleError
from distill.models import weights
from distill.order import Goal, ranked
from distill.rank import Ranking, mixed, rank
from distill.recipe import Recipe, Teacher
from distill.report.rank import verdict
from distill.sweep import Part
from distill.teacher import Ensemble
from distill.types import Batch, Outputs
from tests.engine import processes
from tests.engine.conftest import STUDENT, TEACHER
from tests.promises import Measured


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe of two teachers, a good one and one that learned next to nothing."""
    found = tmp_path_factory.mktemp("rank")
    (found / "teacher.yaml").write_text(TEACHER)
    teachers = "teachers: [{weights: good}, {weights: poor}]"
    (found / "student.yaml").write_text(
        STUDENT.replace("teachers: [{recipe: teacher.yaml}]", teachers)
    )
    good = ["data.fraction=1.0", "train.epochs=4"]
    train(Recipe.load(found / "teacher.yaml", good), found / "good", workers=0)
    poor = ["optimizer.lr=1e-6"]
    train(Recipe.load(found / "teacher.yaml", poor), found / "poor", workers=0)
    return found


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """How fast a teacher is need not be known well."""
    monkeypatch.setattr(jobs, "TIMED_SECONDS", 0.1)


@pytest.fixture
def recipe(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.chdir(folder)
    return Recipe.load("student.yaml")


def measured(recipe: Recipe, out: Path, **options: Any) -> Ranking:
    found = rank(recipe, out, workers=0, epochs=2, **options)
    assert isinstance(found, Ranking)
    return found


def test_every_number_of_a_teacher_is_the_one_that_it_has_live(
    recipe: Recipe, tmp_path: Path
) -> None:
    found = measured(recipe, tmp_path / "out")
    dataset, here = datasets.load(recipe.data), machine.setup(workers=0)
    rows = {row["name"]: row for row in found.ranking}
    assert set(rows) == {"good", "poor", "good + poor"}
    for name in ("good", "poor"):
        told = evaluate.scores(answers(weights.load(name), "val", recipe, dataset, here))
        for key, value in told._asdict().items():
            assert rows[name][f"val_{key}"] == pytest.approx(value, abs=1e-6)
    assert rows["good"]["val_top1"] > 0.5 > rows["poor"]["val_top1"]
    assert rows["good"]["entropy"] < rows["poor"]["entropy"] <= np.log(10) + 1e-6
    both = rows["good + poor"]
    assert both["parameters"] == sum(rows[name]["parameters"] for name in ("good", "poor"))
    assert both["seconds_per_image"] == pytest.approx(
        sum(1 / rows[name]["images_per_second"] for name in ("good", "poor"))
    )
    assert found.temperature == 3
    assert not list(tmp_path.rglob("result.json"))  # nobody was shown the test split


def test_an_ensemble_is_what_its_members_would_teach_together() -> None:
    draw = np.random.default_rng(0)
    members = [draw.normal(size=(7, 5)) * 4 for _ in range(3)]

    class Told:
        def __init__(self, logits: np.ndarray) -> None:
            self.logits = torch.from_numpy(logits)

        def __call__(self, batch: Batch) -> Outputs:
            return Outputs(self.logits)

    nothing = torch.empty(0)
    batch = Batch(nothing, nothing, nothing, nothing)
    live = Ensemble([Told(z) for z in members], [1.0, 1.0, 1.0])(batch)
    for temperature in (1.0, 4.0):
        expected = (live.softened(temperature) / temperature).log_softmax(dim=-1)
        ours = torch.from_numpy(mixed(members, temperature))
        torch.testing.assert_close(ours, expected.double(), rtol=0, atol=1e-5)


def test_a_students_is_the_one_that_its_own_run_trains(recipe: Recipe, tmp_path: Path) -> None:
    steps = {"optimizer.schedule": "step", "optimizer.milestones": [2.0, 3.0]}
    measured(recipe.changed(steps), tmp_path / "out")
    trials = sorted((tmp_path / "out" / "trials").iterdir())
    assert {trial.name for trial in trials} == {
        "good_seed-3",
        "poor_seed-3",
        "good+poor_seed-3",
        "alone_seed-3",
    }
    for trial in trials:
        own = Recipe.load(trial / "recipe.yaml")
        # Half as long, with all at the same part of it.
        assert (own.train.epochs, recipe.train.epochs) == (2, 4)
        assert (own.optimizer.warmup_epochs, own.optimizer.milestones) == (0.5, [1.0, 1.5])
        train(own, tmp_path / trial.name, workers=0)
        ours, expected = (
            safetensors.torch.load_file(run / "student.safetensors")
            for run in (trial, tmp_path / trial.name)
        )
        for name, tensor in expected.items():
            torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-5)


def test_a_candidate_more_is_measured_and_nothing_again(recipe: Recipe, tmp_path: Path) -> None:
    fewer = recipe.model_copy(update={"teachers": recipe.teachers[:1]})
    first = measured(fewer, tmp_path / "out")
    assert [row["name"] for row in first.ranking] == ["good"]
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.safetensors")}
    rate = first.ranking[0]["images_per_second"]
    found = measured(recipe, tmp_path / "out")
    assert len(found.ranking) == 3
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert next(r for r in found.ranking if r["name"] == "good")["images_per_second"] == rate


def test_a_candidate_that_does_not_fit_is_named_and_left_out(
    recipe: Recipe, tmp_path: Path
) -> None:
    nobody = Teacher.model_validate({"weights": "nobody"})
    found = measured(
        recipe.model_copy(update={"teachers": [recipe.teachers[0], nobody]}), tmp_path / "out"
    )
    assert [row["name"] for row in found.ranking] == ["good"]
    assert found.refused[0]["name"] == "nobody"
    assert any("Left out: nobody" in line for line in verdict(found.to_json()))
    with pytest.raises(IncompatibleError, match="none of 1 fits the data"):
        measured(recipe.model_copy(update={"teachers": [nobody]}), tmp_path / "none")


def test_the_best_recipe_is_the_users_with_that_teacher(recipe: Recipe, tmp_path: Path) -> None:
    found = measured(recipe, tmp_path / "out", ensembles=1)
    best = Recipe.load(found.best["recipe"])
    assert [str(spec.weights) for spec in best.teachers] == found.best["teachers"]
    assert best.model_copy(update={"teachers": []}) == recipe.model_copy(update={"teachers": []})


def test_two_parts_are_one_whole(recipe: Recipe, tmp_path: Path) -> None:
    whole = measured(recipe, tmp_path / "whole")
    out = tmp_path / "parts"
    first = rank(recipe, out, workers=0, epochs=2, shard=(1, 2))
    assert first == Part(2, 4, str(out))
    found = rank(recipe, out, workers=0, epochs=2, shard=(2, 2))
    assert isinstance(found, Ranking)
    assert timeless(found.to_json()) == timeless(whole.to_json())


def timeless(found: dict[str, Any]) -> Any:
    """A ranking by accuracy without what depends on the clock, or on the folder."""
    text = json.dumps(found, indent=1)
    lines = [line for line in text.splitlines() if "_per_" not in line and "/" not in line]
    return [line for line in lines if '"out"' not in line]


@pytest.mark.promise("R1")
def test_kill_9_at_random_points_leaves_no_trace(
    folder: Path, tmp_path: Path, measured: Measured
) -> None:
    def start(out: Path) -> ForkServerProcess:
        return processes.rank(folder, out)

    seconds = processes.timed(start, tmp_path / "whole")
    expected = timeless(json.loads((tmp_path / "whole" / "ranking.json").read_text()))
    for out in processes.killed(start, tmp_path, 6, seconds=seconds):
        assert timeless(json.loads((out / "ranking.json").read_text())) == expected
    measured("kill -9 of rank-teachers", "6 kills, the same ranking to the bit")


def outcomes(correct: np.ndarray, nll: float = 1.0) -> list[Outcome]:
    return [Outcome({"nll": nll}, row, 1, 1, []) for row in correct]


def rights(count: int, images: int = 1000) -> np.ndarray:
    found = np.zeros((1, images), bool)
    found[0, :count] = True
    return found


def candidate(name: str, *, size: int, seconds: float, top1: float = 0.9) -> dict[str, Any]:
    costs = {"parameters": size, "flops": 1e9 * size, "seconds_per_image": seconds}
    return {"name": name, "val_top1": top1, "images_per_second": 1 / seconds, **costs}


A, B, C = (
    candidate("big", size=30, seconds=3.0),
    candidate("small", size=10, seconds=2.0),
    candidate("quick", size=20, seconds=1.0),
)


def alternating(base: np.ndarray, lost: Sequence[int], won: Sequence[int]) -> np.ndarray:
    found = base.copy()
    found[0, list(lost)] = False
    found[0, list(won)] = True
    return found


# Students of which the first three cannot be told apart: 800 of 1,000 images, one more or less.
TOP = rights(800)
NEAR = alternating(TOP, range(40), range(800, 839))  # 799
ALSO = alternating(TOP, range(50), range(800, 848))  # 798
CONTROL = outcomes(rights(700))


@pytest.mark.parametrize(
    ("goal", "order"),
    [
        ("accuracy", ["big", "small", "quick"]),
        ("mobile", ["small", "quick", "big"]),
        ("time", ["quick", "small", "big"]),
    ],
)
def test_a_goal_orders_teachers_whose_students_are_as_good(goal: Goal, order: list[str]) -> None:
    rows = ranked([A, B, C], [outcomes(TOP), outcomes(NEAR), outcomes(ALSO)], CONTROL, goal)
    assert [row["name"] for row in rows] == order
    assert all(row["plateau"] for row in rows)
    assert all(row["gain"] > 0.09 for row in rows)
    if goal != "accuracy":
        assert {"mobile": "smallest", "time": "quickest"}[goal] in rows[0]["reason"]


@pytest.mark.parametrize("goal", ["accuracy", "mobile", "time"])
def test_no_answer_is_known_before_it_is_measured(goal: Goal) -> None:
    worse = outcomes(rights(600))
    for best in range(3):
        runs = [outcomes(TOP) if i == best else worse for i in range(3)]
        rows = ranked([A, B, C], runs, CONTROL, goal)
        assert rows[0]["name"] == (A, B, C)[best]["name"]
        assert [row["plateau"] for row in rows] == [True, False, False]
        assert "more than a standard error" in rows[1]["reason"]


def test_the_front_is_what_no_other_beats_in_both() -> None:
    dear = candidate("dear", size=40, seconds=1.0)
    runs = [outcomes(rights(n)) for n in (800, 780, 790, 795)]
    rows = {row["name"]: row for row in ranked([A, B, C, dear], runs, CONTROL, "mobile")}
    assert {name for name, row in rows.items() if row["front"]} == {"big", "small", "quick"}
    assert not rows["dear"]["front"]  # larger than `big`, and its student is worse


def test_a_teacher_below_the_student_is_warned_of() -> None:
    poor = candidate("poor", size=1, seconds=1.0, top1=0.5)
    rows = ranked([A, poor], [outcomes(TOP), outcomes(NEAR)], CONTROL, "accuracy")
    assert [row["below_student"] for row in rows] == [False, True]
    assert "worse than the student alone" in rows[1]["reason"]


def test_a_student_that_failed_is_last_and_says_why() -> None:
    lost = [Outcome({}, np.zeros(0, bool), 0, 0, [], "the loss is not finite")]
    rows = ranked([A, B], [lost, outcomes(TOP)], CONTROL, "accuracy")
    assert [row["name"] for row in rows] == ["small", "big"]
    assert rows[1]["rank"] is None
    assert "the loss is not finite" in rows[1]["reason"]
    with pytest.raises(DivergedError, match="every proxy student failed"):
        ranked([A], [lost], CONTROL, "accuracy")


def test_a_control_that_failed_leaves_the_ranking_without_gains() -> None:
    lost = [Outcome({}, np.zeros(0, bool), 0, 0, [], "not finite")]
    rows = ranked([A, B], [outcomes(TOP), outcomes(NEAR)], lost, "accuracy")
    assert "gain" not in rows[0]
    assert rows[0]["rank"] == 1
