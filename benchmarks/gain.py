"""A recipe's gain from its teacher over several seeds: every run, the mean, and its interval.

    python benchmarks/gain.py recipes/quickstart.yaml [--seeds 5] [--set KEY=VALUE]...

A seed decides everything that is drawn: which images are trained on, their views, their order, and
the initial weights of teacher, student and baseline.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from _intervals import interval

from distill.engine.train import train
from distill.recipe import Recipe


def main() -> None:
    """Run the recipe once for each seed and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    options = parser.parse_args()
    gains = []
    print("| seed | teacher | student | alone | gain, points | 95 % over images |")
    print("|---|---|---|---|---|---|")
    for seed in range(options.seeds):
        seeds = [
            f"{place}{key}={seed}"
            for place in ("", "teachers.0.recipe.")
            for key in ("train.seed", "data.seed")
        ]
        recipe = Recipe.load(options.recipe, [*options.overrides, *seeds])
        with tempfile.TemporaryDirectory() as folder:
            result = train(recipe, Path(folder) / "run", baseline=True)
        assert result.baseline is not None
        assert result.gain is not None
        assert result.gain_ci95 is not None
        gains.append(100 * result.gain)
        low, high = (100 * end for end in result.gain_ci95)
        print(
            f"| {seed} | {result.teachers[0]['top1']:.2%} | {result.top1:.2%} "
            f"| {result.baseline['top1']:.2%} | {gains[-1]:+.2f} | {low:+.2f} to {high:+.2f} |",
            flush=True,
        )
    mean, half = interval(gains)
    if half is not None:
        ends = f"{mean - half:+.2f} to {mean + half:+.2f}"
        print(f"\nmean gain {mean:+.2f} points, 95 % interval over seeds {ends}")


if __name__ == "__main__":
    main()
