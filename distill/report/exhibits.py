"""What the suites of an evaluation found, as blocks of a page: a function a suite."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from distill.definitions import Number, definitions, shown
from distill.report import files
from distill.report.bars import MOST_SERIES
from distill.report.page import Block, Gallery, Image, Picture, Table, Text
from distill.report.plot import (
    Bars,
    BarSeries,
    Calibration,
    Confusion,
    Figure,
    Heatmap,
    Reliability,
    Series,
)

MOST_CLASSES = 30  # of which bars are drawn
LOG_RATIO = 10.0  # of the dearest to the cheapest, from which the axis is logarithmic

Found = Mapping[str, Any]  # an evaluation as plain data
Images = Mapping[str, Mapping[str, Sequence[Any]]]  # by subject, by what they show


def number(subject: Mapping[str, Any], suite: str, name: str) -> Number | None:
    """A number of a subject; None where it was not measured."""
    row = subject["numbers"].get(suite, {}).get(name)
    if row is None:
        return None
    ends = row["ci95"]
    return Number(
        row["value"],
        None if ends is None else (ends[0], ends[1]),
        row["n"],
        row["seeds"],
        row.get("reason", ""),
    )


def value(subject: Mapping[str, Any], suite: str, name: str) -> float | None:
    """Its value; None where there is none."""
    found = number(subject, suite, name)
    return None if found is None else found.value


def numbers(found: Found, suite: str) -> Iterator[Block]:
    """All numbers of a suite, a column a subject, and why some have no value."""
    subjects = [s for s in found["subjects"] if s["numbers"].get(suite)]
    names = dict.fromkeys(name for s in subjects for name in s["numbers"][suite])
    rows: list[tuple[str, ...]] = []
    reasons: dict[str, dict[str, None]] = {}
    for name in names:
        cells = []
        for subject in subjects:
            one = number(subject, suite, name)
            if one is None or one.value is None:
                cells.append("–")
                if one is not None:
                    reasons.setdefault(one.reason, {})[subject["name"]] = None
            else:
                cells.append(shown(name, one))
        rows.append((definitions()[name].title, *cells))
    rows = [row for row in rows if any(cell != "–" for cell in row[1:])]
    if rows:
        yield Table(
            "With 95 % intervals",
            ("", *(s["name"] for s in subjects)),
            rows,
            numeric=range(1, len(subjects) + 1),
            name=suite,
        )
    told = [one for subject in subjects for one in subject["numbers"][suite].values()]
    if any(len(s["seeds"]) > 1 for s in subjects) and all(one["seeds"] == 1 for one in told):
        yield Text("Where there are several seeds, these are the numbers of the first.")
    if reasons:
        said = ". ".join(f"{', '.join(names)}: {reason}" for reason, names in reasons.items())
        yield Text(f"A dash: not defined for this model. {said}.")


def clean(found: Found, images: Images) -> Iterator[Block]:
    """Accuracy and calibration."""
    yield from numbers(found, "clean")
    tables = _tables(found, "clean")
    bins = {
        name: Calibration(name, **_columns(table["reliability"])) for name, table in tables.items()
    }
    rows = [
        (name, *row)
        for name, one in bins.items()
        for row in zip(one.edges, one.edges[1:], one.images, one.confidence, one.accuracy,
                       strict=False)
    ]  # fmt: skip
    heads = ("subject", "from", "to", "images", "confidence", "accuracy")
    yield Picture(
        Reliability("How often it is right when it is so sure", list(bins.values())),
        "reliability",
        files.to_csv(heads, rows),
    )
    for subject in found["subjects"]:
        if subject["role"] != "run":
            continue
        name, table = subject["name"], tables[subject["name"]]
        classes, counts = table["classes"], table["confusion"]
        data = files.to_csv(
            ("label", *classes), [(c, *r) for c, r in zip(classes, counts, strict=True)]
        )
        yield Picture(
            Confusion(f"What {name} takes for what", classes, counts), f"confusion-{name}", data
        )
    yield from _by_class(tables)
    for name, shown_by in images.items():
        if worst := shown_by.get("worst"):
            yield Gallery(
                [Image(i.png, i.lines, ", ".join(i.lines)) for i in worst],
                f"The test images that {name} is most wrong about",
            )


def _by_class(tables: Mapping[str, Any]) -> Iterator[Block]:
    classes = next(iter(tables.values()))["classes"]
    if len(classes) > MOST_CLASSES:
        return
    recall = {name: table["per_class"]["recall"] for name, table in tables.items()}
    label = "images of the class that are recognised"
    yield from _bars("Recognised, by class", label, classes, recall, "classes", "class")


def _bars(
    title: str,
    label: str,
    groups: Sequence[str],
    columns: Mapping[str, Sequence[float]],
    name: str,
    head: str,
) -> Iterator[Block]:
    """A bar for each network in each group, in as many pictures as there are colours for."""
    networks = list(columns)
    parts = [networks[i : i + MOST_SERIES] for i in range(0, len(networks), MOST_SERIES)]
    for i, part in enumerate(parts, 1):
        rows = zip(groups, *(columns[one] for one in part), strict=True)
        yield Picture(
            Bars(
                f"{title} ({i} of {len(parts)})" if len(parts) > 1 else title,
                label,
                groups,
                [BarSeries(one, columns[one]) for one in part],
                percent=True,
            ),
            name if i == 1 else f"{name}-{i}",
            files.to_csv((head, *part), rows),
        )


def fidelity(found: Found, images: Images) -> Iterator[Block]:
    """How far the students say what their teachers say."""
    yield from numbers(found, "fidelity")
    yield Text(
        "Networks that never met agree on most images, because both are right. What the teacher "
        "gave is the difference to the same student trained without it."
    )


def corruptions(found: Found, images: Images) -> Iterator[Block]:
    """Accuracy by corruption and severity."""
    yield from numbers(found, "corruptions")
    tables = {n: t["corruptions"] for n, t in _tables(found, "corruptions").items()}
    first, *_ = tables.values()
    note = f"{first['images']:,} test images, the same for all. "
    if first["reference"]:
        note += f"mCE is relative to {first['reference']}. "
    note += " ".join(
        f"{name.capitalize()} is an approximation: {why}."
        for name, why in first["approximated"].items()
    )
    if first["official"]:
        note += f" Read from official files: {', '.join(first['official'])}."
    yield Text(note)
    names = list(first["accuracy"])
    titles = [name.replace("_", " ") for name in names]
    severities = [str(i + 1) for i in range(5)]
    for subject in found["subjects"]:
        if subject["role"] != "run" or subject["name"] not in tables:
            continue
        own = tables[subject["name"]]
        grid = [own["accuracy"][name] for name in names]
        data = files.to_csv(
            ("corruption", *severities), [(n, *r) for n, r in zip(names, grid, strict=True)]
        )
        yield Picture(
            Heatmap(
                f"{subject['name']}: top-1 by corruption", "severity", "", titles, severities, grid,
                "top-1", percent=True,
            ),
            f"corruptions-{subject['name']}",
            data,
        )  # fmt: skip
        if (other := subject["control"]) in tables:
            theirs = [tables[other]["accuracy"][name] for name in names]
            gap = [
                [100 * (a - b) for a, b in zip(r, t, strict=True)]
                for r, t in zip(grid, theirs, strict=True)
            ]
            yield Picture(
                Heatmap(
                    f"{subject['name']} less {other}", "severity", "", titles, severities, gap,
                    "points of top-1", diverging=True,
                ),
                f"corruptions-gain-{subject['name']}",
                files.to_csv(
                    ("corruption", *severities), [(n, *r) for n, r in zip(names, gap, strict=True)]
                ),
            )  # fmt: skip
    means = {name: [sum(t["accuracy"][one]) / 5 for one in names] for name, t in tables.items()}
    yield from _bars("Mean over severities", "top-1", titles, means, "corruptions", "corruption")


def bias(found: Found, images: Images) -> Iterator[Block]:
    """How the networks behave by their make."""
    yield from numbers(found, "bias")
    tables = _tables(found, "bias")
    kept = {name: table["consistency"]["consistency"] for name, table in tables.items()
            if "consistency" in table}  # fmt: skip
    yield from _curves(
        "Same class when shifted",
        "consistency",
        ("pixels", "images that keep their class"),
        {name: (list(range(1, len(y) + 1)), y) for name, y in kept.items()},
        percent=True,
    )
    for key, column, title, label in (
        (
            "attention",
            "relative",
            "How far attention reaches",
            "distance / that of uniform attention",
        ),
        (
            "specificity",
            "values",
            "How far mixing weights follow the image",
            "their variance over images / mean square",
        ),
        (
            "receptive_field",
            "relative",
            "How far the image is felt",
            "radius / that of the whole image",
        ),
        ("rank", "effective", "Directions that cells use", "effective rank"),
        (
            "spectrum",
            "high",
            "High frequencies in the features",
            "log amplitude at π less that at 0",
        ),
    ):
        lines = {
            name: (table[key]["depth"], table[key][column])
            for name, table in tables.items()
            if key in table
        }
        yield from _curves(title, key, ("depth in the network", label), lines)
    for name, table in tables.items():
        if "cka" in table:
            yield _cka(name, table["cka"])
    for name, shown_by in images.items():
        for key, caption in (
            ("rollout", f"Where {name} looks: attention rollout"),
            ("saliency", f"What {name} reacts to: the gradient of the predicted class"),
            ("receptive_field", f"What the middle of each grid of {name} sees"),
        ):
            if pictures := shown_by.get(key):
                items = [Image(i.png, i.lines, ", ".join(i.lines) or caption) for i in pictures]
                yield Gallery(items, caption)


def _cka(name: str, table: Mapping[str, Any]) -> Picture:
    teacher, student = table["teacher"], table["student"]
    data = files.to_csv(
        ("teacher", *student), [(t, *r) for t, r in zip(teacher, table["means"], strict=True)]
    )
    return Picture(
        Heatmap(
            f"Where {name} is like the teacher", f"layers of {name}", "layers of the teacher",
            teacher, student, table["means"], "CKA", low=0.0, high=1.0,
        ),
        f"cka-{name}",
        data,
    )  # fmt: skip


def dense(found: Found, images: Images) -> Iterator[Block]:
    """What the features know of foreground and background."""
    yield from numbers(found, "dense")
    tables = {n: table for n, table in _tables(found, "dense").items() if "grid" in table}
    yield from map(Text, {table["masks"]: None for table in tables.values()})
    if tables:
        grids = ", ".join(f"{n} {rows} × {c}" for n, t in tables.items() for rows, c in [t["grid"]])
        best = max(table["trivial"] for table in tables.values())
        yield Text(
            f"Cells of the last grid: {grids}; a coarser one draws coarser borders. All foreground "
            f"or all background has {best:.2%}."
        )
    for name, shown_by in images.items():
        if pictures := shown_by.get("dense"):
            items = [Image(i.png, i.lines, ", ".join(i.lines)) for i in pictures]
            yield Gallery(items, f"Foreground that a linear layer finds in {name}")


def cost(found: Found, images: Images) -> Iterator[Block]:
    """What the networks cost, and what accuracy they give for it."""
    yield from numbers(found, "cost")
    yield Text(f"Times are those of {found['environment']['device']}, idle or not.")
    for name, label in (("macs", "MACs of an image"), ("latency_1_p50", "milliseconds an image")):
        points = [
            (subject["name"], x, number(subject, "clean", "top1"))
            for subject in found["subjects"]
            if (x := value(subject, "cost", name)) is not None
        ]
        known = [(s, x, y) for s, x, y in points if y is not None and y.value is not None]
        if len({x for _, x, _ in known}) < 2:
            continue
        xs = [x for _, x, _ in known]
        ys = [y.value for _, _, y in known if y.value is not None]
        ends = [y.ci95 or (v, v) for (_, _, y), v in zip(known, ys, strict=True)]
        rows = [(s, x, v, *e) for (s, x, _), v, e in zip(known, ys, ends, strict=True)]
        yield Picture(
            Figure(
                title=f"Accuracy for {label.split(' of ')[0]}",
                x_label=label,
                y_label="top-1",
                series=[
                    Series(
                        "networks", xs, ys, [e[0] for e in ends], [e[1] for e in ends],
                        joined=False, labels=[s for s, _, _ in known], frontier=True,
                    )
                ],
                log_x=max(xs) / min(xs) > LOG_RATIO,
                percent=True,
            ),
            f"pareto-{name}",
            files.to_csv(("subject", name, "top1", "low", "high"), rows),
        )  # fmt: skip


EXHIBITS = {
    "clean": ("Accuracy and calibration", clean),
    "fidelity": ("Fidelity to the teacher", fidelity),
    "corruptions": ("Corruptions", corruptions),
    "bias": ("Inductive biases", bias),
    "dense": ("Dense features", dense),
    "cost": ("Cost", cost),
}


def _tables(found: Found, suite: str) -> dict[str, Any]:
    """By subject, of those that have some."""
    return {
        subject["name"]: subject["tables"][suite]
        for subject in found["subjects"]
        if subject["tables"].get(suite)
    }


def _columns(table: Mapping[str, Any]) -> dict[str, Any]:
    return {**table, "images": [int(count) for count in table["images"]]}


def _curves(
    title: str,
    stem: str,
    labels: tuple[str, str],
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    percent: bool = False,
) -> Iterator[Block]:
    lines = {name: line for name, line in lines.items() if len(line[0])}
    if lines:
        rows = [(name, *point) for name, line in lines.items() for point in zip(*line, strict=True)]
        series = [Series(name, *line) for name, line in lines.items()]
        figure = Figure(title, labels[0], labels[1], series, percent=percent)
        yield Picture(figure, stem, files.to_csv(("subject", *labels), rows))
