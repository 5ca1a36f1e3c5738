"""The dense probe reads the user's masks of the very images that it shows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distill.engine import machine
from distill.engine.machine import Machine
from distill.errors import IncompatibleError, PreflightError
from distill.suites import dense
from distill.suites.subjects import find
from tests.cli.conftest import process


@pytest.fixture(scope="module")
def here() -> Machine:
    return machine.setup()


@pytest.fixture(scope="module")
def discs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photographs of discs, their masks, and a run."""
    folder = tmp_path_factory.mktemp("discs")
    draw = np.random.default_rng(0)
    rows, columns = np.mgrid[:24, :24]
    for split, count in (("train", 8), ("test", 12)):
        for name in ("left", "right"):
            for i in range(count):
                x = draw.integers(4, 9) + 11 * (name == "right")
                mask = (rows - draw.integers(6, 18)) ** 2 + (columns - x) ** 2 < 36
                pixels = draw.integers(0, 200, (24, 24, 3)) + 50 * mask[..., None]
                for kind, array in (("images", pixels), ("masks", mask * 255)):
                    path = folder / kind / split / name / f"{i}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(array.astype(np.uint8)).save(path)
    (folder / "recipe.yaml").write_text(
        f"""
        data: {{name: folder, root: {folder / "images"}, image_size: 16}}
        student: {{model: resnet8}}
        objective: [{{term: ce}}]
        optimizer: {{name: sgd, lr: 0.01}}
        train: {{epochs: 1, batch_size: 8}}
        """
    )
    done = process("train", "recipe.yaml", "--out", "run", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_foreground_is_found_with_the_masks_of_a_user(discs: Path, here: Machine) -> None:
    (subject,) = find([discs / "run"], None, here)
    found = dense.measure([subject], here, masks=discs / "masks")[subject.name]
    iou = found.numbers["dense_iou"]
    assert iou.value is not None
    assert iou.ci95 is not None
    assert iou.ci95[0] <= iou.value <= iou.ci95[1]
    assert iou.n == 12  # half of the test images
    assert found.tables["trivial"] < iou.value
    assert found.tables["masks"] == f"Masks from {discs / 'masks'}."
    assert len(found.images["dense"]) == 8


def test_without_masks_such_images_have_no_plain_background(discs: Path, here: Machine) -> None:
    (subject,) = find([discs / "run"], None, here)
    number = dense.measure([subject], here, masks=None)[subject.name].numbers["dense_iou"]
    assert number.value is None
    assert "no masks were given" in number.reason


def test_digits_have_a_plain_background(evaluated: Path, here: Machine) -> None:
    subjects = find([evaluated / "teacher"], None, here)
    found = dense.measure(subjects, here, masks=None)[subjects[0].name]
    assert found.numbers["dense_iou"].value is not None
    assert found.tables["masks"] == dense.MADE


def test_masks_that_are_missing_are_named(discs: Path, here: Machine, tmp_path: Path) -> None:
    (subject,) = find([discs / "run"], None, here)
    with pytest.raises(PreflightError, match=r"masks that cannot be used: 24"):
        dense.measure([subject], here, masks=tmp_path)


def test_masks_of_a_data_set_without_files_are_refused(
    evaluated: Path, here: Machine, tmp_path: Path
) -> None:
    subjects = find([evaluated / "teacher"], None, here)
    with pytest.raises(IncompatibleError, match="digits has none"):
        dense.measure(subjects, here, masks=tmp_path)
