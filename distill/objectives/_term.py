"""The one interface a distillation method implements."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from distill.types import Batch, Outputs, Pair


class Reads(NamedTuple):
    """The taps that a term reads, besides logits: `pooled`, or a name out of an `Anatomy`."""

    student: tuple[str, ...] = ()
    teacher: tuple[str, ...] = ()

    def __str__(self) -> str:
        """As a clause: what of which side."""
        sides = {"student": self.student, "teacher": self.teacher}
        return ", ".join(
            f"{' and '.join(taps)} of the {who}" for who, taps in sides.items() if taps
        )

    @classmethod
    def of(cls, pairs: Sequence[tuple[str, str]]) -> Reads:
        """The taps of pairs of a student's and a teacher's, each once."""
        own, other = (tuple(dict.fromkeys(side)) for side in zip(*pairs, strict=True))
        return cls(own, other)


class Term(nn.Module, ABC):
    """One loss of the objective. A subclass's keyword-only arguments are its keys in the recipe."""

    needs_teacher: ClassVar[bool] = True  # False for a term that reads no teacher
    needs_labels: ClassVar[bool] = False
    needs_batch: ClassVar[bool] = False  # True where it compares the images of a batch
    reads_classes: ClassVar[bool] = True  # False where it reads no logits of the teacher
    shows: ClassVar[bool] = False  # True where the student is shown other images besides
    directions: ClassVar[str] = "any"  # or which pairs it works for, such as "vit to cnn"
    reads: Reads = Reads()

    @property
    def needs_tail(self) -> bool:
        """Whether it reads how the teacher ranks the classes that it thinks least of."""
        return self.reads_classes

    def connect(self, pair: Pair) -> None:  # most terms read logits alone
        """Choose what to read of the two networks, and build what is learned between them.

        Raises:
            IncompatibleError: If the two have nothing that the term could compare.
        """

    def show(self, batch: Batch) -> Tensor:
        """The other images, where it `shows` any; as many as the batch's, and as large."""
        raise NotImplementedError

    def set_progress(self, progress: float) -> None:  # most terms are constant
        """Follow the run: the finished fraction of it, in [0, 1]."""

    @abstractmethod
    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        """The loss, one value a sample (B,) where the method allows it, else a scalar."""
