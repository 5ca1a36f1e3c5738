from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill import models, recipe
from distill.models.network import Network

CLASSES = ("ant", "bee", "cat", "dog")
DATA: dict[str, Any] = {
    "classes": CLASSES,
    "image_size": 16,
    "mean": (0.5, 0.4, 0.3),
    "std": (0.25, 0.2, 0.1),
}


@pytest.fixture(autouse=True)
def _repeatable() -> None:
    torch.manual_seed(0)


@pytest.fixture
def student() -> Callable[..., Network]:
    """`build_student` for four classes at 16 px; keys of `DATA` or of the model may be given."""

    def build(model: str = "resnet8", **keys: Any) -> Network:
        data = DATA | {key: keys.pop(key) for key in DATA if key in keys}
        return models.build_student(recipe.Model(model=model, **keys), **data)

    return build


@pytest.fixture
def teacher() -> Callable[..., Network]:
    """`build_teacher` for four classes at 16 px; keys of `DATA` or of the model may be given."""

    def build(**keys: Any) -> Network:
        data = DATA | {key: keys.pop(key) for key in DATA if key in keys}
        return models.build_teacher(recipe.Teacher(**keys), **data)

    return build


class _Tied(nn.Module):
    """Two names for one tensor."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3, bias=False)
        self.second = nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight
        self.fc = nn.Linear(3, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.second(self.first(x.mean(dim=(2, 3))).relu()))
        return logits


def tied(num_classes: int, image_size: int) -> nn.Module:
    """A user's own network."""
    return _Tied(num_classes)


def not_a_network(num_classes: int, image_size: int) -> int:
    return num_classes
