"""What the toolkit promises, and the table of what tests measured of it.

A test that measures a promise is marked with its number and says what it found:

    @pytest.mark.promise("R1")
    def test_kill_9_leaves_no_trace(..., measured: Measured) -> None:
        ...
        measured("kill -9 while training", f"{kills} of {kills} without a trace")

`pytest --promises` runs these tests alone, the long ones too (`--promises-short`: without them),
and writes what they say into docs/reliability.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

PAGE = Path(__file__).parents[1] / "docs" / "reliability.md"
BEGIN, END = "<!-- measured -->", "<!-- /measured -->"

PROMISES = {
    "R1": "A run that was killed and went on ends as if it had never been interrupted",
    "R2": "A file or a checkpoint is whole or not there, wherever its writer dies",
    "R3": "Removing old checkpoints never removes the last good one",
    "R4": "A damaged checkpoint or file of weights is found, and said",
    "R5": "The order of images follows the seed, not the hardware",
    "R6": "Augmented pixels do not depend on the number of workers",
    "R7": "Several processes train the same model as one",
    "R8": "Evaluation counts each image once",
    "R9": "A signal saves the step in work, and the same command goes on",
    "R10": "A number that is not finite is found, named, and never saved",
    "R11": "A full disk loses nothing",
    "R12": "What cannot be saved is never passed over in silence",
    "R13": "Two runs in one directory cannot mix",
    "R14": "Reading a file runs no code, and no file makes a reader crash or hang",
    "R15": "A recipe means what it says, or is refused with its line",
    "R16": "Classes are matched by name, never by position",
    "R17": "A bad image is met the same way always, and nothing of the data is changed",
    "R18": "A teacher's cache answers for its own data, teacher and views only",
    "R19": "What is exported says the same as the model, or is not written",
    "R20": "Scores are those of the reference implementations",
    "R21": "Names and secrets do no harm",
    "R22": "What is downloaded is what was published",
    "R23": "Directories of earlier versions stay readable",
    "R24": "Clock, locale, hash seed, umask and working directory do not matter",
}


class Measured(Protocol):
    """Says what a test found: of what, and the figure."""

    def __call__(self, what: str, figure: str) -> None:
        """Note it for the table."""


class Finding(NamedTuple):
    """A line of the table."""

    promise: str
    what: str
    figure: str
    test: str  # file::function
    long: bool  # whether it was a soak test, of which there may be a shorter form


def joined(findings: Iterable[Finding]) -> list[Finding]:
    """In the order of the promises; of two that measured the same the longer test's."""
    order = list(PROMISES)
    kept = {
        (found.promise, found.what): found for found in sorted(findings, key=lambda one: one.long)
    }
    return sorted(kept.values(), key=lambda found: (order.index(found.promise), found.what))


def table(findings: Iterable[Finding]) -> str:
    """Markdown: a promise a section, a line for each thing measured."""
    by_promise: dict[str, list[Finding]] = {name: [] for name in PROMISES}
    for found in joined(findings):
        by_promise[found.promise].append(found)
    lines = ["| | promise | tested | measured | by |", "|---|---|---|---|---|"]
    for name, text in PROMISES.items():
        for i, found in enumerate(by_promise[name]):
            first = (name, text) if i == 0 else ("", "")
            cells = (*first, found.what, found.figure, f"`{found.test}`")
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def rows(page: str) -> Mapping[str, list[list[str]]]:
    """The cells of every line of the table in a page, by promise."""
    inside = page.partition(BEGIN)[2].partition(END)[0]
    found: dict[str, list[list[str]]] = {}
    name = ""
    for line in inside.strip().splitlines()[2:]:
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        name = cells[0] or name
        found.setdefault(name, []).append(cells[1:])
    return found


def write(findings: Iterable[Finding]) -> None:
    """Put the table into the page, in place of the one before."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n{table(findings)}\n{END}{after}", encoding="utf-8")
