"""YAML as people expect it: 1e-3 is a number, `no` is a word, a key stands once."""

from __future__ import annotations

import math
import re
from typing import Any

import yaml

Path = tuple[str | int, ...]

MAX_CHARACTERS = 1_000_000
MAX_NODES = 10_000  # a recipe has hundreds; an alias bomb has billions
_TOO_MANY = f"more than {MAX_NODES:,} values"


class YamlError(ValueError):
    """A text that is not the YAML we accept.

    Attributes:
        problems: (line, what is wrong) for every fault found; lines count from 1.
    """

    def __init__(self, problems: list[tuple[int, str]]) -> None:
        super().__init__("; ".join(f"line {line}: {what}" for line, what in problems))
        self.problems = problems


class _Loader(yaml.SafeLoader):
    """SafeLoader with the YAML 1.2 core scalars (PyYAML's own are YAML 1.1)."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012 (PyYAML's own name)
    nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.nodes += 1
        if self.nodes > MAX_NODES:  # a megabyte of them would take seconds
            line = self.peek_event().start_mark.line + 1  # type: ignore[no-untyped-call]
            raise YamlError([(line, _TOO_MANY)])
        node: yaml.Node | None = super().compose_node(parent, index)
        return node


_SCALARS = {
    "null": re.compile(r"^(?:null|Null|NULL|~|)$"),
    "bool": re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"),
    "int": re.compile(r"^[-+]?[0-9]+$"),
    "float": re.compile(r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$"),
}
for _tag, _pattern in _SCALARS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, None)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))
_Loader.add_constructor("tag:yaml.org,2002:float", lambda loader, node: float(node.value))


def load(text: str) -> tuple[Any, dict[Path, int]]:
    """Parse `text`; return the data and the 1-based line on which each key stands.

    Raises:
        YamlError: On a syntax error, repeated keys, or a text too large to be a recipe.
    """
    if len(text) > MAX_CHARACTERS:
        raise YamlError([(1, f"{len(text):,} characters; a recipe has at most {MAX_CHARACTERS:,}")])
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        lines: dict[Path, int] = {}
        if node is None:
            return {}, {(): 1}
        problems: list[tuple[int, str]] = []
        _walk(node, (), lines, problems)
        if problems:
            raise YamlError(problems)
        return loader.construct_document(node), lines
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise YamlError([(line, f"character U+{error.character:04X} is not allowed")]) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = (mark.line + 1, f" (column {mark.column + 1})") if mark else (1, "")
        raise YamlError([(where[0], f"{error.problem}{where[1]}")]) from None
    except RecursionError:
        raise YamlError([(1, "nested too deeply")]) from None


def dump(data: Any) -> str:
    """`data` as YAML that `load` reads back, keys in their own order."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes strings by YAML 1.2's rules and writes floats that `load` reads."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_float(dumper: _Dumper, value: float) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:float", repr(value))


def _represent_str(dumper: _Dumper, value: str) -> yaml.ScalarNode:
    # PyYAML reads these line breaks of Unicode back as spaces unless they are escaped.
    style = '"' if any(mark in value for mark in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(float, _represent_float)
_Dumper.add_representer(str, _represent_str)


def _walk(
    node: yaml.Node, path: Path, lines: dict[Path, int], problems: list[tuple[int, str]]
) -> None:
    lines.setdefault(path, node.start_mark.line + 1)
    if len(lines) > MAX_NODES:
        raise YamlError([(1, _TOO_MANY)])
    if what := _fault(node):
        problems.append((node.start_mark.line + 1, what))
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
                problems.append((line, "a key must be a word"))
                continue
            here = (*path, key.value)
            if here in lines:
                first = f"first on line {lines[here]}"
                problems.append((line, f"{key.value}: the key stands twice, {first}"))
                continue
            lines[here] = line
            _walk(value, here, lines, problems)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            _walk(value, (*path, i), lines, problems)


def _fault(node: yaml.Node) -> str:
    """What is wrong with a value in itself: a foreign tag, or a number that no computer holds."""
    kind = node.tag.rpartition(":")[2]
    if isinstance(node, yaml.ScalarNode) and kind in _SCALARS:
        if not _SCALARS[kind].match(node.value):
            return f"{node.value!r:.40} is tagged as {kind}, and is none"
        if kind == "int" and (len(node.value) > 20 or not -(2**63) <= int(node.value) < 2**63):
            return f"{node.value:.40}: a whole number has at most 64 bits"
        if kind == "float" and math.isinf(float(node.value)):
            return f"{node.value:.40}: too large for a number"
    elif kind not in ("str", "map", "seq"):
        return f"the tag {node.tag!r:.80} is not allowed"
    return ""
