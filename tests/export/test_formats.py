from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import distill
from distill import models, recipe
from distill.export import parity
from distill.export.formats import FORMATS, onnx
from distill.export.program import Precision, Resize, Student, in_unit
from tests.export.conftest import CLASSES, VIT, compared, known, pixels, written
from tests.models.test_timm import publish  # noqa: F401

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("model", [{}, VIT])
def test_onnx_says_what_the_student_says(
    student: Callable[..., Student], tmp_path: Path, model: dict[str, object], inside: bool
) -> None:
    given = student(inside=inside, **model)
    path = written(given, "onnx", tmp_path)
    found = compared(given, "onnx", path)
    parity.require(found, "fp32", known(given), max_drop=0)


def test_onnx_resizes_pictures(student: Callable[..., Student], tmp_path: Path) -> None:
    given = student()
    path = written(given, "onnx", tmp_path)
    for size in (77, 20):
        large = pixels(size, 3)
        expected = given.network(Resize(given.preprocessing)(torch.from_numpy(large))).logits
        np.testing.assert_allclose(onnx.answers(given, path, [large])[0], expected, atol=0.05)


@pytest.mark.parametrize("inside", [True, False])
def test_an_onnx_file_says_what_it_is(
    student: Callable[..., Student], tmp_path: Path, inside: bool
) -> None:
    import onnx as library

    given = student(inside=inside)
    model = library.load(written(given, "onnx", tmp_path))
    library.checker.check_model(model, full_check=True)
    assert [(o.domain, o.version) for o in model.opset_import if not o.domain] == [("", onnx.OPSET)]
    (taken,), (told,) = model.graph.input, model.graph.output
    names = [d.dim_param or d.dim_value for d in taken.type.tensor_type.shape.dim]
    assert (taken.name, names) == (
        given.input("pictures")["name"],
        given.input("pictures")["shape"],
    )
    assert [d.dim_param or d.dim_value for d in told.type.tensor_type.shape.dim] == ["batch", 4]
    about = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(about["classes"]) == list(CLASSES)
    assert bool(json.loads(about["preprocessing"])) is not inside


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_same_student_gives_the_same_bytes(
    student: Callable[..., Student], tmp_path: Path, precision: Precision
) -> None:
    first = written(student(), "onnx", tmp_path, precision).read_bytes()
    assert written(student(), "onnx", tmp_path, precision).read_bytes() == first
    for place in (ROOT, Path(sys.prefix), tmp_path):
        assert str(place).encode() not in first


def test_a_program_has_the_same_bytes_and_no_path(
    student: Callable[..., Student], tmp_path: Path
) -> None:
    path = written(student(), "torch-export", tmp_path)
    first = path.read_bytes()
    assert written(student(), "torch-export", tmp_path).read_bytes() == first
    for place in (ROOT, Path(sys.prefix), tmp_path):
        assert str(place).encode() not in first
    names = {"classes.json": ""}
    torch.export.load(path, extra_files=names)
    assert json.loads(names["classes.json"]) == list(CLASSES)


@pytest.mark.parametrize("model", [{}, VIT])
def test_smaller_numbers(
    student: Callable[..., Student], tmp_path: Path, model: dict[str, object]
) -> None:
    given = student(**model)
    full = written(given, "onnx", tmp_path).stat().st_size
    for precision, part in (("fp16", 0.7), ("int8", 0.6)):
        path = written(given, "onnx", tmp_path, precision)  # type: ignore[arg-type]
        found = compared(given, "onnx", path)
        parity.require(found, precision, known(given), max_drop=0.05)  # type: ignore[arg-type]
        assert path.stat().st_size < part * full


def test_weights_are_read_by_the_toolkit(student: Callable[..., Student], tmp_path: Path) -> None:
    given = student()
    path = written(given, "safetensors", tmp_path)
    images = torch.rand(3, 3, 32, 32)
    network = distill.load(path).eval()
    assert torch.equal(network(images).logits, given.network(images).logits)
    assert network.classes == CLASSES


@pytest.mark.parametrize(
    ("model", "keys"),
    [("timm/mobilenetv3_small_050", {}), ("timm/vit_tiny_patch16_224", {"depth": 1})],
)
def test_a_folder_for_timm(
    student: Callable[..., Student], tmp_path: Path, model: str, keys: dict[str, object]
) -> None:
    from timm.data import create_transform, resolve_model_data_config

    given = student(model, **keys)
    path = written(given, "timm", tmp_path)
    found = compared(given, "timm", path)
    parity.require(found, "fp32", known(given), max_drop=0)
    assert str(tmp_path) not in path.read_text()
    assert not {"license", "tag"} & set(json.loads(path.read_text())["pretrained_cfg"])
    import timm

    made = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert made.pretrained_cfg["label_names"] == list(CLASSES)
    config = resolve_model_data_config(made)
    assert config["mean"] == pytest.approx(given.preprocessing.mean)
    resize, crop, *_ = create_transform(**config).transforms
    assert (resize.size, crop.size) == (36, (32, 32))
    assert torch.equal(distill.load(tmp_path / "model.safetensors").mean, given.network.mean)


def test_the_hub_gives_it_back(
    student: Callable[..., Student],
    tmp_path: Path,
    publish: Callable[[str, dict[str, bytes]], None],  # noqa: F811
) -> None:
    """To timm, and to a recipe that takes it for a teacher."""
    import timm

    given = student("timm/mobilenetv3_small_050")
    written(given, "timm", tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    publish("me/student", files)
    shown = torch.from_numpy(given.normalised(pixels(32, 5)))
    made = timm.create_model("hf-hub:me/student", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(made(shown), given.network.answered(shown).logits)
    spec = recipe.Teacher(model=given.network.model, weights="hf-hub:me/student")
    facts = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}  # it has its own
    teacher = models.build_teacher(spec, classes=CLASSES[::-1], image_size=32, **facts)
    images = torch.from_numpy(in_unit(pixels(32, 5)))
    with torch.no_grad():
        told = teacher.eval()(images).logits
        torch.testing.assert_close(told.flip(1), given.network(images).logits)


def test_timm_knows_no_model_of_ours(student: Callable[..., Student]) -> None:
    assert FORMATS["timm"].refusal(student()) == "timm has no model resnet8"


def test_a_file_that_no_process_can_run_is_refused(
    student: Callable[..., Student], tmp_path: Path
) -> None:
    path = tmp_path / "model.pt2"
    path.write_bytes(b"no program")
    with pytest.raises(distill.errors.VerificationError, match="a fresh process cannot run it"):
        FORMATS["torch-export"].answers(student(), path, [pixels(32, 2)])


def test_a_program_runs_where_the_toolkit_is_not(
    student: Callable[..., Student], tmp_path: Path
) -> None:
    given = student()
    path = written(given, "torch-export", tmp_path)
    (found,) = FORMATS["torch-export"].answers(
        given, path, [given.shown(pixels(32)[:5], "pictures")]
    )
    np.testing.assert_allclose(found, known(given).logits[:5], atol=1e-4)
