"""Markdown in which the texts of others are shown and never obeyed."""

from __future__ import annotations

import re
from collections.abc import Sequence

# To Markdown, HTML or formulas. As numbers they are never part of the structure (CommonMark 2.5).
_MARKS = re.compile(r"[\\`*_{}\[\]<>|&$~#@]")


class Markdown(str):
    """Text that is Markdown already. Every other one is escaped where it is shown."""


def text(told: object) -> Markdown:
    """Anything as a text in one line, in which nothing has a meaning."""
    if isinstance(told, Markdown):
        return told
    return Markdown(_MARKS.sub(lambda mark: f"&#{ord(mark[0])};", line(str(told))))


def name(told: str) -> Markdown:
    """A name as code, in one line, in which nothing has a meaning.

    A backslash stands twice, so that no two names look alike, and that a table's own before a
    vertical bar is the odd one to every parser.
    """
    plain = line(told.replace("\\", "\\\\")) or '""'
    fence = "`" * (1 + _longest_fence(plain))
    ends = {plain[0], plain[-1]}
    padding = " " if "`" in ends or (ends == {" "} and plain.strip()) else ""  # is taken off again
    return Markdown(f"{fence}{padding}{plain}{padding}{fence}")


def line(told: str) -> str:
    """The text as one line of what can be printed; the rest is written as Python does it."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in told)


def table(heads: Sequence[object], rows: Sequence[Sequence[object]], *, left: int = 1) -> Markdown:
    """A table; all columns but the first `left` end on the right."""
    marks = [":--" if i < left else "--:" for i in range(len(heads))]
    cells = [[text(cell).replace("|", "\\|") for cell in row] for row in (heads, *rows)]
    lines = (cells[0], marks, *cells[1:])
    return Markdown("\n".join(f"| {' | '.join(row)} |" for row in lines))


def fenced(told: str, language: str) -> Markdown:
    """A block of code that nothing in it can end."""
    plain = "".join(
        c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in told
    )
    fence = "`" * max(3, 1 + _longest_fence(plain))
    return Markdown(f"{fence}{language}\n{plain.rstrip()}\n{fence}")


def listed(parts: Sequence[object]) -> Markdown:
    """The parts as people list them: a, b and c."""
    shown = [text(part) for part in parts]
    return Markdown(" and ".join([", ".join(shown[:-1]), shown[-1]] if shown[1:] else shown))


def _longest_fence(told: str) -> int:
    return max(map(len, re.findall("`+", told)), default=0)
