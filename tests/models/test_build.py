from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from distill.errors import IncompatibleError, RecipeError
from distill.models import weights
from distill.models.network import Network
from tests.models.conftest import CLASSES, DATA

Build = Callable[..., Network]
IMAGES = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
TIED = "tests.models.conftest:tied"


@pytest.fixture
def file(student: Build, tmp_path: Path) -> Path:
    """A trained network for ant, bee, cat and dog."""
    path = tmp_path / "teacher.safetensors"
    path.write_bytes(weights.to_bytes(student()))
    return path


@pytest.fixture
def bare(file: Path) -> Path:
    """The same without a description."""
    path = file.with_name("bare.safetensors")
    path.write_bytes(safetensors.torch.save(safetensors.torch.load_file(file)))
    return path


def answers(network: Network, images: torch.Tensor = IMAGES) -> torch.Tensor:
    with torch.no_grad():
        return network.eval()(images).logits


def test_a_student_is_made_for_the_data(student: Build) -> None:
    network = student("resnet14", classes=("x", "y"), image_size=28)
    assert network.training
    assert network.classes == ("x", "y")
    assert (network.model, network.input_size, network.reinitialised) == ("resnet14", None, ())
    assert network(torch.rand(2, 3, 28, 28)).logits.shape == (2, 2)


def test_a_user_s_own_model_is_built_and_comes_back(
    student: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = student(TIED)
    file = tmp_path / "student.safetensors"
    file.write_bytes(weights.to_bytes(network))
    assert torch.equal(answers(weights.load(tmp_path, vouched=[TIED])), answers(network))
    for place in (tmp_path, file):
        with pytest.raises(RecipeError, match="code outside distill") as caught:
            weights.load(place)
        assert f"model: {TIED}" in caught.value.hint
        assert f"DISTILL_CODE={TIED}" in caught.value.hint
    monkeypatch.setenv("DISTILL_CODE", f"other:part,{TIED}")
    assert torch.equal(answers(weights.load(tmp_path)), answers(network))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("resnet21", "unknown model 'resnet21'; did you mean 'resnet"),
        ("tests.models.conftest:not_a_network", "returns int, not a torch.nn.Module"),
        ("tests.models.conftest:nothing", "has no attribute 'nothing'"),
        ("no.such.module:net", "No module named 'no'"),
    ],
)
def test_an_unknown_model_is_refused(student: Build, model: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        student(model)


def test_a_wrong_argument_is_refused(student: Build) -> None:
    with pytest.raises(RecipeError, match=r"depth: .* got 'deep'"):
        student("vit", depth="deep")
    with pytest.raises(RecipeError, match="width: unknown key"):
        student("resnet8", width=3)


def test_a_teacher_answers_frozen(teacher: Build, file: Path) -> None:
    network = teacher(weights=str(file))
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())
    assert torch.equal(network(IMAGES).logits, answers(weights.load(file)))


def test_a_teacher_may_be_named_or_not(teacher: Build, file: Path) -> None:
    named = teacher(model="resnet8", weights=str(file))
    assert weights.fingerprint(named) == weights.fingerprint(teacher(weights=str(file)))
    with pytest.raises(IncompatibleError, match="holds resnet8, the recipe says resnet14"):
        teacher(model="resnet14", weights=str(file))


def test_a_teacher_s_arguments_are_its_file_s(
    student: Build, teacher: Build, tmp_path: Path
) -> None:
    keys: dict[str, Any] = {"width": 24, "depth": 1, "heads": 3}
    file = tmp_path / "vit.safetensors"
    file.write_bytes(weights.to_bytes(student("vit", **keys)))
    assert teacher(weights=str(file)).description.arguments["width"] == 24
    assert teacher(model="vit", width=24, weights=str(file)).model == "vit"
    with pytest.raises(IncompatibleError, match="trained with width: 24, the recipe says 48"):
        teacher(model="vit", width=48, weights=str(file))


@pytest.mark.parametrize(
    "classes", [("dog", "ant", "cat", "bee"), ("bee", "ant"), ("dog",), CLASSES]
)
def test_a_teacher_s_classes_are_matched_by_name(
    teacher: Build, file: Path, classes: tuple[str, ...]
) -> None:
    network = teacher(weights=str(file), classes=classes)
    plain = answers(weights.load(file))
    expected = torch.stack([plain[:, CLASSES.index(name)] for name in classes], dim=1)
    assert torch.equal(network(IMAGES).logits, expected)
    assert network.classes == classes


@pytest.mark.parametrize("classes", [("ant", "bee", "cat", "eel"), (*CLASSES, "eel"), ("eel",)])
def test_a_teacher_that_lacks_a_class_is_refused(
    teacher: Build, file: Path, classes: tuple[str, ...]
) -> None:
    with pytest.raises(IncompatibleError, match="does not know the data's eel") as caught:
        teacher(weights=str(file), classes=classes)
    assert ("dog" in str(caught.value)) == ("dog" not in classes)
    many = tuple(f"c{i}" for i in range(9))
    with pytest.raises(IncompatibleError, match="c0, c1, c2, c3, c4 and 4 more; it knows ant, bee"):
        teacher(weights=str(file), classes=many)


def test_without_names_an_equal_number_of_classes_is_accepted(
    teacher: Build, file: Path, bare: Path
) -> None:
    network = teacher(model="resnet8", weights=str(bare), classes=("w", "x", "y", "z"))
    assert network.classes == ("w", "x", "y", "z")
    assert torch.equal(network(IMAGES).logits, answers(weights.load(file)))
    for number in (3, 5):
        classes = tuple(map(str, range(number)))
        with pytest.raises(IncompatibleError, match=f"knows 4 classes.* the data has {number}"):
            teacher(model="resnet8", weights=str(bare), classes=classes)


def test_bare_tensors_take_the_data_s_normalisation(teacher: Build, bare: Path) -> None:
    network = teacher(model="resnet8", weights=str(bare))
    assert network.mean.flatten().tolist() == pytest.approx(DATA["mean"])
    with pytest.raises(RecipeError, match="not the name of their network"):
        teacher(weights=str(bare))


def test_bare_tensors_of_published_weights_take_theirs(
    teacher: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Some want 0.5 where ImageNet's mean is expected, and are far worse with it."""
    import timm

    for classes, mean in ((1000, 0.5), (4, None)):
        network = timm.create_model("test_vit", num_classes=classes)
        safetensors.torch.save_file(network.state_dict(), tmp_path / "bare.safetensors")
        names = tuple(f"c{i}" for i in range(classes))
        built = teacher(
            model="timm/test_vit", weights=str(tmp_path / "bare.safetensors"), classes=names,
            image_size=160,
        )  # fmt: skip
        expected = DATA["mean"] if mean is None else [mean] * 3
        assert built.mean.flatten().tolist() == pytest.approx(expected)
        assert ("does not say how" in capsys.readouterr().err) is (mean is not None)


def test_a_teacher_sees_the_size_and_the_normalisation_that_it_was_trained_on(
    student: Build, teacher: Build, tmp_path: Path
) -> None:
    trained = student("vit", depth=1, mean=(0.1, 0.2, 0.3))
    file = tmp_path / "vit.safetensors"
    file.write_bytes(weights.to_bytes(trained))
    network = teacher(weights=str(file), image_size=32, mean=(0.9, 0.9, 0.9))
    assert network.input_size == 16
    images = torch.rand(2, 3, 32, 32)
    small = torch.nn.functional.interpolate(images, (16, 16), mode="bilinear", antialias=True)
    torch.testing.assert_close(answers(network, images), answers(trained, small))


@pytest.mark.parametrize("position", ["learned", "sincos", "conv", "none"])
def test_a_transformer_teaches_at_another_size_than_it_was_trained_at(
    student: Build, teacher: Build, tmp_path: Path, position: str
) -> None:
    """Its positions are for every grid, and at the size that it was trained at they stay."""
    trained = student("vit", depth=1, position=position)
    file = tmp_path / "vit.safetensors"
    file.write_bytes(weights.to_bytes(trained))
    images = torch.rand(2, 3, 16, 16)
    larger = teacher(weights=str(file), input_size=24)
    assert larger.anatomy().stages[-1].grid == (6, 6)
    large = torch.nn.functional.interpolate(images, (24, 24), mode="bilinear", antialias=True)
    assert torch.equal(answers(larger, images), answers(trained, large))
    same = teacher(weights=str(file), input_size=16)
    assert torch.equal(answers(same, images), answers(trained, images))


def test_two_orders_of_classes_are_two_teachers(teacher: Build, file: Path) -> None:
    prints = {
        weights.fingerprint(teacher(weights=str(file), classes=classes))
        for classes in (CLASSES, CLASSES[::-1], CLASSES[:2])
    }
    assert len(prints) == 3


def test_a_student_goes_on_from_weights_of_its_classes(student: Build, file: Path) -> None:
    network = student(weights=str(file))
    assert network.reinitialised == ()
    assert network.training
    assert all(p.requires_grad for p in network.parameters())
    assert torch.equal(answers(network), answers(weights.load(file)))


@pytest.mark.parametrize("classes", [("x", "y", "z"), CLASSES[::-1], ("w", "x", "y", "z")])
def test_a_student_with_other_classes_keeps_all_but_the_head(
    student: Build, file: Path, classes: tuple[str, ...]
) -> None:
    network = student(weights=str(file), classes=classes)
    assert network.reinitialised == ("fc.weight", "fc.bias")
    assert network.classes == classes
    own, trained = network.backbone.state_dict(), safetensors.torch.load_file(file)
    for name, tensor in own.items():
        same = tensor.shape == trained[name].shape and torch.equal(tensor, trained[name])
        assert same == (name not in network.reinitialised), name


def test_a_student_from_bare_tensors(student: Build, bare: Path) -> None:
    assert student(weights=str(bare), classes=("w", "x", "y", "z")).reinitialised == ()
    other = student(weights=str(bare), classes=("x", "y"))
    assert other.reinitialised == ("fc.weight", "fc.bias")
    assert other(IMAGES).logits.shape == (3, 2)


def test_a_student_trains_at_its_own_image_size(student: Build, file: Path) -> None:
    network = student(weights=str(file), image_size=24)
    assert (network.input_size, network.description.image_size) == (None, 24)


def test_a_student_s_new_arguments_come_before_the_file_s(student: Build, tmp_path: Path) -> None:
    file = tmp_path / "vit.safetensors"
    file.write_bytes(weights.to_bytes(student("vit", width=24, depth=1, heads=3)))
    network = student("vit", weights=str(file), drop_path=0.1)
    assert network.description.arguments["width"] == 24
    assert network.description.arguments["drop_path"] == 0.1
    with pytest.raises(IncompatibleError, match=r"missing: blocks\.1\.norm1\.weight"):
        student("vit", weights=str(file), depth=2)
    with pytest.raises(IncompatibleError, match=r"position is \(1, 16, 24\), not \(1, 64, 24\)"):
        student("vit", weights=str(file), image_size=32)


@pytest.mark.parametrize("source", ["pretrained", "hf-hub:someone/something"])
def test_our_own_networks_have_no_published_weights(student: Build, source: str) -> None:
    with pytest.raises(RecipeError, match=f"resnet8: has no weights {source}"):
        student(weights=source)
