"""Several processes train the same model as one, and end together."""

from __future__ import annotations

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

from distill.cache import verify, write
from distill.cache.store import Folder
from distill.engine import launch
from distill.engine.train import train
from distill.recipe import Recipe
from tests.engine.conftest import STUDENT
from tests.engine.processes import free_port, largest_difference
from tests.promises import Measured

ROOT = Path(__file__).parents[2]

# Without dropout, whose masks follow the process; LayerNorm has no statistics of the batch.
PLAIN = STUDENT.replace("drop: 0.1", "drop: 0.0")


@pytest.fixture
def alone(recipes: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path]:
    """The recipe, and its run in one process."""
    recipe = recipes(student=PLAIN.replace("batch_size: 20", "batch_size: 24"))
    teacher = recipe.with_name("teacher.yaml")
    teacher.write_text(teacher.read_text().replace("batch_size: 30", "batch_size: 28"))
    out = tmp_path / "alone" / "run"
    command = [sys.executable, "-m", "distill", "train", str(recipe), "--out", str(out)]
    subprocess.run(command, check=True, env=_environment())
    return recipe, out


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def _largest_difference(first: Path, second: Path) -> float:
    return largest_difference(*(run / "student.safetensors" for run in (first, second)))


def test_two_and_four_processes_and_two_micro_batches_equal_one(
    alone: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, one = alone
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    two, four, pieces = (tmp_path / name / "run" for name in ("two", "four", "pieces"))
    # BatchNorm's statistics follow the process: one teacher for all.
    for run in (two, four, pieces):
        shutil.copytree(one.parent / "teacher", run.parent / "teacher")
    assert launch.spawn(2, ["train", str(recipe), "--out", str(two)]) == 0
    assert launch.spawn(4, ["train", str(recipe), "--out", str(four)]) == 0
    command = ["train", str(recipe), "--out", str(pieces), "--device-batch-size", "12"]
    subprocess.run([sys.executable, "-m", "distill", *command], check=True)
    for other in (two, four, pieces):
        assert _largest_difference(one, other) <= 1e-5
        rows, expected = (
            [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            for run in (other, one)
        )
        assert [row["step"] for row in rows] == [row["step"] for row in expected]
        for row, told in zip(rows, expected, strict=True):
            if row["split"] == "train":
                assert row["kd"] == pytest.approx(told["kd"], rel=1e-4) or other is pieces
    results = [json.loads((run / "result.json").read_text()) for run in (one, two)]
    assert results[0]["top1"] == results[1]["top1"]
    assert results[0]["nll"] == pytest.approx(results[1]["nll"], abs=1e-5)


def test_two_processes_fill_and_read_a_cache_as_one_does(
    recipes: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    cache = tmp_path / "tc"
    recipe = recipes(student=PLAIN + f"cache: {{path: {cache}, views: 2}}\n")
    train(Recipe.load(tmp_path / "teacher.yaml"), tmp_path / "teacher")
    command = ["train", str(recipe)]
    filled, read = str(tmp_path / "filled"), str(tmp_path / "read")
    assert launch.spawn(2, [*command, "--set", "cache.fill=true", "--out", filled]) == 0
    store = Folder(cache)
    manifest = write.read_manifest(store)
    assert manifest is not None
    assert verify.full(store, manifest) == []
    assert write.read_index(store, manifest) is not None
    assert launch.spawn(2, [*command, "--out", read]) == 0
    train(Recipe.load(recipe), tmp_path / "alone")
    for other in (filled, read):
        assert _largest_difference(tmp_path / "alone", Path(other)) <= 1e-5


def test_terms_that_compare_images_or_learn_something_see_the_whole_batch(
    recipes: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    start = PLAIN.index("objective:")
    objective = (
        "objective: [{term: ce}, {term: features, weight: 0.3}, {term: dist}, {term: relations}, "
        "{term: rkd, weight: 0.1}, {term: infonce, weight: 0.1}, "
        "{term: crd, weight: 0.1, negatives: 16, dim: 8}, {term: ctkd}]\n"
    )
    text = PLAIN[:start] + objective + PLAIN[PLAIN.index("optimizer:") :]
    recipe = recipes(student=text)
    train(Recipe.load(tmp_path / "teacher.yaml"), tmp_path / "teacher")
    one, two = tmp_path / "one", tmp_path / "two"
    train(Recipe.load(recipe), one)
    assert launch.spawn(2, ["train", str(recipe), "--out", str(two)]) == 0
    assert _largest_difference(one, two) <= 2e-4
    rows, expected = (
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (two, one)
    )
    trained = [pair for pair in zip(rows, expected, strict=True) if pair[0]["split"] == "train"]
    assert len(trained) == 4
    for row, told in trained:
        for name in ("features", "dist", "relations", "rkd", "infonce", "crd", "ctkd"):
            assert row[name] == pytest.approx(told[name], rel=2e-3, abs=1e-5)


def test_torchrun_and_accelerate_launch_start_it_as_it_is(
    recipes: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = recipes(student=PLAIN.replace("epochs: 4", "epochs: 1"))
    train(Recipe.load(tmp_path / "teacher.yaml"), tmp_path / "teacher")
    starters = {
        "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
        "accelerate": ["accelerate.commands.launch", "--cpu", "--num_processes", "2"],
    }
    students = []
    command = ["train", str(recipe), "--json"]
    for name, starter in starters.items():
        out = tmp_path / name / "run"
        shutil.copytree(tmp_path / "teacher", out.parent / "teacher")
        subprocess.run(
            [sys.executable, "-m", *starter, "-m", "distill", *command, "--out", str(out)],
            check=True,
            env=_environment(),
            capture_output=True,
        )
        students.append(out)
    assert _largest_difference(*students) <= 1e-5


def test_a_failing_process_ends_the_others_with_its_status(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data: {name: digits}\n")
    assert launch.spawn(2, ["train", str(recipe)]) == 2


def _group(arguments: list[str], folders: list[Path]) -> list[subprocess.Popen[str]]:
    """Begin `distill ARGUMENTS` as processes of one group, each in a folder."""
    shared = {"WORLD_SIZE": str(len(folders)), "LOCAL_WORLD_SIZE": str(len(folders))}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "PYTHONPATH": str(ROOT)}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "distill", *arguments],
            cwd=folder,
            env=_environment() | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, folder in enumerate(folders)
    ]


def test_an_error_in_one_process_is_said_and_ends_the_others_without_a_traceback(
    recipes: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = recipes(student=PLAIN.replace("recipe: teacher.yaml", "weights: teacher"))
    train(Recipe.load(tmp_path / "teacher.yaml"), tmp_path / "teacher")
    elsewhere = tmp_path / "elsewhere"  # where there is no such teacher
    elsewhere.mkdir()
    group = _group(["train", str(recipe), "--out", str(tmp_path / "run")], [tmp_path, elsewhere])
    said = [process.communicate(timeout=120)[1] for process in group]
    assert [process.returncode for process in group] == [1, 6]
    assert said[1].count("error:") == 1
    assert "teacher: no such file or run directory" in said[1]
    assert "Traceback" not in said[0] + said[1]


@pytest.mark.promise("R9")
def test_a_process_that_is_killed_ends_the_others_which_say_so(
    recipes: Callable[..., Path], tmp_path: Path, measured: Measured
) -> None:
    recipe = recipes(student=PLAIN.replace("epochs: 4", "epochs: 4000"))
    train(Recipe.load(tmp_path / "teacher.yaml"), tmp_path / "teacher")
    out = tmp_path / "run"
    group = _group(["train", str(recipe), "--out", str(out)], [tmp_path, tmp_path])
    while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").stat().st_size:
        assert [process.poll() for process in group] == [None, None]
        time.sleep(0.05)
    group[1].kill()
    said = [process.communicate(timeout=120)[1] for process in group]
    assert [process.returncode for process in group] == [1, -signal.SIGKILL]
    assert "another process of this run ended" in said[0]
    assert "Traceback" not in said[0]
    measured("kill -9 of one of two processes", "the other ends, and says why; no traceback")
