"""Files that nobody wrote: sound ones, damaged as chance and malice damage them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

Files = dict[str, bytes]

DEEP = 100_000  # brackets in a text
DIGITS = 10_000  # of a number

# What tends to be where a reader does not expect it.
TOKENS: tuple[bytes, ...] = (
    b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\r\n", b"\t", b"\n---\n", b"{", b"}",
    b"[", b"]", b'"', b"'", b":", b"- ", b",", b"#", b"&a ", b"*a", b"<<: ", b"!!python/name:os ",
    b"!!binary ", b"? ", b"| ", b"> ", b"%YAML 9\n", b"null", b"NaN", b"-Infinity", b"1e999", b"-1",
    b"18446744073709551616", b"9" * 400, b"9" * DIGITS, b"\\ud800", b"\\u0000", b"../" * 9, b"/",
    b"[" * 2000, b"[" * DEEP, b'{"a":' * 2000, b"A" * 5000, b"\x1b[2J", b"$(id)", b"${HOME}", b"~",
)  # fmt: skip

VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 255, 256, 2**15, 2**31, 2**32, 2**63 - 1, 2**63, 2**64,
    10**30, -(10**30), 0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"), "", "a", "kd", "auto",
    "\0", "\ud800", "\u202e", "x" * 2000, "../../x", "/dev/null", "os:abort", "resnet8", "hf/a/b",
    "timm/vit_huge_patch14_224", "1e-3", "s3://nowhere/x", "0x10", [], {}, [[]], [None], [0],
    [1, 2], {"": 0}, {"a": {"b": {}}}, list(range(300)), ["a"] * 300,
)  # fmt: skip


def damaged(rng: Random, data: bytes, other: bytes) -> bytes:
    """The bytes with one to four accidents; `other` is what may be spliced in."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(len(found) + 1)
        end = min(len(found), at + rng.choice((1, 2, 8, 64, 1000)))
        match rng.randrange(8):
            case 0 if found:
                found[at - 1] ^= 1 << rng.randrange(8)
            case 1:
                del found[at:]
            case 2:
                del found[at:end]
            case 3:
                start = rng.randrange(len(other) + 1)
                found[at:end] = other[start : start + rng.choice((1, 8, 64, 1000))]
            case 4:
                found[at:at] = rng.choice(TOKENS)
            case 5:
                found[at:at] = found[at:end] * rng.choice((1, 2, 50))
            case 6:
                width = rng.choice((1, 2, 4, 8))
                value = rng.choice((0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, rng.getrandbits(64)))
                found[at : at + width] = (value % 256**width).to_bytes(
                    width, rng.choice(("little", "big"))
                )
            case _:
                found[at:end] = rng.randbytes(end - at)
    return bytes(found)


def changed(rng: Random, value: Any) -> Any:
    """The data with one to three of its values, keys or lengths changed, in a copy."""
    found = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 2, 3))):
        found = _changed(rng, found)
    return found


def _value(rng: Random) -> Any:
    return copy.deepcopy(rng.choice(VALUES))


def _changed(rng: Random, value: Any) -> Any:
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        match rng.randrange(8):
            case 0:
                del value[key]
            case 1:
                value[rng.choice(("", "extra", key + "x", "__class__", "a" * 300))] = value.pop(key)
            case 2:
                value[rng.choice(("extra", "__metadata__", "self", "0"))] = _value(rng)
            case _:
                value[key] = _changed(rng, value[key])
        return value
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        match rng.randrange(6):
            case 0:
                del value[at]
            case 1:
                value.insert(at, _value(rng))
            case 2:
                return value * 40
            case _:
                value[at] = _changed(rng, value[at])
        return value
    if isinstance(value, int) and not isinstance(value, bool) and rng.random() < 0.4:
        return value * rng.choice((-1, 2, 1000, 2**32)) + rng.choice((-1, 0, 1))
    return _value(rng)


def dumped(rng: Random, value: Any) -> bytes:
    """Data as JSON, and sometimes as JSON that no program would write."""
    text = json.dumps(value, indent=rng.choice((None, 1)), ensure_ascii=rng.random() < 0.8)
    data = text.encode(errors="surrogatepass")
    return damaged(rng, data, data) if rng.random() < 0.1 else data


class Mutator:
    """Makes sets of files from sound ones.

    Args:
        seeds: Sound sets of files, by name.
        remade: Makes files whose checksums are right, and whose content is not what it should be.
    """

    def __init__(
        self, seeds: Sequence[Files], remade: Sequence[Callable[[Random], Files]] = ()
    ) -> None:
        self.seeds, self.remade = list(seeds), list(remade)

    def __call__(self, rng: Random) -> Files:
        """The next set."""
        if self.remade and rng.random() < 0.6:
            return rng.choice(self.remade)(rng)
        files = dict(rng.choice(self.seeds))
        name = rng.choice(sorted(files))
        files[name] = damaged(rng, files[name], rng.choice(list(files.values())))
        if rng.random() < 0.05:
            del files[name]
        return files
