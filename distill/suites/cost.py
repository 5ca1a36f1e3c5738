"""What networks cost: their size, their operations, and their time on this device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from distill.definitions import Number
from distill.diagnostics.timing import time_network
from distill.engine import machine
from distill.engine.machine import Machine
from distill.engine.networks import Together
from distill.models import cost
from distill.models.network import Network
from distill.suites import Found, nothing
from distill.suites.subjects import Subject, Tested, sample

BATCHES = (1, 32)
SECONDS = 0.5  # of passes that are timed, by batch
_EXACT = ("parameters", "flops", "macs", "activation_bytes", "file_bytes")
_TIMED = (*(f"latency_{size}_{p}" for size in BATCHES for p in ("p50", "p90")), "throughput")


def measure(subjects: Sequence[Subject], here: Machine) -> dict[str, Found]:
    """Of the first network of each; equal ones are measured once."""
    found: dict[str, Found] = {}
    for subject in subjects:
        tested = subject.first
        if tested.network is None:
            found[subject.name] = nothing("a cache stands for it", *_EXACT, *_TIMED)
            continue
        numbers = {name: Number(value) for name, value in _exact(tested).items()}
        found[subject.name] = Found(numbers | _timed(tested, here), {}, {})
    return found


def _exact(tested: Tested) -> dict[str, float]:
    """What follows from the network alone; of several their sums, and the largest activations."""
    size, whole = tested.dataset.image_size, tested.network
    members = whole.networks if isinstance(whole, Together) else [whole]
    networks = [one for one in members if isinstance(one, Network)]
    counts: dict[str, Callable[[Network], int]] = {
        "parameters": cost.parameters,
        "flops": lambda one: cost.flops(one, size),
        "macs": lambda one: cost.macs(one, size),
        "file_bytes": cost.file_bytes,
    }
    found = {name: float(sum(map(count, networks))) for name, count in counts.items()}
    most = max(cost.activation_bytes(one, size) for one in networks)
    return found | {"activation_bytes": float(most)}


def _timed(tested: Tested, here: Machine) -> dict[str, Number]:
    assert tested.network is not None
    images = sample(tested, here, max(BATCHES)).images
    images = images.repeat(-(-max(BATCHES) // len(images)), 1, 1, 1)
    found: dict[str, Number] = {}
    with machine.autocast(tested.recipe.train.precision, here.device):
        for size in BATCHES:
            timing = time_network(tested.network, images[:size].contiguous(), seconds=SECONDS)
            for p, seconds in (("p50", timing.p50), ("p90", timing.p90)):
                found[f"latency_{size}_{p}"] = Number(1000 * seconds)
            found["throughput"] = Number(timing.images_per_second)
    return found
