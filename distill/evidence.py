"""What can be said of trained runs, and how surely: suites, comparisons, the report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from torch.utils._pytree import tree_map_only

from distill import console, evaluate, storage
from distill.definitions import SUITES
from distill.engine import machine
from distill.engine.finished import require_finished
from distill.engine.machine import Machine
from distill.models import cost
from distill.models.network import Network
from distill.report import evidence as report
from distill.suites import Found, Image, bias, clean, comparison, corruptions, dense, fidelity
from distill.suites import cost as costs
from distill.suites.comparison import Comparison
from distill.suites.subjects import Subject, find

FORMAT = 1  # of evaluation.json
SHARED = ("clean", "fidelity", "corruptions")  # suites of which every process does its share


class Options(NamedTuple):
    """What is measured, and on what."""

    suites: tuple[str, ...] = ("clean", "fidelity", "cost")
    images: int = 1000  # of the test split, that are corrupted
    corrupted: Path | None = None  # official files
    masks: Path | None = None  # of the test images
    data_root: Path | None = None
    reference: Path | None = None  # a run that all are compared with; left out: the first


class Evidence(NamedTuple):
    """All that was found."""

    subjects: list[Subject]
    found: dict[str, dict[str, Found]]  # by suite, by subject
    comparisons: list[Comparison]
    environment: dict[str, Any]

    def to_json(self, *, tables: bool = True) -> dict[str, Any]:
        """Plain data, None where a value is not finite; with what plots are drawn from, or not."""
        data = self.subjects[0].first.dataset
        found: dict[str, Any] = {
            "format": FORMAT,
            "data": {
                "name": data.name,
                "fingerprint": data.fingerprint,
                "classes": len(data.classes),
                "test_images": len(self.subjects[0].first.answers.ids),
            },
            "runs": _rows(self.subjects),
            "subjects": [self._subject(subject, tables=tables) for subject in self.subjects],
            "comparisons": [comparison.to_json() for comparison in self.comparisons],
            "environment": self.environment,
        }
        plain: dict[str, Any] = tree_map_only(float, _finite, found)
        return plain

    def _subject(self, subject: Subject, *, tables: bool) -> dict[str, Any]:
        suites = {name: by_name[subject.name] for name, by_name in self.found.items()}
        row: dict[str, Any] = {
            "name": subject.name,
            "role": subject.role,
            "model": subject.model,
            "runs": [str(run) for run in subject.runs],
            "seeds": list(subject.seeds),
            "teacher": subject.teacher,
            "control": subject.control,
            "numbers": {
                suite: {name: number.to_json(name) for name, number in found.numbers.items()}
                for suite, found in suites.items()
            },
        }
        if tables:
            row["tables"] = {suite: found.tables for suite, found in suites.items()}
        return row


def gather(runs: Sequence[Path], out: Path, options: Options, here: Machine) -> Evidence:
    """Measure finished runs, with their teachers and their students without one beside them.

    Puts `report.html`, `evaluation.json` and `evaluation.csv` into `out`.

    Raises:
        PreflightError: If a run is not finished, its data are not there, or `out` is not writable.
        IncompatibleError: If their test images are not the same, or files do not fit them.
        DivergedError: If a network's answers are not finite numbers.
    """
    runs = list(runs)
    if options.reference is not None and options.reference not in runs:
        runs.append(options.reference)
    require_finished(runs)
    subjects = find(runs, options.data_root, here)
    named = [subject.name for subject in subjects if options.reference in subject.runs]
    reference = named[0] if named else None
    with storage.lock(out) if here.main else nullcontext():
        found: dict[str, dict[str, Found]] = {}
        for suite in options.suites:
            if here.main or suite in SHARED:
                console.say(f"{suite}: {SUITES[suite]}")
                found[suite] = _measure(suite, subjects, options, here, reference)
        comparisons = comparison.compare_all(subjects, found, reference)
        evidence = Evidence(subjects, found, comparisons, machine.environment(here))
        if here.main:
            report.write(evidence.to_json(), _images(found), out)
    return evidence


def _images(found: Mapping[str, Mapping[str, Found]]) -> dict[str, dict[str, list[Image]]]:
    """The pictures of all suites, by subject."""
    images: dict[str, dict[str, list[Image]]] = {}
    for by_name in found.values():
        for name, one in by_name.items():
            images.setdefault(name, {}).update(one.images)
    return images


def _measure(
    suite: str, subjects: list[Subject], options: Options, here: Machine, reference: str | None
) -> dict[str, Found]:
    match suite:
        case "clean":
            return clean.measure(subjects)
        case "fidelity":
            return fidelity.measure(subjects, here)
        case "corruptions":
            return corruptions.measure(
                subjects,
                here,
                images=options.images,
                folder=options.corrupted,
                reference=reference,
            )
        case "bias":
            return bias.measure(subjects, here)
        case "dense":
            return dense.measure(subjects, here, masks=options.masks)
        case _:
            return costs.measure(subjects, here)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _rows(subjects: list[Subject]) -> list[dict[str, Any]]:
    """A row for each run that was named, in short; the gain is over the first."""
    runs = [
        (run, member)
        for subject in subjects
        if subject.role == "run"
        for run, member in zip(subject.runs, subject.members, strict=True)
    ]
    first = runs[0][1].predictions
    rows = []
    for i, (run, member) in enumerate(runs):
        network, told = member.network, member.predictions
        assert isinstance(network, Network)
        row = {
            "run": str(run),
            "student": member.model,
            "parameters": cost.parameters(network),
            "flops": cost.flops(network, member.dataset.image_size),
            "images": len(told.ids),
            **evaluate.scores(told)._asdict(),
        }
        if i > 0:
            gain, interval = evaluate.paired_gain(told, first)
            row |= {"gain": gain, "gain_ci95": list(interval)}
        rows.append(row)
    return rows
