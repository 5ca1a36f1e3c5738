"""A report is one safe file: it fetches nothing, runs nothing, and shows texts as they are."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import PIL.Image
import pytest

from distill.report import drawing, plot
from distill.report import page as report
from distill.report.page import (
    Block,
    Code,
    Details,
    Facts,
    Gallery,
    Heading,
    Image,
    Picture,
    Table,
    Text,
)
from distill.report.plot import Bars, BarSeries, Confusion, Figure, Heatmap, Reliability, Series
from tests.report.reading import HOSTILE
from tests.report.test_reliability import SURE

FIGURE = Figure("Accuracy", "Temperature", "Top-1", [Series("Student", [1, 2], [0.5, 0.6])])
PICTURE = Picture(FIGURE, "sweep", "temperature,top1\n1,0.5\n2,0.6\n")
TABLE = Table(
    "All temperatures",
    ["Temperature", "Top-1"],
    [["1", "50 %"], ["2", "60 %"]],
    strong=[1],
    numeric=[1],
)


def png(size: int = 4) -> bytes:
    file = io.BytesIO()
    PIL.Image.new("RGB", (size, size), (200, 30, 90)).save(file, "PNG")
    return file.getvalue()


VOID = {"meta", "link", "img"}


class Page(HTMLParser):
    """The elements of a page with their attributes, and the text within each."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.open: list[int] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), []))
        if tag not in VOID:
            self.open.append(len(self.elements) - 1)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), []))

    def handle_endtag(self, tag: str) -> None:
        assert self.elements[self.open.pop()][0] == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        for i in self.open:
            self.elements[i][2].append(data)

    def all(self, tag: str) -> list[tuple[dict[str, str | None], str]]:
        return [(attrs, "".join(data)) for name, attrs, data in self.elements if name == tag]


def page(*blocks: Block, verdict: tuple[str, ...] = ("Four is best.",)) -> str:
    return report.page("The report", verdict=verdict, blocks=blocks, footer="distill")


def everything(text: str) -> str:
    """A page with a text at every place that there is."""
    figure = FIGURE._replace(title=text, x_label=text, levels=[(text, 0.5)])
    wide = Heatmap(text, text, text, ["a"], [text] * 25, [[0.987654] * 25], text)
    inner = [
        Text(text),
        Code(text, text),
        Table(text, [text, text], [[text, text]], strong=[0], numeric=[1], name=text, data=text),
        Picture(figure, text, text),
        Picture(wide, text, text),
        Gallery([Image(png(), [text, text], text)], text),
        Facts([(text, text)], text),
    ]
    return report.page(
        text,
        verdict=[text, text],
        blocks=[*[Heading(text)] * 5, *inner, Details(text, [Heading(text), *inner])],
        footer=text,
        data={text: text},
    )


@pytest.mark.parametrize("text", HOSTILE)
def test_a_text_is_shown_as_it_is_wherever_it_stands(text: str) -> None:
    html = everything(text)
    parsed = Page(html)
    assert not parsed.open
    tags = {tag for tag, _, _ in parsed.elements}
    assert tags <= {
        *("html", "head", "meta", "title", "link", "style", "body", "main", "div", "footer"),
        *("h1", "h2", "h3", "p", "figure", "figcaption", "pre", "code", "a", "nav", "ul", "li"),
        *("table", "thead", "tbody", "tr", "th", "td", "img", "dl", "dt", "dd", "span"),
        *("details", "summary", "svg", "desc", "path", "text", "circle", "polyline", "polygon"),
    }
    assert "<script" not in html
    for _, attributes, _ in parsed.elements:
        assert not [name for name in attributes if name.startswith("on")]
        assert re.match("data:|#", attributes.get("href") or "data:")
        assert (attributes.get("src") or "data:").startswith("data:image/png;base64,") or (
            "src" not in attributes
        )
        style = attributes.get("style") or ""
        assert re.fullmatch(r"((max|min)-width:[\d.]+(rem|px))?", style)
    shown = ("h1", "h2", "h3", "figcaption", "code", "td", "th", "title", "dt", "dd", "summary")
    for tag in shown:
        assert text in [content for _, content in parsed.all(tag)], tag
    assert [content for _, content in parsed.all("p")][:3] == [text] * 3
    assert {a["alt"] for a, _ in parsed.all("img")} == {text}
    assert [content for a, content in parsed.all("a") if (a["href"] or "")[0] == "#"] == [text] * 5
    assert {a.get("download") for a, _ in parsed.all("a")} == {
        *(f"{text}.{k}" for k in ("svg", "png", "csv")),
        text,
        None,
    }


def test_characters_that_no_file_can_hold_are_left_out() -> None:
    html = everything("a\x00b\ud800c\x1b[0m")
    html.encode()
    assert "a b c [0m" in html
    assert Page(html).all("code")[0][1] == "a b c [0m"
    assert "one\n\ttwo" in page(Code("one\n\ttwo"))


def test_nothing_is_fetched_and_nothing_runs() -> None:
    html = page(PICTURE, PICTURE, TABLE, Gallery([Image(png(), (), "An image")]))
    assert html.count("http") == html.count('"http://www.w3.org/2000/svg"') + html.count(
        "http-equiv"
    )
    assert not re.search(r"<script|@import|url\(|\bsrcset|<iframe|<object|<form", html)
    for _, attributes, _ in Page(html).elements:
        for address in (attributes.get("href"), attributes.get("src")):
            assert (address or "data:").startswith("data:")
    policy = [a["content"] for a, _ in Page(html).all("meta") if "http-equiv" in a]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_the_policy_stands_before_what_it_governs() -> None:
    html = page(PICTURE)
    assert html.index("Content-Security-Policy") < html.index("<link") < html.index("<style")


def test_the_page_says_its_language_width_and_title() -> None:
    parsed = Page(page())
    assert parsed.all("html")[0][0] == {"lang": "en"}
    names = {a.get("name"): a.get("content") for a, _ in parsed.all("meta")}
    assert names["viewport"] == "width=device-width, initial-scale=1"
    assert names["color-scheme"] == "light dark"
    assert [text for _, text in parsed.all("h1")] == ["The report"]
    assert parsed.all("title")[0][1] == "The report"


def test_the_verdict_stands_before_the_evidence() -> None:
    parsed = Page(page(Text("Evidence."), TABLE, verdict=("Four is best.", "By one point.")))
    paragraphs = [(a.get("class"), text) for a, text in parsed.all("p")]
    assert paragraphs == [
        ("verdict", "Four is best."),
        ("verdict", "By one point."),
        (None, "Evidence."),
        ("files", "Download CSV"),
    ]


def test_a_pictures_files_are_those_of_the_plot() -> None:
    parsed = Page(page(PICTURE))
    files = {a["download"]: a["href"] for a, _ in parsed.all("a")}
    expected = {
        "sweep.svg": ("image/svg+xml", plot.svg(FIGURE).encode()),
        "sweep.png": ("image/png", drawing.png(plot.layout(FIGURE), scale=2)),
        "sweep.csv": ("text/csv;charset=utf-8", PICTURE.data.encode()),
    }
    assert list(files) == list(expected)
    for name, (media, content) in expected.items():
        head, _, data = (files[name] or "").partition(";base64,")
        assert head == f"data:{media}"
        assert base64.b64decode(data) == content
    assert {a["aria-label"] for a, _ in parsed.all("a")} == {
        f"Accuracy, {kind}" for kind in ("SVG", "PNG", "CSV")
    }
    assert plot.svg(FIGURE) in page(PICTURE)


def test_a_table_has_heads_of_columns_and_rows() -> None:
    parsed = Page(page(TABLE))
    heads = [(a.get("scope"), a.get("class"), text) for a, text in parsed.all("th")]
    assert heads == [
        ("col", None, "Temperature"),
        ("col", "number", "Top-1"),
        ("row", None, "1"),
        ("row", None, "2"),
    ]
    assert [(a, text) for a, text in parsed.all("td")] == [
        ({"class": "number"}, "50 %"),
        ({"class": "number"}, "60 %"),
    ]
    assert [a.get("class") for a, _ in parsed.all("tr")] == [None, None, "strong"]
    assert parsed.all("figcaption")[0][1] == "All temperatures"
    (box,) = (a for a, _ in parsed.all("div") if a.get("class") == "wide")
    assert box["aria-label"] == "All temperatures"
    assert box["tabindex"] == "0"  # so that it scrolls without a mouse


def test_blocks_stand_in_their_order() -> None:
    inner = Details("Eight", [Text("Nine"), Heading("Ten"), Details("Eleven", [Text("Twelve")])])
    html = page(
        *(Heading("One"), Text("Two"), Code("Three"), TABLE, PICTURE),
        *(Gallery([Image(png(), ["Six"], "")]), Facts([("Seven", "")]), inner, Heading("End")),
    )
    places = [
        html.index(mark)
        for mark in (
            *("One</h2>", "Two</p>", "Three</code>", "<table", 'class="picture"', "Six</p>"),
            *("Seven</dt>", "Eight</summary>", "Nine</p>", "Ten</h3>", "Eleven</summary>"),
            *("Twelve</p>", "</details>", "End</h2>"),
        )
    ]
    assert places == sorted(places)


def test_a_page_without_a_footer_has_none() -> None:
    assert not Page(report.page("The report", verdict=(), blocks=())).all("footer")
    assert Page(page()).all("footer") == [({}, "distill")]


def test_code_without_a_caption_has_none() -> None:
    assert not Page(page(Code("x"))).all("figcaption")


def test_a_picture_that_cannot_be_drawn_is_refused() -> None:
    broken = FIGURE._replace(series=[Series("Student", [1], [float("nan")])])
    with pytest.raises(ValueError, match="Student: nan is not a finite number"):
        page(Picture(broken, "sweep", ""))


@pytest.mark.parametrize(
    "figure",
    [
        Bars("B", "x", ["a"], [BarSeries("s", [1.0])]),
        Heatmap("H", "x", "y", ["a"], ["b"], [[1.0]]),
        Confusion("C", ["a", "b"], [[1, 2], [3, 4]]),
        Reliability("R", [SURE]),
    ],
    ids=lambda figure: type(figure).__name__,
)
def test_a_picture_may_be_of_any_kind(figure: plot.Plot) -> None:
    html = page(Picture(figure, "name", ""))
    assert plot.svg(figure) in html
    assert not re.search("min-width:[0-9]+px", html)


def test_a_wide_picture_scrolls_on_a_phone() -> None:
    wide = Heatmap("H", "x", "y", ["a"], [f"c{i}" for i in range(25)], [[0.875] * 25], percent=True)
    drawn = plot.layout(wide)
    assert drawn.width > 500
    parsed = Page(page(Picture(wide, "name", "")))
    (box,) = (a for a, _ in parsed.all("div") if a.get("class") == "wide")
    assert (box["role"], box["aria-label"], box["tabindex"]) == ("region", "H", "0")
    (inner,) = (a["style"] or "" for a, _ in parsed.all("div") if "style" in a)
    least = float(inner.removeprefix("min-width:").removesuffix("px"))
    assert 13.5 * least / drawn.width > 10.5  # px, the smallest text


def test_a_table_can_be_kept() -> None:
    def kept(table: Table) -> tuple[str, str]:
        ((attributes, _),) = Page(page(table)).all("a")
        head, _, data = (attributes["href"] or "").partition(";base64,")
        assert head == "data:text/csv;charset=utf-8"
        return attributes["download"] or "", base64.b64decode(data).decode()

    assert kept(TABLE) == ("all-temperatures.csv", "Temperature,Top-1\n1,50 %\n2,60 %\n")
    assert kept(TABLE._replace(name="all", data="t,top1\n1,0.5\n")) == (
        "all.csv",
        "t,top1\n1,0.5\n",
    )
    assert kept(TABLE._replace(caption="中文"))[0] == "table.csv"


def test_images_are_within_the_page_and_small_ones_are_shown_pixel_by_pixel() -> None:
    items = [
        Image(png(28), ("label: boot", "student: sandal"), "A boot"),
        Image(png(224), (), "Another"),
    ]
    parsed = Page(page(Gallery(items, "The worst")))
    small, large = (a for a, _ in parsed.all("img"))
    assert base64.b64decode((small["src"] or "").partition(";base64,")[2]) == items[0].png
    assert (small["alt"], small["width"], small["height"]) == ("A boot", "28", "28")
    assert (small["class"], large.get("class"), large["width"]) == ("small", None, "224")
    assert [text for _, text in parsed.all("p")][1:] == ["label: boot", "student: sandal"]
    assert parsed.all("figcaption") == [({}, "The worst")]
    with pytest.raises(ValueError, match="A boot: not a PNG"):
        page(Gallery([Image(b"<svg>", (), "A boot")]))


def test_facts_are_names_and_values() -> None:
    parsed = Page(page(Facts([("torch", "2.14"), ("seeds", "0, 1")], "Environment")))
    assert [text for _, text in parsed.all("dt")] == ["torch", "seeds"]
    assert [text for _, text in parsed.all("dd")] == ["2.14", "0, 1"]
    assert parsed.all("figcaption") == [({}, "Environment")]


def test_details_are_closed_and_shown_on_paper() -> None:
    html = page(Details("More", [Text("Within."), TABLE]))
    ((attributes, text),) = Page(html).all("details")
    assert attributes == {}
    assert "Within." in text
    on_paper = html.partition("@media print")[2].partition("</style>")[0]
    assert "details::details-content { content-visibility: visible;" in on_paper


def test_a_long_page_has_links_to_its_headings() -> None:
    names = ("Accuracy", "Accuracy", "Über β_2: 97 %", "中文", "", "part", "accuracy-2")
    parsed = Page(page(*(Heading(name) for name in names), Details("d", [Heading("Inner")])))
    ids = [a["id"] for a, _ in parsed.all("h2")]
    assert ids == [
        *("accuracy", "accuracy-2", "uber-2-97", "part", "part-2", "part-3", "accuracy-2-2"),
    ]
    assert [(a["href"], text) for a, text in parsed.all("a")] == [
        (f"#{anchor}", name) for anchor, name in zip(ids, names, strict=True)
    ]
    assert parsed.all("nav")[0][0] == {"aria-label": "Contents"}
    assert parsed.all("h3") == [({}, "Inner")]
    short = Page(page(Heading("One"), Heading("Two"), Heading("Three")))
    assert not short.all("nav")
    assert [a["id"] for a, _ in short.all("h2")] == ["one", "two", "three"]


def test_files_to_keep_are_in_the_footer() -> None:
    html = report.page(
        "R", verdict=(), blocks=(), footer="distill", data={"r.json": "{}", "r.yaml": "a: é\n"}
    )
    parsed = Page(html)
    assert [text for _, text in parsed.all("footer")] == ["distill · Download r.json r.yaml"]
    kept = {a["download"]: (a["href"] or "").split(";base64,") for a, _ in parsed.all("a")}
    assert kept["r.json"] == ["data:application/json", base64.b64encode(b"{}").decode()]
    assert base64.b64decode(kept["r.yaml"][1]).decode() == "a: é\n"
    without = Page(report.page("R", verdict=(), blocks=(), data={"r.json": "{}"}))
    assert [text for _, text in without.all("footer")] == ["Download r.json"]
