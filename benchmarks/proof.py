"""Does a teacher help, by how much, on real images: every run behind docs/results.md.

    python benchmarks/proof.py --tier cpu|long|gpu|bias|coverage [--out DIR] [--minutes 60]
        [--only E0,E2b]

`_plan.py` has the runs: each is a command of ours on a ready recipe, and the images lie where the
recipes say. Runs begin as soon as those that they need are done, `--jobs` beside each other, in the
order of the plan. When `--minutes` are over, what is in work is stopped; the same command goes on
from there, and nothing that is done is done again. `--quick` shows on a few images that all works;
its figures mean nothing. In the end all results go to benchmarks/results/proof-TIER.json and from
there into docs/results.md, those of `bias` into docs/conclusions.md, of `coverage` into
docs/coverage.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from _meters import machine
from _plan import TIERS, Run
from _results import mark, recorded, written
from rich.console import Console

HERE = Path(__file__).parents[1]
SCREEN = Console(stderr=True, highlight=False)
GRACE = 60.0  # seconds that a run has to save itself
# Tens of digits, hundreds of larger images.
SHORT = ("train.epochs=2", "optimizer.warmup_epochs=0", "train.batch_size=20")
PART = {"cpu": 0.01, "long": 0.01, "gpu": 0.01, "bias": 0.1, "coverage": 0.1}


def words(name: str, run: Run, out: Path, *, part: float | None) -> list[str]:
    """What a run is started with; with `part`, a short one on that part of the images."""
    made = shlex.split(run.command.replace("{out}", str(out)))
    if part and made[0] != "evaluate":
        of_teacher = run.needs and "teachers=" not in run.command
        places = ("", "teachers.0.recipe.") if of_teacher else ("",)
        if of_teacher:  # a second recipe has no teacher to shorten
            made = [word for i, word in enumerate(made) if i < 2 or not word.endswith(".yaml")]
        keys = [at + key for at in places for key in SHORT]
        whole = made[0] == "sample-efficiency"  # whose sizes say how many
        keys += [f"{at}data.fraction={part}" for at in places if at or not whole]
        made += [word for key in keys for word in ("--set", key)]
    return [sys.executable, "-m", "distill", *made, "--out", str(out / name)]


class Work:
    """Runs beside each other.

    Args:
        runs: By name, in the order in which they begin.
        options: Of the command line.
    """

    def __init__(self, runs: dict[str, Run], options: argparse.Namespace) -> None:
        self._runs, self._options, self._out = runs, options, options.out.resolve()
        self._end = time.monotonic() + 60 * options.minutes
        self._working: dict[str, tuple[subprocess.Popen[bytes], float]] = {}
        (self._out / "log").mkdir(parents=True, exist_ok=True)

    def all(self) -> None:
        """Make all of them, or as many as there is time for."""
        left = [name for name, run in self._runs.items() if not self._done(name, run)]
        while (left or self._working) and time.monotonic() < self._end:
            free = self._options.jobs - len(self._working)
            for name in [name for name in left if self._may_begin(name)][: max(free, 0)]:
                left.remove(name)
                self._begin(name)
            if not self._working:
                SCREEN.print(f"left out, as what they need has failed: {', '.join(left)}")
                break
            time.sleep(0.2)
            self._gather()
        for name, (process, _) in self._working.items():
            SCREEN.print(f"{name}: stopped, the time is over; the same command goes on")
            process.send_signal(signal.SIGTERM)
        for process, _ in self._working.values():
            process.wait(GRACE)
        self._gather()

    def _done(self, name: str, run: Run) -> bool:
        return mark(run, self._out / name).exists()

    def _may_begin(self, name: str) -> bool:
        return all(self._done(need, self._runs[need]) for need in self._runs[name].needs)

    def _begin(self, name: str) -> None:
        part = PART[self._options.tier] if self._options.quick else None
        command = words(name, self._runs[name], self._out, part=part)
        with (self._out / "log" / f"{name}.log").open("ab") as log:
            log.write(f"{shlex.join(command)}\n".encode())
            log.flush()
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=HERE)
        self._working[name] = process, time.monotonic()

    def _gather(self) -> None:
        for name, (process, began) in list(self._working.items()):
            if process.poll() is not None:
                del self._working[name]
                seconds = time.monotonic() - began
                with (self._out / "log" / "seconds.jsonl").open("a") as log:
                    log.write(json.dumps({"name": name, "seconds": round(seconds, 1)}) + "\n")
                how = f"status {process.returncode}" if process.returncode else "done"
                SCREEN.print(f"{name}: {how}, {seconds:.0f} s")


def chosen(tier: str, only: str | None) -> dict[str, Run]:
    """The runs of some experiments, and those that they need."""
    plan = TIERS[tier]
    wanted = set(only.split(",")) if only else {run.experiment for run in plan.values()}
    if unknown := wanted - {run.experiment for run in plan.values()}:
        raise SystemExit(f"--only: no experiment of the plan is named {', '.join(sorted(unknown))}")
    names = {name for name, run in plan.items() if run.experiment in wanted}
    while more := {need for name in names for need in plan[name].needs} - names:
        names |= more
    return {name: run for name, run in plan.items() if name in names}


def main() -> None:
    """Make the runs, and write what they reached."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tier", choices=list(TIERS), default="cpu")
    parser.add_argument("--out", type=Path, help="default: runs/proof-TIER")
    parser.add_argument("--jobs", type=int, help="beside each other; 2 on a CPU, 1 on a GPU")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--only", help="experiments: E0,E2b")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    options.out = options.out or Path("runs") / f"proof-{options.tier}"
    options.jobs = options.jobs or (1 if options.tier == "gpu" else 2)
    Work(chosen(options.tier, options.only), options).all()
    if not options.quick:
        where = machine("cuda" if options.tier == "gpu" else "cpu")
        found = recorded(TIERS[options.tier], options.out, where)
        written(options.tier, found, options.out)


if __name__ == "__main__":
    main()
