"""Does a teacher help, by how much, on real images: the plan of runs behind docs/results.md.

    python benchmarks/proof.py --root ~/data --out runs/proof [--jobs 3] [--minutes 8] [--only E0]

Every run is a command of ours on a recipe of `recipes/cifar10/`; the overrides below are all that
differs between the sides of a comparison. Runs begin as soon as those that they need are done, some
beside each other, and the most telling come first. At the end of `--minutes` what is in work is
stopped; the same command goes on from there. Whatever is done is not done again. `--quick` shows
that all works, on a few images; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parents[1]
RECIPES = HERE / "recipes" / "cifar10"
SCREEN = Console(stderr=True)
GRACE = 60.0  # seconds that a run has to save itself
ALONE = ("teachers=[]", "objective=[{term: ce}]")
QUICK = (
    "data.fraction=0.02", "train.epochs=2", "optimizer.warmup_epochs=1", "train.batch_size=128",
    "train.precision=fp32",
)  # fmt: skip


class Run(NamedTuple):
    """One command: a training, or a cache of teachers' answers where `views` says how many."""

    experiment: str
    recipe: str
    overrides: tuple[str, ...] = ()
    teacher: str | None = None  # the run that teaches
    cache: str | None = None  # the run that made the teacher's cache
    views: int = 0

    @property
    def makes_cache(self) -> bool:
        """Whether it writes what teachers say, and trains nothing."""
        return self.views > 0 and self.cache is None

    @property
    def needs(self) -> list[str]:
        """Runs that come before it."""
        return [name for name in (self.teacher, self.cache) if name]


def seeded(seed: int) -> tuple[str, ...]:
    """Another order, other views, other initial weights."""
    return (f"train.seed={seed}", f"data.seed={seed}") if seed else ()


RUNS: dict[str, Run] = {
    "teacher": Run("E0", "teacher-cnn.yaml"),
    "vit-strong-alone": Run("E1b", "cnn-to-vit.yaml", ALONE),
    "vit-strong-kd": Run("E2b", "cnn-to-vit.yaml", teacher="teacher"),
    "resnet20-alone": Run("E4", "cnn-to-resnet20.yaml", ALONE),
    "resnet20-kd": Run("E4", "cnn-to-resnet20.yaml", teacher="teacher"),
    "cache": Run("E2c", "cnn-to-vit.yaml", teacher="teacher", views=16),
    "vit-strong-cached": Run("E2c", "cnn-to-vit.yaml", teacher="teacher", cache="cache", views=16),
    "resnet20-alone-1": Run("E4", "cnn-to-resnet20.yaml", (*ALONE, *seeded(1))),
    "resnet20-kd-1": Run("E4", "cnn-to-resnet20.yaml", seeded(1), teacher="teacher"),
    "resnet20-vit-kd": Run("E4", "vit-to-cnn-guidance.yaml", teacher="vit-strong-kd"),
    "resnet20-alone-2": Run("E4", "cnn-to-resnet20.yaml", (*ALONE, *seeded(2))),
    "resnet20-kd-2": Run("E4", "cnn-to-resnet20.yaml", seeded(2), teacher="teacher"),
    "vit-weak-alone": Run("E1a", "cnn-to-vit-weak.yaml", ALONE),
    "vit-weak-kd": Run("E2a", "cnn-to-vit-weak.yaml", teacher="teacher"),
    "vit-features": Run("E3", "cnn-to-vit-features.yaml", teacher="teacher"),
}


def command(name: str, run: Run, options: argparse.Namespace) -> list[str]:
    """What a run is started with."""
    out: Path = options.out
    overrides = [f"data.root={options.root}", *run.overrides, *(QUICK if options.quick else ())]
    if run.teacher:
        overrides.append(f"teachers=[{{weights: {out / run.teacher}}}]")
    if run.cache:
        overrides += [f"cache.path={out / run.cache}", f"cache.views={run.views}"]
    words = [sys.executable, "-m", "distill", "teacher-cache" if run.makes_cache else "train"]
    words += [str(RECIPES / run.recipe), "--out", str(out / name)]
    words += ["--views", str(run.views)] if run.makes_cache else []
    return [*words, *(word for one in overrides for word in ("--set", one))]


def done(name: str, out: Path) -> bool:
    """Whether a run is finished."""
    return (out / name / ("index.json" if RUNS[name].makes_cache else "result.json")).exists()


class Work:
    """Runs beside each other.

    Args:
        options: Of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._end = time.monotonic() + 60 * options.minutes
        self._working: dict[str, tuple[subprocess.Popen[bytes], float]] = {}
        self._log: Path = options.out / "log"
        self._log.mkdir(parents=True, exist_ok=True)

    def all(self, names: list[str]) -> None:
        """Make all of them, or as many as there is time for."""
        left = [name for name in names if not done(name, self._options.out)]
        while (left or self._working) and time.monotonic() < self._end:
            for name in [name for name in left if self._may_begin(name)]:
                if len(self._working) < self._options.jobs:
                    left.remove(name)
                    self._begin(name)
            if not self._working:
                break  # what is left needs what has failed
            time.sleep(0.2)
            self._gather()
        for name, (process, _) in self._working.items():
            SCREEN.print(f"{name}: stopped, the time is over; the same command goes on")
            process.send_signal(signal.SIGTERM)
        for process, _ in self._working.values():
            process.wait(GRACE)
        self._gather()

    def _may_begin(self, name: str) -> bool:
        return all(done(need, self._options.out) for need in RUNS[name].needs)

    def _begin(self, name: str) -> None:
        words = command(name, RUNS[name], self._options)
        with (self._log / f"{name}.log").open("ab") as log:
            log.write(f"{' '.join(words)}\n".encode())
            log.flush()
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            process = subprocess.Popen(words, stdout=log, stderr=log, env=environment)
        self._working[name] = process, time.monotonic()

    def _gather(self) -> None:
        for name, (process, began) in list(self._working.items()):
            if process.poll() is None:
                continue
            del self._working[name]
            seconds = time.monotonic() - began
            said = "done" if process.returncode == 0 else f"status {process.returncode}"
            SCREEN.print(f"{name}: {said}, {seconds:.0f} s")


def result(name: str, out: Path) -> dict[str, Any] | None:
    """What a training ended with."""
    place = out / name / "result.json"
    return json.loads(place.read_text(encoding="utf-8")) if place.exists() else None


def table(names: list[str], out: Path) -> Table:
    """A line for each training that is done."""
    shown = Table(
        "", "run", "test top-1", "val top-1", "NLL", "ECE", "epochs", "seconds", "images/s"
    )
    for name in names:
        if found := result(name, out):
            shown.add_row(
                RUNS[name].experiment, name, f"{found['top1']:.2%}", f"{found['val_top1']:.2%}",
                f"{found['nll']:.3f}", f"{found['ece']:.3f}", str(found["epochs"]),
                f"{found['seconds']:.0f}", f"{found['images_per_second']:,.0f}",
            )  # fmt: skip
    return shown


def main() -> None:
    """Make the runs, and print what they reached."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--root", type=Path, default=Path("~/data"), help="where CIFAR-10 lies")
    parser.add_argument("--out", type=Path, default=Path("runs/proof"))
    parser.add_argument("--jobs", type=int, default=3, help="runs beside each other")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--only", help="experiments, and what they need: E0,E2b")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    wanted = options.only.split(",") if options.only else {run.experiment for run in RUNS.values()}
    chosen = {name for name, run in RUNS.items() if run.experiment in wanted}
    while more := {need for name in chosen for need in RUNS[name].needs} - chosen:
        chosen |= more
    names = [name for name in RUNS if name in chosen]
    Work(options).all(names)
    Console(width=120).print(table(names, options.out))


if __name__ == "__main__":
    main()
