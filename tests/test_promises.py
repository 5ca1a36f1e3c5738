"""The table of promises is whole, and every figure in it comes from a test that is there."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests import promises
from tests.promises import Finding

ROOT = Path(__file__).parents[1]


def number(mark: ast.expr) -> str | None:
    """Of the promise that a mark names."""
    if isinstance(mark, ast.Call) and ast.unparse(mark.func).endswith(".promise"):
        return str(ast.literal_eval(mark.args[0]))
    return None


def marked() -> dict[str, str]:
    """The promise of every test that measures one."""
    found = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        marks: dict[str, str] = {}  # that have a name of their own
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and (own := number(node.value)):
                marks[ast.unparse(node.targets[0])] = own
            if isinstance(node, ast.FunctionDef):
                for mark in node.decorator_list:
                    if own := number(mark) or marks.get(ast.unparse(mark)):
                        found[f"{path.relative_to(ROOT)}::{node.name}"] = own
    return found


def test_every_promise_has_a_figure_and_every_figure_its_test() -> None:
    tests = marked()
    rows = promises.rows(promises.PAGE.read_text(encoding="utf-8"))
    assert list(rows) == list(promises.PROMISES)
    said = {}
    for name, lines in rows.items():
        assert lines[0][0] == promises.PROMISES[name]
        for _, what, figure, test in lines:
            assert what
            assert figure
            said[test.strip("`")] = name
    assert said == tests


def finding(promise: str, what: str, figure: str = "1 of 1", *, long: bool = False) -> Finding:
    return Finding(promise, what, figure, "tests/test_a.py::test_b", long)


def test_the_long_form_of_a_test_is_what_counts() -> None:
    long, short = finding("R2", "kills", "200", long=True), finding("R2", "kills", "20")
    for order in ([long, short], [short, long]):
        assert promises.joined(order) == [long]


def test_the_table_is_read_as_it_was_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{promises.BEGIN}\nold\n{promises.END}\nafter | x\n")
    monkeypatch.setattr(promises, "PAGE", page)
    promises.write([finding("R10", "b"), finding("R2", "a | b"), finding("R10", "a")])
    text = page.read_text()
    assert text.startswith(f"before\n{promises.BEGIN}\n| | promise |")
    assert text.endswith(f"|\n{promises.END}\nafter | x\n")
    rows = promises.rows(text)
    assert list(rows) == ["R2", "R10"]
    assert [line[1] for line in rows["R10"]] == ["a", "b"]
    assert rows["R2"][0][:2] == [promises.PROMISES["R2"], "a \\| b"]
