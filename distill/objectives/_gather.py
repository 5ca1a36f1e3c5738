"""The whole batch, where a formula compares its images: every process holds a part of it."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as collectives

# torch 2.10 knows it by its older name.
_NAMES = ("all_gather_single_autograd", "all_gather_tensor_autograd")
_gather: Any = next(getattr(collectives, name) for name in _NAMES if hasattr(collectives, name))


_apart = ContextVar("apart", default=False)


@contextmanager
def apart_from_others() -> Generator[None]:
    """Let every process take its own rows for the whole batch, and wait for no other."""
    before = _apart.set(True)
    try:
        yield
    finally:
        _apart.reset(before)


def whole(rows: Tensor) -> Tensor:
    """The rows of all processes, in the order of their ranks; gradients flow back to each.

    DDP averages the gradients of the processes, so a loss that is a mean over this process's rows,
    or over all rows alike in every process, moves the weights as one process would.
    """
    if not _ranked() or dist.get_world_size() == 1:
        return rows
    gathered: Tensor = _gather(rows.contiguous(), 0, dist.group.WORLD)
    return gathered


def first_row(rows: Tensor) -> int:
    """Where this process's rows begin among those of all."""
    return dist.get_rank() * len(rows) if _ranked() else 0


def _ranked() -> bool:
    return dist.is_available() and dist.is_initialized() and not _apart.get()
