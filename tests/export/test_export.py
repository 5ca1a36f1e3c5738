from __future__ import annotations

import copy
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import Result

import distill
from tests.cli.conftest import distill as command  # noqa: F401
from tests.cli.conftest import images, listing
from tests.promises import Measured

ROOT = Path(__file__).parents[2]
Run = Callable[..., Result]


@pytest.fixture(name="distill")
def _distill(command: Run) -> Run:  # noqa: F811
    return command


@pytest.fixture(scope="session")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that can be exported of the run, by the real command."""
    out = tmp_path_factory.mktemp("exported") / "files"
    smaller = ("--quantize", "fp16,int8", "--max-drop", "5")
    done = process("export", run, "--out", out, "--no-latency", *smaller)
    assert done.returncode == 0, done.stderr
    return out


def process(*arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "distill", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120", "NO_COLOR": "1", **env},
        capture_output=True,
        text=True,
        check=False,
    )


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


@pytest.mark.promise("R19")
def test_what_is_written(exported: Path, run: Path, measured: Measured) -> None:
    about = json.loads((exported / "export.json").read_text())
    files = {entry["file"]: entry for entry in about["files"]}
    assert list(files) == [
        "model.onnx", "model.fp16.onnx", "model.int8.onnx", "model.pt2", "model.safetensors",
    ]  # fmt: skip
    assert about["left_out"] == [{"format": "timm", "reason": "timm has no model resnet8"}]
    assert files["model.onnx"]["opset"] == 20
    assert files["model.onnx"]["input"]["dtype"] == "uint8"
    assert about["weights"] == "exponential moving average, decay 0.9"
    for entry in (*about["files"], *about["companions"]):
        data = (exported / entry["file"]).read_bytes()
        assert (entry["bytes"], entry["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    listed = {entry["file"] for entry in (*about["files"], *about["companions"])}
    assert listed | {"export.json"} == names(exported)
    for name, entry in files.items():
        parity = entry["parity"]
        assert (parity["images"], parity["batches"]) == (64, [1, 2, 7]), name
        assert parity["accuracy_images"] == 897  # all test images there are
        if entry["precision"] == "fp32":
            assert parity["max_abs"] <= 1e-4
            assert parity["agreement"] == 1
            assert parity["accuracy"] == parity["student_accuracy"]
        figure = f"largest difference {parity['max_abs']:.1e}, same class {parity['agreement']:.1%}"
        if entry["precision"] != "fp32":
            figure += f", {-100 * parity['drop']:+.2f} points"
        measured(f"{name}, 64 digits in batches of 1, 2, 7 and all 897 in 32", figure)
    own = json.loads((run / "result.json").read_text())["top1"]
    assert files["model.onnx"]["parity"]["student_accuracy"] == pytest.approx(own)


def test_the_student_alone_is_in_the_files(exported: Path, run: Path) -> None:
    from safetensors import safe_open

    with safe_open(exported / "model.safetensors", framework="pt") as opened:
        names = set(opened.keys())
    assert names == set(distill.load(run).backbone.state_dict())
    assert (exported / "model.safetensors").read_bytes() == (
        run / "student.safetensors"
    ).read_bytes()


def test_the_program_beside_an_onnx_file(exported: Path, tmp_path: Path) -> None:
    """Copied elsewhere, in a process that can import neither the toolkit nor PyTorch."""
    for name in ("model.onnx", "serve.py"):
        (tmp_path / name).write_bytes((exported / name).read_bytes())
    rng = np.random.default_rng(0)
    for name, size in (("one", (30, 40)), ("two", (8, 8))):
        picture = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(picture).save(tmp_path / f"{name}.png")
    lines = served(tmp_path, "one.png", "two.png")
    network = distill.load(exported / "model.safetensors").eval().requires_grad_(False)
    from distill.data.images import decode, evaluation_view

    for line, name in zip(lines, ("one.png", "two.png"), strict=True):
        view = evaluation_view(decode(tmp_path / name, max_pixels=10**6), size=8, crop=1)
        shown = torch.from_numpy(view.copy()).permute(2, 0, 1)[None] / 255
        shares = network(shown).logits.softmax(dim=1)[0]
        best = int(shares.argmax())
        assert line[0] == name
        found, share = line[1].rsplit(" ", 1)
        assert found == network.classes[best]
        assert float(share.rstrip("%")) == pytest.approx(100 * float(shares[best]), abs=1)


def served(folder: Path, *pictures: str) -> list[list[str]]:
    block = "import runpy, sys; sys.modules.update(distill=None, torch=None); sys.argv.pop(0); "
    done = subprocess.run(
        [sys.executable, "-c", block + "runpy.run_path(sys.argv[0])", "serve.py", *pictures],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [line.split("\t") for line in done.stdout.splitlines()]


def test_again_and_beside(exported: Path, run: Path, distill: Run, tmp_path: Path) -> None:
    """The same bytes again; with preprocessing beside it, and what is not wanted any more gone."""
    arguments = ("export", run, "--out", "x", "--no-latency", "--json", "--format")
    assert distill(*arguments, "onnx,torch-export,safetensors").exit_code == 0
    for name in ("model.onnx", "model.pt2", "model.safetensors"):
        assert (tmp_path / "x" / name).read_bytes() == (exported / name).read_bytes(), name
    done = distill(*arguments, "onnx", "--preprocessing", "sidecar")
    assert done.exit_code == 0
    about = json.loads(done.stdout)
    kept = json.loads((tmp_path / "x" / "export.json").read_text())
    assert about == kept | {"run": str(run), "out": "x"}
    assert str(run.parent) not in (tmp_path / "x" / "export.json").read_text()
    kept = names(tmp_path / "x")
    assert {"model.onnx", "serve.py", "preprocessing.json", "export.json"} <= kept
    assert not {"model.pt2", "model.safetensors"} & kept
    picture = np.random.default_rng(1).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "x" / "p.png")
    Image.fromarray(picture).save(tmp_path / "p.png")
    for name in ("model.onnx", "serve.py"):
        (tmp_path / name).write_bytes((exported / name).read_bytes())
    (beside,), (inside,) = served(tmp_path / "x", "p.png"), served(tmp_path, "p.png")
    assert [name.rsplit(" ")[0] for name in beside[1:]] == [n.rsplit(" ")[0] for n in inside[1:]]


@pytest.mark.promise("R19")
def test_a_file_whose_weights_are_others_is_refused(
    run: Path,
    distill: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    measured: Measured,
) -> None:
    """By a thousandth, in one layer, after the conversion: no exporter's own checks would tell."""
    from distill.export.formats import FORMATS

    count = 0
    for name in ("onnx", "torch-export", "safetensors"):
        form = FORMATS[name]

        def altered(student: Any, path: Path, precision: Any, write: Any = form.write) -> None:
            network = copy.deepcopy(student.network)
            with torch.no_grad():
                next(p for p in network.backbone.parameters() if p.ndim > 1).mul_(1.001)
            write(student._replace(network=network), path, precision)

        with monkeypatch.context() as patch:
            patch.setattr(form, "write", altered)
            done = distill("export", run, "--out", name, "--format", name, "--no-latency")
        assert done.exit_code == 5, (name, done.stderr)
        assert "nothing was written" in done.stderr
        assert names(tmp_path / name) == set()
        count += 1
    measured(
        "weights altered by 0.1 % in one layer", f"{count} of {count} formats refused, no file"
    )


@pytest.mark.promise("R19")
def test_nothing_is_written_if_a_file_does_not_say_the_same(
    run: Path,
    distill: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    measured: Measured,
) -> None:
    from distill.export.formats import onnx

    quantised = onnx._quantised

    def ruined(network: Any, calibration: Any, *, whole: bool) -> Any:
        from onnx import numpy_helper

        found = quantised(network, calibration, whole=whole)
        for tensor in found.graph.initializer:
            if tensor.data_type == 3:  # int8: the weights
                zeros = np.zeros_like(numpy_helper.to_array(tensor))
                tensor.CopyFrom(numpy_helper.from_array(zeros, tensor.name))
        return found

    first = distill("export", run, "--out", "x", "--format", "safetensors", "--no-latency")
    assert first.exit_code == 0
    before = listing(tmp_path / "x")
    monkeypatch.setattr(onnx, "_quantised", ruined)
    done = distill("export", run, "--out", "x", "--format", "onnx", "--quantize", "int8")
    assert done.exit_code == 5
    assert "model.int8.onnx: it is right on" in done.stderr
    assert "nothing was written" in done.stderr
    assert listing(tmp_path / "x") == before
    measured("int8 with ruined weights, over an older export", "refused, the older one as it was")


def test_a_killed_export_leaves_nothing(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "x"
    started = subprocess.Popen(
        [sys.executable, "-m", "distill", "export", str(run), "--out", str(out), "--no-latency"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
    )
    while not list(out.glob(".*.tmp/model.onnx")):
        assert started.poll() is None
        time.sleep(0.02)
    started.send_signal(signal.SIGKILL)
    started.wait()
    assert names(out) == set()
    done = process("export", run, "--out", out, "--format", "safetensors", "--no-latency")
    assert done.returncode == 0, done.stderr
    assert not list(out.glob(".*.tmp"))


def test_a_folder_of_pictures(distill: Run, tmp_path: Path) -> None:
    """Whole files are resized in the graph, and named as the student names their view."""
    for split, count in (("train", 12), ("test", 6)):
        images(tmp_path / "photos" / split, "ant", "bee", count=count, size=(24, 20))
    (tmp_path / "recipe.yaml").write_text(
        """
        data: {name: folder, root: photos, image_size: 16, eval_crop: 0.8}
        student: {model: resnet8}
        objective: [{term: ce}]
        optimizer: {name: sgd, lr: 0.05}
        train: {epochs: 1, batch_size: 8}
        """
    )
    assert distill("train", "recipe.yaml", "--out", "run").exit_code == 0
    done = distill("export", "run", "--format", "onnx", "--no-latency", "--json")
    assert done.exit_code == 0, done.stderr
    (file,) = json.loads(done.stdout)["files"]
    assert file["files"]["images"] == 12
    assert file["files"]["agreement"] >= 0.95
    assert file["parity"]["max_abs"] < 1e-4
    assert (tmp_path / "run" / "export" / "model.onnx").exists()


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("--format", "onyx"), 2, "--format onyx: not known; did you mean 'onnx'"),
        (("--quantize", "int4"), 2, "--quantize int4: not known"),
        (("--preprocessing", "both"), 2, "known are graph, sidecar"),
        (("--format", "timm"), 2, "--format timm: timm has no model resnet8"),
        (("--out", "mine"), 6, "mine: holds files and no export.json"),
        (("--out", "broken"), 6, "broken/export.json: cannot be read"),
    ],
)
def test_what_is_refused(
    run: Path, distill: Run, tmp_path: Path, arguments: tuple[str, ...], status: int, said: str
) -> None:
    for name, file in (("mine", "README.md"), ("broken", "export.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("mine")
    done = distill("export", run, "--out", "x", "--no-latency", *arguments)
    assert (done.exit_code, said in done.stderr) == (status, True), done.stderr
    assert (tmp_path / "mine" / "README.md").read_text() == "mine"
    assert not (tmp_path / "x").exists()


def test_a_run_that_is_not_done(distill: Run, tmp_path: Path) -> None:
    done = distill("export", tmp_path)
    assert done.exit_code == 6
    assert "has no recipe.yaml" in done.stderr


def test_a_format_whose_packages_are_missing(
    run: Path, distill: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distill.export.formats import onnx

    monkeypatch.setattr(onnx, "PACKAGES", ("onnx", "no_such_package"))
    done = distill("export", run, "--format", "onnx", "--out", "x")
    assert done.exit_code == 6
    assert "--format onnx: needs no_such_package" in done.stderr
    assert "pip install 'distill-kd[onnx]'" in done.stderr
    done = distill("export", run, "--out", "x", "--no-latency", "--json")
    assert done.exit_code == 0
    left_out = {entry["format"]: entry["reason"] for entry in json.loads(done.stdout)["left_out"]}
    assert left_out["onnx"] == "needs no_such_package; pip install 'distill-kd[onnx]'"


def test_what_would_be_sent(run: Path, distill: Run, tmp_path: Path) -> None:
    """A dry run needs no network; a wrong name is refused before anything is exported."""
    arguments = ("export", run, "--out", "x", "--format", "safetensors", "--no-latency", "--json")
    done = distill(*arguments, "--push-to-hub", "a name", "--dry-run")
    assert done.exit_code == 2
    assert not (tmp_path / "x").exists()
    done = distill(*arguments, "--push-to-hub", "me/student", "--dry-run")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["hub"] is None
    assert "me/student on the Hugging Face hub (private, if it is new)" in done.stderr
    for name in ("model.safetensors", "README.md", "export.json"):
        assert f"  {name}" in done.stderr
    assert "3 files" in done.stderr
    assert "nothing was sent" in done.stderr
