from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from distill.recipe import Optimizer
from distill.schedule import Ramp, Schedule, learning_rate, value

progress = st.floats(0, 1)
RAMP = {"start": 0.9, "end": 0.2, "begin": 0.25, "until": 0.75}


@settings(deadline=None)
@given(st.floats(-10, 10), progress)
def test_a_number_is_constant(number: float, at: float) -> None:
    assert value(number, at) == number


@settings(deadline=None)
@given(progress)
def test_linear_against_the_plain_formula(at: float) -> None:
    t = min(max((at - 0.25) / 0.5, 0), 1)
    assert value(Ramp(**RAMP), at) == pytest.approx(0.9 - 0.7 * t, abs=1e-12)


@settings(deadline=None)
@given(progress)
def test_cosine_against_the_plain_formula(at: float) -> None:
    t = min(max((at - 0.25) / 0.5, 0), 1)
    plain = 0.2 + 0.7 * (1 + math.cos(math.pi * t)) / 2
    assert value(Ramp(**RAMP, shape="cosine"), at) == pytest.approx(plain, abs=1e-12)


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_the_ends_are_exact(shape: Any) -> None:
    ramp = Ramp(start=0.9, end=0.2, shape=shape)
    assert value(ramp, 0.0) == 0.9
    assert value(ramp, 1.0) == pytest.approx(0.2, abs=1e-15)


def test_a_ramp_without_length_is_a_step() -> None:
    ramp = Ramp(start=1.0, end=2.0, begin=0.5, until=0.5)
    assert [value(ramp, at) for at in (0.0, 0.5, 0.51, 1.0)] == [1.0, 1.0, 2.0, 2.0]


def test_a_ramp_that_ends_before_it_begins_is_refused() -> None:
    with pytest.raises(ValidationError, match="lies after"):
        Ramp(start=1.0, end=2.0, begin=0.6, until=0.5)


@pytest.mark.parametrize(
    "data",
    ["fast", True, None, {"start": 1.0}, {**RAMP, "form": "linear"}, {**RAMP, "until": 1.5}],
)
def test_what_is_no_schedule_is_refused(data: Any) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(Schedule).validate_python(data, strict=True)


@settings(deadline=None)
@given(progress, st.floats(0.01, 0.9))
def test_the_learning_rate_rises_and_then_falls(at: float, warmup: float) -> None:
    t = (at - warmup) / (1 - warmup)
    plain = {
        "cosine": (1 + math.cos(math.pi * t)) / 2,
        "linear": 1 - t,
        "constant": 1.0,
    }
    for shape, falling in plain.items():
        expected = at / warmup if at < warmup else falling
        found = learning_rate(at, warmup=warmup, shape=shape)
        assert found == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("shape", ["cosine", "linear", "constant"])
def test_the_learning_rate_without_and_with_nothing_but_warmup(shape: str) -> None:
    assert learning_rate(0.0, warmup=0.0, shape=shape) == 1.0
    assert learning_rate(0.5, warmup=1.0, shape=shape) == 0.5
    assert learning_rate(1.0, warmup=1.0, shape=shape) == 1.0


@settings(deadline=None, max_examples=40)
@given(
    st.integers(2, 40).flatmap(
        lambda epochs: st.tuples(
            st.just(epochs), st.sets(st.integers(1, epochs - 1), min_size=1, max_size=5)
        )
    ),
    st.integers(1, 7),
    st.floats(0.01, 0.99),
)
@example((240, {150, 180, 210}), 3, 0.1)
def test_steps_are_those_of_torch_to_the_bit(
    run: tuple[int, set[int]], steps_per_epoch: int, gamma: float
) -> None:
    epochs, milestones = run[0], sorted(run[1])
    spec = Optimizer(lr=1.0, schedule="step", milestones=milestones, gamma=gamma)
    reference = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(reference, milestones, gamma)
    for epoch in range(epochs):
        expected = scheduler.get_last_lr()[0]
        for step in range(steps_per_epoch):
            progress = (epoch * steps_per_epoch + step + 0.5) / (epochs * steps_per_epoch)
            assert spec.rate(progress, epochs) == expected
        assert spec.rate(epoch / epochs, epochs) == expected  # the boundary has the lower one
        reference.step()
        scheduler.step()


@settings(deadline=None)
@given(progress, st.floats(0.01, 0.9))
def test_steps_and_the_warm_up_multiply(at: float, warmup: float) -> None:
    steps = {"shape": "step", "milestones": [0.4, 0.7], "gamma": 0.5}
    rise = learning_rate(at, warmup=warmup, shape="constant")
    assert learning_rate(at, warmup=warmup, **steps) == rise * learning_rate(at, warmup=0, **steps)
