"""The table of promises is read as it was written."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import promises
from tests.promises import Finding


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
