"""A run that is exported, and students made by hand."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import distill
from distill import models, recipe
from distill.export import parity
from distill.export.formats import FORMATS
from distill.export.program import Pixels, Precision, Preprocessing, Student
from distill.models import taps
from tests.data.photographs import photographs
from tests.suites.conftest import TEACHER

CLASSES = ("ant", "bee", "cat", "dog")
VIT = {"model": "vit", "width": 64, "depth": 2, "heads": 2}
STUDENT = """
data: {name: digits, fraction: 0.2}
teachers: [{recipe: teacher.yaml, name: teacher}]
student: {model: resnet8}
objective: [{term: ce, weight: 0.5}, {term: kd, weight: 0.5}]
optimizer: {name: sgd, lr: 0.1}
train: {epochs: 2, batch_size: 16, ema: 0.9}
"""


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with a teacher, on digits. Nothing may be written into it."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "teacher.yaml").write_text(TEACHER)
    (folder / "student.yaml").write_text(STUDENT)
    distill.train(distill.Recipe.load(folder / "student.yaml"), folder / "student")
    return folder / "student"


def pixels(size: int, count: int = 64) -> Pixels:
    """Windows of a photograph in other lights, the same in every test."""
    whole = (photographs(2 * size)[0] * 255).round().permute(1, 2, 0).numpy()
    rng = np.random.default_rng(0)
    windows = np.stack(
        [whole[y : y + size, x : x + size] for y, x in rng.integers(0, size, (count, 2))]
    )
    gain = rng.uniform(0.3, 1, (count, 1, 1, 3))
    light = 255 * (1 - gain) * rng.uniform(0, 1, (count, 1, 1, 3))
    return (gain * windows + light).clip(0, 255).astype(np.uint8)


def lively(network: models.Network, shown: Pixels) -> models.Network:
    """The network as if it were trained: statistics of these images, and logits that differ."""
    images = torch.from_numpy(shown).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        network.train()(images)
        logits = network.eval()(images).logits
        head = taps.classifier(network.backbone, network.description.num_classes)
        head.weight *= min(3 / float(logits.std(dim=0).mean()), 15 / float(logits.abs().max()))
    return network.requires_grad_(False)


def known(given: Student) -> parity.Known:
    shown = pixels(32)
    logits = parity.known(given.network, shown, np.zeros(len(shown), np.int64)).logits
    return parity.Known(shown, logits.argmax(axis=1), logits)


def compared(given: Student, name: str, path: Path) -> parity.Parity:
    show = partial(given.shown, takes=FORMATS[name].TAKES)
    return parity.compare(partial(FORMATS[name].answers, given, path), show, known(given))


def written(given: Student, name: str, folder: Path, precision: Precision = "fp32") -> Path:
    path = folder / FORMATS[name].file(precision)
    FORMATS[name].write(given, path, precision)
    return path


@pytest.fixture
def student() -> Callable[..., Student]:
    """A student with four classes at 32 px; keys of the model may be given."""

    def build(model: str = "resnet8", *, inside: bool = True, **keys: object) -> Student:
        torch.manual_seed(0)
        mean, std = (0.5, 0.4, 0.3), (0.25, 0.2, 0.1)
        spec = recipe.Model(model=model, **keys)
        network = models.build_student(spec, classes=CLASSES, image_size=32, mean=mean, std=std)
        shown = pixels(32)
        steps = Preprocessing(32, 36, mean, std)
        batches = (shown[:32], shown[32:])
        return Student(lively(network, shown), CLASSES, steps, inside, batches)

    return build
