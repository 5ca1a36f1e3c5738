"""The page of results is made from the recorded runs, and each of those can be made again."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from distill.recipe import Recipe

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import _bars  # noqa: E402
import _document  # noqa: E402
import _plan  # noqa: E402
import _results  # noqa: E402
import _sides  # noqa: E402
import accuracy  # noqa: E402
import methods  # noqa: E402
import proof  # noqa: E402

TIERS = sorted(_plan.TIERS)


def recorded(tier: str) -> dict[str, dict[str, object]]:
    place = ROOT / "benchmarks" / "results" / f"proof-{tier}.json"
    return json.loads(place.read_text(encoding="utf-8")) if place.exists() else {}


@pytest.mark.parametrize("tier", TIERS)
def test_the_page_says_what_was_recorded(tier: str) -> None:
    page = _results.PAGES[tier].read_text(encoding="utf-8")
    found = recorded(tier)
    assert _document.put(page, f"proof-{tier}", _results.tables(found)) == page
    assert list(found) == [name for name in _plan.TIERS[tier] if name in found]
    for name, run in found.items():
        assert len(str(run["sha256"])) == 64, name
        assert '"/' not in json.dumps(run), f"{name}: names a place on some machine"


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("tier", TIERS)
def test_every_run_of_the_plan_is_a_command_on_a_ready_recipe(tier: str, quick: bool) -> None:
    plan, part = _plan.TIERS[tier], proof.PART[tier] if quick else None
    for name, run in plan.items():
        words = proof.words(name, run, Path("runs/proof"), part=part)
        overrides = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
        for path in (word for word in words if word.endswith(".yaml")):
            Recipe.load(ROOT / path, overrides)
        for need in run.needs:  # teachers and caches come before those that they serve
            assert list(plan).index(need) < list(plan).index(name)


def means(tier: str) -> dict[str, tuple[str, float, str]]:
    """Recipe, mean accuracy and what it is ahead of, by condition that changes nothing else."""
    found = {}
    sides = _sides.sides(recorded(tier))
    for condition, runs in sides.items():
        plan = _plan.TIERS[tier][next(name for name in _plan.TIERS[tier] if name in (
            condition, f"{condition}-{min(runs)}"))]  # fmt: skip
        words = shlex.split(plan.command)
        recipe = next(word for word in words if word.endswith(".yaml"))
        changed = {
            words[i + 1].partition("=")[0] for i, word in enumerate(words) if word == "--set"
        }
        if changed <= {"train.seed", "data.seed"}:
            mean = sum(run["found"]["top1"] for run in runs.values()) / len(runs)
            found[condition] = recipe, mean, plan.against
    return found


@pytest.mark.parametrize("tier", ["cpu", "long", "gpu"])
def test_the_heads_of_recipes_say_what_was_recorded(tier: str) -> None:
    sides = _sides.sides(recorded(tier))
    told = means(tier)
    assert told
    for condition, (recipe, mean, against) in told.items():
        lines = (ROOT / recipe).read_text(encoding="utf-8").splitlines()
        head = " ".join(line.removeprefix("#").strip() for line in lines if line[:1] == "#")
        assert f"{100 * mean:.2f} %" in head, f"{recipe}: {condition} has {mean:.2%}"
        if against in sides and against != condition and len(sides[condition]) > 1:
            points, ends = _sides.gain(sides[condition], sides[against])
            assert f"{points:+.2f}" in head, recipe
            assert ends is None or f"{ends[0]:+.2f} to {ends[1]:+.2f}" in head, recipe
        own = next(iter(sides[condition].values()))["found"]
        if "gain" in own:
            low, high = (100 * end for end in own["gain_ci95"])
            assert f"{100 * own['gain']:+.2f} points, {low:+.2f} to {high:+.2f}" in head, recipe
            assert f"alone {100 * own['baseline']['top1']:.2f} %" in head, recipe


def test_the_page_of_conclusions_says_what_was_recorded() -> None:
    sides = _sides.sides(recorded("bias"))
    text = _results.PAGES["bias"].read_text(encoding="utf-8")
    rows = re.findall(r"\| `([\w-]+)`: .*? \| ([-+]\d+\.\d) ± (\d+\.\d) over `([\w-]+)` \|", text)
    assert len(rows) >= 20
    for name, *figures, other in rows:
        points, ends = _sides.gain(sides[name], sides[other])
        assert ends is not None
        assert figures == [f"{points:+.1f}", f"{points - ends[0]:.1f}"], name
        assert len(sides[name]) == 5


def test_the_first_table_of_the_readme_says_what_was_recorded() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    _, _, rest = text.partition("| teacher → student |")
    rows = rest.partition("\n\n")[0].splitlines()[2:]
    page = _results.PAGES["cpu"].read_text(encoding="utf-8")
    runs = [run["found"] for tier in ("cpu", "gpu") for run in recorded(tier).values()]
    page += " ".join(f"{100 * run['top1']:.2f}" for run in runs if "top1" in run)
    assert len(rows) >= 3
    for row in rows:
        figures = re.findall(r"[+-]?\d+\.\d\d", row)
        assert len(figures) >= 3
        for figure in figures:
            assert figure in page or f"+{figure}" in page, f"{figure} of {row}"


def test_gains_are_paired_by_seed() -> None:
    def side(*top1: float) -> dict[int, dict[str, dict[str, float]]]:
        return {seed: {"found": {"top1": value}} for seed, value in enumerate(top1)}

    mean, ends = _sides.gain(side(0.52, 0.63, 0.71), side(0.50, 0.60, 0.70))
    assert mean == pytest.approx(2.0)
    assert ends is not None
    assert ends == pytest.approx((2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5))
    assert _sides.gain(side(0.5), side(0.4)) == (pytest.approx(10.0), None)


def test_a_bar_is_reached_by_its_figure_and_its_interval() -> None:
    def runs(condition: str, *top1: float) -> dict[str, dict[str, object]]:
        return {
            f"{condition}-{seed}": {
                "condition": condition, "seed": seed, "command": "distill train",
                "found": {"top1": value},
            }
            for seed, value in enumerate(top1)
        }  # fmt: skip

    alone = runs("cnn-alone", 0.80, 0.81, 0.82)
    (near,) = _bars.bars(alone | runs("cnn-kd", 0.802, 0.813, 0.824))
    assert (near.measured, near.reached) == ("+0.30 (+0.05 to +0.55)", True)
    (far,) = _bars.bars(alone | runs("cnn-kd", 0.801, 0.812, 0.823))
    assert (far.measured, far.reached) == ("+0.20 (-0.05 to +0.45)", False)
    (unsure,) = _bars.bars(alone | runs("cnn-vit-guidance", 0.80, 0.81, 0.84))
    assert not unsure.reached  # two thirds of a point ahead, and nobody knows
    assert "+0.67 (-2.20 to" in unsure.measured


@pytest.mark.parametrize(("taught", "alone", "reached"), [(0.6, 0.0, True), (0.4, 0.0, False)])
def test_a_class_never_shown_has_its_bar(taught: float, alone: float, reached: bool) -> None:
    recall = {"boot-kd": taught, "boot-alone": alone}
    subjects = [{"name": name, "recall": {"Ankle boot": part}} for name, part in recall.items()]
    found = {
        "omitted": {"condition": "omitted", "command": "distill evaluate",
                    "found": {"subjects": subjects}},
    }  # fmt: skip
    (bar,) = _bars.bars(found)
    assert (bar.measured, bar.reached) == (f"{taught:.1%} and 0.0%", reached)


def test_the_page_of_methods_says_what_was_recorded() -> None:
    page = methods.DOCUMENT.read_text(encoding="utf-8")
    rows = methods.read()
    assert methods.kept(rows) == rows  # in order, each once
    assert _document.put(page, "methods", methods.table(rows)) == page
    points = {
        key: f"{sum(values) / len(values):+.1f}" for key, values in methods.gains(rows).items()
    }
    table = page.partition("## The table")[2].partition("\n## ")[0]
    lines = [line.strip("|").split(" | ") for line in table.splitlines() if line[:3] == "| `"]
    assert len(lines) >= 25
    for name, *_, cost, cnn_cnn, cnn_vit, vit_vit, vit_cnn in lines:
        term = name.strip(" `")
        assert float(cost) > 0
        method = {"ce": "smoothing 0.1", "kd": "kd, T = 2"}.get(term, term)
        told = [cell.strip() for cell in (cnn_cnn, cnn_vit, vit_vit, vit_cnn)]
        found = [
            points.get((direction, method), "–")
            for direction in ("cnn-to-cnn", "cnn-to-vit", "vit-to-vit", "vit-to-cnn")
        ]
        assert told == found, term


def test_the_quickstart_s_seeds_in_the_readme_are_the_recorded_ones() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    side = _sides.sides(recorded("coverage"))["quickstart"]
    for seed, run in sorted(side.items()):
        found = run["found"]
        low, high = (100 * end for end in found["gain_ci95"])
        row = (
            f"| {seed} | {found['teachers'][0]:.2%} | {found['top1']:.2%} "
            f"| {found['baseline']['top1']:.2%} | {100 * found['gain']:+.2f} "
            f"| {low:+.2f} to {high:+.2f} |"
        )
        assert row in text
    mean, ends = _sides.own_gain(side)
    assert ends is not None
    told = (
        f"Mean gain {mean:+.2f} points, 95 % interval over seeds {ends[0]:+.2f} to {ends[1]:+.2f}."
    )
    assert told in text


def test_the_toolkits_beside_ours_are_the_recorded_ones() -> None:
    page = accuracy.DOCUMENT.read_text(encoding="utf-8")
    rows = accuracy.read(argparse.Namespace(results=accuracy.RESULTS, **accuracy.FULL))
    assert _document.put(page, "accuracy", accuracy.tables(rows)) == page
