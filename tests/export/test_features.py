"""Graphs that give the maps of a student's stages besides its logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distill.diagnostics.tapped import tapped
from distill.errors import IncompatibleError, VerificationError
from distill.export import parity
from distill.export.formats import FORMATS, GRAPHS
from distill.export.program import Student, in_unit, stages
from tests.cli.conftest import distill as command  # noqa: F401
from tests.export.conftest import VIT, pixels, written
from tests.export.test_export import Run, _distill, names, served  # noqa: F401
from tests.models import made

SWIN = {"model": "vit", "width": 16, "depth": [1, 1], "heads": 2, "patch_size": 2,
        "attention": "window", "window": 4, "position": "none"}  # fmt: skip
KINDS = {
    "resnet8": ({}, [(16, 32, 32), (32, 16, 16), (64, 8, 8)], [1, 2, 4]),
    "swin": (SWIN, [(16, 16, 16), (32, 8, 8)], [2, 4]),
    "vit": (VIT | {"pool": "cls"}, [(64, 8, 8)], [4]),
}


def mapped(given: Student) -> Student:
    return given._replace(stages=stages(given.network, 32))


def known(given: Student) -> parity.Known:
    shown = pixels(32, 9)
    return parity.known(given.network, shown, np.zeros(9, np.int64), given.stages)


def compared(given: Student, name: str, path: Path, precision: Any = "fp32") -> list[float]:
    told = partial(GRAPHS[name].told, path, outputs=given.outputs[1:])
    show = partial(given.shown, takes="pictures")
    return parity.compare_maps(told, show, known(given), precision)


@pytest.mark.parametrize("kind", KINDS)
def test_onnx_gives_the_maps_of_every_stage(
    student: Callable[..., Student], tmp_path: Path, kind: str
) -> None:
    import onnx

    keys, shapes, strides = KINDS[kind]
    given = mapped(student(**keys))
    assert [(s.channels, *s.grid) for s in given.stages] == shapes
    assert [s.stride for s in given.stages] == strides
    path = written(given, "onnx", tmp_path)
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    told = {
        out.name: [d.dim_param or d.dim_value for d in out.type.tensor_type.shape.dim]
        for out in model.graph.output
    }
    assert told == {"logits": ["batch", 4]} | {
        f"stage{i}": ["batch", *shape] for i, shape in enumerate(shapes)
    }
    about = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(about["stages"]) == [stage.to_json() for stage in given.stages]
    shown = pixels(32, 5)
    found = GRAPHS["onnx"].told(path, [given.shown(shown, "pictures")], given.outputs)[0]
    copied = tapped(given.network, [stage.module for stage in given.stages])
    said = copied(torch.from_numpy(in_unit(shown)))
    for got, own in zip(found, [said.logits, *said.features.values()], strict=True):  # type: ignore[union-attr]
        np.testing.assert_allclose(got, own, atol=1e-4)
        assert own.std() > 0.01  # there is something to compare
    assert max(compared(given, "onnx", path)) < 1e-4


def test_they_are_those_of_the_published_strides() -> None:
    size = made.SQUARE[0]
    for model in ("timm/swin_tiny_patch4_window7_224", "timm/vit_tiny_patch16_224"):
        found = stages(made.shared(model), size)
        expected = [4, 8, 16, 32] if "swin" in model else [16]
        assert [stage.stride for stage in found] == expected
        assert [stage.grid for stage in found] == [(size // s, size // s) for s in expected]


@pytest.mark.parametrize("kind", ["resnet8", "vit"])
def test_a_program_gives_them_where_the_toolkit_is_not(
    student: Callable[..., Student], tmp_path: Path, kind: str
) -> None:
    given = mapped(student(inside=kind == "vit", **KINDS[kind][0]))
    path = written(given, "torch-export", tmp_path)
    first = path.read_bytes()
    assert written(given, "torch-export", tmp_path).read_bytes() == first
    assert max(compared(given, "torch-export", path)) < 1e-4
    beside = {"stages.json": ""}
    answer = torch.export.load(path, extra_files=beside).module()(given.example)
    assert list(answer) == given.outputs
    assert [stage["name"] for stage in json.loads(beside["stages.json"])] == given.outputs[1:]


def test_smaller_numbers_give_them_too(student: Callable[..., Student], tmp_path: Path) -> None:
    given = mapped(student())
    path = written(given, "onnx", tmp_path, "fp16")
    first = path.read_bytes()
    gaps = compared(given, "onnx", path, "fp16")
    assert max(gaps) > 1e-4  # of float32 it would be refused
    with pytest.raises(VerificationError, match="stage0 differ from the student's by up to"):
        compared(given, "onnx", path, "fp32")
    assert written(given, "onnx", tmp_path, "fp16").read_bytes() == first


def test_without_stages_nothing_of_them_is_in_a_file(
    student: Callable[..., Student], tmp_path: Path
) -> None:
    path = written(student(), "onnx", tmp_path)
    assert b"stage" not in path.read_bytes()


@pytest.mark.parametrize("fault", ["value", "shape", "nan"])
def test_maps_that_are_not_the_students_are_refused(
    student: Callable[..., Student], fault: str
) -> None:
    given = mapped(student())
    own = known(given)

    def told(batches: Any) -> list[list[np.ndarray]]:
        copied = tapped(given.network, [stage.module for stage in given.stages])
        answers = []
        for batch in batches:
            with torch.no_grad():
                found = copied(torch.from_numpy(batch)).features
            maps = [one.numpy().copy() for one in (found or {}).values()]
            if fault == "value":
                maps[1][-1, 3, 2, 1] += 0.01
            elif fault == "shape":
                maps[1] = maps[1][:, :, 1:]
            else:
                maps[1][-1, 3, 2, 1] = np.nan
            answers.append(maps)
        return answers

    expected = {
        "value": "values of stage1 differ",
        "shape": "stage1 has the shape",
        "nan": "finite",
    }
    with pytest.raises(VerificationError, match=expected[fault]):
        parity.compare_maps(told, in_unit, own, "fp32")


@pytest.mark.parametrize("model", ["mlp", "row_gru"])
def test_a_network_without_maps_is_refused(student: Callable[..., Student], model: str) -> None:
    with pytest.raises(IncompatibleError, match=f"--features: {model}: has no grid of features"):
        mapped(student(model))


def test_the_command_writes_them(run: Path, distill: Run, tmp_path: Path) -> None:
    arguments = ("export", run, "--out", "x", "--no-latency", "--features", "--json")
    done = distill(*arguments, "--quantize", "fp16")
    assert done.exit_code == 0, done.stderr
    found = {file["file"]: file for file in json.loads(done.stdout)["files"]}
    assert {name for name, file in found.items() if "stages" in file} == {
        "model.onnx", "model.fp16.onnx", "model.pt2",
    }  # fmt: skip
    for file in found.values():
        if "stages" in file:
            assert [s["shape"][1:] for s in file["stages"]] == [[16, 8, 8], [32, 4, 4], [64, 2, 2]]
            assert [s["stride"] for s in file["stages"]] == [1, 2, 4]
            assert file["precision"] == "fp16" or max(s["max_abs"] for s in file["stages"]) <= 1e-4
    assert (tmp_path / "x" / "model.safetensors").read_bytes() == (
        run / "student.safetensors"
    ).read_bytes()
    card = (tmp_path / "x" / "README.md").read_text()
    assert "| `stage2` | (batch, 64, 2, 2) | 4 px | `layer3` |" in card
    assert 'student(torch.tensor(images))["logits"]\n```' in card
    from PIL import Image

    Image.fromarray(pixels(20, 1)[0]).save(tmp_path / "x" / "p.png")
    assert served(tmp_path / "x", "p.png")[0][0] == "p.png"  # which asks for logits alone


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--quantize", "int8"), "--features: not with --quantize int8"),
        (("--format", "safetensors,timm"), "--features: safetensors and timm give no maps"),
    ],
)
def test_what_cannot_give_them_is_refused(
    run: Path,
    distill: Run,
    tmp_path: Path,
    arguments: tuple[str, ...],
    said: str,
) -> None:
    done = distill("export", run, "--out", "x", "--no-latency", "--features", *arguments)
    assert (done.exit_code, said in done.stderr) == (2, True), done.stderr
    assert not (tmp_path / "x").exists()


def test_nothing_is_written_if_a_map_is_that_of_another_layer(
    run: Path,
    distill: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    form = FORMATS["onnx"]
    write: Any = form.write

    def swapped(given: Student, path: Path, precision: Any) -> None:
        """Another layer's map, of the same shape, under the name of the first stage's."""
        inner = given.stages[0]._replace(module="layer1.0.conv2")
        write(given._replace(stages=(inner, *given.stages[1:])), path, precision)

    monkeypatch.setattr(form, "write", swapped)
    done = distill("export", run, "--out", "x", "--no-latency", "--features", "--format", "onnx")
    assert done.exit_code == 5, done.stderr
    assert "model.onnx: the values of stage0 differ" in " ".join(done.stderr.split())
    assert names(tmp_path / "x") == set()
