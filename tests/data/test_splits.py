"""Held-out and reduced training splits: balanced, nested, the same for ever."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.data.splits import held_out, subset

LABELS = np.random.default_rng(0).integers(0, 7, 500)

some_labels = st.lists(st.integers(0, 4), min_size=1, max_size=60).map(np.array)
seeds = st.integers(0, 2**70)


@given(some_labels, st.floats(0, 1, exclude_max=True), seeds)
def test_held_out_parts_every_class(labels: np.ndarray, val: float, seed: int) -> None:
    train, held = held_out(labels, val, seed)
    assert sorted([*train, *held]) == list(range(len(labels)))
    assert (np.diff(train) > 0).all()
    assert (np.diff(held) > 0).all()
    for label in np.unique(labels):
        size, count = int((labels == label).sum()), int((labels[held] == label).sum())
        if val == 0 or size == 1:
            assert count == 0
        else:
            assert count == min(max(round(val * size), 1), size - 1)


@given(some_labels, st.floats(0.001, 1), st.floats(0.001, 1), seeds)
def test_subset_is_balanced_and_nested(
    labels: np.ndarray, small: float, large: float, seed: int
) -> None:
    small, large = sorted((small, large))
    ids = np.arange(len(labels))
    fewer, more = (subset(ids, labels, fraction, seed) for fraction in (small, large))
    assert set(fewer) <= set(more)
    for label in np.unique(labels):
        size = (labels == label).sum()
        assert (labels[fewer] == label).sum() == max(round(small * size), 1)


def test_subset_chooses_among_the_ids_given() -> None:
    ids = np.arange(0, 500, 3)
    half = subset(ids, LABELS, 0.5, seed=1)
    assert set(half) < set(ids)
    assert np.array_equal(subset(ids, LABELS, 1.0, seed=1), ids)


def test_a_sample_keeps_its_place_whatever_the_others() -> None:
    """Leaving ids out changes the order of no others: it depends on (seed, id) alone."""
    most = np.arange(5, 500)
    kept = subset(np.arange(500), np.zeros(500, int), 0.5, seed=3)
    kept_of_most = subset(most, np.zeros(500, int), 0.5, seed=3)
    assert len(np.setxor1d(kept, kept_of_most)) <= 10


def test_seeds_and_splits_are_independent() -> None:
    first, second = (held_out(LABELS, 0.5, seed)[1] for seed in (0, 1))
    assert 80 < len(np.intersect1d(first, second)) < 170
    kept = subset(np.arange(500), LABELS, 0.5, seed=0)
    assert 80 < len(np.intersect1d(first, kept)) < 170


def test_golden() -> None:
    labels = np.arange(20) % 2
    train, held = held_out(labels, 0.2, seed=0)
    assert held.tolist() == [8, 10, 17, 19]
    assert subset(train, labels, 0.25, seed=0).tolist() == [0, 3, 14, 15]


def test_order_of_the_labels_decides_nothing() -> None:
    renamed = 6 - LABELS
    assert np.array_equal(held_out(LABELS, 0.3, 5)[1], held_out(renamed, 0.3, 5)[1])


@pytest.mark.parametrize("val", [0.0, 0.1])
def test_no_labels_at_all(val: float) -> None:
    train, held = held_out(np.array([], dtype=np.int64), val, 0)
    assert len(train) == len(held) == 0
