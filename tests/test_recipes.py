"""Every ready recipe says what it is, is right, and trains."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.imagenet_info import ImageNetInfo

from distill import models
from distill.engine.train import train
from distill.models.weights import to_bytes
from distill.recipe import Model, Recipe, Teacher

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
NAMES = [str(path.relative_to(ROOT)) for path in RECIPES]

every_recipe = pytest.mark.parametrize("path", RECIPES, ids=NAMES)


def test_they_are_all_there() -> None:
    assert len(RECIPES) >= 24
    assert len(RECIPES) == len(list((ROOT / "recipes").rglob("*.y*ml")))
    pairs = {f"{a}-to-{b}.yaml" for a in ("cnn", "vit") for b in ("cnn", "vit")}
    for folder in ("cifar10", "fashion-mnist"):
        found = {path.name for path in RECIPES if path.parent.name == folder}
        assert found >= pairs | {"teacher-cnn.yaml", "teacher-vit.yaml"}


@every_recipe
def test_its_first_lines_say_what_it_does_how_to_run_it_and_what_came_out(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    head = [line.removeprefix("#").strip() for line in lines[: lines.index("")]]
    assert all(line.startswith("#") for line in lines[: lines.index("")])
    assert re.match(r"[A-Z].*[.,]", head[0])
    (command,) = [line for line in head if line.startswith("distill ")]
    assert command.startswith(f"distill train {path.relative_to(ROOT)}")
    assert command.endswith(" --baseline") is bool(Recipe.load(path).teachers)
    (measured,) = [line for line in head if line.startswith("Measured:")]
    assert measured != "Measured:"


def idx(path: Path, values: np.ndarray) -> None:
    """Write an array of bytes as Fashion-MNIST's files are."""
    header = bytes((0, 0, 8, values.ndim)) + np.array(values.shape, ">u4").tobytes()
    path.write_bytes(header + values.tobytes())


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few random images in the official formats: four a class to train on, two to test on."""
    home, draw = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    fashion, cifar = home / "FashionMNIST" / "raw", home / "cifar-10-batches-bin"
    for folder in (fashion, cifar):
        folder.mkdir(parents=True)
    for name, count in (("train", 40), ("t10k", 20)):
        pixels = draw.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        idx(fashion / f"{name}-images-idx3-ubyte", pixels)
        idx(fashion / f"{name}-labels-idx1-ubyte", np.arange(count, dtype=np.uint8) % 10)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        count = 20 if name == "test_batch" else 8
        records = draw.integers(0, 256, (count, 1 + 3 * 32 * 32), dtype=np.uint8)
        first = 0 if name == "test_batch" else 8 * (int(name[-1]) - 1)
        records[:, 0] = (first + np.arange(count)) % 10
        (cifar / f"{name}.bin").write_bytes(records.tobytes())
    for split in ("train", "val"):
        for name in ("n01440764", "n01443537"):  # the first two of ImageNet's synsets
            folder = home / "imagenet" / split / name
            folder.mkdir(parents=True)
            for i in range(16):
                pixels = draw.integers(0, 256, (70, 80, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.JPEG")
    return home


def published(teacher: Teacher, home: Path) -> Path:
    """A file for weights that are published elsewhere: initial ones, for ImageNet's classes."""
    torch.manual_seed(0)
    assert teacher.model is not None
    network = models.build_student(
        Model(model=teacher.model.partition(".")[0], weights=None),
        classes=tuple(ImageNetInfo("imagenet-1k").label_names()),
        image_size=64,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    )
    path = home / f"{teacher.model.replace('/', '-')}.safetensors"
    path.write_bytes(to_bytes(network))
    return path


def shrunken(recipe: Recipe, home: Path, at: str = "") -> Iterator[str]:
    """The overrides that leave two steps on a few images to a recipe and to its teachers'."""
    changes: dict[str, object] = {
        "train.epochs": 1,
        "train.batch_size": 8,
        "train.precision": "fp32",
        "optimizer.warmup_epochs": 0,
    }
    if recipe.data.name == "digits":
        changes["data.fraction"] = 0.02
    elif recipe.data.name == "folder":
        changes |= {"data.root": home / "imagenet", "data.image_size": 64, "data.fraction": 0.5}
    else:
        changes |= {"data.root": home, "data.download": "false", "data.fraction": 0.5}
    yield from (f"{at}{key}={value}" for key, value in changes.items())
    for i, teacher in enumerate(recipe.teachers):
        if teacher.weights == "pretrained":
            model = str(teacher.model).partition(".")[0]
            yield f"{at}teachers.{i}={{model: {model}, weights: {published(teacher, home)}}}"
            continue
        assert teacher.recipe is not None  # what a ready recipe needs is ready too
        yield from shrunken(teacher.recipe, home, f"{at}teachers.{i}.recipe.")


@every_recipe
def test_it_trains_two_steps_on_a_few_images(path: Path, home: Path) -> None:
    # Beside the runs of the same folder's recipes, some of which are its teachers, as a user does.
    run = home / "runs" / path.relative_to(ROOT).with_suffix("")
    whole = Recipe.load(path)
    recipe = Recipe.load(path, list(shrunken(whole, home)))
    assert recipe.student == whole.student
    assert recipe.objective == whole.objective
    result = train(recipe, run)
    assert result.steps == 2
    assert math.isfinite(result.nll)
    assert len(result.teachers) == (len(whole.teachers) or whole.generations - 1 > 0)
    assert (result.val_top1 is not None) is (whole.data.val > 0)
    assert json.loads((run / "result.json").read_text())["top1"] == result.top1
    for teacher, spec in zip(result.teachers, whole.teachers, strict=False):
        if spec.recipe is None:
            continue
        assert json.loads((Path(teacher["run"]) / "result.json").read_text())["steps"] == 2
