"""Every model of ours and a member of many families, as ONNX and as a program of PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from distill import component, models, recipe
from distill.errors import IncompatibleError
from distill.export import parity
from distill.export.formats import GRAPHS
from distill.export.program import Preprocessing, Student, stages
from distill.models.network import Network
from tests.export.conftest import lively, pixels
from tests.models import made
from tests.promises import Measured

pytestmark = pytest.mark.soak
OURS = sorted(component.find("models.zoo"))


def compared(network: Network, size: int, folder: Path) -> tuple[float, float, int]:
    """Of both files: the largest difference of a logit, how often the class is the same, and maps.

    On 64 windows of a photograph, in batches of 1, 2, 7 and 32; the maps of all stages on 16.
    """
    shown = pixels(size)
    lively(network, shown)
    description = network.description
    steps = Preprocessing(size, size, description.mean, description.std)
    classes = tuple(f"class {i}" for i in range(description.num_classes))
    try:
        maps = stages(network, size)
    except IncompatibleError:
        maps = ()
    student = Student(network, classes, steps, inside=True, stages=maps)
    said = parity.known(network, shown, np.zeros(len(shown), np.int64), maps)
    worst, same = 0.0, 1.0
    for name in ("onnx", "torch-export"):
        form = GRAPHS[name]
        path = folder / form.file("fp32")
        form.write(student, path, "fp32")
        show = partial(student.shown, takes=form.TAKES)
        found = parity.compare(partial(form.answers, student, path), show, said)
        parity.require(found, "fp32", said, max_drop=0)
        if maps:
            told = partial(form.told, path, outputs=student.outputs[1:])
            parity.compare_maps(told, show, said, "fp32")
        worst, same = max(worst, found.max_abs), min(same, found.agreement)
    return worst, same, len(maps)


def ours(model: str) -> Network:
    torch.manual_seed(0)
    mean, std = (0.5, 0.4, 0.3), (0.25, 0.2, 0.1)
    spec = recipe.Model(model=model)
    return models.build_student(spec, classes=tuple("abcde"), image_size=32, mean=mean, std=std)


@pytest.mark.promise("R19")
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(
    ("whose", "build", "size", "names"),
    [("ours", ours, 32, OURS), ("timm and torchvision", made.network, 64, made.FAMILIES)],
)
def test_every_family_says_the_same_as_onnx_and_as_a_program(
    whose: str,
    build: Callable[[str], Network],
    size: int,
    names: Sequence[str],
    tmp_path: Path,
    measured: Measured,
) -> None:
    """All are tried; those that fail are named together."""
    faults, differences, rates, maps = [], [0.0], [1.0], []
    for name in names:
        try:
            difference, rate, count = compared(build(name), size, tmp_path)
        except Exception as error:
            faults.append(f"{name}: {type(error).__name__}: {error}")
        else:
            differences.append(difference)
            rates.append(rate)
            maps.append(count)
    assert not faults, "\n".join(faults)
    measured(
        f"models of {whose} as ONNX and as a program of PyTorch",
        f"{len(names)} models, largest difference {max(differences):.1e}, "
        f"same class {min(rates):.0%}, with {sum(maps)} maps of {sum(map(bool, maps))} of them",
    )
