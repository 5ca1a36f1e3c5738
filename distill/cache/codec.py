"""Logits as few bytes a row, and back.

A temperature is no part of it: what comes back are logits, so one cache serves all temperatures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from distill.cache.layout import num_kept
from distill.errors import DivergedError

_HALF_MAX = 65_504.0  # the greatest float16


def encode(codec: str, logits: Float[Tensor, "B K"]) -> dict[str, Tensor]:
    """What `codec` keeps of these logits, as columns of a row a sample; waits for no device.

    * int8: z ≈ top − q · scale with q in 0 … 255, top the row's greatest logit and scale its range
      over 255, both rounded up to float16 before q is: no logit lies outside, and none is wrong by
      more than half a scale.
    * fp16: log-probabilities, for float16 is finest near 0, where the mass is; and log Σ exp z.
    * topk:K: the K greatest log-probabilities, their classes, and log Σ exp z.

    Logits that are not finite, or beyond what the code holds, leave no finite scale, top or
    log Σ exp z: `require_finite` finds them.
    """
    z = logits.float()
    if codec == "int8":
        top = _half_above(z.amax(dim=-1, keepdim=True))
        scale = _half_above((top.float() - z.amin(dim=-1, keepdim=True)) / 255)
        step = scale.float()
        q = torch.where(step > 0, (top.float() - z) / step, 0).round().clamp(0, 255)
        return {"q": q.to(torch.uint8), "scale": scale[:, 0], "top": top[:, 0]}
    lse = z.logsumexp(dim=-1)
    logp = z - lse[:, None]
    lse = torch.where(z.isfinite().all(dim=-1), lse, torch.nan)
    if codec == "fp16":
        return {"logp": logp.clamp_min(-_HALF_MAX).half(), "lse": lse}
    kept, ids = logp.topk(min(num_kept(codec), z.shape[1]), dim=-1)
    number = torch.uint16 if z.shape[1] <= 2**16 else torch.uint32
    return {"ids": ids.to(number), "logp": kept.clamp_min(-_HALF_MAX).half(), "lse": lse}


def _half_above(x: Float[Tensor, "B 1"]) -> Float[Tensor, "B 1"]:
    """The least float16 that is not below x."""
    near = x.half()
    bits = near.view(torch.int16)
    following = torch.where(near >= 0, bits + 1, bits - 1).view(torch.float16)
    return torch.where(near.float() < x, following, near)


def decode(codec: str, columns: Mapping[str, Tensor], num_classes: int) -> Float[Tensor, "B K"]:
    """The logits again, in float32.

    What `topk:K` left out is spread evenly over the classes that it left out.
    """
    if codec == "int8":
        return torch.addcmul(
            columns["top"].float()[:, None],
            columns["q"].float(),
            columns["scale"].float()[:, None],
            value=-1,
        )
    logp, lse = columns["logp"].float(), columns["lse"][:, None]
    if codec == "fp16":
        return logp + lse
    rest = num_classes - logp.shape[1]
    if not rest:
        tail = torch.zeros_like(lse)
    else:
        left = (-torch.expm1(logp.logsumexp(dim=-1, keepdim=True))).clamp_min(1e-9)
        tail = left.log() - math.log(rest)
    dense = tail.expand(-1, num_classes).scatter(1, columns["ids"].long(), logp)
    return dense + lse


def require_finite(columns: Mapping[str, Tensor], origin: str) -> None:
    """Refuse what is no answer, before it is kept.

    Raises:
        DivergedError: If a number is not finite.
    """
    for name, column in columns.items():
        if column.is_floating_point():
            broken = (~column.isfinite()).reshape(len(column), -1).any(dim=1)
            if count := int(broken.sum()):
                raise DivergedError(
                    f"{origin}: the teacher's answers to {count:,} images are not finite numbers "
                    f"({name})",
                    hint="mind its weights, its input and cache.precision",
                )
