"""The page of a report: one HTML file that needs nothing but itself."""

from __future__ import annotations

import base64
import itertools
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from distill.report import drawing, plot, sheet
from distill.report.files import to_csv
from distill.report.plot import Plot

COLOURS = ("paper", "ink", "muted", "grid", "shade", "series-1")  # of the page itself
SCALE = 2.0  # pixels a unit in a picture's PNG: a page may hold many
BROAD = 34.0  # rem; of a picture of usual width
LEAST = 0.79  # pixels a unit on a phone, where a wider picture scrolls
CONTENTS_FROM = 4  # headings on, a page has a table of contents
PIXELS = 128  # images up to this size are shown pixel by pixel
PNG_HEAD = b"\x89PNG\r\n\x1a\n"


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
    name: str = ""  # of its file, without what comes after the dot; else made of the caption
    data: str = ""  # its numbers as CSV; else its cells


class Picture(NamedTuple):
    """A plot, with its files to keep."""

    figure: Plot
    name: str  # of its files, without what comes after the dot
    data: str  # its numbers as CSV


class Image(NamedTuple):
    """One image of a gallery."""

    png: bytes
    lines: Sequence[str]  # of text below it
    alt: str  # what it shows, for who cannot see it


class Gallery(NamedTuple):
    """Images side by side."""

    items: Sequence[Image]
    caption: str = ""


class Facts(NamedTuple):
    """What something is, by name."""

    pairs: Sequence[tuple[str, str]]
    caption: str = ""


class Details(NamedTuple):
    """Blocks that are shown when asked for, and on paper."""

    summary: str
    blocks: Sequence[Block]


Block = Heading | Text | Code | Table | Picture | Gallery | Facts | Details


def page(
    title: str,
    *,
    verdict: Sequence[str],
    blocks: Sequence[Block],
    footer: str = "",
    data: Mapping[str, str] | None = None,
) -> str:
    """A report as HTML that works from a disk, without a network, and on paper.

    All texts are shown as they are: nothing in them is read as HTML. The pictures' files are
    within the page. A page of many headings begins with links to them.

    Args:
        title: What the report is of.
        verdict: What it comes to, the most important sentence first.
        blocks: What the verdict rests on, in order.
        footer: Where it comes from.
        data: Files to keep, such as all numbers as JSON: their texts by name.

    Raises:
        ValueError: If a picture has nothing to draw, or values that have no place, or if what
            stands for an image is not a PNG.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_plain,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    anchors = _anchors([block.text for block in blocks if isinstance(block, Heading)])
    return environment.get_template("page.html").render(
        title=title,
        verdict=verdict,
        contents=anchors if len(anchors) >= CONTENTS_FROM else [],
        blocks=_filled(blocks, [anchor for anchor, _ in anchors]),
        footer=footer,
        data=[_file(name, name, _media(name), _bytes(text)) for name, text in (data or {}).items()],
        theme=Markup(drawing.theme(":root", COLOURS)),
    )


def _plain(value: Any) -> Any:
    return value if isinstance(value, Markup) else drawing.plain(str(value))


def _anchors(headings: Sequence[str]) -> list[tuple[str, str]]:
    """An id for each heading, no two the same, with the heading."""
    found: dict[str, str] = {}
    for text in headings:
        slug = _slug(text) or "part"
        numbered = itertools.chain([slug], (f"{slug}-{i}" for i in itertools.count(2)))
        found[next(one for one in numbered if one not in found)] = text
    return list(found.items())


def _slug(text: str) -> str:
    """The letters and digits of a text, in ASCII, for an address or the name of a file."""
    letters = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", letters)[:60].strip("-")


def _filled(blocks: Sequence[Block], anchors: Sequence[str] = ()) -> list[tuple[str, Any]]:
    """What the template shows of each block, with the block's kind."""
    ids, filled = iter(anchors), list[tuple[str, Any]]()
    for block in blocks:
        shown: Any = block
        match block:
            case Heading(text):
                shown = {"text": text, "anchor": next(ids, "")}
            case Table():
                shown = {**block._asdict(), "file": _table_file(block)}
            case Picture():
                shown = _picture(block)
            case Gallery(items, caption):
                shown = {"caption": caption, "images": [_image(item) for item in items]}
            case Details(summary, inner):
                shown = {"summary": summary, "blocks": _filled(inner)}
        filled.append((type(block).__name__, shown))
    return filled


def _picture(block: Picture) -> dict[str, Any]:
    drawn = plot.layout(block.figure)
    image = drawing.svg(drawn)
    files = (
        ("SVG", "image/svg+xml", image.encode(errors="replace")),
        ("PNG", "image/png", drawing.png(drawn, scale=SCALE)),
        ("CSV", "text/csv;charset=utf-8", _bytes(block.data)),
    )
    return {
        "image": Markup(image),
        "title": drawn.title,
        "broad": f"{BROAD * drawn.width / sheet.WIDTH:.4g}rem",
        "least": f"{LEAST * drawn.width:.0f}px" if drawn.width > sheet.WIDTH else "",
        "files": [
            _file(kind, f"{block.name}.{kind.lower()}", media, content)
            for kind, media, content in files
        ],
    }


def _table_file(block: Table) -> tuple[str, str, str]:
    name = block.name or _slug(block.caption) or "table"
    data = block.data or to_csv(block.heads, block.rows)
    return _file("CSV", f"{name}.csv", "text/csv;charset=utf-8", _bytes(data))


def _image(item: Image) -> dict[str, Any]:
    if not item.png.startswith(PNG_HEAD):
        raise ValueError(f"{item.alt}: not a PNG")
    width, height = (int.from_bytes(item.png[i : i + 4]) for i in (16, 20))
    return {
        "address": _address("image/png", item.png),
        "alt": item.alt,
        "lines": item.lines,
        "width": width,
        "height": height,
        "small": max(width, height) <= PIXELS,
    }


def _file(kind: str, name: str, media: str, content: bytes) -> tuple[str, str, str]:
    """What a link says, the name it is kept by, and its address."""
    return kind, name, _address(media, content)


def _address(media: str, content: bytes) -> str:
    return f"data:{media};base64,{base64.b64encode(content).decode()}"


def _bytes(text: str) -> bytes:
    return text.encode(errors="replace")


def _media(name: str) -> str:
    return "application/json" if name.endswith(".json") else "text/plain;charset=utf-8"
