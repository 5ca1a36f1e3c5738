"""How long a run waited for its images, and what it says of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distill.engine.train import train
from distill.recipe import Recipe

RECIPE = """
data: {name: DATA}
student: {model: mlp, width: 8, depth: 1}
objective: [{term: ce}]
optimizer: {name: sgd, lr: 0.01}
train: {epochs: 1, batch_size: 8}
"""


def write_photographs(root: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(24):
        split, label = ("test", "train", "train")[number % 3], "ab"[number % 2]
        folder = root / split / label
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (400, 500, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.jpg", quality=90)


def test_a_run_that_waits_for_its_files_says_what_helps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_photographs(tmp_path / "photos")
    data = f"folder, root: {tmp_path / 'photos'}, image_size: 32, augment: [resized_crop]"
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("DATA", data))
    result = train(Recipe.load(tmp_path / "recipe.yaml"), tmp_path / "run", workers=0)
    assert result.data_wait is not None
    assert 0.3 < result.data_wait <= 1
    said = [warning for warning in result.warnings if "distill pack" in warning]
    assert len(said) == 1
    assert f"{result.data_wait:.0%}" in said[0]
    assert said[0] in " ".join(capsys.readouterr().err.split())


def test_images_in_memory_are_no_matter_of_files(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("DATA", "digits"))
    result = train(Recipe.load(tmp_path / "recipe.yaml"), tmp_path / "run")
    assert result.data_wait is not None
    assert 0 <= result.data_wait < 1
    assert not any("distill pack" in warning for warning in result.warnings)
