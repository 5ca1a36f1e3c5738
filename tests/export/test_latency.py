from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from distill.export import latency
from distill.export.formats import onnx
from distill.export.program import Student
from distill.models import cost
from tests.export.conftest import pixels


def test_all_ways_to_run_a_student(
    student: Callable[..., Student], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency, "SECONDS", 0.01)
    given, teacher = student("mlp"), student("resnet8").network
    onnx.write(given, tmp_path / "model.onnx", "fp32")
    rows = latency.table(given, [teacher], {"fp32": tmp_path / "model.onnx"}, pixels(32, 3))
    assert [row.what for row in rows] == [
        "student, PyTorch eager",
        "student, PyTorch compiled",
        "student, ONNX Runtime fp32",
        "teacher resnet8, PyTorch eager",
    ]
    for row in rows:
        assert row.reason == ""
        assert row.batch_1_ms is not None
        assert row.batch_32_ms is not None
        assert 0 < row.batch_1_ms < row.batch_32_ms
    assert rows[0].bytes == cost.file_bytes(given.network)
    assert rows[2].bytes == (tmp_path / "model.onnx").stat().st_size


def test_a_way_that_fails_says_why(
    student: Callable[..., Student], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency, "SECONDS", 0.01)
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (str(tmp_path / "no-compiler"),))
    monkeypatch.setattr("torch._inductor.config.force_disable_caches", True)
    rows = latency.table(student("mlp", width=24), [], {}, pixels(32, 1))
    assert rows[0].batch_1_ms is not None
    assert rows[1].batch_1_ms is None
    assert "compiler" in rows[1].reason
