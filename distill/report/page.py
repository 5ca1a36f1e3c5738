"""The page of a report: one HTML file that needs nothing but itself."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from distill.report import drawing, plot


class Heading(NamedTuple):
    """The title of what follows."""

    text: str


class Text(NamedTuple):
    """A paragraph."""

    text: str


class Code(NamedTuple):
    """Text to copy, such as a command or a recipe."""

    text: str
    caption: str = ""


class Table(NamedTuple):
    """Rows under heads; the first cell of a row names it."""

    caption: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    strong: Sequence[int] = ()  # rows in bold
    numeric: Sequence[int] = ()  # columns that end on the right


class Picture(NamedTuple):
    """A plot, with its files to keep."""

    figure: plot.Figure
    name: str  # of its files, without what comes after the dot
    data: str  # its numbers as CSV


Block = Heading | Text | Code | Table | Picture


def page(title: str, *, verdict: Sequence[str], blocks: Sequence[Block], footer: str = "") -> str:
    """A report as HTML that works from a disk, without a network, and on paper.

    All texts are shown as they are: nothing in them is read as HTML. The pictures' files are
    within the page.

    Args:
        title: What the report is of.
        verdict: What it comes to, the most important sentence first.
        blocks: What the verdict rests on, in order.
        footer: Where it comes from.

    Raises:
        ValueError: If a picture has nothing to draw, or values that have no place.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_plain,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(
        title=title,
        verdict=verdict,
        blocks=[(type(block).__name__, _filled(block)) for block in blocks],
        footer=footer,
        theme=Markup(drawing.theme(":root")),
    )


def _plain(value: Any) -> Any:
    return value if isinstance(value, Markup) else drawing.plain(str(value))


def _filled(block: Block) -> Any:
    """What the template shows of a block."""
    if not isinstance(block, Picture):
        return block
    image = plot.svg(block.figure)
    files = (
        ("SVG", "image/svg+xml", image.encode()),
        ("PNG", "image/png", plot.png(block.figure)),
        ("CSV", "text/csv;charset=utf-8", block.data.encode(errors="replace")),
    )
    return {
        "image": Markup(image),
        "title": block.figure.title,
        "files": [
            (
                kind,
                f"{block.name}.{kind.lower()}",
                f"data:{media};base64,{base64.b64encode(content).decode()}",
            )
            for kind, media, content in files
        ],
    }
