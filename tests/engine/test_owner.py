"""Two processes never work in one directory: one owns it, and the others say which."""

from __future__ import annotations

import re
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from distill import storage, yamlio
from distill.grid import temperature_axis
from distill.recipe import Recipe
from distill.sweep import Sweep, sweep
from tests.cli.conftest import images
from tests.engine import processes
from tests.engine.conftest import STUDENT, TEACHER
from tests.promises import Measured

CROWD = 8
RECIPE = {
    "data": {"name": "folder", "root": "photos", "image_size": 8},
    "student": {"model": "mlp", "width": 8, "depth": 1},
    "objective": [{"term": "ce"}],
    "optimizer": {"name": "sgd", "lr": 0.01},
    "train": {"epochs": 100_000, "batch_size": 8},
}


@pytest.mark.promise("R13")
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("rounds", [2, pytest.param(20, marks=pytest.mark.soak)])
def test_one_of_eight_runs_owns_a_directory_and_kill_9_frees_it(
    tmp_path: Path, rounds: int, measured: Measured
) -> None:
    images(tmp_path / "photos", "train/bee", "train/cat", "test/bee", "test/cat", count=8)
    (tmp_path / "recipe.yaml").write_text(yamlio.dump(RECIPE))
    train = ["train", "recipe.yaml", "--out=run", "--workers=2", "--checkpoint-seconds=0.2"]
    for number in range(rounds):
        crowd = {
            tmp_path / f"said-{number}-{i}": processes.command(
                tmp_path, *train, said=tmp_path / f"said-{number}-{i}"
            )
            for i in range(CROWD)
        }
        while len(living := [one for one in crowd.values() if one.is_alive()]) > 1:
            time.sleep(0.01)
        (owner,) = living
        refused = {said: one for said, one in crowd.items() if one is not owner}
        for said, process in refused.items():
            process.join()
            text = " ".join(said.read_text().split())
            assert process.exitcode == 6, text
            assert re.search(rf"error: run: in use by process {owner.pid} on ", text), text
            assert socket.gethostname() in text
        while not list((tmp_path / "run" / "checkpoint").glob("step-*")):
            assert owner.is_alive()
            time.sleep(0.01)
        owner.kill()
        owner.join()
        began = time.monotonic()
        with storage.lock(tmp_path / "run", seconds=30):  # its workers notice that it is gone
            waited = time.monotonic() - began
        assert waited < 5
    measured(
        "8 runs started at once in one directory, and kill -9 of its owner",
        f"{rounds} of {rounds} times 1 owner, {7 * rounds} of {7 * rounds} refusals name it",
    )


@pytest.mark.promise("R13")
def test_two_parts_of_a_sweep_that_end_at_the_same_moment_both_end_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: Measured
) -> None:
    (tmp_path / "teacher.yaml").write_text(TEACHER)
    (tmp_path / "student.yaml").write_text(STUDENT)
    monkeypatch.chdir(tmp_path)
    recipe = Recipe.load("student.yaml", ["train.epochs=1"])
    axes = [temperature_axis(recipe, (1, 4))]
    assert isinstance(sweep(recipe, axes, Path("sweep"), workers=0), Sweep)
    # All is there but the conclusion, which both come to at once.
    arguments = ["temperature-sweep", "student.yaml", "--temperatures=1,4", "--out=sweep"]
    parts = [
        processes.command(
            tmp_path,
            *(*arguments, "--workers=0", "--set=train.epochs=1", f"--shard={i}/2"),
            said=tmp_path / f"said-{i}",
            slow=processes.Slow("distill.sweep._tested", 1.0),
        )
        for i in (1, 2)
    ]
    for part in parts:
        part.join()
    said = [(tmp_path / f"said-{i}").read_text() for i in (1, 2)]
    assert [part.exitcode for part in parts] == [0, 0], said
    assert sum("waiting for process" in text for text in said) == 1
    assert all("Best: temperature" in text for text in said)
    assert (tmp_path / "sweep" / "sweep.json").is_file()
    measured("two parts of a sweep that conclude at once", "2 of 2 end well, one after the other")


def _write(folder: Path, begun: Any, go_on: Any) -> None:
    (folder / "cache").mkdir(parents=True)
    with storage.writing(folder / "cache" / "unit") as file:
        begun.set()
        go_on.wait(60)
        file.write(b"content")


@pytest.mark.promise("R13")
def test_concluding_leaves_alone_what_another_part_is_writing(
    tmp_path: Path, measured: Measured
) -> None:
    """Whoever locks a folder sweeps those in it, where others are at work."""
    begun, go_on = processes.context.Event(), processes.context.Event()
    writer = processes.context.Process(target=_write, args=(tmp_path / "sweep", begun, go_on))
    writer.start()
    assert begun.wait(60)
    with storage.lock(tmp_path / "sweep"):
        pass
    go_on.set()
    writer.join()
    assert writer.exitcode == 0
    assert (tmp_path / "sweep" / "cache" / "unit").read_bytes() == b"content"
    measured("a folder locked while another process writes into it", "what it writes arrives")
