"""Images a second beside programs that keep every core busy, as on a laptop that is in use.

    python benchmarks/busy.py [--rounds 3] [--beside 2]

A ResNet-8 is trained on digits by `distill train`: with threads that spin where they wait for each
other, as is OpenMP's habit; with ours, which spin for a thirtieth of that time; and on one thread.
All take turns, beside the busy programs and without them. Rates are those of result.json, by the
clock: what a user waits.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from _timing import in_turn, report, rows

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart-teacher.yaml"
SPINS = "300000"  # libgomp's own
VARIANTS = {
    "as OpenMP spins": {"GOMP_SPINCOUNT": SPINS},
    "distill": {},
    "distill, OMP_NUM_THREADS=1": {"OMP_NUM_THREADS": "1"},
}


@contextmanager
def busy(count: int) -> Iterator[None]:
    """So many programs that do nothing else than to need a core."""
    command = [sys.executable, "-c", "while True: pass"]
    programs = [subprocess.Popen(command) for _ in range(count)]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


def rate(out: Path, epochs: int, own: dict[str, str]) -> float:
    """Images a second of a training in a fresh process."""
    unset = ("GOMP_SPINCOUNT", "OMP_NUM_THREADS", "OMP_WAIT_POLICY")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    command = ["train", str(RECIPE), "--restart", "--set", f"train.epochs={epochs}"]
    done = subprocess.run(
        [sys.executable, "-m", "distill", *command, "--out", str(out)],
        env=environment | own, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr)
    return float(json.loads((out / "result.json").read_text())["images_per_second"])


def main() -> None:
    """Train beside nothing and beside busy programs, and print both."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--beside", type=int, default=os.cpu_count(), help="busy programs")
    options = parser.parse_args()
    for count in (0, options.beside):
        rates: dict[str, list[float]] = {name: [] for name in VARIANTS}
        with busy(count), tempfile.TemporaryDirectory() as folder:
            for number in range(options.rounds):
                for name in in_turn(list(VARIANTS), number):
                    found = rate(Path(folder) / "run", options.epochs, VARIANTS[name])
                    rates[name].append(found)
        title = f"resnet8 on digits, batch 30, beside {count} busy programs"
        report(title, rows(rates), unit="images/s", per="")


if __name__ == "__main__":
    main()
