"""Formats whose packages are not among those of the tests: the long ones need them."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import Result

from distill.cli.export import FORMATS as NAMES
from distill.errors import VerificationError
from distill.export import parity
from distill.export.formats import DEFAULT, FORMATS, lacking, torch_export
from distill.export.program import Precision, Resize, Student
from tests.cli.conftest import distill as command  # noqa: F401
from tests.export.conftest import VIT, compared, known, pixels, written

ROOT = Path(__file__).parents[2]
MODELS = [{}, VIT]


def test_the_names_of_all_formats() -> None:
    assert NAMES.split(", ") == list(FORMATS)
    assert list(FORMATS)[: len(DEFAULT)] == list(DEFAULT)
    for document in ("README.md", "docs/export.md"):
        text = (ROOT / document).read_text(encoding="utf-8")
        assert [name for name in FORMATS if f"`{name}`" not in text] == [], document


def test_every_file_has_a_name_of_its_own() -> None:
    names = [form.file(precision) for form in FORMATS.values() for precision in form.PRECISIONS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", ["openvino", "executorch", "coreml"])
def test_a_package_that_is_missing(
    command: Callable[..., Result],  # noqa: F811
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    monkeypatch.setattr(FORMATS[name], "PACKAGES", ("torch", "no_such_package"))
    done = command("export", run, "--format", name, "--out", "x")
    assert done.exit_code == 6
    assert f"--format {name}: needs no_such_package" in done.stderr
    assert f"pip install 'distill-kd[{name}]'" in done.stderr
    assert not Path("x").exists()


@pytest.mark.parametrize(("platform", "said"), [("linux", "on macOS only"), ("darwin", "")])
def test_core_ml_is_written_where_it_runs(
    student: Callable[..., Student], monkeypatch: pytest.MonkeyPatch, platform: str, said: str
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    why = FORMATS["coreml"].refusal(student("mlp"))
    assert why.endswith(said)
    assert bool(why) is bool(said)


def test_unread_tensors_are_dropped() -> None:
    module = torch.fx.symbolic_trace(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1)))
    graph = torch.fx.Graph()
    graph.output(graph.call_function(torch.neg, (graph.get_attr("0.bias"),)))
    module.graph = graph
    torch_export._drop_unused(module)
    assert list(module.state_dict()) == ["0.bias"]


def needs(name: str, precision: Precision = "fp32") -> None:
    """Without importing anything: some packages report when they are."""
    if lacking(name) or precision not in FORMATS[name].PRECISIONS:
        pytest.skip(f"{name} in {precision} needs packages that are not here")


@pytest.mark.soak
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", ["openvino", "executorch"])
def test_it_says_what_the_student_says(
    student: Callable[..., Student],
    tmp_path: Path,
    name: str,
    model: dict[str, object],
    inside: bool,
) -> None:
    needs(name)
    given = student(inside=inside, **model)
    found = compared(given, name, written(given, name, tmp_path))
    parity.require(found, "fp32", known(given), max_drop=0)


@pytest.mark.soak
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", ["openvino", "torch-export"])
def test_int8(
    student: Callable[..., Student],
    tmp_path: Path,
    name: str,
    model: dict[str, object],
    inside: bool,
) -> None:
    """It loses little, is not the student in float32 after all, and is smaller."""
    needs(name, "int8")
    given = student(inside=inside, **model)
    full, small = (written(given, name, tmp_path, precision) for precision in ("fp32", "int8"))
    found = compared(given, name, small)
    parity.require(found, "int8", known(given), max_drop=0.05)
    assert found.max_abs > 0.01
    kind = ".bin" if name == "openvino" else ".pt2"
    size = small.with_suffix(kind).stat().st_size
    assert size < 0.75 * full.with_suffix(kind).stat().st_size


@pytest.mark.soak
@pytest.mark.parametrize(
    ("name", "precision"), [("openvino", "fp32"), ("openvino", "int8"), ("torch-export", "int8")]
)
def test_pictures_of_other_sizes(
    student: Callable[..., Student], tmp_path: Path, name: str, precision: Precision
) -> None:
    """In one open file; each as its view, cut before, is answered."""
    needs(name, precision)
    given = student()
    path = written(given, name, tmp_path, precision)
    views = pixels(32)[:3]
    sizes = [pixels(77, 3), pixels(20, 1), pixels(90, 2)[:, :50], given.shown(views, "pictures")]
    *others, same = FORMATS[name].answers(given, path, sizes)
    allowed = {"atol": 0.05} if precision == "fp32" else {"atol": 1, "rtol": 0.15}
    for pictures, logits in zip(sizes, others, strict=False):
        squares = Resize(given.preprocessing)(torch.from_numpy(pictures))
        np.testing.assert_allclose(logits, given.network(squares).logits, **allowed)
    np.testing.assert_allclose(same, known(given).logits[:3], **allowed)


@pytest.mark.soak
@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("openvino", "fp32"),
        ("openvino", "int8"),
        ("executorch", "fp32"),
        ("coreml", "fp32"),
        ("torch-export", "int8"),
    ],
)
def test_the_same_student_gives_the_same_bytes(
    student: Callable[..., Student], tmp_path: Path, name: str, precision: Precision
) -> None:
    needs(name, precision)
    made = []
    for folder in (tmp_path / "first", tmp_path / "second"):
        folder.mkdir()
        written(student(**VIT), name, folder, precision)
        made.append({path.name: path.read_bytes() for path in folder.iterdir()})
        if name == "coreml":
            with zipfile.ZipFile(folder / FORMATS[name].file(precision)) as archive:
                made[-1] |= {inner: archive.read(inner) for inner in archive.namelist()}
    assert made[0] == made[1]
    for data in made[0].values():
        for place in (ROOT, Path(sys.prefix), tmp_path):
            assert str(place).encode() not in data


@pytest.mark.soak
def test_a_program_in_int8_needs_its_operators_only(
    student: Callable[..., Student], tmp_path: Path
) -> None:
    needs("torch-export", "int8")
    given = student()
    path = written(given, "torch-export", tmp_path, "int8")
    script = (
        "import sys, torch; torch.export.load(sys.argv[1]); assert 'torchao' not in sys.modules"
    )
    for before, status in (("", 1), (f"{torch_export._OPERATORS}\n", 0)):
        done = subprocess.run(
            [sys.executable, "-c", before + script, path], capture_output=True, check=False
        )
        assert done.returncode == status, done.stderr
    unknown = path.rename(tmp_path / "model.pt2")  # whose name does not tell that it is in int8
    with pytest.raises(VerificationError, match="a fresh process cannot run it"):
        FORMATS["torch-export"].answers(given, unknown, [])


@pytest.mark.soak
def test_executorch_takes_32_and_no_more(student: Callable[..., Student], tmp_path: Path) -> None:
    needs("executorch")
    given = student()
    path = written(given, "executorch", tmp_path)
    squares = given.shown(pixels(32), "squares")
    (found,) = FORMATS["executorch"].answers(given, path, [squares[:32]])
    np.testing.assert_allclose(found, known(given).logits[:32], atol=1e-4)
    with pytest.raises(RuntimeError):
        FORMATS["executorch"].answers(given, path, [squares[:33]])


@pytest.mark.soak
@pytest.mark.parametrize("model", MODELS)
def test_a_core_ml_package(
    student: Callable[..., Student], tmp_path: Path, model: dict[str, object]
) -> None:
    """What it takes and says; whether that is right, macOS alone can tell."""
    needs("coreml")
    given = student(**model)
    path = written(given, "coreml", tmp_path)
    zipfile.ZipFile(path).extractall(tmp_path)
    from coremltools.models.utils import load_spec

    spec = load_spec(str(tmp_path / "model.mlpackage"))
    (taken,), (told,) = spec.description.input, spec.description.output
    assert (taken.name, told.name) == ("images", "logits")
    shape = taken.type.multiArrayType.shapeRange.sizeRanges
    assert [(side.lowerBound, side.upperBound) for side in shape] == [
        (1, 32),
        (3, 3),
        (32, 32),
        (32, 32),
    ]
    assert taken.type.multiArrayType.dataType == told.type.multiArrayType.dataType
    if sys.platform == "darwin":
        parity.require(compared(given, "coreml", path), "fp32", known(given), max_drop=0)
