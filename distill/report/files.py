"""What a command found, as files: numbers for programs, a picture and a page for people."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from distill import storage
from distill.report.plot import Plot, png, svg


def write(
    out: Path, stem: str, found: Mapping[str, Any], *, table: str, figure: Plot | None, html: str
) -> None:
    """Put `STEM.json`, `.csv`, `.html`, and of a picture `.svg` and `.png`, into `out`."""
    storage.write(out / f"{stem}.json", (json.dumps(found, indent=1) + "\n").encode())
    storage.write(out / f"{stem}.csv", table.encode(errors="surrogateescape"))
    if figure is not None:
        storage.write(out / f"{stem}.svg", svg(figure).encode(errors="replace"))
        storage.write(out / f"{stem}.png", png(figure))
    storage.write(out / f"{stem}.html", html.encode(errors="replace"))


ONE_SEED = (
    "One seed: how much the same training would differ with another one is not in these intervals; "
    "--seeds 0,1,2 puts it there."
)


ONE_RUN = (
    "One seed: how much the same training would differ with another one is not in this interval; "
    "runs with other seeds, evaluated together, put it there."
)


def to_csv(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table as CSV; fractions with six digits, None as nothing."""
    text = io.StringIO(newline="")
    table = csv.writer(text, lineterminator="\n")
    table.writerow([cell(head) for head in heads])
    for row in rows:
        table.writerow([cell(value) for value in row])
    return text.getvalue()


def cell(value: Any) -> str:
    """A value in a CSV: a text that a spreadsheet would take for a formula begins with a '."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")):
        return f"'{value}"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
