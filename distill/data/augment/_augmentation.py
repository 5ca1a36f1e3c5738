"""The interface of an augmentation: drawn on the host, applied on the device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float, UInt8
from numpy import ndarray
from torch import Tensor


class Plan(NamedTuple):
    """What was drawn for some samples, one row a sample.

    The device's copy is what pixels are made from. The host's copy answers what decides shapes
    (how many samples of a batch get which operation) without waiting for the device.
    """

    host: dict[str, ndarray]
    device: dict[str, Tensor]

    def rows(self, rows: slice) -> Plan:
        """The plan of some of the samples."""
        return Plan(
            {name: drawn[rows] for name, drawn in self.host.items()},
            {name: drawn[rows] for name, drawn in self.device.items()},
        )


class Augmentation(ABC):
    """A random change of images.

    What is drawn for a sample depends on its own numbers alone, and what is done to an image on
    what was drawn for it: never on the rest of the batch.

    Attributes:
        student_only: Whether the teacher may be shown the image as it was before.
        num_draws: How many numbers in [0, 1) a sample needs.
    """

    student_only: ClassVar[bool] = False
    num_draws: int

    @abstractmethod
    def plan(
        self, uniforms: Float[ndarray, "n D"], *, height: int, width: int
    ) -> dict[str, ndarray]:
        """What follows from `num_draws` numbers in [0, 1) a sample, for images of this size."""

    @abstractmethod
    def apply(self, images: UInt8[Tensor, "B 3 H W"], plan: Plan) -> UInt8[Tensor, "B 3 H W"]:
        """The changed images, on the device of `images`; nothing waits for it."""


def to_device(drawn: dict[str, ndarray], device: torch.device) -> Plan:
    """A plan whose device copies are under way; only CUDA copies need pinned memory for that."""
    tensors = {name: torch.from_numpy(values) for name, values in drawn.items()}
    if device.type == "cuda":
        tensors = {name: values.pin_memory() for name, values in tensors.items()}
    return Plan(
        drawn, {name: values.to(device, non_blocking=True) for name, values in tensors.items()}
    )
