"""A sweep is as many runs as it has trials: each the same as alone, whatever happens on the way."""

from __future__ import annotations

import json
import shutil
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from distill.engine import launch
from distill.engine.train import train
from distill.errors import DivergedError, IdentityError, RecipeError
from distill.grid import Axis, points, temperature_axis, weight_axis
from distill.recipe import Recipe
from distill.report.sweep import verdict
from distill.sweep import Part, Sweep, sweep
from tests.cli.conftest import ROOT
from tests.engine import processes
from tests.engine.conftest import STUDENT, TEACHER
from tests.promises import Measured


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the recipe, whose teacher is trained."""
    found = tmp_path_factory.mktemp("sweep")
    (found / "teacher.yaml").write_text(TEACHER)
    (found / "student.yaml").write_text(STUDENT)
    train(Recipe.load(found / "teacher.yaml"), found / "teacher")
    return found


@pytest.fixture
def recipe(folder: Path, tmp_path: Path) -> Recipe:
    """The recipe, with its trained teacher beside what a test writes."""
    shutil.copytree(folder / "teacher", tmp_path / "teacher")
    return Recipe.load(folder / "student.yaml")


def swept(recipe: Recipe, out: Path, *temperatures: float, **options: Any) -> Sweep:
    axes = options.pop("axes", None) or [temperature_axis(recipe, temperatures or (1, 4))]
    found = sweep(recipe, axes, out, workers=0, **options)
    assert isinstance(found, Sweep)
    return found


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(run / "student.safetensors")


def trial_files(out: Path) -> dict[str, bytes]:
    """What the trials left behind that must not depend on how they came about."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.glob("trials/*/*"))
        if path.name in ("trial.json", "student.safetensors", "metrics.jsonl", "recipe.yaml")
    }


TERMS = {
    "logits": "[{term: ce, weight: 0.1}, {term: kd, weight: 0.9, temperature: 3}]",
    "learned projectors": "[{term: ce}, {term: kd}, {term: features}, {term: similarity}]",
    "another look": "[{term: ce}, {term: kd}, {term: subset}]",
}


@pytest.mark.parametrize("objective", TERMS.values(), ids=TERMS)
@pytest.mark.parametrize("live", [False, True], ids=["cached", "live"])
def test_every_student_is_the_one_that_its_own_run_trains(
    recipe: Recipe, tmp_path: Path, objective: str, live: bool
) -> None:
    from distill import yamlio

    recipe = recipe.changed({"objective": yamlio.load(objective)[0]})
    swept(recipe, tmp_path / "sweep", 1, 2, 8, live=live)
    trials = sorted((tmp_path / "sweep" / "trials").iterdir())
    assert len(trials) == 3
    for trial in trials:
        alone = tmp_path / f"alone-{trial.name}"
        train(Recipe.load(trial / "recipe.yaml"), alone, workers=0)
        ours, expected = weights_of(trial), weights_of(alone)
        assert ours.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-5)
        assert (trial / "metrics.jsonl").read_bytes() == (alone / "metrics.jsonl").read_bytes()


def test_students_of_other_kinds_and_micro_batches_are_their_own_too(
    recipe: Recipe, tmp_path: Path
) -> None:
    axes = [Axis("student.width", ("student.width",), (16, 24)), weight_axis(recipe, (0.5, 0.9))]
    swept(recipe, tmp_path / "sweep", axes=axes, live=True, device_batch_size=5)
    trials = sorted((tmp_path / "sweep" / "trials").iterdir())
    assert len(trials) == 4
    for trial in trials:
        alone = tmp_path / f"alone-{trial.name}"
        train(Recipe.load(trial / "recipe.yaml"), alone, workers=0, device_batch_size=5)
        expected = weights_of(alone)
        for name, tensor in weights_of(trial).items():
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-5)


def test_the_best_is_chosen_by_validation_and_tested_alone(recipe: Recipe, tmp_path: Path) -> None:
    found = swept(recipe, tmp_path / "sweep", 1, 2, 8, seeds=[0, 1, 0], baseline=True)
    assert found.seeds == [0, 1]
    rows = found.settings
    assert [row["temperature"] for row in rows] == [1, 2, 8]
    highest = max(rows, key=lambda row: (row["val_top1"], -row["val_nll"]))
    assert found.best["temperature"] == highest["temperature"]
    assert {"temperature": found.best["temperature"]} in found.plateau
    tested = {path.parent.name for path in (tmp_path / "sweep" / "trials").glob("*/result.json")}
    assert tested == {Path(run).name for run in found.best["runs"]}
    results = [json.loads((Path(run) / "result.json").read_text()) for run in found.best["runs"]]
    assert len(results) == 2
    mean = sum(result["top1"] for result in results) / 2
    assert found.best["test_top1"] == pytest.approx(mean)
    low, high = found.best["test_top1_ci95"]
    assert low <= mean <= high
    assert sum(result["val_top1"] for result in results) / 2 == pytest.approx(highest["val_top1"])
    assert set(found.levels) == {"teacher", "student alone"}
    gain = found.best["val_top1"] - found.levels["student alone"]
    assert found.best["gain"] == pytest.approx(gain)
    assert found.best["gain_ci95"][0] <= gain <= found.best["gain_ci95"][1]
    again = Recipe.load(found.best["recipe"])
    assert again.objective[1].arguments["temperature"] == found.best["temperature"]


def test_the_student_alone_is_the_one_without_teacher(recipe: Recipe, tmp_path: Path) -> None:
    swept(recipe, tmp_path / "sweep", 4, baseline=True)
    trial = tmp_path / "sweep" / "trials" / "alone_seed-3"
    plain = Recipe.load(tmp_path / "sweep" / "best.yaml").without_teacher()
    train(plain, tmp_path / "plain", workers=0)
    expected = weights_of(tmp_path / "plain")
    for name, tensor in weights_of(trial).items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-5)


def test_a_round_holds_what_fits_into_memory_and_ends_alike(recipe: Recipe, tmp_path: Path) -> None:
    together = swept(recipe, tmp_path / "a" / "sweep", 1, 2, 8)
    shutil.copytree(tmp_path / "teacher", tmp_path / "b" / "teacher")
    in_turn = swept(recipe, tmp_path / "b" / "sweep", 1, 2, 8, memory=1.0)
    assert together.plateau == in_turn.plateau
    ours, theirs = (trial_files(tmp_path / name / "sweep") for name in "ab")
    assert ours.keys() == theirs.keys()
    for name, content in ours.items():
        assert name.endswith("recipe.yaml") or content == theirs[name], name


def test_a_trial_that_fails_ends_no_other(recipe: Recipe, tmp_path: Path) -> None:
    rates = Axis("optimizer.lr", ("optimizer.lr",), (2e-3, 1e38))
    found = swept(recipe.changed({"optimizer.clip_norm": None}), tmp_path / "sweep", axes=[rates])
    good, bad = found.settings
    assert bad["failed"]
    assert good["failed"] is None
    assert found.best["optimizer.lr"] == 2e-3
    assert "Failed: optimizer.lr 1e+38." in verdict(found.to_json())


def test_a_student_that_cannot_be_built_ends_no_other(recipe: Recipe, tmp_path: Path) -> None:
    widths = Axis("student.width", ("student.width",), (16, 17))  # of two heads
    found = swept(recipe, tmp_path / "sweep", axes=[widths])
    assert "heads" in found.settings[1]["failed"]
    assert found.best["student.width"] == 16


def test_a_sweep_in_which_all_fail_says_so(recipe: Recipe, tmp_path: Path) -> None:
    recipe = recipe.changed({"optimizer.clip_norm": None, "optimizer.lr": 1e38})
    with pytest.raises(DivergedError, match="every student failed"):
        sweep(recipe, [temperature_axis(recipe, (1, 2))], tmp_path / "sweep", workers=0)


def test_values_can_be_added_and_nothing_is_done_twice(recipe: Recipe, tmp_path: Path) -> None:
    swept(recipe, tmp_path / "sweep", 1, 2)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "sweep").glob("trials/*/trial.json")}
    found = swept(recipe, tmp_path / "sweep", 1, 2, 5)
    assert [row["temperature"] for row in found.settings] == [1, 2, 5]
    assert (
        before.items()
        <= {
            p: p.stat().st_mtime_ns for p in (tmp_path / "sweep").glob("trials/*/trial.json")
        }.items()
    )


def test_another_recipe_in_the_same_place_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    swept(recipe, tmp_path / "sweep", 1)
    before = trial_files(tmp_path / "sweep")
    with pytest.raises(IdentityError, match=r"optimizer\.lr"):
        swept(recipe.changed({"optimizer.lr": 0.5}), tmp_path / "sweep", 1)
    assert trial_files(tmp_path / "sweep") == before


def test_a_damaged_trial_is_begun_anew(recipe: Recipe, tmp_path: Path) -> None:
    whole = swept(recipe, tmp_path / "sweep", 1, 2)
    expected = trial_files(tmp_path / "sweep")
    broken = tmp_path / "sweep" / "trials" / "temperature-1_seed-3"
    (broken / "trial.json").unlink()
    for file in broken.glob("checkpoint/*/model.safetensors"):
        file.write_bytes(b"broken")
    assert swept(recipe, tmp_path / "sweep", 1, 2) == whole
    assert trial_files(tmp_path / "sweep") == expected


def test_a_recipe_without_validation_holds_a_tenth_out(recipe: Recipe, tmp_path: Path) -> None:
    found = swept(recipe.changed({"data.val": 0.0, "data.fraction": 1.0}), tmp_path / "sweep", 4)
    assert found.images["val"] == pytest.approx(90, abs=5)
    assert Recipe.load(found.best["recipe"]).data.val == 0.1


def test_a_recipe_whose_students_cannot_be_compared_is_refused(
    recipe: Recipe, tmp_path: Path
) -> None:
    several = recipe.model_copy(update={"generations": 2})
    with pytest.raises(RecipeError, match="generations: must be 1"):
        swept(several, tmp_path / "sweep", 1)
    data = recipe.data.model_copy(update={"transfer": "photos", "val": 0.0})
    with pytest.raises(RecipeError, match="no labels"):
        swept(recipe.model_copy(update={"data": data}), tmp_path / "sweep", 1)
    assert not (tmp_path / "sweep").exists()


def test_what_cannot_be_varied_is_refused(recipe: Recipe) -> None:
    plain = recipe.without_teacher()
    for axis in (temperature_axis, weight_axis):
        with pytest.raises(RecipeError, match="objective: no term"):
            axis(plain, [1.0])
    with pytest.raises(RecipeError, match="a value stands twice"):
        points(recipe, [temperature_axis(recipe, [1.0, 1.0])], [0])
    with pytest.raises(RecipeError, match=r"objective\.1\.temperature=-1"):
        points(recipe, [temperature_axis(recipe, [-1.0])], [0])
    with pytest.raises(RecipeError, match="did you mean 'lr'"):
        points(recipe, [Axis("optimizer.lrr", ("optimizer.lrr",), (1.0,))], [0])


def test_a_temperature_is_one_at_which_classes_of_a_teacher_are_heard(recipe: Recipe) -> None:
    terms = ["ce", "kd", "infonce", "crd", "tfkd", "dkd", "dist", "similarity"]
    several = recipe.changed({"objective": [{"term": term} for term in terms]})
    assert temperature_axis(several, [1.0]).keys == tuple(
        f"objective.{terms.index(term)}.temperature" for term in ("kd", "dkd", "dist")
    )


def test_two_parts_are_one_whole(recipe: Recipe, folder: Path, tmp_path: Path) -> None:
    whole = swept(recipe, tmp_path / "whole" / "sweep", 1, 2, 8)
    shutil.copytree(tmp_path / "teacher", tmp_path / "parts" / "teacher")
    out = tmp_path / "parts" / "sweep"
    axes = [temperature_axis(recipe, (1, 2, 8))]
    first = sweep(recipe, axes, out, shard=(1, 2), workers=0)
    assert first == Part(2, 3, str(out))
    found = sweep(recipe, axes, out, shard=(2, 2), workers=0)
    assert isinstance(found, Sweep)
    for ours, theirs in zip(found.settings, whole.settings, strict=True):
        assert ours | {"runs": []} == theirs | {"runs": []}
    assert found.best["test_top1"] == whole.best["test_top1"]


def test_a_process_for_each_device_does_its_part(
    recipe: Recipe, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = ["temperature-sweep", str(folder / "student.yaml"), "--temperatures", "1,2,8"]
    command += ["--out", str(tmp_path / "sweep")]
    assert launch.spawn_shards(["", ""], command, (1, 1)) == 0
    done = [path.parent.name for path in (tmp_path / "sweep").glob("trials/*/trial.json")]
    assert len(done) == 3
    assert not (tmp_path / "sweep" / "sweep.json").exists()  # left to the one that started them


@pytest.mark.promise("R1")
@pytest.mark.parametrize(
    "kills", [10, pytest.param(200, marks=[pytest.mark.soak, pytest.mark.timeout(3600)])]
)
def test_kill_9_at_random_points_leaves_no_trace(
    folder: Path, tmp_path: Path, kills: int, measured: Measured
) -> None:
    def start(place: Path) -> ForkServerProcess:
        if not place.exists():
            shutil.copytree(folder / "teacher", place / "teacher")
        return processes.sweep(folder / "student.yaml", place, (1, 3, 8))

    seconds = processes.timed(start, tmp_path / "whole")
    expected = trial_files(tmp_path / "whole" / "sweep")
    for place in processes.killed(start, tmp_path, kills, seconds=seconds):
        for name in ("sweep.json", "sweep.csv", "sweep.html", "sweep.svg", "best.yaml"):
            ours, theirs = (p / "sweep" / name for p in (place, tmp_path / "whole"))
            assert ours.read_bytes() == theirs.read_bytes(), name
        assert trial_files(place / "sweep") == expected
    measured("kill -9 of a temperature sweep", f"{kills} kills, every file the same to the bit")
