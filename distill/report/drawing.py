"""Lines, areas and text on a sheet, drawn alike as SVG and as PNG."""

from __future__ import annotations

import io
import math
import unicodedata
from collections.abc import Iterator
from functools import cache
from html import escape
from itertools import accumulate
from typing import Literal, NamedTuple

from PIL import Image, ImageDraw, ImageFont

# Name of a colour -> on a light and on a dark page. The series are the palette of Okabe and Ito
# (Color Universal Design, 2008), which colour-blind people can tell apart; brighter on dark.
COLOURS = {
    "paper": ("#ffffff", "#14171a"),
    "ink": ("#1b1f24", "#e8eaed"),
    "muted": ("#59626b", "#a4adb6"),
    "grid": ("#e4e7ea", "#2c3238"),
    "shade": ("#eef2f5", "#1e242a"),
    "series-1": ("#0072b2", "#3f9bd9"),
    "series-2": ("#d55e00", "#e8702a"),
    "series-3": ("#009e73", "#1fb58a"),
    "series-4": ("#cc79a7", "#d98ab8"),
    "series-5": ("#e69f00", "#e6a817"),
    "series-6": ("#56b4e9", "#8fd0f5"),
}
SCALE = 4  # pixels a unit in a PNG
SUPERSAMPLE = 2  # Pillow draws lines with hard edges: drawn larger, then averaged
FAMILY = "Helvetica, Arial, 'Liberation Sans', system-ui, sans-serif"
WIDER = 1.08  # texts in the font that a browser finds, at most, to those in Pillow's
HALO = 3.0  # units of paper around a text that lies on lines, half of it outside of the letters
# For what Pillow's font cannot write and Unicode does not take apart.
INSTEAD = {"−": "-", "–": "-", "—": "-", "×": "x", "→": ">", "“": '"', "”": '"', "’": "'"}

Point = tuple[float, float]


class Line(NamedTuple):
    """An open line through points."""

    points: tuple[Point, ...]
    colour: str
    width: float
    dash: float = 0.0  # length of its dashes and gaps, for a line of two points


class Area(NamedTuple):
    """A closed shape."""

    points: tuple[Point, ...]
    fill: str
    edge: str | None = None
    opacity: float = 1.0


class Circle(NamedTuple):
    """A disc with an edge."""

    centre: Point
    radius: float
    fill: str
    edge: str


class Text(NamedTuple):
    """One line of text on its baseline."""

    at: Point
    text: str
    colour: str
    size: float
    anchor: Literal["start", "middle", "end"] = "start"
    bold: bool = False
    halo: bool = False


Shape = Line | Area | Circle | Text
EDGE = 1.5  # units; width of the edge of an area and of a circle


class Sheet(NamedTuple):
    """A drawing; later shapes cover earlier ones. The unit is about a pixel on a phone."""

    width: int
    height: int
    shapes: tuple[Shape, ...]
    title: str
    description: str


def plain(text: str) -> str:
    """The text without what cannot be shown, or not be written to a file."""
    return "".join(c if c.isprintable() or c in "\n\t" else " " for c in text)


def text_width(text: str, size: float) -> float:
    """Width of a text in units, on the safe side."""
    return WIDER * size * sum(map(_advance, text))


def fit(text: str, *, width: float, size: float) -> str:
    """The text in one line, cut with an ellipsis where it is wider than `width` units."""
    text = " ".join(plain(text).split())
    if text_width(text, size) <= width:
        return text
    ends = accumulate(text_width(char, size) for char in text)
    kept = sum(end <= width - text_width("…", size) for end in ends)
    return text[:kept].rstrip() + "…"


def theme(selector: str) -> str:
    """CSS that gives the colours to an element as custom properties, as the reader's page is."""
    light, dark = (
        ";".join(f"--{name}:{pair[which]}" for name, pair in COLOURS.items()) for which in (0, 1)
    )
    # On paper the page is white, whatever the screen was.
    on_dark = "@media screen and (prefers-color-scheme:dark)"
    return f"{selector}{{{light}}}{on_dark}{{{selector}{{{dark}}}}}"


def svg(sheet: Sheet) -> str:
    """The drawing as SVG, whole for a file or within a page."""
    # The attributes are for programs that know no custom properties.
    follow = "".join(
        f'.plot [{what}="{light}"]{{{what}:var(--{name})}}'
        for name, (light, _) in COLOURS.items()
        for what in ("fill", "stroke")
    )
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" class="plot" role="img" width="100%" '
        f'viewBox="0 0 {sheet.width} {sheet.height}" font-family="{FAMILY}" fill="none" '
        'stroke-linejoin="round">'
        f"<title>{escape(sheet.title)}</title><desc>{escape(sheet.description)}</desc>"
        f"<style>.plot{{max-height:100vh;background:var(--paper)}}{theme('.plot')}{follow}</style>"
        f'<rect width="{sheet.width}" height="{sheet.height}" fill="{COLOURS["paper"][0]}"/>'
        f"{''.join(map(_element, sheet.shapes))}</svg>\n"
    )


def _element(shape: Shape) -> str:
    match shape:
        case Line(points, colour, width, dash):
            dashes = f' stroke-dasharray="{_number(dash)}"' if dash else ""
            return (
                f'<polyline points="{_points(points)}" stroke="{COLOURS[colour][0]}" '
                f'stroke-width="{_number(width)}"{dashes}/>'
            )
        case Area(points, fill, edge, opacity):
            see_through = f' fill-opacity="{_number(opacity)}"' if opacity < 1 else ""
            return (
                f'<polygon points="{_points(points)}" fill="{COLOURS[fill][0]}"'
                f"{see_through}{_edge(edge)}/>"
            )
        case Circle((x, y), radius, fill, edge):
            return (
                f'<circle cx="{_number(x)}" cy="{_number(y)}" r="{_number(radius)}" '
                f'fill="{COLOURS[fill][0]}"{_edge(edge)}/>'
            )
        case Text((x, y), text, colour, size, anchor, bold, halo):
            weight = ' font-weight="bold"' if bold else ""
            around = (
                f' paint-order="stroke" stroke="{COLOURS["paper"][0]}" stroke-width="{HALO}"'
                if halo
                else ""
            )
            return (
                f'<text x="{_number(x)}" y="{_number(y)}" text-anchor="{anchor}" '
                f'fill="{COLOURS[colour][0]}" font-size="{_number(size)}"{weight}{around}>'
                f"{escape(text)}</text>"
            )


def _edge(colour: str | None) -> str:
    return f' stroke="{COLOURS[colour][0]}" stroke-width="{EDGE}"' if colour else ""


def _points(points: tuple[Point, ...]) -> str:
    return " ".join(f"{_number(x)},{_number(y)}" for x, y in points)


def _number(value: float) -> str:
    return f"{round(value, 2):g}"


def png(sheet: Sheet) -> bytes:
    """The drawing as PNG on white, `SCALE` pixels a unit."""
    k = SCALE * SUPERSAMPLE
    size = (sheet.width * k, sheet.height * k)
    image = Image.new("RGB", size, COLOURS["paper"][0])
    draw = ImageDraw.Draw(image, "RGBA")  # so that colours with an opacity are mixed
    for shape in sheet.shapes:
        _paint(draw, shape, k)
    file = io.BytesIO()
    image.reduce(SUPERSAMPLE).save(file, "PNG", optimize=True)
    return file.getvalue()


def _paint(draw: ImageDraw.ImageDraw, shape: Shape, k: int) -> None:
    match shape:
        case Line(points, colour, width, dash):
            for part in _dashes(points, dash) if dash else (points,):
                pixels = [(x * k, y * k) for x, y in part]
                draw.line(pixels, COLOURS[colour][0], width=round(width * k), joint="curve")
        case Area(points, fill, edge, opacity):
            pixels = [(x * k, y * k) for x, y in points]
            draw.polygon(pixels, f"{COLOURS[fill][0]}{round(255 * opacity):02x}")
            if edge:
                _paint(draw, Line((*points, *points[:2]), edge, EDGE), k)
        case Circle((x, y), radius, fill, edge):
            for colour, r in ((edge, radius + EDGE / 2), (fill, radius - EDGE / 2)):
                box = ((x - r) * k, (y - r) * k, (x + r) * k, (y + r) * k)
                draw.ellipse(box, COLOURS[colour][0])
        case Text((x, y), text, colour, size, anchor, bold, halo):
            at, font = (x * k, y * k), _font(size * k)
            side = {"start": "ls", "middle": "ms", "end": "rs"}[anchor]
            written = "".join(map(_writable, text))
            if halo:
                draw.text(
                    at, written, COLOURS["paper"][0], font, side, stroke_width=round(HALO / 2 * k)
                )
            draw.text(at, written, COLOURS[colour][0], font, side, stroke_width=k // 4 * bold)


def _dashes(points: tuple[Point, ...], dash: float) -> Iterator[tuple[Point, Point]]:
    start, end = points
    length = math.dist(start, end)

    def along(distance: float) -> Point:
        part = min(distance / length, 1)
        return (start[0] + (end[0] - start[0]) * part, start[1] + (end[1] - start[1]) * part)

    for i in range(math.ceil(length / (2 * dash))):
        yield along(2 * i * dash), along((2 * i + 1) * dash)


@cache
def _font(size: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


@cache
def _advance(char: str) -> float:
    """Width in parts of the font's size."""
    wide = unicodedata.east_asian_width(char) in "WF"
    return 1.2 if wide else _font(100).getlength(char) / 100


@cache
def _writable(char: str) -> str:
    """What Pillow's font, which has little beyond ASCII, can write of a character."""
    missing = bytes(_font(100).getmask("\uffff"))
    choices = (char, INSTEAD.get(char, ""), unicodedata.normalize("NFKD", char)[0])
    return next((c for c in choices if c and bytes(_font(100).getmask(c)) != missing), "?")
