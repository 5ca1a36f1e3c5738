from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from distill.cli.env import EXTRAS, SECRETS
from tests.cli.conftest import ROOT, process


def findings(done: Any) -> dict[str, str]:
    (line,) = done.stdout.splitlines()
    return {finding["what"]: finding["mend"] for finding in json.loads(line)["findings"]}


def test_versions_devices_and_machine(tmp_path: Path) -> None:
    import torch

    done = process("env", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert found["devices"][0]["device"] == "cpu"
    assert found["devices"][0]["threads"] == 1  # OMP_NUM_THREADS of the test's process
    assert isinstance(found["devices"][0]["bf16"], bool)
    assert found["machine"]["cores"] >= 1
    assert found["machine"]["free_disk"] > 0
    assert found["machine"]["variables"]["OMP_NUM_THREADS"] == "1"
    assert found["torch_build"].startswith("CUDA" if torch.version.cuda else "CPU")
    for package in ("torchvision", "timm", "accelerate", "numpy", "pillow"):
        assert found["versions"][package]


def test_a_table_for_people_that_shows_no_secret(
    distill: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "[red]x[y]"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    shown = distill("env")
    assert shown.exit_code == 0
    assert "[red]x[y]" in shown.stdout
    assert "unset HF_HUB_OFFLINE" in shown.stderr
    for name in SECRETS:
        assert name not in shown.stdout
        monkeypatch.setenv(name, "hf_do_not_tell")
    for result in (distill("env"), distill("env", "--json")):
        assert all(name in result.stdout for name in SECRETS)
        assert "hf_do_not_tell" not in result.stdout + result.stderr


def test_torchvision_of_another_index(tmp_path: Path) -> None:
    (tmp_path / "torchvision.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')\n"
    )
    done = process("env", "--json", cwd=tmp_path, env={"PYTHONPATH": f"{tmp_path}:{ROOT}"})
    assert done.returncode == 6
    ((what, mend),) = [pair for pair in findings(done).items() if "torchvision" in pair[0]]
    assert "operator torchvision::nms does not exist" in what
    assert mend.startswith("pip install --force-reinstall torch torchvision")


def test_torch_that_cannot_be_loaded(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise OSError('libcudnn.so.9: cannot open')\n")
    done = process("env", "--json", cwd=tmp_path, env={"PYTHONPATH": f"{tmp_path}:{ROOT}"})
    assert done.returncode == 6
    assert findings(done)["torch cannot be loaded: libcudnn.so.9: cannot open"]
    done = process("env", cwd=tmp_path, env={"PYTHONPATH": f"{tmp_path}:{ROOT}"})
    assert done.returncode == 6
    assert "mend with: pip install --force-reinstall torch" in done.stderr


def test_the_extras_are_those_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extra, modules in EXTRAS.items():
        listed = project["optional-dependencies"][extra]
        assert [requirement.partition(">")[0] for requirement in listed] == list(modules)
    others = {"quant", "openvino", "executorch", "coreml"}  # of `distill export --format NAME`
    assert set(project["optional-dependencies"]) - set(EXTRAS) == {"test", "dev", *others}
