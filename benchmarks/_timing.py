"""Fair comparisons on a busy machine: variants in turn, ratios within a round, CPU seconds.

What is reported is printed, and kept for all.py where it asks for that.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil

Work = Callable[[], int]  # does some work and says how many units it did

KEPT = "DISTILL_BENCHMARK_ROWS"  # names the file, a JSON object a line, that all.py reads


class Row(NamedTuple):
    """One variant's figures over all rounds; None where there is none."""

    name: str
    rate: float  # median of units a second
    ratio: float  # median of its rate over the first variant's in the same round
    least: float
    most: float
    share: float | None = None  # of the rate that the device allows
    memory: int | None = None  # most bytes held at once
    waited: float | None = None  # fraction of the time without a batch
    joules: float | None = None  # of the whole machine or GPU, a unit
    failed: str | None = None  # why there are no figures


def compare(variants: Mapping[str, Work], *, rounds: int, wall: bool = False) -> list[Row]:
    """Time every variant once a round, forwards and backwards in turn, after one warm-up each.

    CPU time counts child processes too, and hardly feels what else runs on the machine. `wall` is
    for a GPU, whose work the variants wait for by themselves.
    """
    clock = time.perf_counter if wall else cpu_seconds
    for work in variants.values():
        work()
    rates: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds):
        for name in in_turn(list(variants), number):
            gc.collect()
            start = clock()
            units = variants[name]()
            rates[name].append(units / (clock() - start))
    return rows(rates)


def in_turn(names: Sequence[str], number: int) -> list[str]:
    """The order of a round: forwards and backwards in turn."""
    return list(names) if number % 2 == 0 else list(names)[::-1]


def rows(rates: Mapping[str, Sequence[float]]) -> list[Row]:
    """A row for each variant's rates, one a round; the first variant is what others are held to."""
    base = rates[next(iter(rates))]
    found = []
    for name, values in rates.items():
        ratios = [own / other for own, other in zip(values, base, strict=True)]
        median = statistics.median
        found.append(Row(name, median(values), median(ratios), min(ratios), max(ratios)))
    return found


def inverse(found: Sequence[Row]) -> list[Row]:
    """The rows with ratios of times in place of rates."""
    return [
        row if row.failed else row._replace(
            ratio=1 / row.ratio, least=1 / row.most, most=1 / row.least
        )
        for row in found
    ]  # fmt: skip


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
    _keep({"goal": what, "value": value, "reached": bool(good)})


def report(
    title: str, found: Sequence[Row], *, unit: str, per: str = "CPU-s", note: str = ""
) -> None:
    """Print the rows as a table; `unit` is what was counted, `per` for how long, or nothing."""
    unit = f"{unit}/{per}" if per else unit
    print(f"\n{title}")
    print(f"{'':44} {unit:>14} {'ratio':>8}  min .. max")
    for row in found:
        if row.failed is None:
            figures = f"{number(row.rate):>14} {row.ratio:8.2f}  {row.least:.2f} .. {row.most:.2f}"
        else:
            figures = f"     {row.failed}"
        print(f"{row.name:44} {figures}")
    table = {"title": title, "unit": unit, "note": note, "rows": [row._asdict() for row in found]}
    _keep(table)


def number(value: float) -> str:
    """Three digits of a small number, all those before the point of a large one."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _keep(entry: dict[str, Any]) -> None:
    if place := os.environ.get(KEPT):
        with Path(place).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def cpu_seconds() -> float:
    """Of this process and of all its children, those that have ended and those that run."""
    ended = os.times()  # in hundredths of a second, which is too coarse for this process itself
    spent = time.process_time() + ended.children_user + ended.children_system
    for child in psutil.Process().children(recursive=True):
        try:
            spent += sum(child.cpu_times()[:4])
        except psutil.NoSuchProcess:  # just ended; it counts when it is waited for
            continue
    return spent
