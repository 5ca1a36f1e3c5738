"""Fair comparisons on a busy machine: variants in turn, ratios within a round, CPU seconds."""

from __future__ import annotations

import ctypes
import gc
import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

Work = Callable[[], int]  # does some work and says how many units it did


class Row(NamedTuple):
    """One variant's figures over all rounds."""

    name: str
    rate: float  # median of units a CPU second
    ratio: float  # median of its rate over the first variant's in the same round
    least: float
    most: float


def compare(variants: Mapping[str, Work], *, rounds: int) -> list[Row]:
    """Time every variant once a round, forwards and backwards in turn, after one warm-up each.

    CPU time counts ended child processes too, and hardly feels what else runs on the machine.
    """
    for work in variants.values():
        work()
    rates: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds):
        names = list(variants) if number % 2 == 0 else list(variants)[::-1]
        for name in names:
            gc.collect()
            start = _cpu_seconds()
            units = variants[name]()
            rates[name].append(units / (_cpu_seconds() - start))
    base = rates[next(iter(variants))]
    rows = []
    for name, values in rates.items():
        ratios = [own / other for own, other in zip(values, base, strict=True)]
        median = statistics.median
        rows.append(Row(name, median(values), median(ratios), min(ratios), max(ratios)))
    return rows


def repeated(call: Callable[[], object], units: int, seconds: float = 0.5) -> Work:
    """`call` over and over for about so many seconds of CPU time."""

    def work() -> int:
        done, end = 0, time.process_time() + seconds
        while time.process_time() < end:
            call()
            done += units
        return done

    return work


def verdict(what: str, value: float, good: bool) -> None:
    """Say whether a goal was reached."""
    print(f"  {what}: {value:,.3g} {'reached' if good else 'MISSED'}")


def report(title: str, rows: list[Row], *, unit: str) -> None:
    """Print the rows as a table."""
    print(f"\n{title}")
    print(f"{'':44} {unit + '/CPU-s':>14} {'ratio':>8}  min .. max")
    for row in rows:
        print(
            f"{row.name:44} {row.rate:14,.0f} {row.ratio:8.2f}  {row.least:.2f} .. {row.most:.2f}"
        )


def keep_memory() -> None:
    """Let glibc keep what is freed, so that all variants find their memory in the same state.

    Else it gives large blocks back to the system, and whether a variant pays for new ones, which
    can be more than its work, depends on what ran before it.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD


def _cpu_seconds() -> float:
    ended = os.times()  # in hundredths of a second, which is too coarse for this process itself
    return time.process_time() + ended.children_user + ended.children_system
