"""Results of all.py as tables: in the terminal, and in Markdown between markers of a document."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from _timing import number
from rich.table import Table

Results = Mapping[str, Any]
Cells = list[str]


def columns(table: Mapping[str, Any]) -> tuple[Cells, list[Cells]]:
    """Headings and rows of text; columns that no row fills are left out."""
    rows = table["rows"]
    optional: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
        ("share", "of the limit", lambda x: f"{x:.0%}" if x >= 0.1 else f"{x:.1%}"),
        ("memory", "memory", lambda x: f"{x / 2**20:,.0f} MB"),
        ("waited", "waiting", lambda x: f"{x:.0%}"),
        ("joules", "energy", lambda x: f"{1000 * x:.3g} mJ"),
    )
    used = [column for column in optional if any(row[column[0]] is not None for row in rows)]
    cells = []
    for row in rows:
        if row["failed"]:
            cells.append([row["name"], "–", "–", row["failed"], *("–" for _ in used)])
            continue
        spread = f"{row['least']:.2f} to {row['most']:.2f}"
        more = ["–" if row[key] is None else text(row[key]) for key, _, text in used]
        cells.append([row["name"], number(row["rate"]), f"{row['ratio']:.2f}", spread, *more])
    return ["", table["unit"], "ratio", "least to most", *(name for _, name, _ in used)], cells


def terminal(table: Mapping[str, Any]) -> Table:
    """One table for rich."""
    headings, rows = columns(table)
    drawn = Table(title=table["title"], title_justify="left", caption=table["note"] or None)
    for i, heading in enumerate(headings):
        drawn.add_column(heading, justify="right" if i else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*row)
    return drawn


def markdown(results: Results) -> str:
    """All tables of one device."""
    here = results["machine"]
    processor = f"{here['cores']} cores of {here['processor']}, {here['memory'] / 2**30:.0f} GB"
    device = "" if here["device"] == here["processor"] else f"{here['device']}, "
    libraries = ("torch", "torchvision", "timm", "cuda")
    versions = ", ".join(f"{name} {here[name]}" for name in libraries if here.get(name))
    lines = [f"{device}{processor}; Python {here['python']}, {versions}.", ""]
    for one in results["comparisons"]:
        lines += _comparison(one)
    return "\n".join(lines).rstrip() + "\n"


def _comparison(one: Mapping[str, Any]) -> Cells:
    lines = [f"### {one['about']}", ""]
    lines += [
        f"`{one['command']}`, {one['when']}, {one['seconds']:.0f} s, "
        f"load {one['load'][0]:.1f} to {one['load'][1]:.1f}",
        "",
    ]
    if one["failed"]:
        lines += [f"**Failed:** {_escaped(one['failed'])}", ""]
    for table in one["tables"]:
        headings, rows = columns(table)
        lines += [f"{table['title']}", ""]
        lines += [_line(headings), _line(["---", *("---:" for _ in headings[1:])])]
        lines += [_line([_escaped(cell) for cell in row]) for row in rows]
        lines += ["", *([table["note"], ""] if table["note"] else [])]
    for goal in one["goals"]:
        word = "reached" if goal["reached"] else "**missed**"
        lines += [f"- {goal['goal']}: {goal['value']:,.3g}, {word}"]
    lines += [""] if one["goals"] else []
    if not one["tables"] and one["printed"]:
        lines += ["```", one["printed"].strip(), "```", ""]
    return lines


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def regenerated(document: str, results: Results) -> str:
    """The document with this device's results between its markers."""
    return put(document, f"speed-{results['device']}", markdown(results))


def put(document: str, name: str, text: str) -> str:
    """The document with a text between the markers of a name.

    Raises:
        ValueError: If the document has no such markers.
    """
    begin, end = (f"<!-- {name}: {word} -->" for word in ("begin", "end"))
    before, found, rest = document.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"the document has no lines {begin} and {end}")
    return f"{before}{begin}\n\n{text}\n{end}{after}"
