from __future__ import annotations

import contextlib
import math
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill import yamlio
from distill.errors import RecipeError
from distill.recipe import Recipe
from tests.promises import Measured


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1e3", 1000.0),
        ("1E+3", 1000.0),
        ("-.5", -0.5),
        ("5.", 5.0),
        ("no", "no"),
        ("on", "on"),
        ("yes", "yes"),
        ("Off", "Off"),
        ("true", True),
        ("False", False),
        ("010", 10),
        ("0x10", "0x10"),
        ("1_000", "1_000"),
        ("+1", 1),
        ("12:30", "12:30"),
        ("2020-01-01", "2020-01-01"),
        ("~", None),
        ("", None),
        ("null", None),
        ("'1e-3'", "1e-3"),
        (".inf", ".inf"),
        (".nan", ".nan"),
        ("=", "="),
        (str(2**63 - 1), 2**63 - 1),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    found = yamlio.load(f"a: {text}")[0]["a"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("a: 1\nb: 2\na: 3", 3, "a: the key stands twice, first on line 1"),
        ("a:\n  b: 1\n  c: 2\n  b: 3", 4, "b: the key stands twice, first on line 2"),
        ("a: [1, 2", 1, "expected ',' or ']'"),
        ("a: 1\n\tb: 2", 2, "cannot start any token"),
        ("x: 1\na: b\n\x00", 3, "U+0000"),
        ("? [1, 2]\n: 3", 1, "a key must be a word"),
        ("a: 1\n2: b", 2, "a key must be a word"),
        ("a: 1\n!!int b: 2", 2, "a key must be a word"),
        ("a: !!int b", 1, "tagged as int"),
        ("a: !!float b", 1, "tagged as float"),
        ("a: !!bool b", 1, "tagged as bool"),
        ("a: !!timestamp b", 1, "not allowed"),
        ("a: !!set {b, c}", 1, "not allowed"),
        ("a: !!binary YQ==", 1, "not allowed"),
        ("b: 1\na: !!python/object/apply:os.getcwd []", 2, "not allowed"),
        (f"a: {'9' * 5000}", 1, "at most 64 bits"),
        (f"a: {2**63}", 1, "at most 64 bits"),
        ("a: 1e999", 1, "too large"),
        ("a: &x [*x]", 1, "nested too deeply"),
        ("a: *x", 1, "undefined alias"),
        ("a: 1\n---\nb: 2", 2, "another document"),
        ("[" * 5000 + "]" * 5000, 1, "nested too deeply"),
        ("{a: " * 5000 + "}" * 5000, 1, "nested too deeply"),
        ("a: " + "b" * yamlio.MAX_CHARACTERS, 1, "characters"),
    ],
)
def test_what_is_refused_and_on_which_line(text: str, line: int, what: str) -> None:
    with pytest.raises(yamlio.YamlError) as caught:
        yamlio.load(text)
    (found, message), *_ = caught.value.problems
    assert found == line
    assert what in message


def test_an_alias_bomb_is_refused_before_it_grows() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
    with pytest.raises(yamlio.YamlError, match="more than 10,000 values"):
        yamlio.load("\n".join(lines))


# What YAML 1.1, on which PyYAML stands, would make of a recipe, or what makes its parser suffer:
# the text of `optimizer.lr` or of a whole file, and the value or the line and part of the refusal.
HAZARDS: list[tuple[str, bytes, Any]] = [
    ("1e-3 is a number", b"1e-3", 1e-3),
    ("1e3 is a number", b"1e3", 1000.0),
    ("no and on are words", b"no", ":4: optimizer.lr: should be a valid number, got 'no'"),
    ("010 is ten", b"010", 10.0),
    ("12:30 is a word", b"12:30", ":4: optimizer.lr: should be a valid number, got '12:30'"),
    ("a date is a word", b"2020-01-01", ":4: optimizer.lr: should be a valid number"),
    ("a key twice", b"1\n  lr: 2", ":5: lr: the key stands twice, first on line 4"),
    ("an alias bomb", b"[&a [x, x], " + b"*a, " * 9000 + b"]", "more than 10,000 values"),
    ("5,000 levels", b"[" * 5000 + b"]" * 5000, "nested too deeply"),
    ("a tab", b"\t1\n\tx: 2", ":4: found character '\\t' that cannot start any token (column 7)"),
    ("more than 1 MB", b"1 # " + b"x" * 1_000_000, "characters; a recipe has at most"),
    ("a byte-order mark", b"\xef\xbb\xbf", 0.5),
    ("Windows' lines", b"\r\n", 0.5),
    ("no UTF-8", b"1 # \xff", ":4: not a text file in UTF-8"),
    ("a NUL", b"1 # \0", ":4: character U+0000 is not allowed"),
    ("two documents", b"1\n---\na: 1", "found another document"),
    ("a tag of Python", b"!!python/name:os.system", ":4: the tag 'tag:yaml.org,2002:python/name"),
]
SOUND = b"""data: {name: digits}
student: {model: resnet8}
optimizer:
  lr: 0.5
objective: [{term: ce}]
train: {epochs: 1, batch_size: 30}
"""


@pytest.mark.promise("R15")
def test_no_value_means_something_else_than_it_says(tmp_path: Path, measured: Measured) -> None:
    path = tmp_path / "recipe.yaml"
    for name, text, expected in HAZARDS:
        whole = {b"\xef\xbb\xbf": text + SOUND, b"\r\n": SOUND.replace(b"\n", text)}
        path.write_bytes(whole.get(text, SOUND.replace(b"0.5", text)))
        began = time.process_time()
        if isinstance(expected, float):
            assert Recipe.load(path).optimizer.lr == expected, name
        else:
            with pytest.raises(RecipeError) as caught:
                Recipe.load(path)
            assert expected in str(caught.value), name
            assert str(caught.value).startswith(f"{path}:"), name
        assert time.process_time() - began < 1, name
    measured("hazards of YAML", f"{len(HAZARDS)} of {len(HAZARDS)} as written, or with the line")


@pytest.mark.promise("R15")
def test_an_override_is_read_as_the_file_is(tmp_path: Path, measured: Measured) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(SOUND)
    hazards = [hazard for hazard in HAZARDS if hazard[1] not in (b"\xef\xbb\xbf", b"\r\n")]
    for name, text, expected in hazards:
        given = f"optimizer.lr={text.decode(errors='surrogateescape')}"
        if isinstance(expected, float):
            assert Recipe.load(path, [given]).optimizer.lr == expected, name
        else:
            with pytest.raises(RecipeError, match=r"--set optimizer\.lr="):
                Recipe.load(path, [given])
    measured("the same hazards in --set", f"{len(hazards)} of {len(hazards)}")


@pytest.mark.parametrize(
    "text",
    ["- a\n" * 249_000, "[" + "a," * 490_000 + "]", "a: &a x\nb: [" + "*a," * 300_000 + "]",
     "".join(f"k{i}: 1\n" for i in range(90_000)), '"' + "\\x41" * 200_000 + '"'],
)  # fmt: skip
def test_a_megabyte_of_values_is_refused_at_once(text: str) -> None:
    began = time.process_time()
    with contextlib.suppress(yamlio.YamlError):
        yamlio.load(text)
    assert time.process_time() - began < 1


def test_recipes_that_name_recipes_without_end_are_refused(tmp_path: Path) -> None:
    for i in range(30):  # each names the next one twice: a billion in all
        teachers = f"teachers: [{{recipe: {i + 1}.yaml}}, {{recipe: {i + 1}.yaml, name: b}}]\n"
        (tmp_path / f"{i}.yaml").write_bytes(SOUND + teachers.encode())
    (tmp_path / "30.yaml").write_bytes(SOUND)
    with pytest.raises(RecipeError, match="more than 100 recipes"):
        Recipe.load(tmp_path / "0.yaml")


def test_a_file_without_an_end_is_not_read_to_its_end(tmp_path: Path) -> None:
    recipe = SOUND + b"teachers: [{recipe: /dev/zero}]\n"
    (tmp_path / "recipe.yaml").write_bytes(recipe)
    with pytest.raises(RecipeError, match="/dev/zero"):
        Recipe.load(tmp_path / "recipe.yaml")


def test_every_fault_is_found_at_once() -> None:
    with pytest.raises(yamlio.YamlError) as caught:
        yamlio.load("a: 1\na: 2\nb: 1e999\nc: {d: 1, d: 2}")
    assert [line for line, _ in caught.value.problems] == [2, 3, 4]


def test_the_line_of_every_key() -> None:
    data, lines = yamlio.load("a: 1\n\nb:\n  - c: 2\n    d: 3\n  - 4\n# end\n")
    assert data == {"a": 1, "b": [{"c": 2, "d": 3}, 4]}
    assert lines == {
        (): 1, ("a",): 1, ("b",): 3, ("b", 0): 4, ("b", 0, "c"): 4, ("b", 0, "d"): 5, ("b", 1): 6,
    }  # fmt: skip


def test_an_empty_text_is_an_empty_mapping() -> None:
    assert yamlio.load("") == ({}, {(): 1})
    assert yamlio.load("# nothing\n")[0] == {}


def test_a_byte_order_mark_is_passed_over() -> None:
    assert yamlio.load("\ufeffa: 1")[0] == {"a": 1}


words = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | words
    | st.sampled_from(["no", "1e-3", "~", "0x1", "<<", "=", "- a", "a: b", "#", "null", ""]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=4),
    max_leaves=20,
)


@settings(deadline=None)
@given(values)
def test_what_is_dumped_is_loaded_again(value: Any) -> None:
    found = yamlio.load(yamlio.dump({"value": value}))[0]["value"]
    assert found == value
    assert repr(found) == repr(value)  # 1 is not 1.0, and -0.0 is not 0.0


@settings(deadline=None)
@given(st.text(max_size=200))
def test_no_text_breaks_the_loader(text: str) -> None:
    lines = range(1, len(text.splitlines()) + 3)
    with contextlib.suppress(yamlio.YamlError):
        assert set(yamlio.load(text)[1].values()) <= set(lines)


def test_a_float_survives_to_the_last_bit() -> None:
    value = math.nextafter(0.1, 1)
    assert yamlio.load(yamlio.dump({"a": value}))[0]["a"] == value
