from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
from typer.testing import Result

from distill import component
from distill.cli import list as listing
from distill.recipe import Data, Recipe

READY = sorted(
    str(path.relative_to(listing.recipes()).with_suffix(""))
    for path in listing.recipes().rglob("*.yaml")
)


def names(result: Result, kind: str) -> list[str]:
    assert result.exit_code == 0
    (line,) = result.stdout.splitlines()
    return [item["name"] for item in json.loads(line)[kind]]


def test_what_is_listed_is_what_there_is(distill: Callable[..., Result]) -> None:
    assert names(distill("list", "terms", "--json"), "terms") == [*component.find("objectives")]
    assert names(distill("list", "models", "--json"), "models") == [*component.find("models.zoo")]
    known = list(get_args(Data.model_fields["name"].annotation))
    assert names(distill("list", "datasets", "--json"), "datasets") == known
    assert names(distill("list", "recipes", "--json"), "recipes") == READY
    assert "quickstart" in READY


def test_a_table_for_people(distill: Callable[..., Result]) -> None:
    out = distill("list", "terms").stdout
    assert "Match the teacher's softened class probabilities; at several temperatures," in out
    assert "float, > 0 | list of float, > 0; default 4.0" in out
    assert re.search(r"guidance .*\n +for +vit to any", out)
    assert re.search(r"ce +Match the labels\. *\n +for +any pair", out)
    out = distill("list", "models").stdout
    assert "learned | sincos | conv | none; default learned" in out
    for kind in ("recipes", "datasets"):
        for line in distill("list", kind).stdout.splitlines():
            name, _, summary = line.partition(" ")
            assert name
            assert summary.strip()


def test_a_pattern(distill: Callable[..., Result]) -> None:
    found = names(distill("list", "models", "wrn*", "--json"), "models")
    assert found == ["wrn_16_2", "wrn_40_1", "wrn_40_2"]
    nothing = distill("list", "models", "zz*")
    assert nothing.exit_code == 0
    assert nothing.stdout.strip() == ""
    assert "no models match 'zz*'" in nothing.stderr


def test_models_of_other_libraries(distill: Callable[..., Result]) -> None:
    found = names(distill("list", "models", "timm/vit_tiny*", "--json"), "models")
    assert "timm/vit_tiny_patch16_224" in found
    assert "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k" in found  # pretrained weights
    assert all(name.startswith("timm/vit_tiny") for name in found)
    shown = distill("list", "models", "torchvision/resnet*")
    assert "torchvision/resnet50" in shown.stdout.split()


@pytest.mark.parametrize("name", READY)
def test_a_copied_recipe_is_complete(
    distill: Callable[..., Result], tmp_path: Path, name: str
) -> None:
    result = distill("list", "recipes", "--copy", name, "--json")
    assert result.exit_code == 0, result.stderr
    copied = [Path(path) for path in json.loads(result.stdout)["copied"]]
    source = listing.recipes() / f"{name}.yaml"
    assert copied[0].name == source.name
    assert all((tmp_path / path).is_file() for path in copied)
    assert Recipe.load(copied[0]) == Recipe.load(source)  # with the recipes of its teachers


def test_nothing_is_overwritten(distill: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "quickstart-teacher.yaml").write_text("mine")
    refused = distill("list", "recipes", "--copy", "quickstart")
    assert refused.exit_code == 6
    assert [path.name for path in tmp_path.iterdir()] == ["quickstart-teacher.yaml"]
    assert (tmp_path / "quickstart-teacher.yaml").read_text() == "mine"
    (tmp_path / "quickstart-teacher.yaml").unlink()
    for _ in range(2):  # the same content again is no conflict
        assert distill("list", "recipes", "--copy", "quickstart.yaml").exit_code == 0
    assert len(list(tmp_path.iterdir())) == 2


def test_copy_knows_only_ready_recipes(distill: Callable[..., Result], tmp_path: Path) -> None:
    wrong = distill("list", "recipes", "--copy", "quikstart")
    assert wrong.exit_code == 2
    assert "did you mean 'quickstart'?" in wrong.stderr
    assert distill("list", "recipes", "--copy", "../pyproject").exit_code == 2
    assert distill("list", "models", "--copy", "vit").exit_code == 2
    assert list(tmp_path.iterdir()) == []
