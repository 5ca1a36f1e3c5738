"""Every model of ours and a member of many families, as ONNX and as a program of PyTorch."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from distill import component, models, recipe
from distill.export import parity
from distill.export.formats import FORMATS
from distill.export.program import Preprocessing, Student
from distill.models.network import Network
from tests.export.conftest import lively, pixels
from tests.models import made

pytestmark = pytest.mark.soak
OURS = sorted(component.find("models.zoo"))


def require_equal(network: Network, size: int, folder: Path) -> None:
    """Both files say what the network says, in batches of 1, 2, 7 and 32."""
    shown = pixels(size)
    lively(network, shown)
    description = network.description
    steps = Preprocessing(size, size, description.mean, description.std)
    classes = tuple(f"class {i}" for i in range(description.num_classes))
    student = Student(network, classes, steps, inside=True)
    said = parity.known(network, shown, np.zeros(len(shown), np.int64))
    for name in ("onnx", "torch-export"):
        form = FORMATS[name]
        path = folder / form.file("fp32")
        form.write(student, path, "fp32")
        show = partial(student.shown, takes=form.TAKES)
        found = parity.compare(partial(form.answers, student, path), show, said)
        parity.require(found, "fp32", said, max_drop=0)


@pytest.mark.parametrize("model", OURS)
def test_ours(model: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    mean, std = (0.5, 0.4, 0.3), (0.25, 0.2, 0.1)
    spec = recipe.Model(model=model)
    network = models.build_student(spec, classes=tuple("abcde"), image_size=32, mean=mean, std=std)
    require_equal(network, 32, tmp_path)


@pytest.mark.parametrize("model", made.FAMILIES)
def test_families(model: str, tmp_path: Path) -> None:
    require_equal(made.network(model), 64, tmp_path)
