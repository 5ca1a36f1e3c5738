"""Any two networks make a pair: nothing is configured but their names."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn

from distill import models, recipe, yamlio
from distill.engine.train import train
from distill.models.weights import load, to_bytes
from distill.recipe import Recipe

SIZE = 64  # pixels
CLASSES = ("ant", "bee", "cat")

# One small member of a family each, by whether it is convolutional.
CNNS = {
    "resnet": "timm/resnet10t",
    "convnext": "timm/convnext_atto",
    "mobilenetv3": "timm/mobilenetv3_small_050",
    "efficientnet": "timm/efficientnet_lite0",
}
OTHERS = {
    "vit": "timm/vit_tiny_patch16_224",
    "swin": "timm/swin_tiny_patch4_window7_224",
    "mixer": "timm/mixer_s32_224",
    "deit": "timm/deit_tiny_distilled_patch16_224",
}


class Own(nn.Module):
    """A network that a user wrote."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 8, kernel_size=7, stride=4)
        self.head = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(x).relu().mean(dim=(2, 3)))
        return logits


def own(num_classes: int, image_size: int) -> nn.Module:
    """A model that a recipe names as `tests.test_pairs:own`."""
    return Own(num_classes)


# Each family teaches and learns; a CNN and a transformer stand on either side of each other.
PAIRS = [
    (CNNS["resnet"], OTHERS["vit"]),
    (OTHERS["vit"], CNNS["resnet"]),
    (CNNS["convnext"], OTHERS["mixer"]),
    (OTHERS["mixer"], CNNS["mobilenetv3"]),
    (CNNS["mobilenetv3"], CNNS["convnext"]),
    (OTHERS["swin"], CNNS["efficientnet"]),
    (CNNS["efficientnet"], OTHERS["deit"]),
    (OTHERS["deit"], OTHERS["swin"]),
    ("torchvision/resnet18", "tests.test_pairs:own"),
    ("tests.test_pairs:own", "torchvision/resnet18"),
    ("resnet8", OTHERS["vit"]),
]
EVERY = [*CNNS.values(), *OTHERS.values(), "torchvision/resnet18", "tests.test_pairs:own"]
PAIRS += [
    pytest.param(teacher, student, marks=pytest.mark.soak)  # type: ignore[misc]
    for teacher in EVERY
    for student in EVERY
    if (teacher, student) not in PAIRS
]


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three classes, each of another colour: eight images to learn, three to test."""
    root, draw = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 3)):
        for channel, label in enumerate(CLASSES):
            (root / split / label).mkdir(parents=True)
            for i in range(count):
                pixels = draw.integers(0, 128, (SIZE, SIZE + 8, 3), dtype=np.uint8)
                pixels[..., channel] += 100
                Image.fromarray(pixels).save(root / split / label / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A file of a model's weights, as another run would have left it: here the initial ones."""
    folder = tmp_path_factory.mktemp("weights")
    data: dict[str, Any] = {"classes": CLASSES, "image_size": SIZE}
    data |= {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}

    @cache
    def file(model: str) -> Path:
        torch.manual_seed(0)  # as a run with the default seed begins
        network = models.build_student(recipe.Model(model=model, weights=None), **data)
        path = folder / f"{model.replace('/', '-').replace(':', '-')}.safetensors"
        path.write_bytes(to_bytes(network))
        return path

    return file


@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_one_epoch_with_no_more_than_two_names(
    teacher: str, student: str, pictures: Path, weights: Callable[[str], Path], tmp_path: Path
) -> None:
    spec = {
        "data": {"name": "folder", "root": str(pictures), "image_size": SIZE},
        "teachers": [{"model": teacher, "weights": str(weights(teacher))}],
        "student": {"model": student},
        "objective": [{"term": "ce", "weight": 0.5}, {"term": "kd", "weight": 0.5}],
        "optimizer": {"lr": 1e-3},
        "train": {"epochs": 1, "batch_size": 12},
    }
    (tmp_path / "recipe.yaml").write_text(yamlio.dump(spec))
    before = weights(teacher).read_bytes()
    result = train(Recipe.load(tmp_path / "recipe.yaml"), tmp_path / "run", workers=0)
    assert (result.student, result.teachers[0]["model"]) == (student, teacher)
    assert result.steps == 2
    assert math.isfinite(result.nll)
    (row,) = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert row["kd"] > 0 or student == teacher
    assert weights(teacher).read_bytes() == before
    learned = load(tmp_path / "run")
    assert learned.classes == CLASSES
    initial = safetensors.torch.load_file(weights(student))
    assert learned.backbone.state_dict().keys() == initial.keys()
    moved = [not p.equal(initial[name]) for name, p in learned.backbone.named_parameters()]
    assert sum(moved) > 0.8 * len(moved)
