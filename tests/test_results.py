"""The page of results is made from the recorded runs, and each of those can be made again."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest

from distill.recipe import Recipe

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import _document  # noqa: E402
import _plan  # noqa: E402
import _results  # noqa: E402

TIERS = sorted(_plan.TIERS)


def recorded(tier: str) -> dict[str, dict[str, object]]:
    place = ROOT / "benchmarks" / "results" / f"proof-{tier}.json"
    return json.loads(place.read_text(encoding="utf-8")) if place.exists() else {}


@pytest.mark.parametrize("tier", TIERS)
def test_the_page_says_what_was_recorded(tier: str) -> None:
    page = _results.PAGE.read_text(encoding="utf-8")
    found = recorded(tier)
    assert _document.put(page, f"proof-{tier}", _results.tables(found)) == page
    assert list(found) == [name for name in _plan.TIERS[tier] if name in found]
    for name, run in found.items():
        assert len(str(run["sha256"])) == 64, name


@pytest.mark.parametrize("tier", TIERS)
def test_every_run_of_the_plan_is_a_command_on_a_ready_recipe(tier: str) -> None:
    plan = _plan.TIERS[tier]
    for name, run in plan.items():
        words = shlex.split(run.command.replace("{out}", "runs/proof"))
        overrides = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
        for path in (word for word in words if word.endswith(".yaml")):
            Recipe.load(ROOT / path, overrides)
        for need in run.needs:  # teachers and caches come before those that they serve
            assert list(plan).index(need) < list(plan).index(name)


def test_gains_are_paired_by_seed() -> None:
    def side(*top1: float) -> dict[int, dict[str, dict[str, float]]]:
        return {seed: {"found": {"top1": value}} for seed, value in enumerate(top1)}

    mean, ends = _results.gain(side(0.52, 0.63, 0.71), side(0.50, 0.60, 0.70))
    assert mean == pytest.approx(2.0)
    assert ends is not None
    assert ends == pytest.approx((2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5))
    assert _results.gain(side(0.5), side(0.4)) == (pytest.approx(10.0), None)
