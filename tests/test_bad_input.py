"""Whatever is wrong, the command says it in a sentence and leaves everything as it was."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from distill import models, recipe, yamlio
from distill.models.weights import to_bytes
from tests import disks
from tests.engine import processes

TINY: dict[str, Any] = {
    "data": {"name": "digits", "fraction": 0.1},
    "student": {"model": "resnet8"},
    "objective": [{"term": "ce"}],
    "optimizer": {"name": "sgd", "lr": 0.05},
    "train": {"epochs": 2, "batch_size": 30},
}
KD = [{"term": "ce"}, {"term": "kd"}]


class Told(NamedTuple):
    """What the command said on stderr, and how it ended."""

    status: int
    error: str
    hint: str
    text: str


def distill(*arguments: object, cwd: Path) -> Told:
    """Run `distill train ARGUMENTS` as a user does; no failure may be a traceback."""
    process = begin(*arguments, cwd=cwd)
    _, text = process.communicate()
    return told(process.returncode, text)


def begin(*arguments: object, cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "distill", "train", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "NO_COLOR": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def told(status: int, text: str) -> Told:
    assert "Traceback" not in text
    before, found, error = text.partition("error: ")
    assert before == "" or before.endswith("\n")
    assert "error: " not in error
    error, _, hint = error.partition("\nhint: ")
    assert bool(found) is (status not in (0, 75))
    return Told(status, error.strip(), hint.strip(), text)


def write(path: Path, **sections: Any) -> Path:
    path.write_text(yamlio.dump(TINY | sections))
    return path


def tree(folder: Path) -> dict[str, bytes]:
    """All that lies in a folder but the lock, which says who looked last."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in sorted(folder.rglob("*"))
        if path.name != ".lock"
    }


def network(path: Path, classes: tuple[str, ...]) -> Path:
    """Write the weights of an untrained network that knows `classes`."""
    data: dict[str, Any] = {
        "classes": classes,
        "image_size": 8,
        "mean": (0.5,) * 3,
        "std": (0.5,) * 3,
    }
    torch.manual_seed(0)
    built = models.build_student(recipe.Model(model="resnet8", weights=None), **data)
    path.write_bytes(to_bytes(built))
    return path


def pictures(root: Path) -> Path:
    draw = np.random.default_rng(0)
    for split in ("train", "test"):
        for label in ("ant", "bee"):
            (root / split / label).mkdir(parents=True)
            for i in range(4):
                pixels = draw.integers(0, 256, (12, 12, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / label / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe, and its finished run with two checkpoints."""
    folder = tmp_path_factory.mktemp("reference")
    path = write(folder / "tiny.yaml")
    done = distill(path, "--out", "run", "--checkpoint-seconds", 0, cwd=folder)
    assert done.status == 0
    return folder


@pytest.fixture
def finished(reference: Path, tmp_path: Path) -> Path:
    """A copy of that folder."""
    return Path(shutil.copytree(reference, tmp_path / "copy"))


def test_a_missing_recipe(tmp_path: Path) -> None:
    said = distill("nowhere.yaml", cwd=tmp_path)
    assert said.status == 2
    assert said.error == "nowhere.yaml: no such file or directory"
    assert said.hint == "`distill list recipes` shows the ready ones"
    assert tree(tmp_path) == {}


def test_wrong_keys_and_types_are_all_said_at_once(tmp_path: Path) -> None:
    text = yamlio.dump(TINY).replace("lr: 0.05", "lr: fast").replace("epochs:", "epoch:")
    (tmp_path / "recipe.yaml").write_text(text)
    lines = text.splitlines()
    number = {
        key: i + 1 for i, line in enumerate(lines) for key in ("lr:", "epoch:") if key in line
    }
    before = tree(tmp_path)
    said = distill("recipe.yaml", cwd=tmp_path)
    assert said.status == 2
    assert f"recipe.yaml:{number['lr:']}: optimizer.lr: " in said.error
    assert "got 'fast'" in said.error
    assert f"recipe.yaml:{number['epoch:']}: train.epoch: unknown key; did you mean 'epochs'?" in (
        said.error
    )
    assert tree(tmp_path) == before


def test_a_wrong_override(tmp_path: Path) -> None:
    write(tmp_path / "recipe.yaml")
    said = distill("recipe.yaml", "--set", "optimizer.lr=-1", cwd=tmp_path)
    assert said.status == 2
    assert said.error.startswith("--set optimizer.lr=-1: ")
    assert "greater than 0" in said.error


def test_missing_data(tmp_path: Path) -> None:
    write(tmp_path / "recipe.yaml", data={"name": "folder", "root": "nowhere"})
    said = distill("recipe.yaml", "--out", "run", cwd=tmp_path)
    assert said.status == 6
    assert said.error == f"{tmp_path / 'nowhere'}: no such folder"
    assert "data.root" in said.hint
    assert not (tmp_path / "run" / "recipe.yaml").exists()


def test_a_corrupt_image_is_named(tmp_path: Path) -> None:
    root = pictures(tmp_path / "images")
    bad = root / "train" / "bee" / "2.png"
    bad.write_bytes(bad.read_bytes()[:60])
    write(
        tmp_path / "recipe.yaml",
        data={"name": "folder", "root": "images", "image_size": 12},
        train={"epochs": 1, "batch_size": 4},
    )
    before = tree(root)
    said = distill("recipe.yaml", "--out", "run", cwd=tmp_path)
    assert said.status == 6
    assert f"{root}: images that cannot be used: 1" in said.error
    assert str(bad) in said.error
    assert "data.on_bad_image: skip" in said.hint
    assert tree(root) == before


def test_missing_weights_of_a_teacher(tmp_path: Path) -> None:
    teachers = [{"weights": "runs/nowhere"}]
    write(tmp_path / "recipe.yaml", teachers=teachers, objective=KD)
    said = distill("recipe.yaml", "--out", "run", cwd=tmp_path)
    assert said.status == 6
    assert said.error == "runs/nowhere: no such file or run directory"
    assert "weights is a run directory" in said.hint


def test_a_teacher_of_other_classes_shows_the_difference(tmp_path: Path) -> None:
    file = network(tmp_path / "animals.safetensors", ("0", "1", "2", "cat", "dog"))
    write(tmp_path / "recipe.yaml", teachers=[{"weights": file.name}], objective=KD)
    said = distill("recipe.yaml", "--out", "run", cwd=tmp_path)
    assert said.status == 2
    assert said.error == (
        "animals.safetensors: does not know the data's 3, 4, 5, 6, 7 and 2 more; "
        "it knows cat, dog instead"
    )
    assert "train this teacher on the data first" in said.hint


def test_damaged_weights_of_a_teacher(tmp_path: Path) -> None:
    (tmp_path / "teacher").mkdir()
    file = network(tmp_path / "teacher" / "student.safetensors", tuple("0123456789"))
    file.write_bytes(file.read_bytes()[:-100])
    write(tmp_path / "recipe.yaml", teachers=[{"weights": "teacher"}], objective=KD)
    before = tree(tmp_path / "teacher")
    said = distill("recipe.yaml", "--out", "run", cwd=tmp_path)
    assert said.status == 5
    assert said.error.startswith("teacher/student.safetensors: not a whole safetensors file")
    assert said.hint
    assert tree(tmp_path / "teacher") == before


def test_a_batch_larger_than_the_data(tmp_path: Path) -> None:
    write(tmp_path / "recipe.yaml")
    said = distill("recipe.yaml", "--set", "train.batch_size=91", "--out", "run", cwd=tmp_path)
    assert said.status == 2
    assert said.error == "train.batch_size is 91, and there are 90 training images"
    assert "a batch of 90 or less" in said.hint


def test_a_run_directory_of_another_recipe(finished: Path) -> None:
    before = tree(finished)
    said = distill("tiny.yaml", "--set", "train.seed=7", "--out", "run", cwd=finished)
    assert said.status == 4
    assert said.error == "run: holds a run of another recipe: train.seed: 0 -> 7"
    assert "--restart" in said.hint
    assert tree(finished) == before


def test_a_run_directory_in_use(finished: Path) -> None:
    """Two commands at once: the one that comes second is refused while the first goes on."""
    shutil.rmtree(finished / "run")
    first = begin("tiny.yaml", "--set", "train.epochs=100000", "--out", "run", cwd=finished)
    metrics = finished / "run" / "metrics.jsonl"
    while not metrics.exists() or not metrics.read_text():
        assert first.poll() is None
        time.sleep(0.01)
    said = distill("tiny.yaml", "--set", "train.epochs=100000", "--out", "run", cwd=finished)
    first.terminate()
    _, text = first.communicate()
    assert said.status == 6
    assert said.error.startswith(f"run: in use by process {first.pid} on ")
    assert "--out" in said.hint
    assert first.returncode == 75
    assert "stopped by SIGTERM" in text


def test_a_corrupt_newest_checkpoint_is_set_aside(finished: Path, reference: Path) -> None:
    run = finished / "run"
    for name in ("result.json", "student.safetensors"):
        (run / name).unlink()
    newest = max((run / "checkpoint").glob("step-*"))
    weights = bytearray((newest / "model.safetensors").read_bytes())
    weights[len(weights) // 2] ^= 1
    (newest / "model.safetensors").write_bytes(weights)
    said = distill("tiny.yaml", "--out", "run", cwd=finished)
    assert said.status == 0
    assert f"warning: {newest.name} is damaged and set aside: " in said.text
    assert "going on after step" in said.text
    assert (run / "checkpoint" / f"{newest.name}.damaged" / "model.safetensors").exists()
    assert processes.traces(run) == processes.traces(reference / "run")


def test_without_a_whole_checkpoint(finished: Path) -> None:
    run = finished / "run"
    (run / "result.json").unlink()
    damaged = {}
    for path in (run / "checkpoint").glob("*/optimizer.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
        damaged[path.parent.name] = tree(path.parent)
    others = {name: data for name, data in tree(run).items() if not name.startswith("checkpoint/")}
    said = distill("tiny.yaml", "--out", "run", cwd=finished)
    assert said.status == 5
    assert said.error.startswith("run/checkpoint: no checkpoint is whole (")
    assert "--restart" in said.hint
    assert len(damaged) == 2
    for name, content in damaged.items():
        assert tree(run / "checkpoint" / f"{name}.damaged") == content
    after = {name: data for name, data in tree(run).items() if not name.startswith("checkpoint/")}
    assert after == others


def test_a_run_directory_below_a_file(finished: Path) -> None:
    before = tree(finished)
    said = distill("tiny.yaml", "--out", "tiny.yaml/run", cwd=finished)
    assert said.status == 6
    assert said.error.startswith("tiny.yaml/run: cannot be written: not a directory")
    assert "--out" in said.hint
    assert tree(finished) == before


def test_a_read_only_disk(tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    with disks.disk(folder, 8_000_000):
        write(tmp_path / "tiny.yaml")
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        said = distill("tiny.yaml", "--out", folder / "run", cwd=tmp_path)
        assert said.status == 6
        assert said.error == f"{folder}/run: cannot be written: read-only file system"
        assert "--out" in said.hint
