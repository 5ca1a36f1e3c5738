"""The student's features tell which image the teacher looked at, among all of the batch.

van den Oord, Li, Vinyals: Representation Learning with Contrastive Predictive Coding, 2018,
arXiv:1807.03748: the loss is a bound on the information that one side has about the other.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from distill.component import Count, Positive
from distill.errors import IncompatibleError
from distill.objectives._gather import first_row, whole
from distill.objectives._term import Reads, Term
from distill.types import Batch, Outputs, Pair


def infonce_loss(
    student: Float[Tensor, "B D"], teacher: Float[Tensor, "B D"], *, temperature: float
) -> Float[Tensor, " B"]:
    """−log (exp(⟨u_i, v_i⟩ / τ) / Σ_j exp(⟨u_i, v_j⟩ / τ)) of vectors u, v scaled to length 1.

    Args:
        student: Vectors u of the student.
        teacher: Vectors v of the teacher for the same images.
        temperature: τ > 0.

    Returns:
        One value a sample, in nats; ln B less the mean of it is a bound on the information that
        u has about v. The other images are those of the whole batch, gathered over all processes.
    """
    with torch.autocast(student.device.type, enabled=False):
        u, v = (F.normalize(x.float(), dim=1) for x in (student, teacher))
        logits = u @ whole(v).T / temperature
    rows = torch.arange(len(u), device=u.device) + first_row(u)
    return F.cross_entropy(logits, rows, reduction="none")


def require_pooled(pair: Pair) -> None:
    """Refuse networks without the vector that a classifier reads.

    Raises:
        IncompatibleError: Naming the network.
    """
    assert pair.teacher is not None
    for side in (pair.student, pair.teacher):
        if not side.width:
            raise IncompatibleError(f"{side.model} has no classifier to read `pooled` at")


class InfoNCE(Term):
    """Tell each image by what the teacher saw of it, among the batch; a usual weight 0.1 to 1."""

    reads_classes = False
    needs_batch = True
    reads = Reads(("pooled",), ("pooled",))

    def __init__(self, *, dim: Count = 128, temperature: Positive = 0.1) -> None:
        super().__init__()
        self.dim, self.temperature = dim, temperature

    def connect(self, pair: Pair) -> None:
        """Build a head for each side: the student's is learned with it, the teacher's too.

        Unlike in a distance, a learned head of the teacher cannot make both sides constant: the
        images would not be told apart any more.
        """
        require_pooled(pair)
        assert pair.teacher is not None
        self.own, self.other = (
            nn.Linear(side.width, self.dim) for side in (pair.student, pair.teacher)
        )

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        assert teacher is not None
        u, v = self.own(student.read("pooled")), self.other(teacher.read("pooled").detach())
        return infonce_loss(u, v, temperature=self.temperature)
