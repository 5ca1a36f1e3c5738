"""A drawing is the same as SVG and as PNG, in colours that stand out on light and dark pages."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import ImageFont

from distill.report import colours, drawing
from distill.report.colours import COLOURS
from distill.report.drawing import SCALE, Area, Circle, Line, Shape, Sheet, Text, Tiles
from tests.report.reading import HEAD, elements, pixels, rgb

SHAPES = (
    Line(((4, 5), (30, 9), (35, 35)), "series-1", 2.0),
    Line(((4, 20), (36, 20)), "ink", 1.5, dash=4.0),
    Area(((10, 10), (30, 12), (20, 33)), "series-2"),
    Area(((10, 10), (30, 12), (20, 33)), "series-3", edge="series-1"),
    Circle((20, 15), 6, "series-4", "series-5"),
    Text((4, 30), "HH", "ink", 12.0),
    Text((20, 30), "HH", "ink", 12.0, "middle", bold=True),
    Text((36, 30), "HH", "ink", 12.0, "end"),
    Text((36, 30), "HH", "ink", 12.0, turned=True),
    Text((20, 5), "HH", "ink", 12.0, "end", turned=True),
    Tiles(((3, 4, 20, 12),), "amount-20"),
)


def extent(shape: Shape) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of a shape as the SVG has it."""
    (element,) = (
        e
        for e in list(ElementTree.fromstring(drawing.svg(Sheet(40, 40, (shape,), "", ""))))[4:]
        if e.tag.removeprefix(HEAD) in ("polyline", "polygon", "circle", "text", "path")
    )
    a = element.attrib
    if "points" in a:
        xy = np.array([[float(v) for v in pair.split(",")] for pair in a["points"].split()])
        half = float(a.get("stroke-width", 0)) / 2
        low, high = xy.min(axis=0) - half, xy.max(axis=0) + half
        return (*low, *high)
    if "d" in a:
        left, top, right, bottom, _ = map(float, re.findall(r"[\d.]+", a["d"]))
        return (left, top, right, bottom)
    if "r" in a:
        x, y, r = (float(a[key]) for key in ("cx", "cy", "r"))
        r += float(a["stroke-width"]) / 2
        return (x - r, y - r, x + r, y + r)
    x, y, size = (float(a[key]) for key in ("x", "y", "font-size"))
    width = size * 1.45  # of two H
    if "transform" in a:
        assert a["transform"] == f"rotate(-90 {a['x']} {a['y']})"
        top = y - width * {"start": 1, "middle": 0.5, "end": 0}[a["text-anchor"]]
        return (x - 0.72 * size, top, x, top + width)
    left = x - width * {"start": 0, "middle": 0.5, "end": 1}[a["text-anchor"]]
    return (left, y - 0.72 * size, left + width, y)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: type(shape).__name__)
def test_a_shape_is_at_the_same_place_in_both_forms(shape: Shape) -> None:
    image = pixels(drawing.png(Sheet(40, 40, (shape,), "", "")))
    rows, columns = np.nonzero((image != 255).any(axis=2))
    drawn = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / SCALE
    loose = 5.0 if isinstance(shape, Line) and shape.dash else 1.3  # a dashed line ends on a gap
    assert np.abs(drawn - extent(shape)).max() < loose, (drawn, extent(shape))


def test_both_forms_have_every_shape_and_its_colour() -> None:
    sheet = Sheet(40, 40, SHAPES, "", "")
    svg = drawing.svg(sheet)
    kinds = ((Line, "polyline"), (Area, "polygon"), (Circle, "circle"), (Text, "text"))
    for kind, tag in (*kinds, (Tiles, "path")):
        count = sum(isinstance(shape, kind) for shape in SHAPES)
        assert len(elements(svg, tag)) == count + (kind is Tiles)  # the page is the first
    for shape in SHAPES:
        sheet = Sheet(40, 40, (shape,), "", "")
        image, elements_ = pixels(drawing.png(sheet)), drawing.svg(sheet).partition("</style>")[2]
        colours = [getattr(shape, part, None) for part in ("fill", "edge", "colour")]
        for colour in filter(None, colours):
            assert (image == rgb(colour)).all(axis=2).any(), shape
            assert COLOURS[colour][0] in elements_


def test_dashes_and_opacity_are_in_both_forms() -> None:
    dashed = Line(((0, 20), (40, 20)), "ink", 2.0, dash=4.0)
    row = pixels(drawing.png(Sheet(40, 40, (dashed,), "", "")))[20 * SCALE, :, 0] < 128
    assert [row[round(x * SCALE)] for x in (2, 6, 10, 14)] == [True, False, True, False]
    assert 'stroke-dasharray="4"' in drawing.svg(Sheet(40, 40, (dashed,), "", ""))
    light = Area(((0, 0), (40, 0), (40, 40), (0, 40)), "series-1", opacity=0.25)
    mixed = pixels(drawing.png(Sheet(40, 40, (light,), "", "")))[80, 80]
    assert np.abs(mixed - (0.75 * 255 + 0.25 * np.array(rgb("series-1")))).max() <= 2
    assert 'fill-opacity="0.25"' in drawing.svg(Sheet(40, 40, (light,), "", ""))
    cut = Line(((0, 20), (33, 20)), "ink", 2.0, dash=4.0)  # within its ninth part, a dash
    row = pixels(drawing.png(Sheet(40, 40, (cut,), "", "")))[20 * SCALE, :, 0] < 128
    assert row[round(32.5 * SCALE)]
    assert not row[34 * SCALE :].any()


def test_bold_and_halo_are_in_both_forms() -> None:
    def dark(text: Text) -> int:
        on_line = Line(((0, 16), (40, 16)), "ink", 1.0)
        return int((pixels(drawing.png(Sheet(40, 40, (on_line, text), "", ""))) < 128).sum())

    text = Text((10, 20), "HH", "ink", 12.0)
    assert dark(text._replace(halo=True)) < dark(text) < dark(text._replace(bold=True))
    assert 'font-weight="bold"' in drawing.svg(Sheet(40, 40, (text._replace(bold=True),), "", ""))
    around = drawing.svg(Sheet(40, 40, (text._replace(halo=True),), "", ""))
    assert f'paint-order="stroke" stroke="{COLOURS["paper"][0]}"' in around


def test_the_width_of_a_text_is_foretold_on_the_safe_side() -> None:
    for text in ("Top-1 accuracy", "timm/resnet50.a1_in1k", "84.5 %"):
        written = ImageFont.load_default(20).getlength(text)
        assert written < drawing.text_width(text, 20) < 1.2 * written
    assert drawing.text_width("中文", 20) > 40  # as wide as high in every font that has them
    assert drawing.text_width("😀", 20) > 25
    assert drawing.fit("x" * 200, width=100, size=10).endswith("x…")
    assert 90 < drawing.text_width(drawing.fit("x" * 200, width=100, size=10), 10) <= 100


def test_a_text_is_wrapped_where_it_may_be() -> None:
    def wrapped(text: str, width: float = 100) -> list[str]:
        return drawing.wrap(text, width=width, size=10)

    assert wrapped("short") == ["short"]
    assert wrapped("") == wrapped(" \n") == []
    assert wrapped("one two three four five") == ["one two three four", "five"]
    assert wrapped("timm/vit_small_patch16_224") == ["timm/vit_small_", "patch16_224"]
    first, second = wrapped("x" * 200)
    assert first == "x" * len(first)
    assert second.endswith("x…")
    for text in ("a b " * 90, "/" * 200, "word." * 50, "😀" * 40, "_ _" * 80):
        lines = wrapped(text)
        assert len(lines) == 2
        assert all(drawing.text_width(line, 10) <= 100 for line in lines)


def test_only_the_256_shades_that_a_png_has_most_of_are_kept_and_colours_are_exact() -> None:
    shapes: list[Shape] = [Tiles(((i, 0, i + 1, 40),), f"amount-{i}") for i in range(colours.STEPS)]
    shapes += [Text((i, 20 + i / 3), "abc", "white-black", 9.3) for i in range(0, 30, 3)]
    image = drawing.png(Sheet(40, 40, tuple(shapes), "", ""))
    assert image[25] == 3  # the type of colour: indexed
    found = pixels(image)
    for i in range(colours.STEPS):
        assert tuple(found[2, i * SCALE + 2]) == rgb(f"amount-{i}")
    assert tuple(found[2, 39 * SCALE]) == (255, 255, 255)


def test_a_large_drawing_has_fewer_pixels_a_unit() -> None:
    wide = pixels(drawing.png(Sheet(4000, 3000, (), "", "")))
    assert 0.98 * drawing.PIXELS < wide.shape[0] * wide.shape[1] <= 1.01 * drawing.PIXELS
    assert pixels(drawing.png(Sheet(400, 300, (), "", ""), scale=2)).shape[:2] == (600, 800)


def test_a_drawing_names_the_colours_that_it_has_and_no_others() -> None:
    svg = drawing.svg(Sheet(40, 40, (Tiles(((0, 0, 9, 9),), "amount-7"),), "", ""))
    assert set(re.findall(r"--([\w-]+):", svg)) == {"paper", "amount-7"}


def test_a_font_without_a_character_writes_one_like_it() -> None:
    def black(text: str) -> np.ndarray:
        return pixels(drawing.png(Sheet(60, 30, (Text((2, 20), text, "ink", 14.0),), "", "")))

    for strange, like in (("é", "e"), ("T²", "T2"), ("−1", "-1"), ("3 × 4", "3 x 4"), ("中", "?")):
        assert (black(strange) == black(like)).all()
    assert (black("…") != black("...")).any()
