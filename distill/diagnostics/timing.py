"""How long a network takes to answer, on the device it is on."""

from __future__ import annotations

import time
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

LEAST = 5  # passes that are timed, however slow


class Timing(NamedTuple):
    """Of one forward pass."""

    p50: float  # median, in seconds
    p90: float  # interpolated where the passes are few
    samples: int  # passes that were timed
    images_per_second: float  # by the median


def time_network(
    network: nn.Module, images: Float[Tensor, "B 3 H W"], *, seconds: float = 1.0, warmup: int = 2
) -> Timing:
    """The latency of a forward pass over `images`, again and again for a while.

    Each pass is timed alone, from an idle device to an idle device: what a batch waits for its
    answer, the cost of starting every kernel included. In eval mode, without gradients, in the
    autocast that the caller is in. The network is as it was afterwards.

    Args:
        network: On the device of the images.
        images: One batch; latency is that of all of it.
        seconds: How long to go on; at least `LEAST` passes are timed.
        warmup: Passes before, which choose kernels, compile, and fill caches.
    """
    modes = {module: module.training for module in network.modules()}
    spent: list[float] = []
    network.eval()
    try:
        with torch.no_grad():
            for _ in range(warmup):
                network(images)
            _wait(images.device)
            end = time.perf_counter() + seconds
            while len(spent) < LEAST or time.perf_counter() < end:
                start = time.perf_counter()
                network(images)
                _wait(images.device)
                spent.append(time.perf_counter() - start)
    finally:
        for module, mode in modes.items():
            module.training = mode
    p50, p90 = (float(value) for value in np.quantile(spent, [0.5, 0.9]))
    return Timing(p50, p90, len(spent), len(images) / p50)


def _wait(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
