"""Help and recipe errors come at once: nothing heavy is imported for them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main
from typer.testing import Result

from distill.cli import app
from tests.cli.conftest import ROOT, process

COMMANDS = sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
HEAVY = ("torch", "torchvision", "timm", "accelerate", "numpy", "safetensors", "PIL")

SCRIPT = """
import sys
from typer.testing import CliRunner
from distill.cli import app

result = CliRunner().invoke(app, sys.argv[2:])
assert result.exit_code == int(sys.argv[1]), (result.exit_code, result.output)
print([name for name in {heavy!r} if name in sys.modules])
"""


def imported(status: int, *arguments: str, cwd: Path) -> str:
    """The heavy packages that a command has imported by its end."""
    script = SCRIPT.format(heavy=HEAVY)
    done = subprocess.run(
        [sys.executable, "-c", script, str(status), *arguments],
        cwd=cwd,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help(command: str, tmp_path: Path) -> None:
    arguments = [command, "--help"] if command else ["--help"]
    assert imported(0, *arguments, cwd=tmp_path) == "[]"


@pytest.mark.parametrize("command", ["train", "check"])
def test_a_wrong_recipe(command: str, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("data: {name: digitz}\nstudent: {model: vitt}\n")
    assert imported(2, command, "bad.yaml", cwd=tmp_path) == "[]"


@pytest.mark.parametrize("kind", ["recipes", "models", "terms", "datasets"])
def test_lists(kind: str, tmp_path: Path) -> None:
    assert imported(0, "list", kind, "--json", cwd=tmp_path) == "[]"


def test_the_schema(tmp_path: Path) -> None:
    assert imported(0, "check", "--schema", cwd=tmp_path) == "[]"


def test_a_look_at_a_folder_needs_no_torch(tmp_path: Path) -> None:
    loaded = imported(6, "init", "nowhere", cwd=tmp_path)
    assert "torch" not in loaded


def test_the_real_command_shows_every_command(tmp_path: Path) -> None:
    done = process("--help", cwd=tmp_path)
    assert done.returncode == 0
    for command in COMMANDS:
        assert re.search(rf"\b{command}\b", done.stdout)


def test_an_unknown_command_or_option_is_a_usage_error(tmp_path: Path) -> None:
    for arguments in (["trian"], ["train"], ["train", "--epochs", "3"], ["list", "modles"]):
        done = process(*arguments, cwd=tmp_path)
        assert done.returncode == 2
        assert done.stdout == ""


def test_every_fault_with_its_line_and_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "[bad].yaml").write_text("data: {name: digitz}\nstudent: {model: '[red]x[/y]'}\n")
    done = process("train", "[bad].yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "[bad].yaml:1: data.name: " in done.stderr
    assert "[bad].yaml:2: student.model: unknown model '[red]x[/y]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = process("train", "none.yaml", cwd=tmp_path, env={"DISTILL_DEBUG": "1"})
    assert "Traceback" in done.stderr


def helps() -> list[tuple[str, Result]]:
    from typer.testing import CliRunner

    runner = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"})
    return [(name, runner.invoke(app, [name, "--help"])) for name in COMMANDS]


def test_every_command_has_an_example_and_json() -> None:
    for name, result in helps():
        if name != "distill":  # the same command under another name
            assert f"Example: distill {name}" in result.output
        assert "--json" in result.output
