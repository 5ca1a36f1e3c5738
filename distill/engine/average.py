"""The exponential moving average of a student's weights, which is what is evaluated and saved."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class Average:
    """A copy of a network that follows it: average = decay · average + (1 − decay) · weights.

    The first update copies. Statistics of BatchNorm are averaged too, and counts copied. PyTorch's
    `AveragedModel` does the same, and waits for the device at every step.

    Attributes:
        network: The averaged one.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network = copy.deepcopy(network).requires_grad_(False)
        self._decay = decay

    @torch.no_grad()
    def update(self, network: nn.Module, *, first: bool) -> None:
        """Follow the network by one step. Never waits for the device."""
        own, other = _state(self.network), _state(network)
        if first:
            torch._foreach_copy_(own, other)
            return
        numbers = [i for i, tensor in enumerate(own) if tensor.is_floating_point()]
        torch._foreach_lerp_(
            [own[i] for i in numbers], [other[i] for i in numbers], 1 - self._decay
        )
        counts = sorted(set(range(len(own))) - set(numbers))
        if counts:
            torch._foreach_copy_([own[i] for i in counts], [other[i] for i in counts])


def _state(network: nn.Module) -> list[Tensor]:
    own = [*network.parameters(), *network.buffers()]
    return [x.to_local() if isinstance(x, DTensor) else x for x in own]  # of a model in parts
