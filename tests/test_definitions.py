"""What each number means is written once, and shown where people look."""

from __future__ import annotations

from pathlib import Path

from distill.definitions import SUITES, definitions

ROOT = Path(__file__).parents[1]


def test_the_page_of_measures_says_what_the_definitions_say() -> None:
    text = (ROOT / "docs" / "measures.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert len(rows) == len(definitions())
    for row, (name, one) in zip(rows, definitions().items(), strict=True):
        cells = [cell.strip() for cell in row.strip("|").split(" | ")]
        told = one.text.replace("|", "&#124;")
        assert (cells[0].strip("| "), cells[1]) == (f"`{name}`", one.title)
        assert cells[3:] == [one.better, told, str(one.version)]


def test_every_suite_has_measures_and_a_row_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for suite in SUITES:
        assert any(one.suite == suite for one in definitions().values())
        assert f"| `{suite}` |" in readme
    assert {one.suite for one in definitions().values()} == {*SUITES, "comparison"}
