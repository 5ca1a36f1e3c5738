"""Scalars that change over a run: loss weights and learning-rate factors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Tag, model_validator

from distill.component import Fraction


class Ramp(BaseModel):
    """From `start` to `end` while progress goes from `begin` to `until`; constant outside.

    A warm-up is `{start: 0, end: 1, until: 0.1}`; a decay to a floor is `{start: 0.9, end: 0.2}`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    start: float
    end: float
    shape: Literal["linear", "cosine"] = "linear"
    begin: Fraction = 0.0
    until: Fraction = 1.0

    @model_validator(mode="after")
    def _forward(self) -> Ramp:
        if self.begin > self.until:
            raise ValueError(f"begin {self.begin} lies after until {self.until}")
        return self


Schedule = Annotated[
    Annotated[float, Tag("number")] | Annotated[Ramp, Tag("ramp")],
    Discriminator(lambda v: "ramp" if isinstance(v, dict | Ramp) else "number"),
]


def value(schedule: Schedule, progress: float) -> float:
    """The scalar at `progress`, the finished fraction of the run in [0, 1].

    With t the fraction of the way from `begin` to `until`: linear is start + (end − start)·t,
    cosine is start + (end − start)·(1 − cos πt)/2.
    """
    if not isinstance(schedule, Ramp):
        return float(schedule)
    span = max(schedule.until - schedule.begin, 1e-12)
    t = min(max((progress - schedule.begin) / span, 0.0), 1.0)
    return schedule.start + (schedule.end - schedule.start) * _eased(t, schedule.shape)


def learning_rate(
    progress: float,
    *,
    warmup: float,
    shape: str,
    milestones: Sequence[float] = (),
    gamma: float = 1.0,
) -> float:
    """The factor on the learning rate at `progress`, in [0, 1].

    Args:
        progress: Finished fraction of the run in [0, 1].
        warmup: Fraction of the run that rises linearly from 0 to 1.
        shape: Fall after the warm-up: "cosine" or "linear" to 0, "constant", or "step".
        milestones: Of "step", as `progress`: from each of them on, within the warm-up too, the
            rate is `gamma` times as high.
        gamma: Of "step".
    """
    rise = progress / warmup if progress < warmup else 1.0
    if shape == "step":  # a product and no power, which would round other than torch's MultiStepLR
        return rise * math.prod(gamma for milestone in milestones if progress >= milestone)
    if progress < warmup or shape == "constant":
        return rise
    return 1.0 - _eased((progress - warmup) / max(1.0 - warmup, 1e-12), shape)


def _eased(t: float, shape: str) -> float:
    """From 0 at t = 0 to 1 at t = 1."""
    return (1 - math.cos(math.pi * t)) / 2 if shape == "cosine" else t
