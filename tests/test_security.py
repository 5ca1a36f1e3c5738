"""Nothing that lies in a folder is run because a command reads the folder."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill import remote, yamlio
from distill.errors import DistillError, RecipeError
from tests.cli.conftest import images
from tests.engine import processes
from tests.promises import Measured

long = [pytest.mark.soak, pytest.mark.timeout(3600)]

RECIPE: dict[str, Any] = {
    "data": {"name": "digits", "fraction": 0.1},
    "teachers": [{"recipe": "teacher.yaml"}],
    "student": {"model": "mlp", "width": 8},
    "objective": [{"term": "ce"}, {"term": "kd"}],
    "cache": {"path": "cache", "views": 1},
    "optimizer": {"lr": 1e-3},
    "train": {"epochs": 1, "batch_size": 30},
}
COMMANDS = (
    "check recipe.yaml",
    "train recipe.yaml --out run --workers 0",
    "teacher-cache recipe.yaml --out cache --status",
    "teacher-cache recipe.yaml --out cache --verify full",
    "evaluate run --suite clean --workers 0",
    "export run --format safetensors --no-latency --workers 0",
    "pack images.yaml --out pack --size 8 --verify",
    "check pack.yaml",
    "init pictures --out made.yaml",
)


class _Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.marker,)


def payloads(marker: Path) -> dict[str, bytes]:
    """What would make a folder `marker` if a reader trusted it."""
    import torch

    bomb, stream, array = _Bomb(str(marker)), io.BytesIO(), io.BytesIO()
    torch.save(bomb, stream)
    np.save(array, np.array([bomb], dtype=object), allow_pickle=True)
    act = f"import os; os.mkdir({str(marker)!r})"
    return {
        "pickle": pickle.dumps(bomb),
        "torch.save": stream.getvalue(),
        "numpy": array.getvalue(),
        "yaml": f"a: !!python/object/apply:os.mkdir [{str(marker)!r}]\n".encode(),
        "yaml of a newer kind": f"!!python/object/new:os.mkdir\nargs: [{str(marker)!r}]\n".encode(),
        "python": f"{act}\n".encode(),
        "template": f"{{{{ self.__init__.__globals__.__builtins__.exec({act!r}) }}}}".encode(),
    }


def _command(line: str) -> None:
    """Run it in this process; anything but a sentence is raised."""
    from typer.testing import CliRunner

    from distill.cli import app

    found = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(app, line.split())
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception


def _make(folder: Path) -> None:
    """A folder in which every command has left what it leaves."""
    os.chdir(folder)
    files = {
        "teacher.yaml": {key: RECIPE[key] for key in ("data", "student", "optimizer", "train")}
        | {"objective": [{"term": "ce"}]},
        "recipe.yaml": RECIPE,
        "images.yaml": {**RECIPE, "teachers": [], "cache": None, "objective": [{"term": "ce"}]}
        | {"data": {"name": "folder", "root": "pictures", "image_size": 8}},
        "pack.yaml": {**RECIPE, "teachers": [], "cache": None, "objective": [{"term": "ce"}]}
        | {"data": {"name": "webdataset", "root": "pack", "image_size": 8}}
        | {"train": {"epochs": 1, "batch_size": 2}},
    }
    for name, data in files.items():
        Path(name).write_text(yamlio.dump(data))
    images(Path("pictures"), "train/a", "train/b", "test/a", "test/b", count=2, size=(10, 8))
    _command("teacher-cache recipe.yaml --out cache --workers 0")
    _command("train recipe.yaml --out run --checkpoint-seconds 0 --workers 0")
    _command("evaluate run --suite clean --workers 0")
    _command("export run --format safetensors --no-latency --workers 0")
    _command("pack images.yaml --out pack --size 8 --workers 0")
    for name in ("run/student.safetensors", "run/export/export.json", "cache/index.json"):
        assert Path(name).is_file(), name


def _plant(folder: Path, every: bool) -> None:
    """Put the payloads in the place of files, run the commands, and tell what came of it."""
    import torch

    torch.set_num_threads(1)
    sound, marker = folder / "sound", folder / "marker"
    sound.mkdir()
    _make(sound)
    names = [str(path.relative_to(sound)) for path in sorted(sound.rglob("*")) if path.is_file()]
    names = [name for name in names if not name.endswith((".lock", ".html", ".csv", "1.png"))]
    kinds = payloads(marker)
    faults, runs = [], 0
    for i, name in enumerate(names):
        first = name.partition("/")[0].partition(".")[0]
        for j, (kind, payload) in enumerate(kinds.items()):
            if not every and j != i % len(kinds):
                continue
            os.chdir(folder)
            shutil.rmtree("place", ignore_errors=True)
            shutil.copytree(sound, "place")
            os.chdir("place")
            if "checkpoint" in name or name.endswith("student.safetensors"):
                Path("run/result.json").unlink()  # else training is done and reads no more
            Path(name).write_bytes(payload)
            for command in COMMANDS:
                if first not in command and first not in ("teacher", "recipe"):
                    continue
                runs += 1
                try:
                    _command(command)
                except Exception as error:
                    faults.append(f"{kind} as {name}: {command}: {type(error).__name__}: {error}")
                if marker.exists():
                    faults.append(f"{kind} as {name}: {command}: it was run")
                    marker.rmdir()
    found = {"faults": faults, "runs": runs, "files": len(names), "kinds": len(kinds)}
    (folder / "found.json").write_text(json.dumps(found))


@pytest.mark.promise("R14")
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=long)])
def test_a_payload_in_the_place_of_a_file_is_never_run(
    every: bool, tmp_path: Path, measured: Measured
) -> None:
    child = processes.context.Process(target=_plant, args=(tmp_path, every))
    child.start()
    child.join()
    assert child.exitcode == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["faults"] == []
    measured(
        "payloads planted in every file of a run, cache, pack, export and set",
        f"{found['files']} files, {found['kinds']} kinds, {found['runs']:,} commands: 0 run",
    )


def test_the_payloads_would_run(tmp_path: Path) -> None:
    """Else nothing is shown by their silence."""
    import torch
    import yaml

    marker = tmp_path / "marker"
    kinds = payloads(marker)
    readers = {
        "pickle": pickle.loads,
        "torch.save": lambda data: torch.load(io.BytesIO(data), weights_only=False),
        "numpy": lambda data: np.load(io.BytesIO(data), allow_pickle=True),
        "yaml": yaml.unsafe_load,
        "python": exec,
    }
    for kind, read in readers.items():
        read(kinds[kind])
        marker.rmdir()


MODULES = (
    "torch/__init__.py", "numpy.py", "yaml.py", "json.py", "pickle.py", "struct.py", "socket.py",
    "multiprocessing/__init__.py", "sitecustomize.py", "usercustomize.py", "conftest.py", "timm.py",
    "PIL/__init__.py", "safetensors.py", "random.py", "subprocess.py",
)  # fmt: skip


@pytest.mark.promise("R14")
@pytest.mark.parametrize("start", ["distill", "python -m distill"])
def test_no_module_of_the_working_directory_is_imported(
    start: str, tmp_path: Path, measured: Measured
) -> None:
    """A folder of data is not a part of the program, in the processes that decode images either."""
    marker = tmp_path / "marker"
    place = images(tmp_path / "place", "train/a", "train/b", "test/a", "test/b", count=3)
    own = ["typing.py", "distill.py"] if start == "distill" else []  # python itself reads those
    for name in (*MODULES, *own):
        for folder in (place, place / "train"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(f"open({str(marker)!r}, 'a').write(__file__ + '\\n')\n")
    shutil.rmtree(place / "train" / "torch")  # else they are classes without an image
    shutil.rmtree(place / "train" / "PIL")
    shutil.rmtree(place / "train" / "multiprocessing")
    recipe = {
        "data": {"name": "folder", "root": ".", "image_size": 8},
        "student": {"model": "mlp", "width": 8},
        "objective": [{"term": "ce"}],
        "optimizer": {"lr": 1e-3},
        "train": {"epochs": 1, "batch_size": 2},
    }
    (place / "recipe.yaml").write_text(yamlio.dump(recipe))
    script = Path(sys.executable).with_name("distill")
    program = [str(script)] if start == "distill" else [sys.executable, "-m", "distill"]
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    done = subprocess.run(
        [*program, "train", "recipe.yaml", "--out", "run", "--workers", "2"],
        cwd=place, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert not marker.exists(), marker.read_text()
    assert done.returncode == 0, done.stderr
    measured(f"modules planted in the working directory, `{start}`", f"{len(MODULES)}: 0 imported")


@pytest.fixture
def strange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module that can be imported, and tells when it is."""
    folder = tmp_path / "importable"
    folder.mkdir()
    marker = tmp_path / "marker"
    (folder / "strange_part.py").write_text(
        f"open({str(marker)!r}, 'w').close()\nfrom distill.models.zoo.mlp import mlp as net\n"
    )
    monkeypatch.syspath_prepend(folder)
    yield marker
    sys.modules.pop("strange_part", None)


def _foreign_run(folder: Path) -> Path:
    """A run directory whose weights and recipe name that module."""
    from distill import models, recipe
    from distill.models import weights

    facts: dict[str, Any] = {
        "classes": tuple("0123456789"), "image_size": 8, "mean": (0.5,) * 3, "std": (0.5,) * 3,
    }  # fmt: skip
    built = models.build_student(recipe.Model(model="mlp", weights=None), **facts)
    run = folder / "run"
    run.mkdir()
    named = built.description.model_copy(update={"model": "strange_part:net", "arguments": {}})
    built.description = named
    data = weights.to_bytes(built)
    (run / "student.safetensors").write_bytes(data)
    own = {key: RECIPE[key] for key in ("data", "optimizer", "train")}
    own |= {"student": {"model": "strange_part:net"}, "objective": [{"term": "ce"}]}
    (run / "recipe.yaml").write_text(yamlio.dump(own))
    return run


@pytest.mark.promise("R14")
def test_code_that_only_a_run_directory_names_is_not_imported(
    strange: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: Measured
) -> None:
    from distill.engine.finished import Loader
    from distill.models import weights

    run = _foreign_run(tmp_path)
    recipe = {**RECIPE, "cache": None, "teachers": [{"weights": str(run)}]}
    (tmp_path / "recipe.yaml").write_text(yamlio.dump(recipe))
    monkeypatch.chdir(tmp_path)
    for read in (
        lambda: weights.load(run),
        lambda: weights.load(run / "student.safetensors"),
        lambda: Loader(None)(run),
    ):
        with pytest.raises(RecipeError, match="strange_part:net, which is code outside distill"):
            read()
    for command in ("train recipe.yaml", "check recipe.yaml", "evaluate run", "export run"):
        _command(command)
        assert not strange.exists(), command
    monkeypatch.setenv("DISTILL_CODE", "strange_part:net")
    assert weights.load(run).model == "strange_part:net"
    assert strange.exists()
    measured("code that only a run directory names", "7 ways to read it: 0 imported")


@pytest.mark.parametrize(
    "url",
    [
        "reference://::file:///tmp/x.json",
        "zip://a::https://example.org/b.zip",
        "s3://bucket/a::ssh://host/b",
        "ssh://host/a",
        "python://a",
        "github://a:b@/c",
        "filecache::s3://a/b",
        "dask://a",
    ],
)
def test_an_address_opens_an_object_store_and_nothing_else(url: str) -> None:
    with pytest.raises(DistillError, match=r"Protocol not known|a password or a signature"):
        remote.open_files(url)
