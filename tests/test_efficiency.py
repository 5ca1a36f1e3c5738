"""Curves over images: nested parts, equal steps, fair teachers, numbers that follow from them."""

from __future__ import annotations

import json
import shutil
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from distill import statistics
from distill.data import datasets
from distill.efficiency import Answers, Efficiency, compare, efficiency
from distill.engine.train import train
from distill.engine.trials import outcome
from distill.errors import DivergedError, IdentityError, RecipeError
from distill.models import weights
from distill.recipe import Recipe
from distill.report.efficiency import figure, to_html, verdict, write
from distill.statistics import Curve
from distill.subsets import plan, require_comparable
from distill.sweep import Part
from tests.engine import processes
from tests.engine.conftest import STUDENT, TEACHER
from tests.promises import Measured

ALL = 111  # images that the recipe trains on
SIZES = (40, ALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the recipe, whose teacher is trained."""
    found = tmp_path_factory.mktemp("efficiency")
    (found / "teacher.yaml").write_text(TEACHER)
    (found / "student.yaml").write_text(STUDENT)
    train(Recipe.load(found / "teacher.yaml"), found / "teacher")
    return found


@pytest.fixture
def recipe(folder: Path, tmp_path: Path) -> Recipe:
    """The recipe, with its trained teacher beside what a test writes."""
    shutil.copytree(folder / "teacher", tmp_path / "teacher")
    return Recipe.load(folder / "student.yaml")


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Efficiency:
    """All curves of the recipe at two sizes."""
    out = tmp_path_factory.mktemp("whole") / "curves"
    shutil.copytree(folder / "teacher", out.parent / "teacher")
    return measured({"student": Recipe.load(folder / "student.yaml")}, out, baseline=True)


def measured(recipes: dict[str, Recipe], out: Path, **options: Any) -> Efficiency:
    sizes = options.pop("sizes", SIZES)
    found = efficiency(recipes, out, sizes=sizes, workers=0, **options)
    assert isinstance(found, Efficiency)
    return found


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(run / "student.safetensors")


def same_weights(one: Path, other: Path) -> None:
    ours, theirs = weights_of(one), weights_of(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-5)


def trained_on(run: Path) -> set[int]:
    return set(datasets.load(Recipe.load(run / "recipe.yaml").data).train_ids.tolist())


def by_name(found: Efficiency) -> dict[str, dict[str, Any]]:
    return {curve["name"]: curve for curve in found.curves}


def trial_files(out: Path) -> dict[str, bytes]:
    """What trials left behind that must not depend on how they came about."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted([*out.glob("trials/*/*"), *out.glob("teachers/*/*")])
        if path.name in ("trial.json", "train.json", "student.safetensors", "metrics.jsonl")
    }


# What is planned.


def test_parts_are_nested_balanced_and_as_near_as_can_be(recipe: Recipe, tmp_path: Path) -> None:
    recipe = recipe.changed({"data.fraction": 1.0})
    everything = datasets.load(recipe.data)
    labels = everything.train.labels
    shares = np.bincount(labels[everything.train_ids]) / len(everything.train_ids)
    # All totals there are: a class of n images goes up by one at (k + 1/2) / n of them.
    counts = np.bincount(labels[everything.train_ids])
    jumps = {(k + 0.5) / n for n in counts.tolist() for k in range(1, n)}
    totals = [
        sum(max(round((jump + side) * n), 1) for n in counts.tolist())
        for jump in sorted(jumps)
        for side in (-1e-9, 1e-9)
    ]
    asked = (20, 41, 60, 99, 250, 333, 801, 810)
    planned = plan({"student": recipe}, tmp_path / "x", sizes=asked, teacher="all")
    before: set[int] = set()
    for n, size, row in zip(asked, planned.sizes, planned.curves[0].students, strict=True):
        ids = datasets.load(row[0].trial.recipe.data).train_ids
        assert len(ids) == size.images
        assert abs(size.images - n) == min(abs(total - n) for total in (*totals, 810))
        assert np.abs(np.bincount(labels[ids]) - len(ids) * shares).max() <= 1
        assert before < set(ids.tolist())
        before = set(ids.tolist())
    assert planned.notes == [
        f"{n} images: {size.images} are as near as balanced classes come"
        for n, size in zip(asked, planned.sizes, strict=True)
        if n != size.images
    ]


@pytest.mark.parametrize("warmup", [0.0, 0.3, 1.0, 4.0])
def test_steps_are_equal_and_the_warm_up_and_milestones_are_the_same_parts(
    recipe: Recipe, tmp_path: Path, warmup: float
) -> None:
    steps_at = {"optimizer.schedule": "step", "optimizer.milestones": [2.0, 3.5]}
    recipe = recipe.changed({"data.fraction": 1.0, "optimizer.warmup_epochs": warmup, **steps_at})
    planned = plan({"student": recipe}, tmp_path / "x", sizes=(30, 50, 130, 400, 790, 810))
    steps = 4 * (810 // 20)
    for curve in planned.curves:
        for size, (student,) in zip(planned.sizes, curve.students, strict=True):
            own = student.trial.recipe
            per_epoch = size.images // own.train.batch_size
            assert abs(own.train.epochs * per_epoch - steps) < per_epoch
            part = own.optimizer.warmup_epochs / own.train.epochs
            assert part == pytest.approx(warmup / 4)
            places = [milestone / own.train.epochs for milestone in own.optimizer.milestones]
            assert places == pytest.approx([2.0 / 4, 3.5 / 4])
            assert own.train.eval_epochs == own.train.epochs
    last = planned.curves[0].students[-1][0].trial.recipe
    assert last.optimizer == recipe.optimizer
    assert last.train == recipe.train.model_copy(update={"eval_epochs": 4})


def test_a_teacher_on_the_same_images_takes_its_own_steps(recipe: Recipe, tmp_path: Path) -> None:
    spec = recipe.teachers[0]
    assert spec.recipe is not None
    longer = spec.recipe.changed({"data.fraction": 0.5, "train.epochs": 6})  # 6 of 15 steps
    given = spec.model_copy(update={"recipe": longer})
    recipe = recipe.model_copy(update={"teachers": [given]})
    planned = plan({"student": recipe}, tmp_path / "x", sizes=SIZES, teacher="same")
    for (student,), size in zip(planned.curves[0].students, SIZES, strict=True):
        (teacher,) = student.teachers
        own = teacher.trial.recipe
        assert abs(own.train.epochs * (size // 30) - 6 * 15) < size // 30
        assert own.data.augment == longer.data.augment != recipe.data.augment
        assert own.data.fraction == student.trial.recipe.data.fraction


def test_sizes_that_are_not_given_go_up_in_ones_twos_and_fives(
    recipe: Recipe, tmp_path: Path
) -> None:
    def chosen(**changes: Any) -> list[int]:
        changed = recipe.changed({"data.val": 0.0, **changes})
        return [size.images for size in plan({"s": changed}, tmp_path / "x").sizes]

    assert chosen(**{"data.fraction": 1.0}) == [100, 200, 501, 900]  # 10 of a class; not 800 to 900
    assert chosen(**{"data.fraction": 0.5, "train.batch_size": 120}) == [200, 453]
    assert chosen(**{"data.fraction": 0.12}) == [109]


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ([112], "112 images: there are 111 to train on"),
        ([9], "9 images: less than one of each of the 10 classes"),
        ([0], "0 images: less than one of each"),
        ([19], "19 images: less than train.batch_size 20 of student"),
        ([25], "25 images: less than train.batch_size 30 of student, teachers.0"),
        ([40, 40], "40 images: the same 40 as of another size"),
    ],
)
def test_an_impossible_size_is_refused(
    recipe: Recipe, tmp_path: Path, sizes: list[int], said: str
) -> None:
    with pytest.raises(RecipeError) as refused:
        plan({"student": recipe}, tmp_path / "x", sizes=[*sizes, 500])
    assert said in str(refused.value)
    assert "500 images: there are 111" in str(refused.value)  # all faults at once


def test_recipes_of_other_images_are_refused(recipe: Recipe) -> None:
    require_comparable({"a": recipe, "b": recipe.changed({"data.augment": [], "data.mixup": 0.0})})
    for key, value in {"data.val": 0.2, "data.seed": 1, "data.fraction": 0.2}.items():
        with pytest.raises(RecipeError, match=f"a and b have not the same images: {key}"):
            require_comparable({"a": recipe, "b": recipe.changed({key: value})})
    with pytest.raises(RecipeError, match="b: generations"):
        require_comparable({"a": recipe, "b": recipe.model_copy(update={"generations": 2})})
    teacher = recipe.changed({"teachers.0.recipe.train.epochs": 9})
    with pytest.raises(RecipeError, match="a and b have two teachers of the name 'teacher'"):
        require_comparable({"a": recipe, "b": teacher})


def test_a_teacher_that_cannot_be_trained_anew_is_told_by_name(
    recipe: Recipe, tmp_path: Path, folder: Path
) -> None:
    shutil.copytree(folder / "teacher", tmp_path / "alone")
    (tmp_path / "alone" / "recipe.yaml").unlink()
    published = {"model": "timm/resnet18.a1_in1k", "weights": "pretrained"}
    begun = recipe.changed({"teachers.0.recipe.student.weights": str(tmp_path / "teacher")})
    known = recipe.changed({"teachers": [{"weights": str(tmp_path / "teacher")}]})
    for changed, said in (
        (recipe.changed({"teachers": [published]}), "no recipe says how pretrained was trained"),
        (recipe.changed({"teachers": [{"weights": str(tmp_path / "alone")}]}), "no recipe says"),
        (begun, "begins with"),
        (recipe.changed({"teachers": [], "cache": {"path": "x"}, "data.mixup": 0}), "cache.path"),
    ):
        with pytest.raises(RecipeError, match=f"student: .*{said}"):
            require_comparable({"student": changed}, teacher="same")
        planned = plan({"student": changed}, tmp_path / "x", sizes=SIZES)
        assert [curve.teacher for curve in planned.curves] == ["all"]
        assert "student has the given teacher" in planned.notes[0]
        assert said in planned.notes[0]
    both = plan({"student": known}, tmp_path / "x", sizes=SIZES)
    assert [curve.teacher for curve in both.curves] == ["all", "same"]


def test_what_curves_have_in_common_is_trained_once(recipe: Recipe, tmp_path: Path) -> None:
    # The teacher's own images are the student's: with all of them it is the given one.
    fit = {"data.fraction": 0.14, "data.val": 0.1}
    recipe = recipe.changed({f"teachers.0.recipe.{key}": value for key, value in fit.items()})
    hotter = recipe.changed({"objective.1.temperature": 8.0})
    teacher = recipe.teachers[0].recipe
    assert teacher is not None
    recipes = {"kd": recipe, "hotter": hotter, "teacher": teacher}
    planned = plan(recipes, tmp_path / "x", sizes=SIZES, baseline=True)
    curves = {curve.name: curve.students for curve in planned.curves}
    assert list(curves) == [
        "kd, teacher as given",
        "kd, teacher on the same images",
        "hotter, teacher as given",
        "hotter, teacher on the same images",
        "teacher",
        "student alone",
    ]
    given, same, hot, hot_same, plain, alone = curves.values()
    assert given[1] == same[1]
    assert given[0] != same[0]
    assert same[0][0].teachers == hot_same[0][0].teachers == (plain[0][0],)
    caches = [[row[0].trial.recipe.cache for row in one] for one in (given, hot)]
    assert caches[0] == caches[1]
    assert alone[0][0].trial.recipe.teachers == []
    names = [student.trial.name for student in planned.students()]
    assert len(set(names)) == len(names) == 2 * 6 - 2


def test_the_teachers_of_teachers_have_seen_the_same_images_too(
    recipe: Recipe, tmp_path: Path
) -> None:
    assistant = recipe.changed({"data.fraction": 1.0})
    spec = {"recipe": assistant.model_dump(), "name": "assistant"}
    recipe = recipe.changed({"teachers": [spec]})
    planned = plan({"student": recipe}, tmp_path / "x", sizes=SIZES, teacher="same")
    (student,) = planned.curves[0].students[0]
    (middle,) = student.teachers
    (first,) = middle.teachers
    ids = [set(datasets.load(one.trial.recipe.data).train_ids) for one in (student, middle, first)]
    assert ids[0] == ids[1] == ids[2]
    assert len(ids[0]) == 40
    run = str(tmp_path / "x" / first.folder / first.trial.name)
    assert middle.trial.recipe.teachers[0].weights == run


def test_a_cache_that_a_recipe_names_serves_where_nothing_is_mixed(
    recipe: Recipe, tmp_path: Path
) -> None:
    def paths(**changes: Any) -> list[str | None]:
        changed = recipe.changed({"cache": {"path": "mine", "views": 3}, **changes})
        planned = plan({"s": changed}, tmp_path / "x", sizes=SIZES)
        rows = [row[0].trial.recipe.cache for curve in planned.curves for row in curve.students]
        assert [cache.views for cache in rows if cache] == [3] * 4
        return [cache.path for cache in rows if cache]

    own = str(tmp_path / "x" / "caches" / "s")
    fair = [f"{own}_same_40", f"{own}_same_111"]
    assert paths() == [f"{own}_all_40", "mine", *fair]
    assert paths(**{"data.mixup": 0.0}) == ["mine", "mine", *fair]
    alone = {"teachers": [], "cache": {"path": "mine"}, "objective": [{"term": "kd"}]}
    with pytest.raises(RecipeError, match=r"cache\.path: images are mixed"):
        plan({"s": recipe.changed(alone)}, tmp_path / "x", sizes=SIZES)
    live = plan({"s": recipe}, tmp_path / "x", sizes=SIZES, live=True)
    assert all(student.trial.recipe.cache is None for student in live.students())


# What is trained.


def test_every_student_is_the_one_that_its_own_recipe_trains(
    whole: Efficiency, tmp_path: Path
) -> None:
    runs = sorted(Path(whole.out).glob("trials/*"))
    assert len(runs) == 6
    for run in runs:
        train(Recipe.load(run / "recipe.yaml"), tmp_path / run.name, workers=0)
        same_weights(run, tmp_path / run.name)
        result = json.loads((tmp_path / run.name / "result.json").read_text())
        kept = outcome(run)
        assert kept is not None
        assert kept.scores["top1"] == pytest.approx(result["top1"])


def test_a_teacher_on_the_same_images_has_seen_no_other(whole: Efficiency, tmp_path: Path) -> None:
    out = Path(whole.out)
    for size in SIZES:
        run, student = out / "teachers" / f"teacher_{size}", f"student_same_{size}_seed-3"
        assert trained_on(run) == trained_on(out / "trials" / student)
        assert len(trained_on(run)) == size
        told = Recipe.load(out / "trials" / student / "recipe.yaml")
        assert told.teachers[0].weights == str(run)
        train(Recipe.load(run / "recipe.yaml"), tmp_path / f"{size}", workers=0)
        same_weights(run, tmp_path / f"{size}")
        given = Recipe.load(out / "trials" / f"student_all_{size}_seed-3" / "recipe.yaml")
        assert given.teachers[0].weights == str(out.parent / "teacher")


def test_the_student_alone_hears_nobody(whole: Efficiency, folder: Path, tmp_path: Path) -> None:
    recipe = Recipe.load(folder / "student.yaml")
    curve = by_name(whole)["student alone"]
    assert curve["teacher"] is None
    for point in curve["points"]:
        changes = dict.fromkeys(("train.epochs", "train.eval_epochs"), point["epochs"])
        changes |= {"data.fraction": point["fraction"], "cache": {"views": point["epochs"]}}
        changes |= {"optimizer.warmup_epochs": point["epochs"] / 4}
        plain = recipe.changed(changes).without_teacher()
        train(plain, tmp_path / str(point["size"]), workers=0)
        same_weights(Path(point["runs"][0]["run"]), tmp_path / str(point["size"]))


def test_points_are_those_of_their_runs(whole: Efficiency) -> None:
    assert whole.images == {"train": ALL, "test": 897}
    assert whole.sizes == list(SIZES)
    assert list(by_name(whole)) == [
        "student, teacher as given",
        "student, teacher on the same images",
        "student alone",
    ]
    for curve in whole.curves:
        for point, size in zip(curve["points"], SIZES, strict=True):
            (run,) = point["runs"]
            kept = outcome(Path(run["run"]))
            assert kept is not None
            assert point["size"] == size
            assert point["steps"] == 20
            assert point["top1"] == run["top1"] == pytest.approx(kept.correct.mean())
            assert point["top1_ci95"][0] <= point["top1"] <= point["top1_ci95"][1]
            assert point["gap"] == pytest.approx(point["train_top1"] - point["top1"])
        accuracies = np.array([point["top1"] for point in curve["points"]])
        area = statistics.area(Curve(np.array(SIZES), accuracies))
        assert curve["area"] == pytest.approx(area)
        assert curve["area_ci95"][0] <= area <= curve["area_ci95"][1]


def test_the_gap_is_to_the_images_that_were_trained_on(whole: Efficiency) -> None:
    for point in (curve["points"][0] for curve in whole.curves):
        run = Path(point["runs"][0]["run"])
        dataset = datasets.load(Recipe.load(run / "recipe.yaml").data)
        assert dataset.train.pixels is not None
        pixels = torch.from_numpy(dataset.train.pixels[dataset.train_ids])
        network = weights.load(run).eval()
        with torch.no_grad():
            images = pixels.permute(0, 3, 1, 2).expand(-1, 3, -1, -1).float() / 255
            predicted = network(images).logits.argmax(dim=1).numpy()
        right = predicted == dataset.train.labels[dataset.train_ids]
        assert point["train_top1"] == pytest.approx(right.mean())


def test_seeds_draw_other_students_on_the_same_images(recipe: Recipe, tmp_path: Path) -> None:
    options: dict[str, Any] = {"teacher": "all", "live": True, "sizes": [40]}
    found = measured({"student": recipe}, tmp_path / "x", seeds=[0, 1, 1], **options)
    assert found.seeds == [0, 1]
    first, second = (Path(run["run"]) for run in found.curves[0]["points"][0]["runs"])
    assert trained_on(first) == trained_on(second)
    assert not torch.equal(*(next(iter(weights_of(run).values())) for run in (first, second)))
    (point,) = found.curves[0]["points"]
    assert point["top1"] == pytest.approx(np.mean([run["top1"] for run in point["runs"]]))
    assert found.multipliers == []
    assert "One number of images makes no curve" in verdict(found.to_json())[1]


def test_a_named_cache_is_made_of_all_images_once(recipe: Recipe, tmp_path: Path) -> None:
    named = {"path": str(tmp_path / "mine"), "views": 2}
    recipe = recipe.changed({"cache": named, "data.mixup": 0.0})
    measured({"student": recipe}, tmp_path / "x", teacher="all", sizes=[40])
    assert not (tmp_path / "x" / "caches").exists()
    manifest = json.loads((tmp_path / "mine" / "manifest.json").read_text())
    assert (manifest["samples"], manifest["views"]) == (ALL, 2)


# What fails, stops, is parted or goes on.


def test_a_recipe_or_a_size_that_fails_ends_no_other(recipe: Recipe, tmp_path: Path) -> None:
    wild = recipe.changed({"optimizer.clip_norm": None, "optimizer.lr": 1e38})
    plain = recipe.without_teacher()
    recipes = {"good": plain, "wild": wild.without_teacher()}
    found = measured(recipes, tmp_path / "x")
    curves = by_name(found)
    assert curves["good"]["area"] is not None
    assert curves["wild"]["area"] is None
    assert all(point["failed"] for point in curves["wild"]["points"])
    assert found.multipliers == []
    said = verdict(found.to_json())
    assert any(line.startswith('Failed: "wild" with 40 images') for line in said)
    write(found.to_json(), tmp_path / "x")
    assert "failed" in (tmp_path / "x" / "efficiency.html").read_text()
    with pytest.raises(DivergedError, match="every student failed"):
        measured({"wild": wild.without_teacher()}, tmp_path / "y")


def test_a_teacher_that_fails_takes_its_own_students_alone(recipe: Recipe, tmp_path: Path) -> None:
    # It is given what it can learn from, but anew it diverges.
    teacher = tmp_path / "teacher" / "recipe.yaml"
    teacher.write_text(teacher.read_text().replace("lr: 0.05", "lr: 1e38"))
    recipe = recipe.changed({"teachers": [{"weights": str(tmp_path / "teacher")}]})
    found = measured({"student": recipe}, tmp_path / "x")
    given, same = found.curves
    assert not any(point["failed"] for point in given["points"])
    assert all("its teacher failed" in point["failed"] for point in same["points"])
    assert found.multipliers == []


def test_sizes_and_recipes_can_be_added_and_nothing_is_done_twice(
    recipe: Recipe, tmp_path: Path
) -> None:
    plain = recipe.without_teacher()
    measured({"plain": plain}, tmp_path / "x", sizes=[40])
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "x").glob("trials/*/*")}
    other = plain.changed({"student.width": 24})
    found = measured({"plain": plain, "other": other}, tmp_path / "x", sizes=[40, 60])
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "x").glob("trials/*/*")}
    assert before.items() <= after.items()
    assert found.sizes == [40, 60]
    assert len(list((tmp_path / "x" / "trials").iterdir())) == 4


def test_another_recipe_in_the_same_place_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    plain = recipe.without_teacher()
    measured({"student": plain}, tmp_path / "x", sizes=[40])
    before = trial_files(tmp_path / "x")
    with pytest.raises(IdentityError, match=r"optimizer\.lr"):
        measured({"student": plain.changed({"optimizer.lr": 0.5})}, tmp_path / "x", sizes=[40])
    assert trial_files(tmp_path / "x") == before


def test_parts_are_one_whole(
    recipe: Recipe, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The plain recipe trains what is the other one's teacher on the same images.
    spec = recipe.teachers[0].recipe
    assert spec is not None
    plain = spec.changed({"data.fraction": 0.14, "data.val": 0.1})
    recipes = {"student": recipe, "plain": plain}

    def measure(place: str, part: int, count: int) -> Efficiency | Part:
        if not (tmp_path / place).exists():
            shutil.copytree(folder / "teacher", tmp_path / place / "teacher")
        monkeypatch.chdir(tmp_path / place)
        options: dict[str, Any] = {"baseline": True, "seeds": [0, 1], "workers": 0}
        return efficiency(recipes, Path("x"), sizes=SIZES, shard=(part, count), **options)

    def made(place: str) -> set[str]:
        found = (tmp_path / place / "x").glob("*/*")
        return {"/".join(path.parts[-2:]) for path in found if path.is_dir()}

    whole = measure("whole", 1, 1)
    assert isinstance(whole, Efficiency)
    parts = []
    for part in (1, 2, 3):  # none needs what another one makes
        found = measure(f"part-{part}", part, 3)
        assert isinstance(found, Part)
        assert 0 < found.done < found.trials
        parts += sorted(made(f"part-{part}"))
        shutil.copytree(tmp_path / f"part-{part}", tmp_path / "all", dirs_exist_ok=True)
    assert sorted(parts) == sorted(made("whole"))
    before = trial_files(tmp_path / "all" / "x")
    assert measure("all", 3, 3) == whole
    expected = trial_files(tmp_path / "whole" / "x")
    assert {name: expected[name] for name in before} == before
    assert trial_files(tmp_path / "all" / "x") == expected


@pytest.mark.promise("R1")
@pytest.mark.parametrize(
    "kills", [4, pytest.param(100, marks=[pytest.mark.soak, pytest.mark.timeout(3600)])]
)
def test_kill_9_at_random_points_leaves_no_trace(
    folder: Path, tmp_path: Path, kills: int, measured: Measured
) -> None:
    def start(place: Path) -> ForkServerProcess:
        if not place.exists():
            shutil.copytree(folder / "teacher", place / "teacher")
        process = processes.context.Process(target=measure, args=(folder, place))
        process.start()
        return process

    seconds = processes.timed(start, tmp_path / "whole")
    expected = trial_files(tmp_path / "whole" / "x")
    for place in processes.killed(start, tmp_path, kills, seconds=seconds):
        for name in ("json", "csv", "html", "svg"):
            ours, theirs = (
                (one / "x" / f"efficiency.{name}").read_bytes()
                for one in (place, tmp_path / "whole")
            )
            assert ours == theirs, name
        assert trial_files(place / "x") == expected
    measured("kill -9 of sample-efficiency", f"{kills} kills, every file the same to the bit")


def measure(folder: Path, place: Path) -> None:
    """All curves of a short recipe, in a process of its own."""
    import os

    torch.set_num_threads(1)
    os.chdir(place)
    recipe = Recipe.load(folder / "student.yaml", ["train.epochs=2"])
    found = measured({"student": recipe}, Path("x"), baseline=True, checkpoint_seconds=0)
    write(found.to_json(), Path("x"))


# What follows from the answers.

# The example curves of "accuracy over training images" that the toolkit's first article prints.
EXAMPLE = [1_000, 5_000, 10_000, 50_000, 100_000, 500_000]
CNN, VIT, HYBRID = (45, 62, 71, 79, 83, 85), (38, 52, 64, 75, 81, 85), (48, 65, 73, 80, 84, 86)


def right_on(*percent: int) -> Answers:
    """A curve that is right on so many of each 100 of 1,000 images."""
    return Answers(EXAMPLE, [np.arange(1_000)[None] % 100 < n for n in percent])


def test_the_examples_multipliers_and_areas() -> None:
    found = compare([right_on(*CNN), right_on(*VIT), right_on(*HYBRID)])
    of = {(one["of"], one["over"]): one for one in found.multipliers}
    assert list(of) == [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)]
    assert of[0, 1]["value"] == pytest.approx(2.08, abs=0.005)
    assert of[2, 1]["value"] == pytest.approx(2.74, abs=0.005)
    assert of[2, 0]["value"] == pytest.approx(1.33, abs=0.005)
    assert of[1, 0]["value"] == pytest.approx(1 / of[0, 1]["value"])
    assert of[1, 0]["ci95"] == pytest.approx([1 / end for end in reversed(of[0, 1]["ci95"])], 0.01)
    low, high = of[0, 1]["ci95"]
    assert low < of[0, 1]["value"] < high
    assert of[0, 1]["draws"] == statistics.RESAMPLES
    assert [area.value for area in found.areas] == pytest.approx([0.715, 0.663, 0.733], abs=5e-4)


def test_all_curves_see_the_same_draws() -> None:
    draw = np.random.default_rng(0)
    sizes = [100, 1_000, 10_000]
    correct = [draw.random((3, 400)) < rate for rate in (0.5, 0.6, 0.8, 0.4, 0.6, 0.7)]
    found = compare([Answers(sizes, correct[:3]), Answers(sizes, correct[3:])])
    draws = statistics.bootstrap(correct)
    ours, theirs = (
        [Curve(np.array(sizes), column) for column in part.T] for part in (draws[:3], draws[3:])
    )
    pairs = zip(ours, theirs, strict=True)
    kept = [one for pair in pairs if (one := statistics.data_multiplier(*pair)) is not None]
    low, high = np.quantile(kept, [0.025, 0.975])
    assert found.multipliers[0]["ci95"] == pytest.approx([low, high])
    assert found.multipliers[0]["draws"] == len(kept)
    areas = [statistics.area(curve) for curve in ours]
    assert found.areas[0].ci95 == pytest.approx(np.quantile(areas, [0.025, 0.975]))
    assert found.points[1][2] == statistics.estimate(correct[5].mean(), draws[5])
    alike = compare([Answers(sizes, correct[:3]), Answers(sizes, correct[:3])])
    assert alike.multipliers[0] == {
        "of": 0, "over": 1, "value": 1.0, "ci95": [1.0, 1.0], "draws": statistics.RESAMPLES
    }  # fmt: skip


def test_curves_without_an_accuracy_in_common_have_no_multiplier() -> None:
    found = compare([right_on(80, 81, 82, 83, 84, 85), right_on(10, 11, 12, 13, 14, 15)])
    assert [(one["value"], one["ci95"], one["draws"]) for one in found.multipliers] == [
        (None, None, 0)
    ] * 2
    few = compare([right_on(60, 62, 64, 66, 68, 70), right_on(50, 52, 54, 56, 58, 60)])
    assert few.multipliers[0]["value"] is None  # they meet in one point alone
    assert few.multipliers[0]["ci95"] is None


def as_found(answers: dict[str, Answers]) -> dict[str, Any]:
    """What `efficiency` would say of these answers."""
    compared = compare(list(answers.values()))
    names = list(answers)
    curves = []
    for name, estimates, area in zip(names, compared.points, compared.areas, strict=True):
        points = [
            {
                "size": size,
                "top1": one.value,
                "top1_ci95": one.ci95,
                "nll": 1.0,
                "train_top1": 1.0,
                "gap": 1.0 - one.value,
                "epochs": 1,
                "steps": 1,
                "failed": None,
            }
            for size, one in zip(EXAMPLE, estimates, strict=True)
        ]
        curves.append({"name": name, **statistics.named("area", area), "points": points})
    multipliers = [
        {**one, "of": names[one["of"]], "over": names[one["over"]]} for one in compared.multipliers
    ]
    return {
        "curves": curves,
        "multipliers": multipliers,
        "sizes": EXAMPLE,
        "seeds": [0],
        "images": {"train": EXAMPLE[-1], "test": 1_000},
        "resamples": statistics.RESAMPLES,
        "notes": [],
    }


def test_the_verdict_says_which_needs_fewer_images_and_how_sure_that_is() -> None:
    found = as_found({"vit": right_on(*VIT), "cnn": right_on(*CNN)})
    said = verdict(found)
    low, high = found["multipliers"][1]["ci95"]
    assert said[0] == (
        '"cnn" needs 2.08 times fewer images than "vit" for the same accuracy '
        f"(95 % interval {low:.2f} to {high:.2f})."
    )
    assert low > 1
    assert said[1].startswith(
        'Mean accuracy over the logarithm of the number of images, 1,000 to 500,000: "cnn" 71.5% ('
    )
    assert "A steeper curve does not show a stronger bias" in said[2]
    moved = [(np.arange(1_000)[None] + 7 * i) % 100 < n for i, n in enumerate(CNN)]
    near = as_found({"a": right_on(*CNN), "b": Answers(EXAMPLE, moved)})
    assert verdict(near)[0].endswith("these data cannot tell them apart.")
    apart = as_found({"a": right_on(*range(20, 26)), "b": right_on(*range(80, 86))})
    assert verdict(apart)[0].startswith(
        '"b" is better with 1,000 images (80.0%) than "a" with 500,000 (25.0%)'
    )
    flat = as_found({"a": right_on(*[80] * 6), "b": right_on(*[81] * 6)})
    assert "their intervals overlap" in verdict(flat)[0]
    assert "none" in to_html(apart, figure(apart), "")
