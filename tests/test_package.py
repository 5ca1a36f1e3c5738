"""What a user installs is whole, and the README's commands are the ones that are run."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_a_wheel_carries_recipes_digits_and_licences(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in (ROOT / "recipes").rglob("*.yaml"):
        assert f"distill/recipes/{path.relative_to(ROOT / 'recipes').as_posix()}" in names
    data = {"data/digits.npz", "data/digits.LICENSE.txt", "export/card/card.md.jinja"}
    assert {f"distill/{name}" for name in data} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if "test" in name.split("/")[0]]


def test_ci_runs_the_command_that_the_readme_names() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    command = 'pip install ".[test]" && python -m pytest'
    assert re.search(rf"^{re.escape(command)}$", readme, re.MULTILINE)
    assert command in (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()


def test_the_dockerfile_installs_as_the_readme_does_and_runs_as_a_user() -> None:
    docker = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    index = "pip install torch torchvision --index-url https://download.pytorch.org/whl/cpu"
    assert index in docker
    assert index in readme
    for target in re.split(r"^FROM ", docker, flags=re.MULTILINE)[2:]:
        assert "USER distill" in target
        assert 'ENTRYPOINT ["distill"]' in target
