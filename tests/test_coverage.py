"""What docs/coverage.md says is there is there: files, commands, keys, tests and figures."""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer.main

from distill.cli import app
from distill.definitions import SUITES
from distill.errors import RecipeError
from distill.recipe import Recipe

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGE = (DOCS / "coverage.md").read_text(encoding="utf-8")
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
BASE = "recipes/quickstart.yaml"  # what single keys are put into

GROUPS = {
    "Inductive biases": (1, 31),
    "Distillation": (32, 68),
    "The note on inductive biases": (69, 89),
}
CODE, LINK = re.compile(r"`([^`]+)`"), re.compile(r"\[[^\]]+\]\(([^)]+)\)")
SOURCE = re.compile(r"\((\[[^\]]+\]\([^)]+\))\)$")
NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?")


class Row(NamedTuple):
    """A row of a table; cells are Markdown."""

    number: str
    what: str
    where: str
    command: str
    test: str
    measured: str


def table(text: str) -> list[Row]:
    lines = [line for line in text.splitlines() if re.match(r"\| \d", line)]
    return [Row(*(cell.strip() for cell in line.strip("|").split(" | "))) for line in lines]


def sections(level: str) -> dict[str, str]:
    parts = re.split(rf"^{level} (.+)$", PAGE, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


ROWS = table(PAGE.partition("\n## The runs\n")[0])
every_row = pytest.mark.parametrize("row", ROWS, ids=[row.number for row in ROWS])


def test_each_item_has_its_row_in_order() -> None:
    assert [row.number for row in ROWS] == [str(n) for n in range(1, 90)]
    found = sections("##")
    for title, (first, last) in GROUPS.items():
        before, _, _ = found[title].partition("\n|")
        assert re.search(r"\w\.\s*$", before), f"{title}: no sentence before the table"
        numbers = [int(row.number) for row in table(found[title])]
        assert numbers == [*range(first, last + 1)], title


@every_row
def test_no_cell_is_empty(row: Row) -> None:
    assert all(re.search(r"\w", cell) for cell in row), row
    assert len(row.what) <= 100, "a name, not a text"


@cache
def definitions(path: Path) -> frozenset[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kinds = (ast.FunctionDef, ast.ClassDef)
    return frozenset(node.name for node in tree.body if isinstance(node, kinds))


def misplaced(row: Row) -> list[str]:
    """What is wrong with the files that a row says its item lives in."""
    targets = LINK.findall(row.where)
    missing = [target for target in targets if not (DOCS / target).resolve().is_file()]
    inside = [(DOCS / target).resolve().is_relative_to(ROOT) for target in targets]
    return missing + ([] if targets and all(inside) else ["no link to a file of the repository"])


def unshown(row: Row) -> list[str]:
    """What is wrong with the tests that a row names, as paths below tests/."""
    found = []
    for span in CODE.findall(row.test):
        path, _, name = span.partition("::")
        file = ROOT / "tests" / path
        if not (name.startswith("test_") and file.is_file() and name in definitions(file)):
            found.append(span)
    return found if CODE.search(row.test) else ["no test"]


def command(words: list[str]) -> list[str]:
    """What is wrong with a `distill` command, its options, recipes and keys."""
    name, *arguments = words
    if name not in COMMANDS:
        return [f"no command {name}"]
    known = {o for p in COMMANDS[name].params for o in (*p.opts, *p.secondary_opts)}
    options = [word.partition("=")[0] for word in arguments if word.startswith("--")]
    if unknown := [option for option in options if option not in known]:
        return [f"{name} has no {option}" for option in unknown]
    params = COMMANDS[name].make_context(name, list(arguments)).params  # choices and numbers
    given = params.get("recipe") or BASE
    recipes = [str(path) for path in (given if isinstance(given, list) else [given])]
    found = [path for path in recipes if "/" in path and not (ROOT / path).is_file()]
    if copied := params.get("copy"):
        found += [] if (ROOT / "recipes" / f"{copied}.yaml").is_file() else [copied]
    suites = (params.get("suite") or "all").split(",") if name == "evaluate" else []
    found += [f"no suite {one}" for one in suites if one not in (*SUITES, "all")]
    axes = [key.partition(",")[0] for key in params.get("keys") or []]
    changes = [*(params.get("overrides") or []), *axes]
    for path in recipes if changes and not found else []:
        found += faults(changes, ROOT / (path if "/" in path else BASE))
    return found


def faults(changes: list[str], path: Path = ROOT / BASE) -> list[str]:
    """What a recipe says of changes of its keys."""
    try:
        Recipe.load(path, changes)
    except RecipeError as error:
        return [str(error)]
    return []


def typed(span: str) -> list[str]:
    """What is wrong with what a row says is typed: a command, a script, a key or a term."""
    if span.startswith("distill "):
        return command(shlex.split(span)[1:])
    if span.startswith("python "):
        script = span.split()[1]
        return [] if (ROOT / script).is_file() else [f"no {script}"]
    if span.startswith("distill."):
        module, _, name = span.partition("(")[0].rpartition(".")
        file = ROOT / f"{module.replace('.', '/')}.py"
        return [] if file.is_file() and name in definitions(file) else [f"no {span}"]
    if span.startswith("{term:"):
        return faults([f"objective=[{{term: ce}}, {span}]"])
    key, colon, value = span.partition(": ")
    if not colon:
        return [f"{span} is neither a command nor a key with its value"]
    return faults([f"{key}={value}"])


def mistyped(row: Row) -> list[str]:
    spans = CODE.findall(row.command)
    return [fault for span in spans for fault in typed(span)] if spans else ["nothing to type"]


def unsourced(row: Row) -> list[str]:
    """Numbers of a row that are not in the file it says they are from."""
    if re.match(r"not measured: \w", row.measured):
        return []
    source = SOURCE.search(row.measured)
    if source is None:
        return ["no source"]
    told = row.measured[: source.start()]
    numbers = NUMBER.findall(CODE.sub("", told))
    if not numbers:
        return ["no figure"]
    (target,) = LINK.findall(source[1])
    file, _, runs = target.partition("#")
    text = (DOCS / file).read_text(encoding="utf-8")
    if file.endswith(".json"):  # whose runs are named behind the #: among all, any figure is found
        record = json.loads(text)
        if unknown := [name for name in runs.split(",") if name not in record]:
            return [f"no run {name}" for name in unknown]
        known = recorded([record[name]["found"] for name in runs.split(",")])
        return [number for number in numbers if not stands(number, known)]
    return [n for n in numbers if not re.search(rf"(?<![\d.]){re.escape(n)}(?![\d]|\.\d)", text)]


def recorded(value: Any) -> set[float]:
    """All numbers of a record of runs."""
    if isinstance(value, dict | list):
        parts = value.values() if isinstance(value, dict) else value
        return set().union(*(recorded(part) for part in parts))
    return {float(value)} if isinstance(value, int | float) else set()


def stands(number: str, known: Iterable[float]) -> bool:
    """Whether a number, or a hundred times a part of one, is what is written here rounded."""
    told = number.replace(",", "").lstrip("+")
    digits = len(told.partition(".")[2])
    return any(f"{value * scale:.{digits}f}" == told for value in known for scale in (1, 100))


CHECKS = {"where": misplaced, "test": unshown, "command": mistyped, "measured": unsourced}


@every_row
@pytest.mark.parametrize("cell", CHECKS)
def test_what_a_row_names_is_there(row: Row, cell: str) -> None:
    assert CHECKS[cell](row) == []


GOOD = next(row for row in ROWS if SOURCE.search(row.measured))


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        ("where", "[x](../distill/nowhere.py)"),
        ("where", "in the engine"),
        ("where", "[x](../../elsewhere.md)"),
        ("test", "`test_coverage.py::test_that_nobody_wrote`"),
        ("test", "`nowhere.py::test_no_cell_is_empty`"),
        ("test", "`test_coverage.py::misplaced`"),
        ("test", "by hand"),
        ("command", "`distill suggest RECIPE`"),
        ("command", "`distill train RECIPE --no-such-option`"),
        ("command", "`distill train recipes/nowhere.yaml`"),
        ("command", "`distill train recipes/quickstart.yaml --set student.positoin=conv`"),
        ("command", "`distill temperature-sweep RECIPE --key student.windows=2,4`"),
        ("command", "`distill evaluate RUN --suite biased`"),
        ("command", "`distill list recipes --copy nothing`"),
        ("command", "`student.position: spiral`"),
        ("command", "`student: {model: vit_huge}`"),
        ("command", "`{term: features, projector: none}`"),
        ("command", "`distill.models.pyramid.tower(network)`"),
        ("command", "`python benchmarks/nothing.py`"),
        ("command", "set it in the recipe"),
        ("measured", "+47.11 points ([methods](methods.md))"),
        ("measured", "+2.3 points"),
        ("measured", "good ([methods](methods.md))"),
        ("measured", "82.83 % ([runs](../benchmarks/results/proof-coverage.json#conv))"),
        ("measured", "96.43 % ([runs](../benchmarks/results/proof-coverage.json))"),
        ("measured", "not measured:"),
    ],
)
def test_a_row_that_is_wrong_is_found(cell: str, text: str) -> None:
    assert CHECKS[cell](GOOD) == []
    assert CHECKS[cell](GOOD._replace(**{cell: text})) != []


def test_rows_that_are_not_whole_are_marked_and_explained() -> None:
    marked = [row.number for row in ROWS if row.what.endswith(("*(in part)*", "*(otherwise)*"))]
    listed = sections("##")["Covered in part, or otherwise"]
    explained = re.findall(r"^- \*\*(\d+)\*\* \S", listed, flags=re.MULTILINE)
    assert marked == explained


def test_what_the_page_of_conclusions_has_typed_is_right() -> None:
    text = (DOCS / "conclusions.md").read_text(encoding="utf-8")
    commands = [line for line in text.splitlines() if line.startswith("distill ")]
    rows = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    keys = [span for row in rows for span in CODE.findall(row[2]) if ": " in span]
    assert commands
    assert len(keys) > 20
    assert [fault for span in [*commands, *keys] for fault in typed(span)] == []


def test_every_open_question_of_the_conclusions_has_an_interval_that_holds_0() -> None:
    """And no other has."""
    text = (DOCS / "conclusions.md").read_text(encoding="utf-8")
    rows = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    told = [
        (float(gain), float(half), follows)
        for *_, measured, follows in rows[1:]
        for gain, half in re.findall(r"([-+]\d+\.\d) ± (\d+\.\d)", measured)
    ]
    assert len(told) >= 8
    for gain, half, follows in told:
        assert (abs(gain) <= half) == follows.strip().startswith("Open"), (gain, half, follows)
