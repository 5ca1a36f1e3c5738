from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from distill.recipe import Recipe
from tests.cli.conftest import images, listing, picture

OWN = """
from torch import nn

def vitality(num_classes, image_size):
    first = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)]
    return nn.Sequential(*first, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))
"""


def init(distill: Callable[..., Result], *arguments: object) -> dict[str, Any]:
    result = distill("init", *arguments, "--json")
    assert result.exit_code == 0, result.stderr
    (line,) = result.stdout.splitlines()
    return dict(json.loads(line))


def test_a_folder_of_class_folders(distill: Callable[..., Result], tmp_path: Path) -> None:
    root = images(tmp_path / "photos", "cat", "[red]dog[", count=10, size=(40, 33))
    before = listing(root)
    seen = init(distill, "photos")
    assert seen["files"] == ["recipe.yaml", "recipe-teacher.yaml", "recipe-split.csv"]
    assert seen["classes"] == ["[red]dog[", "cat"]
    assert (seen["train"], seen["test"], seen["side"], seen["bad"]) == (16, 4, 33, [])
    assert listing(root) == before
    with (tmp_path / "recipe-split.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    counts = Counter((row["path"].rpartition("/")[0], row["split"]) for row in rows)
    assert counts == {
        (name, split): number
        for name in ("cat", "[red]dog[")
        for split, number in (("train", 8), ("test", 2))
    }
    recipe = Recipe.load(tmp_path / "recipe.yaml")
    assert recipe.data.root == str(root)
    assert recipe.data.image_size == 32
    assert recipe.teachers[0].recipe is not None
    assert recipe.teachers[0].recipe.data == recipe.data
    assert (recipe.teachers[0].recipe.student.model, recipe.student.model) == (
        "resnet32x4",
        "resnet8x4",
    )
    assert recipe.teachers[0].recipe.student.weights is None
    check = distill("check", "recipe.yaml")
    assert check.exit_code == 0, check.stderr
    assert "2 classes, 16 train, 0 val, 4 test images, 32 px" in check.stdout


def test_the_same_folder_gives_the_same_files(
    distill: Callable[..., Result], tmp_path: Path
) -> None:
    images(tmp_path / "photos", "a", "b", "c", count=7)
    contents = []
    for _ in range(2):
        written = [tmp_path / name for name in init(distill, "photos")["files"]]
        contents.append([path.read_bytes() for path in written])
        for path in written:
            path.unlink()
    assert contents[0] == contents[1]


def test_a_folder_with_splits_of_its_own(distill: Callable[..., Result], tmp_path: Path) -> None:
    images(tmp_path / "photos", "train/a", "train/b", "val/a", "val/b", count=24)
    seen = init(distill, "photos", "--out", "pets.yaml")
    assert seen["files"] == ["pets.yaml", "pets-teacher.yaml"]
    assert (seen["train"], seen["test"]) == (48, 48)
    recipe = Recipe.load(tmp_path / "pets.yaml")
    assert recipe.data.split_file is None
    assert recipe.data.val == 0.1
    assert distill("check", "pets.yaml").exit_code == 0


def test_a_train_folder_alone_is_split(distill: Callable[..., Result], tmp_path: Path) -> None:
    images(tmp_path / "photos", "train/a", "train/b", count=5)
    seen = init(distill, "photos")
    assert (seen["classes"], seen["train"], seen["test"]) == (["a", "b"], 8, 2)
    assert distill("check", "recipe.yaml").exit_code == 0


def test_photographs_get_pretrained_networks(
    distill: Callable[..., Result], tmp_path: Path
) -> None:
    import timm

    images(tmp_path / "photos", "a", "b", count=5, size=(300, 260))
    init(distill, "photos")
    recipe = Recipe.load(tmp_path / "recipe.yaml")
    teacher = recipe.teachers[0].recipe
    assert teacher is not None
    known = timm.list_models(pretrained=True)
    for student in (recipe.student, teacher.student):
        assert student.weights == "pretrained"
        assert student.model.removeprefix("timm/") in known
    assert recipe.data.image_size == 224
    assert [spec.name for spec in recipe.data.augment] == ["resized_crop", "flip"]
    text = (tmp_path / "recipe.yaml").read_text()
    assert all(section in text for section in ("# Begins with", "# flip", "# Held out"))


def test_models_by_option(distill: Callable[..., Result], tmp_path: Path) -> None:
    images(tmp_path / "photos", "a", "b", count=10)
    init(distill, "photos", "--teacher", "resnet20", "--student", "vit")
    recipe = Recipe.load(tmp_path / "recipe.yaml")
    assert recipe.teachers[0].recipe is not None
    assert recipe.teachers[0].recipe.student.model == "resnet20"
    assert (recipe.student.model, recipe.optimizer.name) == ("vit", "adamw")
    assert distill("check", "recipe.yaml").exit_code == 0
    init(distill, "photos", "--student", "timm/test_vit", "--out", "b.yaml")
    assert Recipe.load(tmp_path / "b.yaml").student.weights == "pretrained"
    offline = ["student.weights=null", "teachers.0.recipe.student.weights=null"]
    check = distill("check", "b.yaml", "--set", offline[0], "--set", offline[1])
    assert check.exit_code == 0, check.stderr


def proposed(
    distill: Callable[..., Result], tmp_path: Path, *models: str
) -> dict[str, tuple[str, str | None]]:
    """Optimizer and weights that are proposed for each as a student."""
    found = {}
    for i, model in enumerate(models):
        init(distill, "photos", "--student", model, "--out", f"{i}.yaml")
        recipe = Recipe.load(tmp_path / f"{i}.yaml")
        assert recipe.student.model == model
        found[model] = recipe.optimizer.name, recipe.student.weights
    return found


def test_what_attends_or_does_not_normalise_batches_gets_adamw_whatever_it_is_called(
    distill: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    images(tmp_path / "photos", "a", "b", count=3)
    (tmp_path / "own_networks.py").write_text(OWN)
    sgd = ("resnet20", "wrn_16_2", "own_networks:vitality")
    adamw = ("vit_tiny", "swin_tiny", "convit_tiny", "crate_tiny", "alternet_18", "convnext_atto")
    found = proposed(distill, tmp_path, *sgd, *adamw)
    assert found == dict.fromkeys(sgd, ("sgd", None)) | dict.fromkeys(adamw, ("adamw", None))
    warned = {
        model
        for i, model in enumerate(found)
        if "Few images for a network without" in (tmp_path / f"{i}.yaml").read_text()
    }
    assert warned == {"vit_tiny", "swin_tiny", "convit_tiny", "crate_tiny"}


def test_a_library_s_network_begins_with_weights_only_where_there_are_some(
    distill: Callable[..., Result], tmp_path: Path
) -> None:
    """A giant of timm's without weights is looked at too: it is built without values."""
    images(tmp_path / "photos", "a", "b", count=3, size=(64, 64))
    found = proposed(
        distill, tmp_path, "timm/test_vit", "torchvision/vit_b_16", "timm/vit_giant_patch14_224",
        "timm/resnetv2_50t", "timm/levit_384_s8",
    )  # fmt: skip
    assert found == {
        "timm/test_vit": ("adamw", "pretrained"),
        "torchvision/vit_b_16": ("adamw", "pretrained"),
        "timm/vit_giant_patch14_224": ("adamw", None),
        "timm/resnetv2_50t": ("sgd", None),
        "timm/levit_384_s8": ("adamw", None),  # it does both
    }
    result = distill("init", "photos", "--student", "timm/vit_tinny", "--out", "x.yaml")
    assert result.exit_code == 2
    assert "timm has no classifier 'vit_tinny'" in result.stderr
    assert not (tmp_path / "x.yaml").exists()


def test_bad_images_are_named_and_left_out(distill: Callable[..., Result], tmp_path: Path) -> None:
    root = images(tmp_path / "flat", "a", "b", count=10)
    (root / "a" / "[red]bad[x].png").write_bytes(b"no image")
    result = distill("init", "flat")
    assert result.exit_code == 0
    assert "[red]bad[x].png" in result.stderr
    assert "bad" not in (tmp_path / "recipe-split.csv").read_text()
    assert distill("check", "recipe.yaml").exit_code == 0

    root = images(tmp_path / "split", "train/a", "train/b", "test/a", count=10)
    (root / "train/a/empty.png").write_bytes(b"")
    seen = init(distill, "split", "--out", "s.yaml")
    assert (seen["train"], len(seen["bad"])) == (20, 1)
    assert Recipe.load(tmp_path / "s.yaml").data.on_bad_image == "skip"
    assert distill("check", "s.yaml").exit_code == 0

    for i in range(3):
        (root / f"train/b/empty {i}.png").write_bytes(b"")
    init(distill, "split", "--out", "u.yaml")
    assert Recipe.load(tmp_path / "u.yaml").data.max_bad == 0.17  # 4 of 24
    assert distill("check", "u.yaml").exit_code == 0

    (root / "test/a/cut.png").write_bytes(picture((20, 16), 0)[:20])
    result = distill("init", "split", "--out", "t.yaml")
    assert "never skipped" in result.stderr
    assert distill("check", "t.yaml").exit_code == 6


@pytest.mark.parametrize("there", ["recipe.yaml", "recipe-teacher.yaml", "recipe-split.csv"])
def test_nothing_is_overwritten(distill: Callable[..., Result], tmp_path: Path, there: str) -> None:
    images(tmp_path / "photos", "a", "b", count=5)
    (tmp_path / there).write_text("mine")
    before = listing(tmp_path)
    result = distill("init", "photos")
    assert result.exit_code == 6
    assert there in result.stderr
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    ("folders", "count", "fault"),
    [
        ([], 0, "no such folder"),
        ([""], 3, "no class folder"),
        (["a"], 9, "of 1 classes"),
        (["a", "b"], 1, "0 test images"),
        (["train/a", "test/b"], 3, "'b'"),
    ],
)
def test_folders_that_make_no_data_set(
    distill: Callable[..., Result], tmp_path: Path, folders: list[str], count: int, fault: str
) -> None:
    images(tmp_path / "[x]", *folders, count=count)
    result = distill("init", "[x]")
    assert result.exit_code == 6
    assert fault in result.stderr
    assert "[x]" in result.stderr
    assert not (tmp_path / "recipe.yaml").exists()


def test_an_unknown_model(distill: Callable[..., Result], tmp_path: Path) -> None:
    images(tmp_path / "photos", "a", "b", count=5)
    result = distill("init", "photos", "--student", "vitt")
    assert result.exit_code == 2
    assert "--student: no model 'vitt'; did you mean 'vit'?" in result.stderr


def test_paths_that_yaml_could_misread(distill: Callable[..., Result], tmp_path: Path) -> None:
    root = images(tmp_path / "a: #b 'c' {d} é", "yes", "1e3", count=5)
    init(distill, root, "--out", "no.yaml")
    recipe = Recipe.load(tmp_path / "no.yaml")
    assert recipe.data.root == str(root)
    assert distill("check", "no.yaml").exit_code == 0


def test_a_path_that_is_no_utf_8(distill: Callable[..., Result], tmp_path: Path) -> None:
    images(tmp_path / "caf\udce9", "a", "b", count=5)
    result = distill("init", tmp_path / "caf\udce9")
    assert result.exit_code == 6
    assert "UTF-8" in result.stderr
