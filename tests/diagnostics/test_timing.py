"""Timing tells of passes that took place, and leaves the network as it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from distill.diagnostics import timing
from distill.types import Outputs


class Counting(nn.Module):
    """Notes each of its passes; a part of it is frozen in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.frozen = nn.BatchNorm2d(3), nn.BatchNorm2d(3).eval()
        self.fc = nn.Linear(3, 2)
        self.seen: list[tuple[int, bool, bool]] = []

    def forward(self, images: Tensor) -> Outputs:
        logits = self.fc(self.frozen(self.norm(images)).mean(dim=(2, 3)))
        self.seen.append((len(images), self.norm.training, logits.requires_grad))
        return Outputs(logits)


@pytest.mark.parametrize("batch", [1, 32])
def test_passes_are_counted_without_the_first(batch: int) -> None:
    network = Counting()
    found = timing.time_network(network, torch.rand(batch, 3, 4, 4), seconds=0.0, warmup=4)
    assert found.samples == timing.LEAST
    assert network.seen == [(batch, False, False)] * (4 + timing.LEAST)
    assert 0 < found.p50 <= found.p90
    assert found.images_per_second == batch / found.p50


def test_it_goes_on_for_as_long_as_it_is_told() -> None:
    found = timing.time_network(Counting(), torch.rand(1, 3, 4, 4), seconds=0.2)
    assert found.samples > timing.LEAST


@pytest.mark.parametrize("training", [True, False])
def test_the_network_is_left_as_it_was(training: bool) -> None:
    network = Counting().train(training)
    network.frozen.eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    timing.time_network(network, torch.rand(2, 3, 4, 4), seconds=0.0)
    assert (network.training, network.norm.training) == (training, training)
    assert not network.frozen.training
    assert all(p.requires_grad and p.grad is None for p in network.parameters())
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_network_that_fails_is_left_as_it_was() -> None:
    network = Counting()
    with pytest.raises(RuntimeError, match="elements"):
        timing.time_network(network, torch.rand(2, 5, 4, 4))
    assert network.training
    assert not network.frozen.training
