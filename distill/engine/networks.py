"""The networks of a recipe: what they know of the data, and where they lie."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from distill.data.datasets import Dataset
from distill.engine.machine import Machine
from distill.models.network import Network
from distill.objectives import Objective
from distill.recipe import Teacher
from distill.types import Anatomy


def facts(dataset: Dataset) -> dict[str, Any]:
    """What a network has to know of the data."""
    return {
        "classes": dataset.classes,
        "image_size": dataset.image_size,
        "mean": dataset.mean,
        "std": dataset.std,
    }


def trained(spec: Teacher, path: Path, position: int) -> Teacher:
    """The teacher with weights: one that is a recipe has its run beside the student's `path`."""
    if spec.recipe is None:
        return spec
    run = path.parent / (spec.name or f"{path.name}-teacher-{position}")
    return spec.model_copy(update={"recipe": None, "weights": str(run)})


def connect(
    objective: Objective, student: Network, teachers: Sequence[Anatomy], dataset: Dataset
) -> None:
    """Let the objective choose what it reads of the networks, and have the student give it.

    Raises:
        IncompatibleError: If a term finds nothing to read; both sides are named.
    """
    if objective.looks_inside:
        objective.connect(
            student.anatomy(),
            teachers,
            num_classes=len(dataset.classes),
            samples=torch.from_numpy(dataset.train_ids.astype("int64")).sort().values,
        )
        student.tap(objective.student_taps())


def placed(network: Network, here: Machine) -> Network:
    """The network on the device, in the order of memory that its kernels like."""
    network = network.to(here.device)
    return network.to(memory_format=torch.channels_last) if network.is_convolutional else network
