"""The rules of the house, kept by tests."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import typer.main

from distill import component
from distill.cli import app
from distill.recipe import Data
from tests.promises import Measured

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "distill").rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
NAMES = {path: str(path.relative_to(ROOT)) for path in FILES}

every_file = pytest.mark.parametrize("path", FILES, ids=NAMES.get)

MOST_LINES = 400
MOST_LINES_OF_A_FUNCTION = 80
HEAVY = {"torch", "torchvision", "timm", "accelerate", "numpy"}


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Every call in a file, with the dotted name of what is called where it has one."""
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def imports(path: Path) -> Iterator[str]:
    """Every module that a file names in an import."""
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def keywords(call: ast.Call) -> dict[str | None, str]:
    return {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}


def test_layers_import_downwards_only() -> None:
    found = subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout
    assert "0 broken" in found.stdout


@pytest.mark.parametrize(
    "module",
    [
        "distill",
        "distill.cli",
        "distill.recipe",
        "distill.component",
        "distill.schedule",
        "distill.yamlio",
        "distill.errors",
        "distill.storage",
        "distill.console",
    ],
)
def test_nothing_heavy_is_imported_with(module: str) -> None:
    script = f"import sys, {module}; print(sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


# What runs code that lies in its input, whole modules and single functions.
RUNS_CODE = {
    "pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "runpy",
    "code", "codeop", "imp", "zipimport", "pdb", "cProfile", "timeit", "doctest", "pty", "xml",
    "lxml", "jsonpickle", "numexpr", "telnetlib", "webbrowser",
}  # fmt: skip
RUNS_CODE_CALLED = re.compile(
    r"eval|exec|compile|__import__|(?:builtins\.).*|os\.(?:system|popen|exec\w+|spawn\w+|startfile)"
    r"|subprocess\.(?:getoutput|getstatusoutput)|yaml\.(?:full_|unsafe_)?load(?:_all)?"
    r"|torch\.(?:hub\.load|jit\.load|package\.\w+|ops\.load_library|classes\.load_library)"
    r"|(?:np|numpy)\.(?:fromregex|genfromtxt|ctypeslib\.\w+)|importlib\.(?:reload|util\.(?:spec|module)_from\w+)"
    r"|tempfile\.mktemp|ssl\._create_unverified_context|(?:pd|pandas)\.read_pickle"
    r"|.*\.(?:load_module|exec_module|find_class|add_safe_globals|safe_globals)"
)
# Where a module is imported by a name that is not written there: of built-in parts, and of what
# `require_vouched` guards. All other code must name what it imports.
IMPORTS_BY_NAME = {"distill/__init__.py", "distill/component.py"}
# Where a program is read or an archive is unpacked: what was written a moment ago, and what has
# the checksum that was published.
READS_OWN = {
    "torch.export.load": "distill/export/formats/torch_export.py",
    "extractall": "distill/export/formats/coreml.py distill/data/download.py",
}


@every_file
def test_no_code_is_run_from_data(path: Path) -> None:
    assert not RUNS_CODE & {name.partition(".")[0] for name in imports(path)}
    assert not {"torch.package", "torch.jit", "torch.hub"} & set(imports(path))
    for name, call in calls(path):
        given, said = keywords(call), ast.unparse(call)
        assert not RUNS_CODE_CALLED.fullmatch(name), said
        if name in ("torch.load", "load_state_dict_from_url", "torch.hub.load_state_dict_from_url"):
            assert given.get("weights_only") == "True", said
        if name.startswith(("np.load", "numpy.load")):
            assert given.get("allow_pickle") == "False", said
        if name.endswith("import_module") and not isinstance(call.args[0], ast.Constant):
            assert NAMES[path] in IMPORTS_BY_NAME, said
        for reader, places in READS_OWN.items():
            if name.endswith(reader):
                assert NAMES[path] in places.split(), said
        if name.endswith("Environment"):  # what Markdown needs is escaped by `finalize`
            assert given.get("autoescape") == "True" or "finalize" in given, said
        if name.startswith("subprocess."):
            assert not call.args or isinstance(call.args[0], ast.List), said
        if name.startswith("hashlib."):
            assert re.match(r"hashlib\.(sha256|file_digest)\b", name), said
        for key, safe in {
            "shell": "False", "trust_remote_code": "False", "allow_pickle": "False",
            "verify": "True", "weights_only": "True", "executable": "None",
        }.items():  # fmt: skip
            assert given.get(key, safe) == safe, said


FORBIDDEN = """
import pickle
from joblib import load
import torch.package
from xml.etree import ElementTree
torch.load(file)
torch.load(file, weights_only=False)
torch.hub.load("a/b", "c")
torch.jit.load(file)
torch.export.load(file)
torch.serialization.add_safe_globals([type])
np.load(file)
np.load(file, allow_pickle=True)
yaml.load(text, Loader)
yaml.unsafe_load(text)
eval(text)
exec(text)
compile(text, "", "exec")
__import__(name)
importlib.import_module(name)
importlib.util.spec_from_file_location("a", file)
os.system(text)
os.execv(file, arguments)
subprocess.run(text)
subprocess.run([file], shell=True)
subprocess.getoutput(text)
AutoModel.from_pretrained(name, trust_remote_code=True)
Environment(autoescape=False)
Environment()
archive.extractall(folder)
tempfile.mktemp()
requests.get(url, verify=False)
hashlib.md5(data)
hashlib.new("md5")
"""


@pytest.mark.promise("R14")
def test_the_rule_against_code_in_data_finds_it(
    monkeypatch: pytest.MonkeyPatch, measured: Measured
) -> None:
    path = Path("line.py")
    monkeypatch.setitem(NAMES, path, "line.py")
    lines = FORBIDDEN.strip().splitlines()
    for line in lines:
        monkeypatch.setitem(TREES, path, ast.parse(line))
        with pytest.raises(AssertionError):
            test_no_code_is_run_from_data(path)
    for path in FILES:
        test_no_code_is_run_from_data(path)
    figure = f"{len(lines)} kinds are found by the rule, 0 of them in {len(FILES)} files"
    measured("statements that run code of a file that is read", figure)


@every_file
def test_size(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < MOST_LINES_OF_A_FUNCTION, node.name


@every_file
def test_imports_are_absolute(path: Path) -> None:
    nodes = [node for node in ast.walk(TREES[path]) if isinstance(node, ast.ImportFrom)]
    assert not [ast.unparse(node) for node in nodes if node.level]


@every_file
def test_every_module_and_everything_public_says_what_it_is(path: Path) -> None:
    tree = TREES[path]
    if tree.body:
        assert ast.get_docstring(tree), "no module docstring"
    for holder in (tree, *(n for n in tree.body if isinstance(n, ast.ClassDef))):
        if isinstance(holder, ast.ClassDef) and holder.name.startswith("_"):
            continue
        for node in holder.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                inherited = isinstance(holder, ast.ClassDef) and holder.bases
                assert ast.get_docstring(node) or inherited, node.name


@every_file
def test_no_drawer_for_odds_and_ends(path: Path) -> None:
    assert not re.search(r"util|helper|manager|handler|callback|registry|misc", NAMES[path])


@every_file
def test_nothing_is_left_to_do(path: Path) -> None:
    assert not re.search(r"\b(TODO|FIXME|XXX)\b", path.read_text(encoding="utf-8"))


def words(*names: str) -> list[str]:
    """Those that the README does not name."""
    readme = ROOT / "README.md"
    assert readme.is_file()
    text = readme.read_text(encoding="utf-8")
    return [name for name in names if not re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text)]


def test_the_readme_names_every_command() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert words(*(f"distill {name}" for name in commands)) == []


@pytest.mark.parametrize("package", ["objectives", "models.zoo", "data.augment"])
def test_the_readme_names_every(package: str) -> None:
    assert words(*component.find(package)) == []


def test_the_readme_names_every_data_set() -> None:
    assert words(*get_args(Data.model_fields["name"].annotation)) == []


def options() -> Iterator[tuple[str, str | None]]:
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        for parameter in command.params:
            yield f"{name} {parameter.opts[0]}", getattr(parameter, "help", None)


def test_every_option_of_every_command_has_help() -> None:
    found = dict(options())
    assert len(found) > 20
    assert [name for name, text in found.items() if not (text and text.endswith("."))] == []


def test_every_term_has_a_row_of_formula_source_use_cost_and_measurement() -> None:
    lines = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    found = {row[0].strip("| `"): row[1:] for row in rows if row[0].startswith(("`", "| `"))}
    assert set(component.find("objectives")) <= set(found)
    for name in component.find("objectives"):
        assert len(found[name]) == 8, name
        assert all(found[name]), name
        assert "](https://arxiv.org/abs/" in found[name][1]
        assert float(found[name][3]) > 0


def test_what_pages_point_to_is_there() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
