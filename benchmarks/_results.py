"""What the runs of proof.py reached, as data and as tables of the documents."""

from __future__ import annotations

import hashlib
import json
import shutil
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from _bars import bars
from _document import put
from _plan import TIERS, Run
from _sides import gain, own_gain, sides

HERE = Path(__file__).parents[1]
DOCS = HERE / "docs"
PAGES = dict.fromkeys(("cpu", "long", "gpu"), DOCS / "results.md") | {
    "bias": DOCS / "conclusions.md", "coverage": DOCS / "coverage.md",
}  # fmt: skip
KEPT = (  # of a result.json
    "top1", "val_top1", "nll", "ece", "epochs", "steps", "seconds", "images_per_second",
    "parameters", "flops", "memory",
)  # fmt: skip
OWN = ("gain", "gain_ci95", "baseline", "generations", "ensemble")  # where there is one
MARKS = {  # what a command leaves behind when it is done
    "train": "result.json",
    "teacher-cache": "index.json",
    "temperature-sweep": "sweep.json",
    "sample-efficiency": "efficiency.json",
    "rank-teachers": "ranking.json",
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
    walls = _walls(out / "log" / "seconds.jsonl")
    shown = f"runs/{out.name}"
    for name, run in plan.items():
        path = mark(run, out / name)
        if not path.exists():
            continue
        content = path.read_bytes()
        command = f"distill {run.command} --out {{out}}/{name}".replace("{out}", shown)
        document = json.loads(content.decode().replace(str(out.resolve()), shown))
        found[name] = {
            "experiment": run.experiment,
            "condition": run.condition or name,
            "seed": run.seed,
            "against": run.against,
            "command": command,
            "sha256": hashlib.sha256(content).hexdigest(),
            **_weights(out / name / "student.safetensors"),
            "device": f"{where['device']}, torch {where['torch']}",
            "wall": walls.get(name),  # seconds, start and evaluation included
            "found": _kept(path.name, document),
        }
    return found


def _weights(file: Path) -> dict[str, str]:
    """The digest of what was trained: the same wherever the same bits are computed."""
    return {"weights": hashlib.sha256(file.read_bytes()).hexdigest()} if file.exists() else {}


def _walls(log: Path) -> dict[str, float]:
    """Seconds by run, over all times that it was gone on with."""
    found: dict[str, float] = {}
    for line in log.read_text(encoding="utf-8").splitlines() if log.exists() else ():
        one = json.loads(line)
        found[one["name"]] = round(found.get(one["name"], 0.0) + one["seconds"], 1)
    return found


def _kept(name: str, document: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a run's file."""
    if name == "result.json":
        own = {key: document[key] for key in OWN if document.get(key) is not None}
        told = {"teachers": [one["top1"] for one in document.get("teachers", [])]}
        return {key: document.get(key) for key in KEPT} | own | told
    if name == "index.json":
        return {}
    if name == "evaluation.json":
        return {"subjects": [_kept_subject(one) for one in document["subjects"]]}
    return {key: value for key, value in document.items() if key not in ("out", "best_recipe")}


def _kept_subject(one: Mapping[str, Any]) -> dict[str, Any]:
    """A network's numbers, and which part of each class it finds."""
    numbers = {
        suite: {
            key: {"value": number["value"], "ci95": number["ci95"]}
            for key, number in suite_.items()
        }
        for suite, suite_ in one["numbers"].items()
    }
    kept = {"name": one["name"], "role": one["role"], "numbers": numbers}
    if table := one["tables"].get("clean"):
        shares = [row[i] / sum(row) for i, row in enumerate(table["confusion"])]
        kept["recall"] = dict(zip(table["classes"], shares, strict=True))
    return kept


def kept(tier: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """These results, and earlier ones of runs of the plan that are not there, in its order.

    What is the same keeps the device that it was made on.
    """
    place = HERE / "benchmarks" / "results" / f"proof-{tier}.json"
    old = json.loads(place.read_text(encoding="utf-8")) if place.exists() else {}
    same = {name for name, run in found.items() if old.get(name, {}).get("sha256") == run["sha256"]}
    new = {
        name: run | ({"device": old[name]["device"]} if name in same else {})
        for name, run in found.items()
    }
    both = {name: run for name in TIERS[tier] if (run := new.get(name, old.get(name)))}
    place.write_text(json.dumps(both, indent=1) + "\n", encoding="utf-8")
    return both


def written(tier: str, found: Mapping[str, Any], out: Path) -> None:
    """Keep the results, put their tables into the page, and the plots of the runs beside it."""
    for name, run in TIERS[tier].items():
        plot = mark(run, out / name).with_suffix(".svg")
        if plot.exists():
            shutil.copyfile(plot, DOCS / "images" / f"{tier}-{name}.svg")
    page = PAGES[tier]
    text = page.read_text(encoding="utf-8")
    page.write_text(put(text, f"proof-{tier}", tables(kept(tier, found))), encoding="utf-8")


def tables(found: Mapping[str, Any]) -> str:
    """All of it in Markdown."""
    devices = sorted({run["device"] for run in found.values()})
    lines = [f"Made on {'; '.join(devices)}.", "", *_asked(found), *_trainings(found)]
    return "\n".join([*lines, *_others(found), *_commands(found)]).rstrip() + "\n"


def _asked(found: Mapping[str, Any]) -> Iterator[str]:
    if not (all_bars := bars(found)):
        return
    yield "| | asked for | measured | |"
    yield "|---|---|---:|---|"
    for bar in all_bars:
        word = "reached" if bar.reached else "**missed**"
        yield f"| {bar.experiment} | {bar.asked} | {bar.measured} | {word} |"
    yield ""


def _trainings(found: Mapping[str, Any]) -> Iterator[str]:
    heads = ("run", "seeds", "test top-1", "ahead, points", "95 %", "of", "NLL", "ECE", "MFLOPs")
    yield f"| | {' | '.join(heads)} | seconds |"
    yield "|---|---|---:|---:|---:|---|---|---:|---:|---:|---:|"
    all_sides = sides(found)
    for condition, runs in all_sides.items():
        values = {
            key: statistics.mean(run["found"][key] for run in runs.values())
            for key in ("top1", "nll", "ece")
        }
        ahead, ends, of = "", "", ""
        first = next(iter(runs.values()))
        other = all_sides.get(first["against"], {})
        if first["against"] != condition and runs.keys() & other.keys():
            mean, interval = gain(runs, other)
            ahead, of = f"{mean:+.2f}", f"`{first['against']}`"
            ends = _ends(interval) if interval else "one seed"
        elif "gain" in first["found"]:
            mean, interval = own_gain(runs)
            ahead, of = f"{mean:+.2f}", "itself alone"
            over_images = [100 * end for end in first["found"]["gain_ci95"]]
            ends = _ends(interval) if interval else f"{_ends(over_images)}, over images"
        yield (
            f"| {first['experiment']} | `{condition}` | {len(runs)} | {values['top1']:.2%} "
            f"| {ahead} | {ends} | {of} | {values['nll']:.3f} | {values['ece']:.3f} "
            f"| {first['found']['flops'] / 1e6:.2f} | {_wall(runs.values())} |"
        )
    caches = [run for run in found.values() if "teacher-cache" in run["command"]]
    if caches:
        wall = _wall(caches)
        yield f"| {caches[0]['experiment']} | `cache` | {len(caches)} | | | | | | | | {wall} |"
    yield ""


def _ends(interval: Sequence[float]) -> str:
    return f"{interval[0]:+.2f} to {interval[1]:+.2f}"


def _commands(found: Mapping[str, Any]) -> Iterator[str]:
    """How every run is made again, folded away."""
    yield "<details><summary>The command of every run, and the SHA-256 of its result</summary>"
    yield ""
    for name, run in found.items():
        yield f"- `{name}`: `{run['command']}`, {run['sha256']}"
    yield ""
    yield "</details>"


def _wall(runs: Iterable[Mapping[str, Any]]) -> str:
    """Seconds of a run in the middle."""
    return f"{statistics.median(run['wall'] or run['found']['seconds'] for run in runs):.0f}"


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
        if one["value"] is not None and one["value"] > 1:  # each pair is there in both orders
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
    ("bias", "data_specificity", "data specificity", False),
    ("bias", "erf_radius_relative", "receptive field", False),
    ("bias", "cka", "CKA with teacher", False),
    ("bias", "effective_rank", "effective rank", False),
    ("bias", "sharpness", "sharpness", False),
    ("dense", "dense_iou", "foreground IoU", True),
)


def _evaluation(document: Mapping[str, Any]) -> Iterator[str]:
    subjects = document["subjects"]
    shown = [
        one for one in SHOWN
        if any(one[1] in subject["numbers"].get(one[0], {}) for subject in subjects)
    ]  # fmt: skip
    unseen = sorted(
        {label for one in subjects for label, part in one.get("recall", {}).items() if part == 0}
    )
    headings = [*(heading for _, _, heading, _ in shown), *(f"finds {label}" for label in unseen)]
    yield f"| | {' | '.join(headings)} |"
    yield f"|---|{'---:|' * len(headings)}"
    for subject in subjects:
        cells = []
        for suite, key, _, percent in shown:
            number = subject["numbers"].get(suite, {}).get(key, {}).get("value")
            cells.append("" if number is None else f"{number:.2%}" if percent else f"{number:.3g}")
        cells += [f"{subject['recall'][label]:.1%}" for label in unseen]
        yield f"| {subject['name']} | {' | '.join(cells)} |"
