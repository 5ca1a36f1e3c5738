"""A run that learned from a cache alone is held against what the cache says."""

from __future__ import annotations

from pathlib import Path

import pytest

from distill.engine import machine
from distill.suites import bias, clean, corruptions, cost, fidelity
from distill.suites.subjects import find
from tests.cli.conftest import process


def test_the_cache_speaks_for_the_teacher(evaluated: Path, tmp_path: Path) -> None:
    for arguments in (
        ("teacher-cache", evaluated / "student.yaml", "--views", 2, "--out", tmp_path / "cache"),
        ("train", evaluated / "student.yaml", "--out", tmp_path / "run", "--set", "teachers=[]",
         "--set", f"cache={{path: {tmp_path / 'cache'}, views: 2}}"),
    ):  # fmt: skip
        done = process(*arguments, cwd=evaluated)
        assert done.returncode == 0, done.stderr
    here = machine.setup()
    taught, teacher = find([tmp_path / "run"], None, here)
    assert (teacher.role, teacher.model, taught.teacher) == ("teacher", "resnet8", teacher.name)
    named = find([evaluated / "teacher"], None, here)[0]
    (own,), (live,) = (clean.measure([one]).values() for one in (teacher, named))
    assert own.numbers["top1"] == live.numbers["top1"]
    assert own.numbers["nll"].value == pytest.approx(live.numbers["nll"].value, rel=1e-6)
    told = fidelity.measure([taught, teacher], here)[taught.name].numbers
    assert told["agreement"].value is not None
    assert told["train_kl"].reason == "a cache says nothing of other images"
    for suite in (bias, cost):
        numbers = suite.measure([taught, teacher], here)[teacher.name].numbers
        assert {number.value for number in numbers.values()} == {None}
        assert "cache" in " ".join(number.reason for number in numbers.values())
    shown = corruptions.measure([taught, teacher], here, images=8)
    assert shown[teacher.name].numbers["mca"].reason == "a cache says nothing of other images"
    assert shown[taught.name].numbers["mca"].value is not None
    assert shown[taught.name].numbers["mce"].value is None  # nobody to be relative to
