"""Seconds until the command line answers, in fresh interpreters, beside `import torch`.

    python benchmarks/startup.py [--rounds 7]

Seconds of the clock: what a user waits. Commands take turns; files are in the system's memory after
the first round, which is not counted.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _timing import in_turn, report, rows, verdict

GOAL = 0.3  # seconds until help
WRONG = """
data: {name: digits}
student: {model: resnet8}
objective: [{term: ce, wieght: 1}]
optimizer: {lr: 0.1}
train: {epochs: 1, batch_size: 8}
"""


def main() -> None:
    """Time all commands and print them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "wrong.yaml"
        recipe.write_text(WRONG)
        commands = {
            "python -c pass": (["-c", "pass"], 0),
            "distill --help": (["-m", "distill", "--help"], 0),
            "distill check, a recipe with an error": (["-m", "distill", "check", str(recipe)], 2),
            "import distill": (["-c", "import distill"], 0),
            "import torch": (["-c", "import torch"], 0),
        }
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        for number in range(options.rounds + 1):
            for name in in_turn(list(commands), number):
                arguments, status = commands[name]
                began = time.perf_counter()
                done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
                if done.returncode != status:
                    raise SystemExit(f"{name}: status {done.returncode}\n{done.stderr}")
                if number:
                    seconds[name].append(time.perf_counter() - began)
    found = rows({name: [1000 * s for s in spent] for name, spent in seconds.items()})
    report("until a command has answered", found, unit="ms", per="", note="Ratios are of times.")
    median = statistics.median(seconds["distill --help"])
    verdict(f"seconds until help, goal {GOAL}", median, median < GOAL)


if __name__ == "__main__":
    main()
