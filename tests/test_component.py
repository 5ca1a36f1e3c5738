from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel

from distill import component, recipe
from distill.component import Count, Definition, Fraction, Positive
from distill.errors import RecipeError

PACKAGES = ("objectives", "models.zoo", "data.augment")
DEFINITIONS = [
    pytest.param(package, definition, id=f"{package}.{name}")
    for package in PACKAGES
    for name, definition in component.find(package).items()
]


def fields(model: type[BaseModel]) -> dict[str, Any]:
    return {
        name: (field.annotation, field.metadata, field.is_required(), field.default)
        for name, field in model.model_fields.items()
    }


@pytest.mark.parametrize(("package", "definition"), DEFINITIONS)
def test_what_is_read_from_the_source_is_what_python_sees(
    package: str, definition: Definition
) -> None:
    target = component.load(package, definition.name)
    assert target.__module__ == definition.module
    assert fields(definition.keys) == fields(component.schema(target))
    for name, value in definition.constants.items():
        assert getattr(target, name) == value


@pytest.mark.parametrize(("package", "definition"), DEFINITIONS)
def test_every_component_says_what_it_is(package: str, definition: Definition) -> None:
    target = component.load(package, definition.name)
    first = (inspect.getdoc(target) or "").partition("\n")[0]
    assert first == definition.summary
    assert first.endswith(".")


@pytest.mark.parametrize(("package", "definition"), DEFINITIONS)
def test_no_key_of_a_component_hides_behind_one_of_the_recipe(
    package: str, definition: Definition
) -> None:
    sections: dict[str, list[type[BaseModel]]] = {
        "objectives": [recipe.TermSpec],
        "models.zoo": [recipe.Model, recipe.Teacher],
        "data.augment": [recipe.Augmentation],
    }
    for section in sections[package]:
        assert not set(definition.keys.model_fields) & set(section.model_fields)


def test_every_package_has_components() -> None:
    assert {"ce", "kd", "hard"} <= set(component.find("objectives"))
    assert {"resnet20", "vit", "wrn_40_2"} <= set(component.find("models.zoo"))
    assert {"crop", "flip"} <= set(component.find("data.augment"))
    assert not any(name.startswith("_") for p in PACKAGES for name in component.find(p))


def own(*, rate: Positive, steps: Count = 2, kind: Literal["a", "b"] = "a") -> tuple[Any, ...]:
    return rate, steps, kind


class Own:
    def __init__(self, base: int, *, share: Fraction = 0.5) -> None:
        self.base, self.share = base, share


def test_a_users_own_part_is_checked_by_its_signature() -> None:
    assert component.build("objectives", f"{__name__}:own", {"rate": 1}) == (1.0, 2, "a")
    built = component.build("models.zoo", f"{__name__}:Own", {"share": 0.25}, 7)
    assert (built.base, built.share) == (7, 0.25)
    with pytest.raises(RecipeError) as caught:
        component.build("objectives", f"{__name__}:own", {"step": 0, "kind": "c"})
    assert str(caught.value).splitlines() == [
        f"{__name__}:own: rate: required, but not given",
        f"{__name__}:own: kind: should be 'a' or 'b', got 'c'",
        f"{__name__}:own: step: unknown key; did you mean 'steps'?",
    ]


@pytest.mark.parametrize("name", ["no_such_module:f", f"{__name__}:missing", ":f", "os:"])
def test_a_users_own_part_that_is_not_there(name: str) -> None:
    with pytest.raises(RecipeError, match=name):
        component.build("objectives", name, {})


def test_a_users_file_that_does_not_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_part.py").write_text("import no_such_module_of_mine\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with pytest.raises(RecipeError, match="no_such_module_of_mine"):
        component.load("objectives", "broken_part:f")


class Inner(BaseModel, **component._STRICT):
    size: Count = 1


class Outer(BaseModel, **component._STRICT):
    inner: list[Inner] = []
    rate: Positive = 1.0
    name: str | None = None
    sizes: Positive | list[Positive] = 1.0


@pytest.mark.parametrize(
    ("data", "place", "what"),
    [
        ({"inner": [{"size": 1}, {"size": 0}]}, ("inner", 1, "size"), "greater than or equal to 1"),
        ({"inner": [{"sise": 1}]}, ("inner", 0, "sise"), "did you mean 'size'"),
        ({"inner": 3}, ("inner",), "valid list, got 3"),
        ({"inner": [3]}, ("inner", 0), "got 3"),
        ({"rate": "fast"}, ("rate",), "valid number, got 'fast'"),
        ({"rate": True}, ("rate",), "valid number, got True"),
        ({"rate": -1}, ("rate",), "greater than 0, got -1"),
        ({"zzz": 1}, ("zzz",), "unknown key; known: inner, rate, name, sizes"),
        ({"sizes": 0}, ("sizes",), "greater than 0, got 0"),
        ({"sizes": [1, 0]}, ("sizes", 1), "greater than 0, got 0"),
        ({"sizes": "a"}, ("sizes",), "valid number, got 'a'"),
        ({"name": 3}, ("name",), "valid string, got 3"),
        (7, (), "got 7"),
    ],
)
def test_a_fault_is_named_by_place_and_kind(data: Any, place: Any, what: str) -> None:
    ((found, message),) = component.check(Outer, data)
    assert found == place
    assert what in message


def test_sound_data_have_no_faults() -> None:
    assert component.check(Outer, {"inner": [{"size": 2}], "rate": 3, "sizes": [1, 2]}) == []


def test_the_nearest_name_or_all_of_them() -> None:
    assert component.suggestion("resnet_20", ["resnet20", "vit"]) == "; did you mean 'resnet20'?"
    assert component.suggestion("zzz", ["a", "b"]) == "; known: a, b"
    assert component.suggestion("zzz", []) == ""


def test_an_error_lists_some_of_very_many_names() -> None:
    names = [f"m{i:04}" for i in range(1000)]
    said = component.suggestion("zzz", names)
    assert said.startswith("; known: m0000, m0001")
    assert said.endswith("m0039 and 960 more")
    assert component.suggestion("zzz", names[:3]) == "; known: m0000, m0001, m0002"
    assert component.suggestion("m0999x", names) == "; did you mean 'm0999'?"
