"""What others wrote is shown by a real parser of Markdown, and never obeyed."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

from distill.export.card import markdown


def parsed(text: str) -> list[Token]:
    return MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text)


def inlines(tokens: list[Token]) -> list[Token]:
    return [child for token in tokens for child in token.children or ()]


def words(token: Token) -> str:
    """What a reader sees of a piece of text."""
    return "".join(child.content for child in token.children or ())


def written(name: str) -> str:
    return markdown.line(name.replace("\\", "\\\\")) or '""'


@given(st.text())
@example("a\\|b|\\")
@example("` |`` \\")
@example("   ")
def test_a_name_is_shown_as_it_is_written(name: str) -> None:
    (child,) = inlines(parsed(f"x {markdown.name(name)}"))[1:]
    assert (child.type, child.content) == ("code_inline", written(name))
    shown = parsed(markdown.table(("a", "b"), [(markdown.name(name), "c")]))
    cells = [token for token in shown if token.type == "inline"]
    assert [words(cell) for cell in cells] == ["a", "b", written(name), "c"]


@given(st.text())
@example("a|b")
@example("<b>&amp;")
def test_a_text_is_shown_as_it_is(told: str) -> None:
    (paragraph,) = [t for t in parsed(f"x {markdown.text(told)} x") if t.type == "inline"]
    assert {child.type for child in paragraph.children or ()} == {"text"}
    assert words(paragraph) == f"x {markdown.line(told)} x"
    shown = parsed(markdown.table(("a",), [(told,)]))
    cells = [token for token in shown if token.type == "inline"]
    assert [words(cell) for cell in cells] == ["a", markdown.line(told).strip()]


@given(st.text())
@example("```\n</details>\n````")
def test_nothing_ends_a_block_of_code(told: str) -> None:
    (token,) = parsed(markdown.fenced(told, "yaml"))
    assert token.type == "fence"
    assert token.info == "yaml"


def test_parts_are_listed_as_people_do() -> None:
    assert markdown.listed([]) == ""
    assert markdown.listed(["a"]) == "a"
    assert markdown.listed([1, 2]) == "1 and 2"
    assert markdown.listed(["a", markdown.name("b"), "<c>"]) == "a, `b` and &#60;c&#62;"
