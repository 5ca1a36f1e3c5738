"""Weights alone, with what rebuilds the network: for `distill.load`, and timm where it knows it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from distill.export.program import Logits, Precision, Student, Takes
from distill.models import weights

PACKAGES: tuple[str, ...] = ()
PRECISIONS: tuple[Precision, ...] = ("fp32",)
TAKES: Takes = "images"


def file(precision: Precision) -> str:
    """The file's name, which is the hub's for weights."""
    return "model.safetensors"


def refusal(student: Student) -> str:
    """Weights can always be written."""
    return ""


def write(student: Student, path: Path, precision: Precision) -> None:
    """Write the weights under the backbone's own names."""
    path.write_bytes(weights.to_bytes(student.network))


def answers(student: Student, path: Path, batches: Sequence[np.ndarray]) -> list[Logits]:
    """What the network in the file says of each batch of images in [0, 1]."""
    # A user's own network has to be named: a file alone is not enough to run code.
    network = weights.load(path, expected=student.network.description).eval()
    with torch.no_grad():
        return [network(torch.from_numpy(batch)).logits.numpy() for batch in batches]
