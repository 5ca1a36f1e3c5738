"""The networks of a recipe: what they know of the data, and where they lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from distill.data.datasets import Dataset
from distill.engine.machine import Machine
from distill.models.network import Network
from distill.recipe import Teacher


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


def placed(network: Network, here: Machine) -> Network:
    """The network on the device, in the order of memory that its kernels like."""
    network = network.to(here.device)
    return network.to(memory_format=torch.channels_last) if network.is_convolutional else network
