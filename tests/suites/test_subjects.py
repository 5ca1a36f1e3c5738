"""Who is evaluated beside the runs that are named, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from distill import evaluate
from distill.engine import machine
from distill.engine.finished import require_finished
from distill.engine.machine import Machine
from distill.errors import PreflightError
from distill.models import weights
from distill.suites.subjects import evenly, find, sample, training_views
from tests.cli.conftest import process


@pytest.fixture
def here() -> Machine:
    return machine.setup()


def test_a_run_brings_its_teacher_and_its_control(evaluated: Path, here: Machine) -> None:
    run, teacher, alone = find([evaluated / "one"], None, here)
    assert [one.role for one in (run, teacher, alone)] == ["run", "teacher", "alone"]
    assert (run.teacher, run.control) == (teacher.name, alone.name)
    assert alone.teacher == teacher.name  # by whom it is measured, though it never met it
    assert (run.model, teacher.model, alone.model) == ("vit", "resnet8", "vit")
    told = evaluate.scores(alone.first.predictions)
    network = weights.load(evaluated / "one" / "baseline").eval()
    with torch.no_grad():
        images = torch.from_numpy(alone.first.dataset.test.pixels).permute(0, 3, 1, 2)  # type: ignore[arg-type]
        logits = network(images.expand(-1, 3, -1, -1) / 255).logits
    np.testing.assert_allclose(alone.first.answers.logits, logits, atol=1e-5)
    assert told.top1 == pytest.approx(
        float((logits.argmax(dim=1).numpy() == alone.first.dataset.test.labels).mean())
    )


def test_runs_that_differ_in_their_seed_are_one(evaluated: Path, here: Machine) -> None:
    found = find([evaluated / "one", evaluated / "two"], None, here)
    runs = [one for one in found if one.role == "run"]
    assert [(one.name, one.seeds) for one in runs] == [("one (2 seeds)", (0, 1))]
    assert runs[0].runs == (evaluated / "one", evaluated / "two")
    teacher, alone = (next(s for s in found if s.role == role) for role in ("teacher", "alone"))
    assert len(teacher.members) == 1  # both learned from the same
    assert alone.seeds == (0, 1)


def test_a_named_run_is_the_control_or_the_teacher_of_another(
    evaluated: Path, here: Machine
) -> None:
    paths = [evaluated / "one", evaluated / "one" / "baseline", evaluated / "teacher"]
    found = find(paths, None, here)
    assert [one.role for one in found] == ["run"] * 3
    assert (found[0].teacher, found[0].control) == ("teacher", "baseline")


def test_runs_with_other_weights_for_a_teacher_are_not_one(
    evaluated: Path, here: Machine, tmp_path: Path
) -> None:
    for seed, teacher in enumerate(("teacher", "one")):
        given = f"teachers=[{{weights: {evaluated / teacher}}}]"
        changes = ("--set", given, "--set", f"train.seed={seed}", "--set", "train.epochs=1")
        out = ("--out", tmp_path / f"from-{teacher}")
        done = process("train", evaluated / "student.yaml", *out, *changes, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    found = find([tmp_path / "from-teacher", tmp_path / "from-one"], None, here)
    assert [one.name for one in found if one.role == "run"] == ["from-teacher", "from-one"]


def test_the_same_run_twice_is_two(evaluated: Path, here: Machine) -> None:
    found = find([evaluated / "one", evaluated / "one"], None, here)
    assert [one.name for one in found if one.role == "run"] == ["one", "one (2)"]


def test_a_teacher_that_was_trained_again_is_left_out(
    evaluated: Path, here: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "teacher"):
        shutil.copytree(evaluated / name, tmp_path / name)
    other = weights.load(tmp_path / "teacher")
    with torch.no_grad():
        next(other.parameters()).add_(1.0)
    (tmp_path / "teacher" / "student.safetensors").write_bytes(weights.to_bytes(other))
    found = find([tmp_path / "one"], None, here)
    assert [one.role for one in found] == ["run", "alone"]
    assert "other weights now than when it taught" in capsys.readouterr().err


def test_a_teacher_that_is_gone_is_left_out(
    evaluated: Path, here: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(evaluated / "one", tmp_path / "one")
    found = find([tmp_path / "one"], None, here)
    assert [one.role for one in found] == ["run", "alone"]
    assert "its teacher cannot be asked" in capsys.readouterr().err


def test_what_is_not_finished_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match=r"has no recipe\.yaml"):
        require_finished([tmp_path])


def test_a_sample_is_spread_and_mixed(evaluated: Path, here: Machine) -> None:
    tested = find([evaluated / "teacher"], None, here)[0].first
    found = sample(tested, here, 100)
    ids = found.ids.numpy()
    assert sorted(ids) == evenly(897, 100).tolist()
    assert np.abs(np.corrcoef(ids, np.arange(100))[0, 1]) < 0.3
    np.testing.assert_array_equal(found.labels, tested.dataset.test.labels[ids])
    again = sample(tested, here._replace(rank=1, world=2), 100)
    assert torch.equal(found.images, again.images)


def test_training_views_are_those_of_the_first_epoch(evaluated: Path, here: Machine) -> None:
    tested = find([evaluated / "one"], None, here)[0].first
    batches = list(training_views(tested, here, images=64))
    assert sum(len(batch.images) for batch in batches) == 64
    assert all(np.isin(batch.ids, tested.dataset.train_ids).all() for batch in batches)


@pytest.mark.parametrize(
    ("count", "most", "expected"), [(5, 9, [0, 1, 2, 3, 4]), (10, 4, [0, 3, 6, 9])]
)
def test_evenly(count: int, most: int, expected: list[int]) -> None:
    assert evenly(count, most).tolist() == expected
