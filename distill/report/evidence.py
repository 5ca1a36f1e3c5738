"""An evaluation as a page: the verdict first, then all that it rests on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from distill import storage
from distill.definitions import definitions, shown
from distill.report import files, run
from distill.report.exhibits import EXHIBITS, Found, Images, number, value
from distill.report.page import Block, Details, Facts, Heading, Table, page

# What a summary has of each suite.
SUMMARY = (
    ("clean", "top1"), ("clean", "nll"), ("clean", "ece"), ("fidelity", "agreement"),
    ("corruptions", "mca"), ("bias", "consistency"), ("dense", "dense_iou"),
    ("cost", "parameters"), ("cost", "macs"), ("cost", "latency_1_p50"), ("cost", "throughput"),
)  # fmt: skip


def write(found: Found, images: Images, out: Path) -> None:
    """Put `report.html`, `evaluation.json` and `evaluation.csv` into a folder.

    Args:
        found: An evaluation as plain data.
        images: Pictures that belong to it, by subject and by what they show.
        out: The folder.
    """
    text = json.dumps(found, indent=1) + "\n"
    storage.write(out / "evaluation.json", text.encode())
    storage.write(out / "evaluation.csv", table_of(found).encode(errors="surrogateescape"))
    html = to_html(found, images, text)
    storage.write(out / "report.html", html.encode(errors="replace"))


def table_of(found: Found) -> str:
    """Every number of every subject, a row each, as CSV."""
    rows = []
    for subject in found["subjects"]:
        for suite, numbers in subject["numbers"].items():
            for name, one in numbers.items():
                low, high = one["ci95"] or (None, None)
                rows.append(
                    (subject["name"], suite, name, one["value"], low, high, one["n"], one["seeds"],
                     one["definition_version"], one.get("reason"))
                )  # fmt: skip
    heads = ("subject", "suite", "name", "value", "low", "high", "n", "seeds", "version", "reason")
    return files.to_csv(heads, rows)


def verdict(found: Found) -> list[str]:
    """What it comes to: whether the teacher helped, by how much, how surely, and what it saves."""
    by_name = {subject["name"]: subject for subject in found["subjects"]}
    runs = [subject for subject in found["subjects"] if subject["role"] == "run"]
    lines = []
    for comparison in found["comparisons"]:
        one, other = by_name[comparison["subject"]], by_name[comparison["reference"]]
        lines += _compared(one, other, comparison["numbers"], alone=one["control"] == other["name"])
    if not lines:
        lines = [
            f"{runs[0]['name']}: right on {_percent(runs[0], 'clean', 'top1')} of the test images."
            if value(runs[0], "clean", "top1") is not None
            else f"{runs[0]['name']}: {runs[0]['model']}."
        ]
        if runs[0]["teacher"]:
            lines.append(
                "Whether its teacher helped is not known: there is no run of the same student "
                "without it; `distill train --baseline` makes one."
            )
    lines += _size(runs[0], by_name.get(runs[0]["teacher"]))
    if all(len(subject["seeds"]) < 2 for subject in runs):
        lines.append(files.ONE_RUN)
    return lines


def _compared(
    one: Mapping[str, Any], other: Mapping[str, Any], numbers: Mapping[str, Any], *, alone: bool
) -> list[str]:
    """A comparison in sentences."""
    gain = numbers["gain"]
    low, high = (100 * end for end in gain["ci95"])
    points = 100 * gain["value"]
    over = "images" if gain["seeds"] == 1 else f"images and {gain['seeds']} seeds"
    lines = [run.helped(points, low, high)] if alone else []
    lines.append(
        f"{one['name']} against {other['name']}: {points:+.2f} points of top-1 on "
        f"{gain['n'] or 0:,} test images (95 % interval over {over} {low:+.2f} to {high:+.2f}; "
        f"McNemar p = {numbers['mcnemar_p']['value']:.2g})."
    )
    if "gain_mca" in numbers:
        mca = numbers["gain_mca"]
        lines.append(
            f"On corrupted images {100 * mca['value']:+.2f} points "
            f"({100 * mca['ci95'][0]:+.2f} to {100 * mca['ci95'][1]:+.2f})."
        )
    return lines


def _size(student: Mapping[str, Any], teacher: Mapping[str, Any] | None) -> list[str]:
    """What the student saves."""
    if teacher is None:
        return []
    parts = []
    for name, fewer, more in (
        ("parameters", "fewer parameters", "more parameters"),
        ("macs", "fewer multiply-adds", "more multiply-adds"),
        ("latency_1_p50", "quicker for one image here", "slower for one image here"),
    ):
        own, theirs = (value(side, "cost", name) for side in (student, teacher))
        if own and theirs:
            ratio, word = (theirs / own, fewer) if theirs >= own else (own / theirs, more)
            parts.append(f"{ratio:.3g} times {word}")
    return [f"Than its teacher: {', '.join(parts)}."] if parts else []


def _percent(subject: Mapping[str, Any], suite: str, name: str) -> str:
    found = number(subject, suite, name)
    return "" if found is None else shown(name, found)


def to_html(found: Found, images: Images, text: str) -> str:
    """The page."""
    runs = [subject for subject in found["subjects"] if subject["role"] == "run"]
    suites = dict.fromkeys(suite for subject in found["subjects"] for suite in subject["numbers"])
    blocks: list[Block] = [_summary(found), *_training(runs)]
    for suite in suites:
        title, exhibit = EXHIBITS[suite]
        blocks += [Heading(title), *exhibit(found, images)]
    blocks += [Heading("Recipe and environment"), *_sources(found, runs)]
    names = ", ".join(subject["name"] for subject in runs)
    return page(
        f"Evaluation of {names}",
        verdict=verdict(found),
        blocks=blocks,
        footer=f"distill evaluate, {found['data']['test_images']:,} test images of "
        f"{found['data']['name']}",
        data={"evaluation.json": text, "evaluation.csv": table_of(found)},
    )


def _summary(found: Found) -> Table:
    """A column a subject, the first numbers of each suite."""
    subjects = found["subjects"]
    rows = [("model", *(subject["model"] for subject in subjects))]
    rows.append(("seeds", *(", ".join(map(str, subject["seeds"])) for subject in subjects)))
    for suite, name in SUMMARY:
        cells = [number(subject, suite, name) for subject in subjects]
        if any(cell is not None and cell.value is not None for cell in cells):
            shown_ = [
                "–" if cell is None or cell.value is None else shown(name, cell, interval=False)
                for cell in cells
            ]
            rows.append((definitions()[name].title, *shown_))
    heads = ("", *(subject["name"] for subject in subjects))
    return Table("In short", heads, rows, numeric=range(1, len(heads)), name="summary")


def _training(runs: list[Mapping[str, Any]]) -> Iterator[Block]:
    """How the runs, and the students without teacher in them, went."""
    places = {subject["name"]: Path(subject["runs"][0]) for subject in runs if subject["runs"]}
    for name, place in list(places.items()):
        if (place / "baseline" / "metrics.jsonl").is_file():
            places[f"{name}, alone"] = place / "baseline"
    blocks = list(run.curves(places))
    if blocks:
        yield Heading("Training")
        yield from blocks


def _sources(found: Found, runs: list[Mapping[str, Any]]) -> Iterator[Block]:
    """From what, and on what."""
    data, environment = found["data"], found["environment"]
    yield Facts(
        [
            ("data", f"{data['name']}, {data['classes']:,} classes"),
            ("fingerprint of the data", data["fingerprint"]),
            *((name, str(value)) for name, value in environment.items()),
        ]
    )
    for subject in runs:
        for place in subject["runs"][:1]:
            yield Details(f"Recipe of {subject['name']}", [run.recipe(Path(place))])
    names = {n: None for s in found["subjects"] for m in s["numbers"].values() for n in m}
    names |= {name: None for c in found["comparisons"] for name in c["numbers"]}
    rows = [
        (definitions()[name].title, definitions()[name].text, str(definitions()[name].version))
        for name in names
    ]
    yield Details(
        "What each number means",
        [Table("Definitions", ("", "definition", "version"), rows, numeric=(2,))],
    )
