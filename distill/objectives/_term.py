"""The one interface a distillation method implements."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor, nn

from distill.types import Batch, Outputs


class Term(nn.Module, ABC):
    """One loss of the objective. A subclass's keyword-only arguments are its keys in the recipe."""

    needs_teacher: ClassVar[bool] = True  # False for a term that reads labels alone
    needs_labels: ClassVar[bool] = False
    features: tuple[str, ...] = ()  # of student and teacher that it reads, by name

    @property
    def needs_tail(self) -> bool:
        """Whether it reads how the teacher ranks the classes that it thinks least of."""
        return True

    @abstractmethod
    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        """The loss, one value a sample (B,) where the method allows it, else a scalar."""
