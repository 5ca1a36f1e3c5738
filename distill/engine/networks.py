"""The networks of a recipe: what they know of the data, and where they lie."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from distill.data.datasets import Dataset
from distill.engine.machine import Machine
from distill.models.network import Network
from distill.objectives import Objective
from distill.recipe import Teacher
from distill.teacher import Ensemble, Live
from distill.types import Anatomy, Batch, Outputs


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
    model = spec.recipe.student.model
    own = model if ":" in model else None  # else it is code that only the run's files name
    return spec.model_copy(update={"recipe": None, "model": own, "weights": str(run)})


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
    """The network on the device, in the order of memory that its kernels like.

    One that is to be cut in parts waits on the host: it may be too large for the device.
    """
    if here.shards:
        return network
    network = network.to(here.device)
    return network.to(memory_format=torch.channels_last) if network.is_convolutional else network


class Together(nn.Module):
    """Networks that answer as one, as an ensemble of teachers does.

    Args:
        networks: The members.
        weights: Their shares; left out, they are equal.
        mean: Of their probabilities or of their logits.
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        weights: Sequence[float] = (),
        mean: Literal["probability", "logit"] = "probability",
    ) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        members = [Live(network) for network in networks]
        self._ensemble = Ensemble(members, weights or [1.0] * len(members), mean)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Outputs:
        """The logits of all of them together."""
        nothing = images.new_zeros(len(images), dtype=torch.long)
        return Outputs(self._ensemble(Batch(images, nothing, nothing, nothing)).logits)
