"""What is on a drawing, read from its shapes, its SVG and its PNG."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from itertools import combinations
from xml.etree import ElementTree

import numpy as np
from PIL import Image, ImageColor

from distill.report import drawing
from distill.report.colours import COLOURS
from distill.report.drawing import Sheet, Text, Tiles
from distill.report.labels import Box

HEAD = "{http://www.w3.org/2000/svg}"
HOSTILE = (
    "<script>alert(1)</script>",
    "\"><img src=x onerror='alert(1)'>",
    "a & b &amp; \"quoted\" 'twice' ]]> <!-- -->",
    "{{ 7 * 7 }} {% raw %} [/x] [bold]",
    "javascript:alert(1)",
    "emoji 😀 and 中文 and τ² × é −",
    "مرحبا שלום, mixed",
    "../../etc/passwd",
    "x" * 255,
    "word " * 40 + "end",
)
# Of these a part is left out or written otherwise.
UNWRITABLE = ("two\nlines\tand\x00a\x1bcontrol \ud800 \uffff", "turned \u202e over", "", " ")


def pixels(image: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(image)) as opened:
        return np.asarray(opened.convert("RGB"))


def rgb(colour: str) -> tuple[int, ...]:
    return ImageColor.getrgb(COLOURS[colour][0])


def elements(text: str, tag: str) -> list[ElementTree.Element]:
    return list(ElementTree.fromstring(text).iter(HEAD + tag))


def texts(sheet: Sheet) -> dict[str, Text]:
    return {shape.text: shape for shape in sheet.shapes if isinstance(shape, Text)}


def box(text: Text) -> Box:
    """Where the letters of a text are, from its baseline."""
    width, (x, y) = drawing.text_width(text.text, text.size), text.at
    along = {"start": 0.0, "middle": 0.5, "end": 1.0}[text.anchor] * width
    above, under = 0.75 * text.size, 0.22 * text.size
    if text.turned:
        return Box(x - above, y + along - width, x + under, y + along)
    return Box(x - along, y - above, x - along + width, y + under)


def tiles(sheet: Sheet, colour: str) -> list[tuple[float, ...]]:
    """The rectangles of a colour: left, top, right and bottom as the SVG has them."""
    return all_tiles(sheet).get(colour, [])


def all_tiles(sheet: Sheet) -> dict[str, list[tuple[float, ...]]]:
    """Those of every colour; the first path is the page."""
    names = {light: name for name, (light, _) in COLOURS.items()}
    found: dict[str, list[tuple[float, ...]]] = {}
    for path in elements(drawing.svg(sheet), "path")[1:]:
        for outline in path.attrib["d"].split("z")[:-1]:
            left, top, right, bottom, _ = (float(v) for v in re.split("[MHV ]", outline)[1:])
            found.setdefault(names[path.attrib["fill"]], []).append((left, top, right, bottom))
    return found


def require_legible(sheet: Sheet) -> None:
    """Texts are within the sheet and on no other text."""
    boxes = [(shape.text, box(shape)) for shape in sheet.shapes if isinstance(shape, Text)]
    for text, where in boxes:
        assert where.left >= 0, text
        assert where.top >= 0, text
        assert where.right <= sheet.width, text
        assert where.bottom <= sheet.height, text
    assert not [(a, b) for (a, at), (b, other) in combinations(boxes, 2) if at.touches(other)]
    sizes = [shape.size for shape in sheet.shapes if isinstance(shape, Text)]
    assert min(sizes) >= 13.5


def require_same_in_both(sheet: Sheet, scale: int = 2) -> None:
    """Where the SVG has a tile, the PNG has its colour in a corner."""
    image = pixels(drawing.png(sheet, scale=scale))
    letters = [box(shape) for shape in sheet.shapes if isinstance(shape, Text)]
    for shape in sheet.shapes:
        for left, top, right, bottom in shape.boxes if isinstance(shape, Tiles) else ():
            at = (left + 1.5, bottom - 1.5)
            if right - left > 3 and bottom - top > 3 and not any(b.holds(at) for b in letters):
                found = tuple(image[round(at[1] * scale), round(at[0] * scale)])
                assert found == rgb(shape.fill), (shape.fill, at)


def require_safe(svg: str) -> None:
    """Nothing but shapes and texts."""
    root = ElementTree.fromstring(svg.encode())
    assert {element.tag.removeprefix(HEAD) for element in root.iter()} <= {
        *("svg", "title", "desc", "style"),
        *("polyline", "polygon", "path", "circle", "text"),
    }
    assert "<script" not in svg
    assert "url(" not in svg
    assert svg.count("http") == 1


def used_colours(svg: str) -> Iterator[tuple[str, str]]:
    """Attributes and their colours."""
    for element in ElementTree.fromstring(svg).iter():
        for what in ("fill", "stroke"):
            if element.attrib.get(what, "none") != "none":
                yield what, element.attrib[what]
