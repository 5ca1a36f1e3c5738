from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn
from typer.testing import Result

from tests.cli.conftest import images, listing, picture, process

KD = [{"term": "ce", "weight": 0.5}, {"term": "kd", "weight": 0.5}]
MINE = f"{__name__}:mine"


class Mine(nn.Module):
    """A hidden layer of 32 numbers."""

    def __init__(self, num_classes: int, image_size: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(3 * image_size**2, 32), nn.ReLU(), nn.Linear(32, num_classes)
        )

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layers(images)
        return logits


def mine(num_classes: int, image_size: int) -> nn.Module:
    return Mine(num_classes, image_size)


def wrong_shape(num_classes: int, image_size: int) -> nn.Module:
    return Mine(num_classes + 1, image_size)


def found(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.stderr
    (line,) = result.stdout.splitlines()
    return dict(json.loads(line))


def test_counts_steps_and_costs(
    distill: Callable[..., Result], write_recipe: Callable[..., Path]
) -> None:
    recipe = write_recipe(
        data={"name": "digits", "fraction": 0.5, "val": 0.2},
        student={"model": MINE},
        optimizer={"name": "adamw", "lr": 0.1},
        train={"epochs": 3, "batch_size": 50, "ema": 0.9},
    )
    seen = found(distill("check", recipe, "--json"))
    data = seen["data"]
    assert (data["num_classes"], data["test"], data["image_size"]) == (10, 897, 8)
    assert data["val"] == pytest.approx(180, abs=5)
    assert seen["steps"] == 3 * (data["train"] // 50)
    parameters = 192 * 32 + 32 + 32 * 10 + 10
    assert seen["student"]["model"] == MINE
    assert seen["student"]["parameters"] == parameters
    assert seen["student"]["flops"] == 2 * (192 * 32 + 32 * 10)
    memory = seen["memory"]
    assert memory["weights"] == memory["gradients"] == memory["average"] == 4 * parameters
    assert memory["optimizer"] == 2 * 4 * parameters + 4 * 4  # a step count for each tensor
    assert memory["images"] == 50 * 3 * 8 * 8 * 4
    # Kept for the backward pass at least: the images, and what comes out of the hidden layer.
    assert 50 * 4 * (192 + 32) <= memory["activations"] < 50 * 4 * (192 + 32 + 32 + 8 * 10)
    assert memory["total"] == sum(v for k, v in memory.items() if k != "total")
    assert seen["checkpoint"] == 4 * 4 * parameters + 4 * 4
    assert seen["warnings"] == []


def test_activations_grow_with_the_images_of_a_device(
    distill: Callable[..., Result], write_recipe: Callable[..., Path]
) -> None:
    recipe = write_recipe()
    sizes = [
        found(distill("check", recipe, "--json", "--set", f"train.batch_size={n}"))["memory"]
        for n in (16, 32, 64)
    ]
    small, middle, large = (size["activations"] for size in sizes)
    assert large - middle == pytest.approx(2 * (middle - small), rel=1e-6)
    assert small > 0


def test_teachers_that_will_be_trained_first(
    distill: Callable[..., Result], write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    write_recipe("teacher.yaml", train={"epochs": 2, "batch_size": 8})
    recipe = write_recipe(teachers=[{"recipe": "teacher.yaml"}], objective=KD)
    before = listing(tmp_path)
    seen = found(distill("check", recipe, "--json"))
    (teacher,) = seen["teachers"]
    assert teacher["trained_first"] is True
    assert teacher["run"] == "runs/teacher"
    assert teacher["model"] == "resnet8"
    assert teacher["steps"] == 2 * (seen["data"]["train"] // 8)
    shown = distill("check", recipe)
    assert "will be trained first" in shown.stdout
    assert "no faults found" in shown.stderr
    assert listing(tmp_path) == before  # nothing was written


def test_a_teacher_that_is_trained(distill: Callable[..., Result], runs: Path) -> None:
    recipe = runs / "kd" / "recipe.yaml"
    weights = f"teachers=[{{weights: {runs / 'teacher'}}}]"
    seen = found(distill("check", recipe, "--json", "--set", weights))
    assert seen["teachers"][0]["trained_first"] is False
    assert seen["teachers"][0]["run"] == str(runs / "teacher")
    shown = distill("check", recipe, "--set", weights)
    assert shown.exit_code == 0
    assert "teacher" in shown.stdout
    assert "first" not in shown.stdout


def test_the_faults_of_student_and_teachers_in_one_error(
    distill: Callable[..., Result], write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    images(tmp_path / "photos", "train/cat", "train/dog", "test/cat", count=20)
    folder = {"name": "folder", "root": str(tmp_path / "photos"), "image_size": 8}
    write_recipe("teacher.yaml", data=folder)
    recipe = write_recipe(
        teachers=[{"recipe": "teacher.yaml"}, {"weights": "runs/none"}],
        student={"model": "vit", "patch_size": 3},
        objective=KD,
    )
    result = distill("check", recipe)
    assert result.exit_code in (2, 6)
    assert result.stdout == ""
    first, *rest = result.stderr.splitlines()
    assert "patch" in first
    assert any("runs/teacher: " in line and "cat" in line for line in rest)
    assert any("runs/none" in line for line in rest)
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("change", "status", "fault"),
    [
        ({"data": {"name": "folder", "root": "[red]no[/x]"}}, 6, "[red]no[/x]: no such folder"),
        ({"data": {"name": "cifar10", "root": "."}}, 6, "data_batch_1.bin"),
        ({"train": {"epochs": 1, "batch_size": 901}}, 2, "901"),
        ({"student": {"model": "timm/resnet_fifty"}}, 2, "resnet_fifty"),
        ({"student": {"model": "no_module_of_mine:net"}}, 2, "no_module_of_mine"),
        ({"student": {"model": f"{__name__}:wrong_shape"}}, 2, "wrong_shape"),
        ({"student": {"model": "resnet8", "weights": "none.safetensors"}}, 6, "none.safetensors"),
        ({"student": {"model": "resnet8", "weights": "none.pth"}}, 2, "none.pth"),
    ],
)
def test_faults_that_show_only_when_parts_are_built(
    distill: Callable[..., Result],
    write_recipe: Callable[..., Path],
    change: dict[str, Any],
    status: int,
    fault: str,
) -> None:
    result = distill("check", write_recipe(**change))
    assert result.exit_code == status, result.stderr
    assert fault in result.stderr
    assert result.stdout == ""


def test_every_fault_of_a_recipe(
    distill: Callable[..., Result], write_recipe: Callable[..., Path]
) -> None:
    recipe = write_recipe(student={"model": "vitt"}, train={"epochs": 0, "batch_size": 16})
    result = distill("check", recipe, "--set", "optimizer.lr=0")
    assert result.exit_code == 2
    assert "student.model: unknown model 'vitt'; did you mean 'vit'?" in result.stderr
    assert "train.epochs: should be greater than or equal to 1, got 0" in result.stderr
    assert "--set optimizer.lr=0: should be greater than 0, got 0" in result.stderr


def test_bf16_is_rehearsed_whatever_the_machine(
    distill: Callable[..., Result], write_recipe: Callable[..., Path]
) -> None:
    recipe = write_recipe(train={"epochs": 1, "batch_size": 16, "precision": "bf16"})
    full = found(distill("check", recipe, "--json", "--set", "train.precision=fp32"))
    half = found(distill("check", recipe, "--json"))
    assert 0 < half["memory"]["activations"] < full["memory"]["activations"]


def test_bad_images_that_are_left_out_are_told(
    distill: Callable[..., Result], write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    root = images(tmp_path / "photos", "train/a", "train/b", "test/a", count=10)
    (root / "train/a/0.png").write_bytes(b"no image")
    data = {"name": "folder", "root": str(root), "image_size": 8}
    strict = distill("check", write_recipe(data=data))
    assert strict.exit_code == 6
    assert "train/a/0.png" in strict.stderr
    seen = found(distill("check", write_recipe(data=data | {"on_bad_image": "skip"}), "--json"))
    assert seen["data"]["bad"] == ["train/a/0.png"]
    assert seen["data"]["train"] == 19
    assert any("bad" in warning for warning in seen["warnings"])


def test_without_a_recipe(distill: Callable[..., Result]) -> None:
    result = distill("check")
    assert result.exit_code == 2
    assert "distill check RECIPE" in result.stderr


def test_the_schema_is_json(distill: Callable[..., Result]) -> None:
    one_line = distill("check", "--schema", "--json").stdout
    assert len(one_line.splitlines()) == 1
    assert json.loads(one_line) == json.loads(distill("check", "--schema").stdout)


def test_the_quickstart_as_a_user_runs_it(tmp_path: Path) -> None:
    copied = process("list", "recipes", "--copy", "quickstart", cwd=tmp_path)
    assert copied.returncode == 0, copied.stderr
    done = process("check", "quickstart.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "digits: 10 classes" in done.stdout


def test_what_terms_read_inside_of_the_networks_is_told(
    distill: Callable[..., Result], write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    teacher = write_recipe(
        "teacher.yaml", data={"name": "digits", "fraction": 0.1}, student={"model": "resnet8"}
    )
    recipe = write_recipe(
        data={"name": "digits", "fraction": 0.1},
        teachers=[{"recipe": str(teacher)}],
        student={"model": "vit", "patch_size": 2, "width": 16, "depth": 6, "heads": 2},
        objective=[{"term": "ce"}, {"term": "features"}, {"term": "relations"}],
    )
    seen = found(distill("check", recipe, "--json"))
    assert seen["reads"] == {
        "features": "blocks.4 and blocks.5 of the student, layer2 and layer3 of the teacher",
        "relations": "pooled of the student, pooled of the teacher",
    }
    shown = " ".join(distill("check", recipe).stdout.split())
    assert f"features reads {seen['reads']['features']}" in shown


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twenty training images and two test images, the first of each class the same."""
    root = images(tmp_path / "photos", "train/a", "train/b", count=10)
    for name in "ab":
        (root / "test" / name).mkdir(parents=True)
        (root / "test" / name / "0.png").write_bytes(picture((20, 16), 77 + ord(name)))
    return root


def test_all_images_are_read_and_a_manifest_is_written_and_compared(
    distill: Callable[..., Result], write_recipe: Callable[..., Path], photos: Path, tmp_path: Path
) -> None:
    data = {"name": "folder", "root": str(photos), "image_size": 18}
    recipe = write_recipe(data=data)
    before = listing(photos)
    first = distill("check", recipe, "--data", "--workers", 0)
    assert first.exit_code == 0, first.stderr
    assert "20 train, 2 test images" in first.stdout
    assert "22 with a shorter side below 18 px" in first.stdout
    assert listing(tmp_path) == {"recipe.yaml": recipe.read_bytes()} | {
        f"photos/{name}": content for name, content in before.items()
    }
    arguments = ("check", recipe, "--data", "--manifest", "images.jsonl", "--json", "--workers", 0)
    made = found(distill(*arguments))
    assert (made["manifest"], made["written"]) == ("images.jsonl", True)
    assert made["classes"] == {"a": 10, "b": 10}
    again = distill(*arguments)
    assert found(again)["written"] is False
    assert "images.jsonl: all as it says" in again.stderr
    held = write_recipe("held.yaml", data=data | {"manifest": "images.jsonl"})
    assert found(distill("check", held, "--json"))["data"]["train"] == 20
    (photos / "test/a/0.png").write_bytes((photos / "train/b/3.png").read_bytes())
    (photos / "train/a/new.png").write_bytes(picture((20, 16), 5))
    changed = distill("check", held, "--data", "--json", "--workers", 0)
    assert changed.exit_code == 5
    assert "train image train/a/new.png was added" in changed.stderr
    told = json.loads(changed.stdout)
    assert told["leaked"] == {"count": 1, "first": [["test/a/0.png", "train/b/3.png"]]}
    assert told["changed"]["count"] == 2
    refused = distill("check", held)
    assert refused.exit_code == 5
    assert "train/a/new.png was added" in refused.stderr
    assert listing(photos).keys() == before.keys() | {"train/a/new.png"}


def test_bad_images_of_all_that_are_read(
    distill: Callable[..., Result], write_recipe: Callable[..., Path], photos: Path, tmp_path: Path
) -> None:
    whole = (photos / "train/a/0.png").read_bytes()
    (photos / "train/a/0.png").write_bytes(whole[:-50])  # only decoding tells
    recipe = write_recipe(data={"name": "folder", "root": str(photos), "image_size": 8})
    skip = ("--set", "data.on_bad_image=skip")
    arguments = ("check", recipe, "--data", "--workers", 0, "--manifest", "images.jsonl")
    bad = distill(*arguments)
    assert bad.exit_code == 6
    assert "train images that cannot be used: 1" in bad.stdout
    assert "train/a/0.png: " in bad.stderr
    assert "data.on_bad_image: skip" in bad.stderr
    assert (tmp_path / "images.jsonl").exists()
    assert distill(*arguments, *skip).exit_code == 0
    few = distill(*arguments, *skip, "--set", "data.max_bad=0.04")
    assert few.exit_code == 6
    assert "allows 0 of 20 training images" in few.stderr
    (photos / "test/b/0.png").write_bytes(b"<html>")
    (tmp_path / "images.jsonl").unlink()
    test = distill(*arguments, *skip)
    assert test.exit_code == 6
    assert "never skipped" in test.stderr


def test_only_images_in_files_have_a_manifest(
    distill: Callable[..., Result], write_recipe: Callable[..., Path]
) -> None:
    result = distill("check", write_recipe(), "--data")
    assert result.exit_code == 2
    assert "digits" in result.stderr
    result = distill("check", write_recipe(), "--set", "data.manifest=images.jsonl")
    assert result.exit_code == 2
    assert "data.manifest" in result.stderr
    result = distill("check", write_recipe(), "--manifest", "images.jsonl")
    assert result.exit_code == 2
    assert "goes with --data" in result.stderr
