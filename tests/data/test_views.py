from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.data.views import Permutation, epoch_order, partner, shard_order, uniform

IDS = np.arange(4000)


def test_uniform_is_a_function_of_its_key_alone() -> None:
    whole = uniform(7, IDS, 3, stream=2, num=5)
    some = np.array([17, 3999, 17, 0])
    assert np.array_equal(uniform(7, some, 3, stream=2, num=5), whole[some])
    assert np.array_equal(uniform(7, IDS, np.full(len(IDS), 3), stream=2, num=5), whole)
    assert np.array_equal(uniform(7, IDS, 3, stream=2, num=2), whole[:, :2])


@pytest.mark.parametrize("other", [(8, 3, 2), (7, 4, 2), (7, 3, 1)])
def test_uniform_differs_by_seed_view_and_stream(other: tuple[int, int, int]) -> None:
    seed, view, stream = other
    first = uniform(7, IDS, 3, stream=2, num=1).ravel()
    second = uniform(seed, IDS, view, stream=stream, num=1).ravel()
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.06  # 4 standard errors of 4000 numbers


def test_uniform_is_uniform() -> None:
    from scipy import stats

    numbers = uniform(0, IDS, 0, stream=1, num=25).ravel()
    assert ((numbers >= 0) & (numbers < 1)).all()
    assert stats.kstest(numbers, "uniform").pvalue > 1e-3
    # Neighbouring samples, and neighbouring numbers of a sample, have nothing in common.
    for shift in (1, 25):
        assert abs(np.corrcoef(numbers[:-shift], numbers[shift:])[0, 1]) < 0.0127


def test_uniform_never_changes() -> None:
    """Caches on disk hold what was made from these numbers."""
    got = uniform(0, np.array([0, 1, 49_999]), 2, stream=1, num=2)
    assert got.tolist() == [
        [0.2468144186580662, 0.6572558890883914],
        [0.9559927258489576, 0.6586338343735958],
        [0.7347474716658369, 0.1649821630480034],
    ]


@given(n=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
@settings(max_examples=60, deadline=None)
def test_a_permutation_has_every_element_once_and_an_inverse(n: int, key: int) -> None:
    permutation = Permutation(n, key)
    positions = np.arange(n)
    elements = permutation(positions)
    assert np.array_equal(np.sort(elements), positions)
    assert np.array_equal(permutation.inverse(elements), positions)
    assert permutation(positions[-1:])[0] == elements[-1]


def test_permutations_of_all_keys_are_all_permutations() -> None:
    seen = {tuple(Permutation(4, key)(np.arange(4))) for key in range(600)}
    assert len(seen) == 24


def test_every_place_is_equally_likely() -> None:
    firsts = [int(Permutation(10, key)(np.array([0]))[0]) for key in range(4000)]
    counts = np.bincount(firsts, minlength=10)
    assert np.abs(counts - 400).max() < 5 * np.sqrt(400 * 0.9)


@given(n=st.integers(1, 500), epoch=st.integers(0, 50), seed=st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_an_epoch_reads_every_sample_once_with_partners_side_by_side(
    n: int, epoch: int, seed: int
) -> None:
    order = epoch_order(n, data_seed=seed, train_seed=seed + 1, epoch=epoch, view=3)
    assert np.array_equal(np.sort(order), np.arange(n))
    partners = partner(order, n, data_seed=seed, view=3)
    pairs = order[: n // 2 * 2].reshape(-1, 2)
    assert np.array_equal(partners[: n // 2 * 2].reshape(-1, 2), pairs[:, ::-1])
    if n % 2:
        assert partners[-1] == order[-1]


def test_the_view_decides_the_pairs_and_the_epoch_their_order() -> None:
    def pairs(**key: int) -> list[tuple[int, int]]:
        order = epoch_order(1000, **{"data_seed": 1, "train_seed": 2, "epoch": 0, "view": 0} | key)
        return [(int(a), int(b)) for a, b in order.reshape(-1, 2)]

    first = pairs()
    for same in (pairs(epoch=1), pairs(train_seed=3)):
        assert same != first
        assert sorted(same) == sorted(first)
    for other in (pairs(view=1), pairs(data_seed=2)):
        assert len({frozenset(pair) for pair in other} & {frozenset(pair) for pair in first}) < 5


def test_an_epoch_is_shuffled() -> None:
    order = epoch_order(10_000, data_seed=0, train_seed=0, epoch=0, view=0)
    assert abs(np.corrcoef(order, np.arange(10_000))[0, 1]) < 0.04
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.04
    # A batch has as many samples of the first half as chance gives it.
    halves = (order < 5000)[: 78 * 128].reshape(78, 128).sum(axis=1)
    assert abs(halves.var() - 32) < 20


def test_an_order_never_changes() -> None:
    """A run that was cut short goes on in the order that it began."""
    order = epoch_order(11, data_seed=0, train_seed=1, epoch=2, view=3)
    assert order.tolist() == [9, 4, 1, 8, 7, 6, 10, 3, 5, 0, 2]


def test_an_order_by_shards_reads_every_sample_once_a_few_shards_at_a_time() -> None:
    ends = np.array([3, 3, 10, 14, 15, 29, 40])
    of = np.searchsorted(ends, np.arange(40), side="right")
    seen = set()
    for mixed in (1, 2, 3, 99):
        for epoch in range(5):
            order = shard_order(ends, mixed=mixed, train_seed=1, epoch=epoch)
            assert sorted(order.tolist()) == list(range(40))
            seen.add(tuple(order.tolist()))
            shards = of[order]
            first = {s: int(np.flatnonzero(shards == s)[0]) for s in set(shards.tolist())}
            last = {s: int(np.flatnonzero(shards == s)[-1]) for s in set(shards.tolist())}
            for place in range(40):
                assert sum(first[s] <= place <= last[s] for s in first) <= mixed
    assert len(seen) == 20
    again = shard_order(ends, mixed=2, train_seed=1, epoch=3)
    assert tuple(again.tolist()) in seen
    assert tuple(shard_order(ends, mixed=2, train_seed=2, epoch=3).tolist()) not in seen


def test_an_order_by_shards_never_changes() -> None:
    order = shard_order(np.array([4, 7, 12]), mixed=2, train_seed=5, epoch=1)
    assert order.tolist() == [11, 10, 9, 4, 7, 6, 5, 8, 2, 1, 3, 0]
