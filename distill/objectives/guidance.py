"""A transformer's attention tells a CNN where to look, and which places belong together.

Where to look is attention transfer (Zagoruyko, Komodakis, ICLR 2017, arXiv:1612.03928) in the form
of probabilities; which places belong together follows the attention projector of Liu et al.:
Cross-Architecture Knowledge Distillation, ACCV 2022, arXiv:2207.05273.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from distill.component import Count, NonNegative
from distill.objectives._align import ResampleMaps, attending
from distill.objectives._term import Reads, Term
from distill.objectives.attention import attention_loss
from distill.types import Batch, Outputs, Pair

SINKS = 0.99  # quantile above which attention to a cell is cut: some cells only store things
LEAST = 1e-8  # of a cell's part of the whole


def saliency_loss(
    features: Float[Tensor, "B C h w"], attention: Float[Tensor, "B h*w"]
) -> Float[Tensor, " B"]:
    """KL from where the teacher looks to where the student's features are strong, over ln(h w).

    Σ_i a_i (log a_i − log s_i), s_i = Σ_c F_ci² over its sum.

    Args:
        features: Of the student.
        attention: Of the teacher, sums to 1 over the cells. It gets no gradient.

    Returns:
        One value a sample: 1 is what uniform features are from one cell that is looked at.
    """
    features = features.float()
    # The parts do not depend on the scale, and squares of what is large would overflow.
    largest = features.detach().abs().amax(dim=(1, 2, 3), keepdim=True).clamp_min(1e-6)
    energy = (features / largest).square().sum(dim=1).flatten(1)
    own = energy / energy.sum(dim=1, keepdim=True).clamp_min(LEAST)
    cells = own.shape[1]
    own, other = ((x + LEAST) / (1 + cells * LEAST) for x in (own, attention.detach().float()))
    divergence = (other * (other.log() - own.log())).sum(dim=1)
    return divergence / max(math.log(cells), 1.0)


class Guidance(Term):
    """Lead a CNN by a transformer's attention; a usual weight is 0.2, after the first tenth."""

    reads_classes = False
    directions = "vit to any"

    def __init__(
        self, *, saliency: NonNegative = 0.5, affinity: NonNegative = 0.5, width: Count = 64
    ) -> None:
        super().__init__()
        self.saliency, self.affinity, self.width = saliency, affinity, width

    def connect(self, pair: Pair) -> None:
        """Take the teacher's last map, and the student's last grid with more than one cell."""
        assert pair.teacher is not None
        (map_,) = attending(pair.teacher, 1)
        site = (pair.student.blocks or pair.student.stages)[-1]
        self.reads = Reads((site.name,), (map_.name,))
        self.front = map_.prefix
        self.bridge = ResampleMaps(map_, site.grid, prefix=False)
        self.whole = ResampleMaps(map_, site.grid, prefix=True)
        # What looks like a query or a key in the student is learned, for training alone.
        self.query, self.key = (nn.Conv2d(site.channels, self.width, 1) for _ in range(2))

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        assert teacher is not None
        features = student.read(self.reads.student[0])
        maps = teacher.read(self.reads.teacher[0]).mean(dim=1, keepdim=True)
        looked = self._looked(maps)
        q, k = (layer(features).flatten(2).float() for layer in (self.query, self.key))
        with torch.autocast(features.device.type, enabled=False):
            affinity = ((q / math.sqrt(self.width)).transpose(1, 2) @ k).softmax(dim=-1)
        related = attention_loss(affinity[:, None], self.bridge(maps), kind="kl")
        return self.saliency * saliency_loss(features, looked) + self.affinity * related

    def _looked(self, maps: Float[Tensor, "B 1 Q K"]) -> Float[Tensor, "B N"]:
        """How much is looked at each cell: by the tokens in front, or by all cells."""
        over: Tensor = self.whole(maps)[:, 0]
        seen = over[:, 0, 1:] if self.front else over.mean(dim=1)
        seen = seen.minimum(seen.quantile(SINKS, dim=1, keepdim=True))
        return seen / seen.sum(dim=1, keepdim=True).clamp_min(LEAST)
