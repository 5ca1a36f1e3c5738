"""A run that was cut short, in whatever way, ends as if it had never been."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
import safetensors.torch
import torch

from distill import storage
from distill.engine.train import train
from distill.errors import DamagedError, IdentityError, PreflightError
from distill.recipe import Recipe
from tests.engine import processes
from tests.promises import Measured


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """The recipe, and what its uninterrupted run leaves behind."""
    from tests.engine.conftest import STUDENT, TEACHER

    folder = tmp_path_factory.mktemp("reference")
    (folder / "teacher.yaml").write_text(TEACHER)
    recipe = folder / "student.yaml"
    recipe.write_text(STUDENT)
    process = processes.start(recipe, folder / "run")
    process.join()
    assert process.exitcode == 0
    return recipe, processes.traces(folder / "run")


@pytest.mark.promise("R1")
@pytest.mark.parametrize(
    "kills", [10, pytest.param(200, marks=[pytest.mark.soak, pytest.mark.timeout(3600)])]
)
def test_kill_9_at_random_points_leaves_no_trace(
    reference: tuple[Path, dict[str, bytes]], tmp_path: Path, kills: int, measured: Measured
) -> None:
    def start(out: Path) -> ForkServerProcess:
        return processes.start(recipe, out, checkpoint_seconds=0)

    recipe, expected = reference
    # The teacher is there already, so that the kills fall into the student's run.
    shutil.copytree(recipe.parent / "teacher", tmp_path / "teacher")
    seconds = processes.timed(start, tmp_path / "whole")
    for out in processes.killed(start, tmp_path, kills, seconds=seconds):
        assert processes.traces(out) == expected
        assert not list(out.rglob("*.tmp"))
    measured(
        "kill -9 while training, live teacher (EMA, mixup, dropout, ramped weights)",
        f"{kills} kills, every file the same to the bit",
    )


@pytest.mark.parametrize(
    ("signum", "status"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)]
)
def test_a_signal_saves_the_step_and_the_run_goes_on(
    reference: tuple[Path, dict[str, bytes]], tmp_path: Path, signum: int, status: int
) -> None:
    recipe, expected = reference
    shutil.copytree(recipe.parent / "teacher", tmp_path / "teacher")
    out = tmp_path / "run"
    process = processes.start(recipe, out)
    while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").read_text():
        assert process.is_alive()
        time.sleep(0.005)
    import os

    assert process.pid is not None
    os.kill(process.pid, signum)
    process.join()
    assert process.exitcode == status
    assert list((out / "checkpoint").glob("step-*"))
    assert not (out / "result.json").exists()
    process = processes.start(recipe, out)
    process.join()
    assert process.exitcode == 0
    assert processes.traces(out) == expected


def test_a_finished_run_is_not_trained_again(recipes: Callable[..., Path], tmp_path: Path) -> None:
    recipe = Recipe.load(recipes(), ["train.epochs=1"])
    first = train(recipe, tmp_path / "run")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert train(recipe, tmp_path / "run") == first
    after = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.is_file()}
    del before[tmp_path / "run/.lock"], after[tmp_path / "run/.lock"]
    assert before == after


def test_another_recipe_is_refused_and_restart_replaces_it(
    recipes: Callable[..., Path], tmp_path: Path
) -> None:
    path, out = recipes(), tmp_path / "run"
    train(Recipe.load(path, ["train.epochs=1"]), out)
    kept = (out / "student.safetensors").read_bytes()
    other = Recipe.load(path, ["train.epochs=2", "train.seed=4"])
    with pytest.raises(IdentityError, match=r"train\.epochs: 1 -> 2; train\.seed: 3 -> 4"):
        train(other, out)
    assert (out / "student.safetensors").read_bytes() == kept
    assert train(other, out, restart=True).epochs == 2
    assert (out / "student.safetensors").read_bytes() != kept


def test_another_teacher_is_refused(recipes: Callable[..., Path], tmp_path: Path) -> None:
    path, out = recipes(), tmp_path / "run"
    train(Recipe.load(path, ["train.epochs=1"]), out)
    teacher = tmp_path / "teacher"
    train(Recipe.load(tmp_path / "teacher.yaml", ["train.seed=1"]), teacher, restart=True)
    with pytest.raises(IdentityError, match=r"train\.seed: 1 -> 0"):
        train(Recipe.load(path, ["train.epochs=1"]), out)


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_taken(
    reference: tuple[Path, dict[str, bytes]], tmp_path: Path
) -> None:
    recipe, expected = reference
    shutil.copytree(recipe.parent / "teacher", tmp_path / "teacher")
    out = tmp_path / "run"
    processes.start(recipe, out, checkpoint_seconds=0).join()
    (out / "result.json").unlink()
    newest, older = sorted((out / "checkpoint").iterdir(), reverse=True)
    weights = bytearray((newest / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (newest / "model.safetensors").write_bytes(weights)
    process = processes.start(recipe, out)
    process.join()
    assert process.exitcode == 0
    assert processes.traces(out) == expected
    assert (out / "checkpoint" / f"{newest.name}.damaged").is_dir()
    for path in (newest, older):
        assert path.exists()


def test_a_checkpoint_of_an_earlier_version_goes_on(
    reference: tuple[Path, dict[str, bytes]], tmp_path: Path
) -> None:
    """It names averaged weights as PyTorch's AveragedModel does, and counts no waits."""
    recipe, expected = reference
    shutil.copytree(recipe.parent / "teacher", tmp_path / "teacher")
    out = tmp_path / "run"
    processes.start(recipe, out, checkpoint_seconds=0).join()
    (out / "result.json").unlink()
    newest, older = sorted((out / "checkpoint").iterdir(), reverse=True)
    shutil.rmtree(newest)
    files = storage.read_folder(older)
    shutil.rmtree(older)
    average = safetensors.torch.load(files["ema.safetensors"])
    average = {f"module.{name}": tensor for name, tensor in average.items()}
    average["n_averaged"] = torch.tensor(19)
    state = json.loads(files["state.json"])
    del state["values"]["waited"]
    changed = {
        "ema.safetensors": safetensors.torch.save(average),
        "state.json": json.dumps(state).encode(),
    }
    storage.write_folder(older, {**files, **changed})
    process = processes.start(recipe, out)
    process.join()
    assert process.exitcode == 0
    assert processes.traces(out) == expected


def test_without_a_whole_checkpoint_the_run_refuses_and_keeps_everything(
    recipes: Callable[..., Path], tmp_path: Path
) -> None:
    recipe, out = Recipe.load(recipes(), ["train.epochs=2"]), tmp_path / "run"
    train(recipe, out, checkpoint_seconds=0)
    (out / "result.json").unlink()
    for path in (out / "checkpoint").iterdir():
        (path / "state.json").write_text("{}")
    for _ in range(2):  # the second start finds them set aside already
        with pytest.raises(DamagedError, match="no checkpoint is whole"):
            train(recipe, out)
    assert len(list((out / "checkpoint").glob("*.damaged"))) == 2


def test_two_runs_cannot_share_a_directory(
    reference: tuple[Path, dict[str, bytes]], tmp_path: Path
) -> None:
    recipe, _ = reference
    shutil.copytree(recipe.parent / "teacher", tmp_path / "teacher")
    crowd = [processes.start(recipe, tmp_path / "run") for _ in range(4)]
    for process in crowd:
        process.join()
    assert sorted(process.exitcode or 0 for process in crowd) == [0, 6, 6, 6]


def test_a_run_directory_that_cannot_be_written_is_named(
    recipes: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(PreflightError, match=r"file/.*: cannot be written: not a directory"):
        train(Recipe.load(recipes()), tmp_path / "file" / "run")
    assert (tmp_path / "file").read_text() == "in the way"
