"""The hash is SplitMix64, the same on every machine."""

import warnings

import numpy as np
import pytest

from distill.data.hashing import hash64

MASK = 2**64 - 1


def splitmix64(seed: int, count: int) -> list[int]:
    """The generator in plain integers, as published."""
    outputs, state = [], seed
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & MASK
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        outputs.append(z ^ (z >> 31))
    return outputs


def test_published_values() -> None:
    assert hash64(1234567, np.arange(5)).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_every_part_splits_off_a_generator() -> None:
    first = splitmix64(7, 4)[3]
    second = splitmix64(first, 12)[11]
    assert int(hash64(7, 3, 11)) == second
    assert hash64(7, 3, 11).dtype == np.uint64


def test_arrays_broadcast_and_agree_with_integers() -> None:
    grid = hash64(5, np.arange(3)[:, None], np.arange(4, dtype=np.int32))
    assert grid.shape == (3, 4)
    assert grid.tolist() == [[int(hash64(5, i, j)) for j in range(4)] for i in range(3)]
    assert len(np.unique(grid)) == 12


@pytest.mark.parametrize("value", [-1, 2**63, 2**64 - 1, 2**64 + 5])
def test_integers_wrap_without_a_warning(value: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert int(hash64(value, value)) == int(hash64(value % 2**64, value % 2**64))
    assert int(hash64(0, -1)) == int(hash64(0, np.array([-1]))[0])


def test_order_of_parts_and_seed_matter() -> None:
    assert len({int(hash64(s, a, b)) for s in range(8) for a in range(8) for b in range(8)}) == 512


def test_bits_are_balanced_and_neighbours_independent() -> None:
    h = hash64(0, np.arange(100_000))
    bits = np.unpackbits(h.view(np.uint8).reshape(-1, 8), axis=1)
    assert np.abs(bits.mean(axis=0) - 0.5).max() < 0.01
    unit = (h >> np.uint64(11)) * 2.0**-53
    assert abs(np.corrcoef(unit[:-1], unit[1:])[0, 1]) < 0.02
    other = (hash64(1, np.arange(100_000)) >> np.uint64(11)) * 2.0**-53
    assert abs(np.corrcoef(unit, other)[0, 1]) < 0.02
