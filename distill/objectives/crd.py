"""The student's features tell which image the teacher looked at, among thousands in a memory.

Tian, Krishnan, Isola: Contrastive Representation Distillation, ICLR 2020, arXiv:1910.10699.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from distill.component import Count, Fraction, Positive
from distill.objectives._draws import uniform_of
from distill.objectives._gather import whole
from distill.objectives._term import Reads, Term
from distill.objectives.infonce import require_pooled
from distill.types import Batch, Outputs, Pair


def crd_loss(
    own: Float[Tensor, " B"],
    others: Float[Tensor, "B N"],
    same: Bool[Tensor, "B N"],
    *,
    constant: Float[Tensor, ""],
    samples: int,
) -> Float[Tensor, " B"]:
    """−log h_0 − Σ_n log (1 − h_n), h = e / (e + N / M) with e = exp(score) / Z.

    It is noise contrastive estimation of which of 1 + N images belongs to the anchor, the others
    being drawn evenly from all M.

    Args:
        own: ⟨u, v⟩ / τ of each anchor with its own image.
        others: That with N others.
        same: Where an other is the anchor's own image after all: it does not count.
        constant: log Z, so that e is 1 / M in the mean.
        samples: M.

    Returns:
        One value a sample, in nats.
    """
    shift = constant + math.log(others.shape[1] / samples)
    wrong = torch.where(same, 0.0, F.logsigmoid(shift - others.float()))
    return -F.logsigmoid(own.float() - shift) - wrong.sum(dim=1)


class CRD(Term):
    """Tell each image by what the teacher saw of it, among many kept; a usual weight is 0.8."""

    reads_classes = False
    needs_batch = True
    reads = Reads(("pooled",), ("pooled",))

    ids: Tensor
    memory: Tensor
    constants: Tensor
    step: Tensor

    def __init__(
        self,
        *,
        dim: Count = 128,
        negatives: Count = 16384,
        temperature: Positive = 0.07,
        momentum: Fraction = 0.5,
    ) -> None:
        super().__init__()
        self.dim, self.negatives = dim, negatives
        self.temperature, self.momentum = temperature, momentum

    def connect(self, pair: Pair) -> None:
        """Build a head for each side, and a memory of both sides' vectors of every image."""
        require_pooled(pair)
        assert pair.teacher is not None
        self.heads = nn.ModuleList(
            nn.Linear(side.width, self.dim) for side in (pair.student, pair.teacher)
        )
        count = len(pair.samples)
        self.register_buffer("ids", pair.samples.clone(), persistent=False)
        self.register_buffer("memory", F.normalize(torch.randn(2, count, self.dim), dim=2))
        self.register_buffer("constants", torch.zeros(2))
        self.register_buffer("step", torch.zeros((), dtype=torch.long), persistent=False)

    def set_progress(self, progress: float) -> None:
        """Draw others in every step: a step is known by how much of the run is done."""
        self.step.fill_(round(progress * 2**40))

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        assert teacher is not None
        told = (student.read("pooled"), teacher.read("pooled").detach())
        units = [
            F.normalize(head(x).float(), dim=1) for head, x in zip(self.heads, told, strict=True)
        ]
        own = torch.searchsorted(self.ids, batch.ids)
        count = self.memory.shape[1]
        # The same for all anchors: a draw for each would fill memory with B times as many vectors.
        drawn = (uniform_of(self.step, self.negatives, salt=3) * count).long().clamp_max(count - 1)
        same = drawn == own[:, None]
        losses = []
        with torch.autocast(units[0].device.type, enabled=False):
            for side in (0, 1):  # the student's vector among the teacher's kept ones, and inversely
                kept = self.memory[1 - side]
                first = (units[side] * kept[own]).sum(dim=1) / self.temperature
                others = units[side] @ kept[drawn].T / self.temperature
                constant = self._constant(others, side, count)
                losses.append(crd_loss(first, others, same, constant=constant, samples=count))
        if self.training:
            self._remember(units, batch)
        return losses[0] + losses[1]

    def _constant(self, scores: Tensor, side: int, count: int) -> Tensor:
        """The logarithm of Z, as the first batch gave it."""
        if not self.training:
            return self.constants[side]
        with torch.no_grad():
            found = whole(scores.detach().logsumexp(dim=1) - math.log(scores.shape[1]))
            found = found.logsumexp(dim=0) - math.log(len(found)) + math.log(count)
            constant = torch.where(self.constants[side] != 0, self.constants[side], found)
            self.constants[side] = constant
            return constant

    def _remember(self, units: list[Tensor], batch: Batch) -> None:
        """Move the kept vectors of the batch's images, of all processes, towards the new ones."""
        with torch.no_grad():
            place = torch.searchsorted(self.ids, whole(batch.ids))
            for side, unit in enumerate(units):
                mixed = self.memory[side][place].lerp(whole(unit.detach()), 1 - self.momentum)
                self.memory[side][place] = F.normalize(mixed, dim=1)
