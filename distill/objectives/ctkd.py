"""A temperature that learns to make the student's task harder, little by little.

Li, Li, Yang, Zhao, Song, Luo, Li, Yang: Curriculum Temperature for Knowledge Distillation, AAAI
2023, arXiv:2211.16231 (the global temperature).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from distill.component import Fraction, NonNegative, Positive
from distill.errors import RecipeError
from distill.objectives._term import Term
from distill.objectives.kd import kd_loss
from distill.types import Batch, Outputs


class CTKD(Term):
    """Match the teacher's classes at a learned temperature that works against the student.

    T = least + span · σ(θ), and the gradient of θ is reversed: T moves to where the loss is larger.
    The reversal grows from nothing over `warmup` of the run, as half a cosine.
    """

    strength: Tensor

    def __init__(
        self,
        *,
        least: Positive = 1.0,
        span: Positive = 20.0,
        start: Positive = 4.0,
        warmup: Fraction = 0.05,
        most: NonNegative = 1.0,
    ) -> None:
        super().__init__()
        self.least, self.span, self.warmup, self.most = least, span, warmup, most
        if not least < start < least + span:
            raise RecipeError(
                f"ctkd: start: {start:g} is no temperature between {least:g} and {least + span:g}",
                hint="start lies above least and below least + span",
            )
        self.theta = nn.Parameter(torch.tensor(math.log((start - least) / (least + span - start))))
        # In a tensor, so that compiled code sees a number change and not itself.
        self.register_buffer("strength", torch.zeros(()), persistent=False)

    def set_progress(self, progress: float) -> None:
        """Set how strongly the gradient of θ is reversed."""
        done = min(progress / self.warmup, 1.0) if self.warmup else 1.0
        self.strength.fill_(self.most * (1 - math.cos(math.pi * done)) / 2)

    def temperature(self) -> Tensor:
        """T, with the reversed gradient."""
        # θ in value, −strength in slope.
        theta = self.theta.detach() * (1 + self.strength) - self.strength * self.theta
        return self.least + self.span * theta.sigmoid()

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        assert teacher is not None
        temperature = self.temperature()
        # An ensemble's mean is that of this T; θ hears it as one teacher's logits.
        return kd_loss(
            student.logits, teacher.softened(temperature.detach()), temperature=temperature
        )
