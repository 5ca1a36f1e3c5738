"""A report is one safe file: it fetches nothing, runs nothing, and shows texts as they are."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser

import pytest

from distill.report import page as report
from distill.report import plot
from distill.report.page import Block, Code, Heading, Picture, Table, Text
from distill.report.plot import Figure, Series

FIGURE = Figure("Accuracy", "Temperature", "Top-1", [Series("Student", [1, 2], [0.5, 0.6])])
PICTURE = Picture(FIGURE, "sweep", "temperature,top1\n1,0.5\n2,0.6\n")
TABLE = Table(
    "All temperatures",
    ["Temperature", "Top-1"],
    [["1", "50 %"], ["2", "60 %"]],
    strong=[1],
    numeric=[1],
)
HOSTILE = (
    "<script>alert(1)</script>",
    "\"><img src=x onerror='alert(1)'>",
    "a & b &amp; {{ 7 * 7 }} {% raw %}",
    "javascript:alert(1)",
    "emoji 😀, ends --> ]]>",
)
VOID = {"meta", "link"}


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
    return report.page(
        text,
        verdict=[text, text],
        blocks=[
            Heading(text),
            Text(text),
            Code(text, text),
            Table(text, [text, text], [[text, text]], strong=[0], numeric=[1]),
            Picture(figure, text, text),
        ],
        footer=text,
    )


@pytest.mark.parametrize("text", HOSTILE)
def test_a_text_is_shown_as_it_is_wherever_it_stands(text: str) -> None:
    html = everything(text)
    parsed = Page(html)
    assert not parsed.open
    tags = {tag for tag, _, _ in parsed.elements}
    assert tags <= {
        *("html", "head", "meta", "title", "link", "style", "body", "main", "div", "footer"),
        *("h1", "h2", "p", "figure", "figcaption", "pre", "code", "a"),
        *("table", "thead", "tbody", "tr", "th", "td"),
        *("svg", "desc", "rect", "text", "circle", "polyline", "polygon"),
    }
    assert "<script" not in html
    for _, attributes, _ in parsed.elements:
        assert not [name for name in attributes if name.startswith("on")]
        assert not (attributes.get("href") or "").startswith("javascript")
    for tag in ("h1", "h2", "figcaption", "code", "td", "th", "footer", "title"):
        assert text in [content for _, content in parsed.all(tag)], tag
    assert [content for _, content in parsed.all("p")][:3] == [text] * 3
    assert {a["download"] for a, _ in parsed.all("a")} == {
        f"{text}.{k}" for k in ("svg", "png", "csv")
    }


def test_characters_that_no_file_can_hold_are_left_out() -> None:
    html = everything("a\x00b\ud800c\x1b[0m")
    html.encode()
    assert "a b c [0m" in html
    assert Page(html).all("code")[0][1] == "a b c [0m"
    assert "one\n\ttwo" in page(Code("one\n\ttwo"))


def test_nothing_is_fetched_and_nothing_runs() -> None:
    html = page(PICTURE, PICTURE, TABLE)
    assert html.count("http") == html.count('"http://www.w3.org/2000/svg"') + html.count(
        "http-equiv"
    )
    assert not re.search(r"<script|@import|url\(|\bsrc=|srcset|<iframe|<object|<form", html)
    for _, attributes, _ in Page(html).elements:
        assert (attributes.get("href") or "data:").startswith("data:")
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
    ]


def test_a_pictures_files_are_those_of_the_plot() -> None:
    parsed = Page(page(PICTURE))
    files = {a["download"]: a["href"] for a, _ in parsed.all("a")}
    expected = {
        "sweep.svg": ("image/svg+xml", plot.svg(FIGURE).encode()),
        "sweep.png": ("image/png", plot.png(FIGURE)),
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
    html = page(Heading("One"), Text("Two"), Code("Three"), TABLE, PICTURE, Heading("Six"))
    places = [
        html.index(mark)
        for mark in ("One</h2>", "Two</p>", "Three</code>", "<table", 'class="picture"', "Six</h2>")
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
