"""What the runs of proof.py reached, as data and as the tables of docs/results.md."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from _document import put
from _intervals import interval
from _plan import TIERS, Run

HERE = Path(__file__).parents[1]
PAGE = HERE / "docs" / "results.md"
KEPT = (  # of a result.json
    "top1", "val_top1", "nll", "ece", "epochs", "steps", "seconds", "images_per_second",
    "parameters", "flops", "memory",
)  # fmt: skip
MARKS = {  # what a command leaves behind when it is done
    "train": "result.json",
    "teacher-cache": "index.json",
    "temperature-sweep": "sweep.json",
    "sample-efficiency": "efficiency.json",
    "evaluate": "evaluation.json",
}


def mark(run: Run, place: Path) -> Path:
    """The file that a run ends with."""
    return place / MARKS[run.command.split()[0]]


def recorded(plan: Mapping[str, Run], out: Path, where: Mapping[str, Any]) -> dict[str, Any]:
    """The results of all runs that are done, each with the digest of the file that holds it.

    Args:
        plan: Runs by name.
        out: Where they are.
        where: The machine that they ran on.
    """
    found: dict[str, Any] = {}
    for name, run in plan.items():
        path = mark(run, out / name)
        if not path.exists():
            continue
        content = path.read_bytes()
        document = json.loads(content)
        if path.name == "result.json":
            document = {key: document.get(key) for key in KEPT}
        elif path.name == "index.json":
            document = {}
        command = f"distill {run.command} --out {{out}}/{name}".replace("{out}", f"runs/{out.name}")
        found[name] = {
            "experiment": run.experiment,
            "condition": run.condition or name,
            "seed": run.seed,
            "command": command,
            "sha256": hashlib.sha256(content).hexdigest(),
            "device": f"{where['device']}, torch {where['torch']}",
            "found": document,
        }
    return found


def kept(tier: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """These results, and earlier ones of runs of the plan that are not there, in its order.

    What is the same keeps the device that it was made on.
    """
    place = HERE / "benchmarks" / "results" / f"proof-{tier}.json"
    old = json.loads(place.read_text(encoding="utf-8")) if place.exists() else {}
    same = {name for name, run in found.items() if old.get(name, {}).get("sha256") == run["sha256"]}
    new = {name: old[name] if name in same else run for name, run in found.items()}
    both = {name: run for name in TIERS[tier] if (run := new.get(name, old.get(name)))}
    place.write_text(json.dumps(both, indent=1) + "\n", encoding="utf-8")
    return both


def written(tier: str, found: Mapping[str, Any]) -> None:
    """Keep the results, and put their tables into the page."""
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(put(text, f"proof-{tier}", tables(kept(tier, found))), encoding="utf-8")


def sides(found: Mapping[str, Any]) -> dict[str, dict[int, Mapping[str, Any]]]:
    """Trainings by condition and seed."""
    by_condition: dict[str, dict[int, Mapping[str, Any]]] = {}
    for run in found.values():
        if "top1" in run["found"]:
            by_condition.setdefault(run["condition"], {})[run["seed"]] = run
    return by_condition


def gain(
    one: Mapping[int, Mapping[str, Any]], other: Mapping[int, Mapping[str, Any]]
) -> tuple[float, tuple[float, float] | None]:
    """By how many points one side is ahead of the other, paired by seed, and its 95 % interval."""
    both = sorted(one.keys() & other.keys())
    points = [100 * (one[seed]["found"]["top1"] - other[seed]["found"]["top1"]) for seed in both]
    mean, half = interval(points)
    return mean, None if half is None else (mean - half, mean + half)


def tables(found: Mapping[str, Any]) -> str:
    """All of it in Markdown."""
    devices = sorted({run["device"] for run in found.values()})
    lines = [f"Made on {'; '.join(devices)}.", ""]
    return "\n".join([*lines, *_trainings(found), *_others(found)]).rstrip() + "\n"


def _alone(condition: str) -> str:
    return f"{condition.partition('-')[0]}-alone"


def _trainings(found: Mapping[str, Any]) -> Iterator[str]:
    yield "| | run | seeds | test top-1 | against alone, points | 95 % | NLL | ECE | seconds |"
    yield "|---|---|---:|---:|---:|---|---:|---:|---:|"
    all_sides = sides(found)
    for condition, runs in all_sides.items():
        values = {
            key: statistics.mean(run["found"][key] for run in runs.values())
            for key in ("top1", "nll", "ece", "seconds")
        }
        ahead, interval = "", ""
        alone = all_sides.get(_alone(condition))
        if alone and condition != _alone(condition) and runs.keys() & alone.keys():
            mean, ends = gain(runs, alone)
            ahead = f"{mean:+.2f}"
            interval = f"{ends[0]:+.2f} to {ends[1]:+.2f}" if ends else "one seed"
        first = next(iter(runs.values()))
        yield (
            f"| {first['experiment']} | `{condition}` | {len(runs)} | {values['top1']:.2%} "
            f"| {ahead} | {interval} | {values['nll']:.3f} | {values['ece']:.3f} "
            f"| {values['seconds']:.0f} |"
        )
    yield ""


def _others(found: Mapping[str, Any]) -> Iterator[str]:
    """Sweeps, curves over the number of images, and what `distill evaluate` found."""
    for run in found.values():
        document = run["found"]
        for key, rows in (("settings", _sweep), ("curves", _curves), ("subjects", _evaluation)):
            if key in document:
                yield f"**{run['experiment']}**: `{run['command']}`"
                yield ""
                yield from rows(document)
                yield ""


def _percent(value: float, ends: Sequence[float] | None = None) -> str:
    if not ends:
        return f"{value:.2%}"
    return f"{value:.2%} ({100 * ends[0]:.1f} to {100 * ends[1]:.1f})"


def _sweep(document: Mapping[str, Any]) -> Iterator[str]:
    (axis,) = document["axes"]
    yield f"| {axis} | validation top-1 (95 %) | within one standard error of the best |"
    yield "|---|---|---|"
    for one in document["settings"]:
        level = _percent(one["val_top1"], one["val_top1_ci95"])
        yield f"| {one[axis]} | {level} | {'yes' if one['plateau'] else ''} |"
    best = document["best"]
    level = _percent(best["test_top1"], best["test_top1_ci95"])
    yield ""
    yield f"Chosen: {axis} {best[axis]}; right on {level} of the test images."


def _curves(document: Mapping[str, Any]) -> Iterator[str]:
    sizes = document["sizes"]
    yield f"| | {' | '.join(f'{size:,} images' for size in sizes)} |"
    yield f"|---|{'---|' * len(sizes)}"
    for curve in document["curves"]:
        levels = {point["size"]: point for point in curve["points"]}
        cells = [_percent(levels[n]["top1"], levels[n]["top1_ci95"]) for n in sizes]
        yield f"| {curve['name']} | {' | '.join(cells)} |"
    yield ""
    for one in document["multipliers"]:
        if one["value"] is not None:
            ends = f" ({one['ci95'][0]:.2f} to {one['ci95'][1]:.2f})" if one["ci95"] else ""
            yield f"- {one['over']} needs {one['value']:.2f} times{ends} the images of {one['of']}."


SHOWN = (  # suite, measure, heading, in per cent
    ("clean", "top1", "top-1", True),
    ("clean", "ece", "ECE", False),
    ("fidelity", "agreement", "agreement", True),
    ("fidelity", "teacher_kl", "KL to teacher", False),
    ("corruptions", "mca", "corrupted", True),
    ("bias", "lie_translation_relative", "Lie derivative", False),
    ("bias", "consistency", "same after a shift", True),
    ("bias", "attention_distance_relative", "attention distance", False),
    ("bias", "erf_radius_relative", "receptive field", False),
    ("bias", "cka", "CKA with teacher", False),
    ("bias", "sharpness", "sharpness", False),
)


def _evaluation(document: Mapping[str, Any]) -> Iterator[str]:
    subjects = document["subjects"]
    shown = [
        one for one in SHOWN
        if any(one[1] in subject["numbers"].get(one[0], {}) for subject in subjects)
    ]  # fmt: skip
    yield f"| | {' | '.join(heading for _, _, heading, _ in shown)} |"
    yield f"|---|{'---:|' * len(shown)}"
    for subject in subjects:
        cells = []
        for suite, key, _, percent in shown:
            number = subject["numbers"].get(suite, {}).get(key, {}).get("value")
            cells.append("" if number is None else f"{number:.2%}" if percent else f"{number:.3g}")
        yield f"| {subject['name']} | {' | '.join(cells)} |"
