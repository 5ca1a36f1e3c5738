"""What the teacher says goes to a token of its own, with a head of its own.

Touvron, Cord, Douze, Massa, Sablayrolles, Jégou: Training data-efficient image transformers &
distillation through attention, ICML 2021, arXiv:2012.12877.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from distill.component import Positive
from distill.errors import IncompatibleError
from distill.objectives._term import Reads, Term
from distill.objectives.hard import hard_loss
from distill.objectives.kd import kd_loss
from distill.types import Batch, Outputs, Pair


class Token(Term):
    """Teach a ViT's distillation token, by the teacher's first class or softly; a usual weight 0.5.

    Other terms then read the class token's head; in evaluation the student's logits are the mean of
    the two.
    """

    directions = "any to vit"
    reads = Reads(("token",))

    def __init__(
        self, *, kind: Literal["hard", "soft"] = "hard", temperature: Positive = 3.0
    ) -> None:
        super().__init__()
        self.kind, self.temperature = kind, temperature

    @property
    def needs_tail(self) -> bool:
        """Hard, it reads the first class alone; softly, all of them above T = 1."""
        return self.kind == "soft" and self.temperature > 1

    def connect(self, pair: Pair) -> None:
        """Refuse a student without such a token."""
        if not pair.student.token:
            raise IncompatibleError(
                f"{pair.student.model} has no distillation token",
                hint="student: {model: vit, pool: distill}, or one of timm's distilled networks",
            )

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        assert teacher is not None
        if self.kind == "hard":
            return hard_loss(student.read("token"), teacher.logits)
        heard = teacher.softened(self.temperature)
        return kd_loss(student.read("token"), heard, temperature=self.temperature)
