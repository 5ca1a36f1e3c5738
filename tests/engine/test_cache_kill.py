"""Writers that are killed at any moment leave a cache that is complete and exact in the end."""

from __future__ import annotations

import random
import signal
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill import yamlio
from distill.cache import verify, write
from distill.cache.store import Folder
from distill.engine.step import Step, train_step
from distill.engine.train import train
from distill.errors import Stopped
from distill.recipe import Recipe
from tests.engine import processes
from tests.promises import Measured

RECIPE = {
    "data": {"name": "digits", "fraction": 0.2, "augment": ["crop", "flip"], "mixup": 0.5},
    "teachers": [{"weights": "teacher"}],
    "student": {"model": "resnet8"},
    "objective": [{"term": "kd"}],
    "cache": {"path": "tc", "views": 40},
    "optimizer": {"lr": 0.1},
    "train": {"epochs": 40, "batch_size": 16},
}
TEACHER = {
    "data": {"name": "digits", "fraction": 0.2},
    "student": {"model": "resnet8"},
    "objective": [{"term": "ce"}],
    "optimizer": {"name": "sgd", "lr": 0.1},
    "train": {"epochs": 1, "batch_size": 16},
}
PARTS = [(1, 3), (2, 3), (3, 3), (2, 3)]  # the second has a double


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "teacher.yaml").write_text(yamlio.dump(TEACHER))
    train(Recipe.load(tmp_path / "teacher.yaml"), tmp_path / "teacher")
    path = tmp_path / "recipe.yaml"
    teachers = [{"weights": str(tmp_path / "teacher")}]
    path.write_text(yamlio.dump(RECIPE | {"teachers": teachers}))
    return path


def build(recipe: Path, out: Path) -> None:
    """Make all that is missing."""
    process = processes.build(recipe, out, (1, 1))
    process.join()
    assert process.exitcode == 0


def files(folder: Path) -> dict[str, bytes]:
    """Everything in a cache but what killed writers left half written."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".tmp"
    }


@pytest.mark.promise("R1")
@pytest.mark.parametrize("kills", [10, pytest.param(200, marks=pytest.mark.soak)])
@pytest.mark.timeout(3600)
def test_killed_parallel_and_double_writers_change_nothing(
    recipe: Path, tmp_path: Path, kills: int, measured: Measured
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    build(recipe, whole)
    dice = random.Random(kills)
    running = [processes.build(recipe, broken, part) for part in PARTS]
    done = 0
    while done < kills:
        time.sleep(dice.uniform(0.02, 0.4))
        number = dice.randrange(len(PARTS))
        through = not running[number].is_alive()
        done += not through
        # Where work is undone all stop: one may be about to write an index that names it.
        stopped = range(len(PARTS)) if through else [number]
        for i in stopped:
            running[i].kill()
            running[i].join()
        if through:  # so that there is something to kill
            for unit in dice.sample(sorted(broken.rglob("u*.safetensors")), 5):
                unit.unlink(missing_ok=True)
            (broken / "index.json").unlink(missing_ok=True)
        store = Folder(broken)
        if (manifest := write.read_manifest(store)) is not None:
            assert verify.full(store, manifest) == []
        for i in stopped:
            running[i] = processes.build(recipe, broken, PARTS[i])
    for process in running:
        process.join()
        assert process.exitcode == 0
    build(recipe, broken)
    assert files(broken) == files(whole)
    manifest = write.read_manifest(Folder(broken))
    assert manifest is not None
    assert not write.missing(Folder(broken), manifest)
    assert write.read_index(Folder(broken), manifest) is not None
    measured(
        "kill -9 of four writers of a teacher's cache, two of them on the same part",
        f"{done} kills, every file the same to the bit",
    )


@pytest.mark.timeout(600)
def test_a_run_that_fills_its_cache_may_be_killed(recipe: Path, tmp_path: Path) -> None:
    """Mid-epoch, the answers before the kill are forgotten; the view is completed all the same."""
    text = yamlio.load(recipe.read_text())[0]
    text["cache"] = {"views": 4, "fill": True}
    text["train"] = {"epochs": 6, "batch_size": 16}
    recipe.write_text(yamlio.dump(text))

    def start(out: Path) -> ForkServerProcess:
        return processes.start(recipe, out, checkpoint_seconds=0)

    seconds = processes.timed(start, tmp_path / "whole")
    for place in processes.killed(start, tmp_path, 6, seconds=seconds):
        store = Folder(place / "cache")
        manifest = write.read_manifest(store)
        assert manifest is not None
        assert verify.full(store, manifest) == []
        assert write.read_index(store, manifest) is not None
        whole, broken = (files(out / "cache") for out in (tmp_path / "whole", place))
        assert set(whole) == set(broken)
        # Rows that were asked for in another batch may differ in the last bit of a float.
        for name in whole:
            if name.startswith("views/"):
                one, other = (np.frombuffer(each[name], np.uint8) for each in (whole, broken))
                assert one.shape == other.shape
                assert (one != other).mean() < 0.02


def test_a_run_that_is_stopped_again_and_again_completes_its_cache(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No start sees all views, and the last one none that is new."""
    text = yamlio.load(recipe.read_text())[0]
    text["cache"] = {"views": 3, "fill": True}
    text["train"] = {"epochs": 4, "batch_size": 16}
    recipe.write_text(yamlio.dump(text))
    steps = 0

    def stopping(*parts: Any, **keys: Any) -> Step:
        nonlocal steps
        steps += 1
        if steps in (15, 37):  # of 11 an epoch: in the second one, and in the last
            signal.raise_signal(signal.SIGTERM)
        return train_step(*parts, **keys)

    monkeypatch.setattr("distill.engine.fit.train_step", stopping)
    for _ in range(2):
        with pytest.raises(Stopped):
            train(Recipe.load(recipe), tmp_path / "run", workers=0)
    train(Recipe.load(recipe), tmp_path / "run", workers=0)
    assert steps == 44
    store = Folder(tmp_path / "run" / "cache")
    manifest = write.read_manifest(store)
    assert manifest is not None
    assert write.read_index(store, manifest) is not None
