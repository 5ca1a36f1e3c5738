"""A network that a file names may not be out of all proportion to what the file holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from distill.errors import DamagedError

SPARE = 2**24  # numbers, beside those of the file: tables that are made anew and not kept
_SPARE_OPERATIONS = 20_000
_TIMES = 4  # the file's: a classifier is replaced, values are drawn in float64


class Bounded(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses to make much more than `tensors` numbers, before memory is taken for them.

    A few bytes can say `depth: 1000000`: building that would take the machine down before a shape
    is found to be another.

    Args:
        origin: What errors call the file.
        tensors: What it holds.

    Raises:
        DamagedError: Where a network is built, if it is too large.
    """

    def __init__(self, origin: str, tensors: Sequence[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._origin = origin
        self._numbers = _TIMES * sum(tensor.numel() for tensor in tensors) + SPARE
        self._operations = 100 * len(tensors) + _SPARE_OPERATIONS

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if args and isinstance(args[0], list | tuple):  # a new tensor's shape
            self._numbers -= math.prod(size for size in args[0] if isinstance(size, int))
        self._operations -= 1
        if self._numbers < 0 or self._operations < 0:
            raise DamagedError(
                f"{self._origin}: names a network that is far larger than the weights in it",
                hint="copy it again from where it came, or train again",
            )
        return func(*args, **(kwargs or {}))
