"""Every suite has an answer, or a reason, for networks of many families."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distill.data.datasets import Dataset, Source
from distill.definitions import definitions
from distill.engine import machine
from distill.evaluate import Answers
from distill.recipe import Recipe
from distill.suites import bias, cost, dense, subjects
from tests.models import made

SIDE = 64


def dataset() -> Dataset:
    """Discs on a plain background, one of five colours."""
    draw = np.random.default_rng(0)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    labels = np.arange(24) % made.CLASSES
    pixels = np.zeros((24, SIDE, SIDE, 3), np.uint8)
    for image, label in zip(pixels, labels, strict=True):
        y, x = draw.integers(20, 44, 2)
        image[(rows - y) ** 2 + (columns - x) ** 2 < 250] = 60 + 40 * (np.arange(3) + label) % 195
    source = Source(labels.astype(np.int64), pixels, None)
    ids = np.arange(24)
    return Dataset(
        name="discs", classes=tuple("abcde"), train=source, test=source, train_ids=ids,
        val_ids=ids[:0], image_size=SIDE, mean=(0.1,) * 3, std=(0.2,) * 3, max_pixels=10**6,
        bad=(), content="", fingerprint="",
    )  # fmt: skip


@pytest.mark.soak
@pytest.mark.parametrize("model", made.FAMILIES)
def test_every_measure_has_a_value_or_a_reason(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, count in {"IMAGES": 8, "FELT": 4, "BENT": 4, "SHUFFLED": 16, "SHOWN": 2}.items():
        monkeypatch.setattr(bias, name, count)
    monkeypatch.setattr(cost, "SECONDS", 0.01)
    recipe = Recipe.model_validate(
        {
            "data": {"name": "digits"},
            "student": {"model": "resnet8"},
            "objective": [{"term": "ce"}],
            "optimizer": {"name": "sgd", "lr": 0.1},
            "train": {"epochs": 1, "batch_size": 4},
        }
    )
    data, network = dataset(), made.network(model, made.SQUARE).eval().requires_grad_(False)
    told = Answers(np.arange(24), data.test.labels, np.zeros((24, made.CLASSES), np.float32))
    tested = subjects.Tested(model, model, network, recipe, data, told, told.predictions)
    subject = subjects.Subject("it", "run", (tested,), (), (0,), teacher="it")
    here = machine.setup()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    for suite, measure in {
        "bias": lambda: bias.measure([subject], here),
        "cost": lambda: cost.measure([subject], here),
        "dense": lambda: dense.measure([subject], here, masks=None),
    }.items():
        numbers = measure()["it"].numbers
        assert set(numbers) == {name for name, one in definitions().items() if one.suite == suite}
        for name, number in numbers.items():
            assert (number.value is None) == bool(number.reason), name
            if number.value is None:
                print(model, name, number.reason)
            else:
                assert np.isfinite(number.value), name
    assert not network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
