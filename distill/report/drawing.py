"""Lines, areas and text on a sheet, drawn alike as SVG and as PNG."""

from __future__ import annotations

import io
import math
import re
import unicodedata
from collections.abc import Iterable, Iterator
from functools import cache
from html import escape
from itertools import accumulate
from typing import Literal, NamedTuple

from PIL import Image, ImageDraw, ImageFont

from distill.report.colours import COLOURS

SCALE = 4  # pixels a unit in a PNG
PIXELS = 8e6  # of a PNG, at most
MOST_SHADES = 1 << 16  # that are counted
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


class Tiles(NamedTuple):
    """Upright rectangles of one colour: left, top, right and bottom of each."""

    boxes: tuple[tuple[float, float, float, float], ...]
    fill: str


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
    turned: bool = False  # reads upwards, its baseline through the same point


Shape = Line | Area | Tiles | Circle | Text
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


def wrap(text: str, *, width: float, size: float, most: int = 2) -> list[str]:
    """The text in at most so many lines, the last one cut where it is too long; none if empty."""
    text, lines = " ".join(plain(text).split()), list[str]()
    while len(lines) < most - 1 and text_width(text, size) > width:
        ends = list(accumulate(text_width(char, size) for char in text))
        fitting = sum(end <= width for end in ends)
        breaks = [m.end() for m in re.finditer(r"(?<=\S)(\s|[-_/.]+)", text)]
        at = max((b for b in breaks if len(text[:b].rstrip()) <= fitting), default=max(fitting, 1))
        lines.append(text[:at].rstrip())
        text = text[at:].lstrip()
    return [line for line in (*lines, fit(text, width=width, size=size)) if line]


def theme(selector: str, names: Iterable[str]) -> str:
    """CSS that gives colours to an element as custom properties, as the reader's page is."""
    light, dark = (
        ";".join(f"--{name}:{COLOURS[name][which]}" for name in names) for which in (0, 1)
    )
    # On paper the page is white, whatever the screen was.
    on_dark = "@media screen and (prefers-color-scheme:dark)"
    return f"{selector}{{{light}}}{on_dark}{{{selector}{{{dark}}}}}"


def svg(sheet: Sheet) -> str:
    """The drawing as SVG, whole for a file or within a page."""
    shapes = (Tiles(((0, 0, sheet.width, sheet.height),), "paper"), *sheet.shapes)
    used = {use: None for shape in shapes for use in _uses(shape)}
    # The attributes are for programs that know no custom properties.
    follow = "".join(
        f'.plot [{what}="{COLOURS[name][0]}"]{{{what}:var(--{name})}}' for what, name in used
    )
    names = {name: None for _, name in used}
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" class="plot" role="img" width="100%" '
        f'viewBox="0 0 {sheet.width} {sheet.height}" font-family="{FAMILY}" fill="none" '
        'stroke-linejoin="round">'
        f"<title>{escape(sheet.title)}</title><desc>{escape(sheet.description)}</desc>"
        "<style>.plot{max-height:100vh;background:var(--paper)}"
        f"{theme('.plot', names)}{follow}</style>"
        f"{''.join(map(_element, shapes))}</svg>\n"
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
        case Tiles(boxes, fill):
            outlines = "".join(
                f"M{_number(left)} {_number(top)}H{_number(right)}V{_number(bottom)}"
                f"H{_number(left)}z"
                for left, top, right, bottom in boxes
            )
            return f'<path d="{outlines}" fill="{COLOURS[fill][0]}"/>'
        case Circle((x, y), radius, fill, edge):
            return (
                f'<circle cx="{_number(x)}" cy="{_number(y)}" r="{_number(radius)}" '
                f'fill="{COLOURS[fill][0]}"{_edge(edge)}/>'
            )
        case Text((x, y), text, colour, size, anchor, bold, halo, turned):
            weight = ' font-weight="bold"' if bold else ""
            around = (
                f' paint-order="stroke" stroke="{COLOURS["paper"][0]}" stroke-width="{HALO}"'
                if halo
                else ""
            )
            place = f'x="{_number(x)}" y="{_number(y)}"'
            if turned:
                place += f' transform="rotate(-90 {_number(x)} {_number(y)})"'
            return (
                f'<text {place} text-anchor="{anchor}" '
                f'fill="{COLOURS[colour][0]}" font-size="{_number(size)}"{weight}{around}>'
                f"{escape(text)}</text>"
            )


def _uses(shape: Shape) -> Iterator[tuple[str, str]]:
    """Which attributes of a shape have which colour, by name."""
    match shape:
        case Line(_, colour):
            yield "stroke", colour
        case Tiles(_, fill):
            yield "fill", fill
        case Area(_, fill, edge) | Circle(_, _, fill, edge):
            yield "fill", fill
            if edge:
                yield "stroke", edge
        case Text(_, _, colour, halo=halo):
            yield "fill", colour
            if halo:
                yield "stroke", "paper"


def _edge(colour: str | None) -> str:
    return f' stroke="{COLOURS[colour][0]}" stroke-width="{EDGE}"' if colour else ""


def _points(points: tuple[Point, ...]) -> str:
    return " ".join(f"{_number(x)},{_number(y)}" for x, y in points)


def _number(value: float) -> str:
    return f"{round(value, 2):g}"


def png(sheet: Sheet, *, scale: float = SCALE) -> bytes:
    """The drawing as PNG on white, so many pixels a unit, or fewer where it is very large."""
    scale = min(scale, math.sqrt(PIXELS / (sheet.width * sheet.height)))
    size = (round(sheet.width * scale) * SUPERSAMPLE, round(sheet.height * scale) * SUPERSAMPLE)
    image = Image.new("RGB", size, COLOURS["paper"][0])
    draw = ImageDraw.Draw(image, "RGBA")  # so that colours with an opacity are mixed
    for shape in sheet.shapes:
        _paint(draw, shape, scale * SUPERSAMPLE)
    file = io.BytesIO()
    _indexed(image.reduce(SUPERSAMPLE)).save(file, "PNG")
    return file.getvalue()


def _indexed(image: Image.Image) -> Image.Image:
    """The image with the 256 colours that it has most of, which takes a third of the bytes.

    Those of lines, areas and letters are among them; the rest are shades of their edges.
    """
    counted = sorted(image.getcolors(MOST_SHADES) or (), reverse=True)
    if not counted:
        return image
    # Pillow looks for the nearest colour of each cube of 4 by 4 by 4, from its lowest corner.
    cubes: dict[tuple[int, ...], tuple[int, ...]] = {}
    for _, colour in counted:
        assert isinstance(colour, tuple)
        cubes.setdefault(tuple(part & ~3 for part in colour), colour)
    kept = list(cubes.items())[:256]
    palette = Image.new("P", (1, 1))
    palette.putpalette([part for cube, _ in kept for part in cube])
    indexed = image.quantize(palette=palette, dither=Image.Dither.NONE)
    indexed.putpalette([part for _, colour in kept for part in colour])
    return indexed


def _paint(draw: ImageDraw.ImageDraw, shape: Shape, k: float) -> None:
    """Draw a shape, `k` pixels a unit."""
    match shape:
        case Line(points, colour, width, dash):
            for part in _dashes(points, dash) if dash else (points,):
                pixels = [(x * k, y * k) for x, y in part]
                draw.line(pixels, COLOURS[colour][0], width=max(round(width * k), 1), joint="curve")
        case Area(points, fill, edge, opacity):
            pixels = [(x * k, y * k) for x, y in points]
            draw.polygon(pixels, f"{COLOURS[fill][0]}{round(255 * opacity):02x}")
            if edge:
                _paint(draw, Line((*points, *points[:2]), edge, EDGE), k)
        case Circle((x, y), radius, fill, edge):
            for colour, r in ((edge, radius + EDGE / 2), (fill, radius - EDGE / 2)):
                box = ((x - r) * k, (y - r) * k, (x + r) * k, (y + r) * k)
                draw.ellipse(box, COLOURS[colour][0])
        case Tiles(boxes, fill):
            for box in boxes:
                left, top, right, bottom = (round(end * k) for end in box)
                if left < right and top < bottom:  # Pillow's ends are inside
                    draw.rectangle((left, top, right - 1, bottom - 1), COLOURS[fill][0])
        case Text():
            _write(draw, shape, k)


def _write(draw: ImageDraw.ImageDraw, text: Text, k: float) -> None:
    (x, y), font = (text.at[0] * k, text.at[1] * k), _font(text.size * k)
    side = {"start": "ls", "middle": "ms", "end": "rs"}[text.anchor]
    written, colour = "".join(map(_writable, text.text)), COLOURS[text.colour][0]
    bold = round(k / 4) * text.bold
    if text.turned:
        left, top, right, bottom = map(round, font.getbbox(written, anchor=side, stroke_width=bold))
        letters = Image.new("L", (max(right - left, 1), max(bottom - top, 1)))
        ImageDraw.Draw(letters).text((-left, -top), written, 255, font, side, stroke_width=bold)
        upwards = letters.transpose(Image.Transpose.ROTATE_90)
        draw.bitmap((round(x) + top, round(y) - right), upwards, colour)
        return
    if text.halo:
        paper, rim = COLOURS["paper"][0], round(HALO / 2 * k)
        draw.text((x, y), written, paper, font, side, stroke_width=rim)
    draw.text((x, y), written, colour, font, side, stroke_width=bold)


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
