"""Tar archives, read by their headers alone: USTAR, GNU and PAX.

Python's `tarfile` makes an object a member and keeps them all; and what it takes for the end of an
archive may be damage.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

from distill.errors import DamagedError

BLOCK = 512

_WINDOW = 4096  # bytes read at a time: a header, a label and the next header
# Types of members.
_REGULAR = (b"\0", b"0", b"7")
_PAX, _PAX_GLOBAL, _LONG_NAME, _SPARSE = b"x", b"g", b"L", b"S"
_MOST_TEXT = 2**20  # bytes of a name, or of a PAX header
_MOST_DIGITS = 30  # of a number


class Member(NamedTuple):
    """A regular file in an archive."""

    name: str
    offset: int  # of its content
    size: int  # bytes


class Archive:
    """An archive that is open for reading at random.

    Args:
        descriptor: An open file.
        name: What errors call it.
    """

    def __init__(self, descriptor: int, name: str) -> None:
        self._descriptor, self._name = descriptor, name
        self._size = os.fstat(descriptor).st_size
        self._window, self._start = b"", 0

    def read(self, offset: int, size: int) -> bytes:
        """These bytes.

        Raises:
            DamagedError: If the archive ends before.
        """
        at = offset - self._start
        if at < 0 or at + size > len(self._window):
            self._window = os.pread(self._descriptor, max(size, _WINDOW), offset)
            self._start, at = offset, 0
        found = self._window[at : at + size]
        if len(found) < size:
            raise self._damaged(offset, f"cut short, {size - len(found):,} bytes are missing")
        return found

    def members(self) -> Iterator[Member]:
        """The regular files in it, in order.

        Raises:
            DamagedError: If a header is altered, or the archive is cut short.
        """
        at, name, pax = 0, "", dict[str, str]()
        while True:
            if at >= self._size:
                raise self._damaged(at, "cut short, the mark of its end is missing")
            header = self.read(at, BLOCK)
            if not any(header):
                return
            kind, size = header[156:157], self._checked(header, at)
            if kind not in (_PAX, _PAX_GLOBAL, _LONG_NAME) and "size" in pax:
                size = self._number(pax["size"], at, base=10)
            start, at = at + BLOCK, at + BLOCK + -(-size // BLOCK) * BLOCK
            if start + size > self._size:
                missing = start + size - self._size
                raise self._damaged(start - BLOCK, f"cut short, {missing:,} bytes are missing")
            if kind in (_PAX, _LONG_NAME):
                if size > _MOST_TEXT:
                    raise self._damaged(start - BLOCK, f"a name of {size:,} bytes")
                text = self.read(start, size)
                if kind == _PAX:
                    pax = self._records(text, start)
                else:
                    name = _text(text)
                continue
            if kind == _SPARSE or any(key.startswith("GNU.sparse") for key in pax):
                raise self._damaged(start - BLOCK, "a sparse file, which is not supported")
            own = pax.get("path") or name or _name(header)
            if kind in _REGULAR and not own.endswith("/"):
                yield Member(own, start, size)
            if kind != _PAX_GLOBAL:
                name, pax = "", {}

    def _checked(self, header: bytes, at: int) -> int:
        """The size that a header states."""
        stated = self._number(_text(header[148:156]), at, base=8)
        if stated != sum(header) - sum(header[148:156]) + 8 * ord(" "):
            raise self._damaged(at, "no tar header, or an altered one")
        if header[124] & 0x80:  # in base 256, which has no limit of 8 GB
            return int.from_bytes(header[124:136], "big") - (0x80 << 88)
        return self._number(_text(header[124:136]), at, base=8)

    def _number(self, text: str, at: int, *, base: int) -> int:
        digits = text.strip()[: _MOST_DIGITS + 1] or "0"
        if len(digits) > _MOST_DIGITS:
            raise self._damaged(at, "an altered header, with a number of many digits")
        if not digits.isascii() or not digits.isdigit() or (base == 8 and max(digits) > "7"):
            raise self._damaged(at, "no tar header, or an altered one")
        return int(digits, base)

    def _records(self, text: bytes, at: int) -> dict[str, str]:
        """The `length key=value` lines of a PAX header."""
        found, position = {}, 0
        while position < len(text):
            digits = text[position:].partition(b" ")[0]
            length = int(digits) if digits.isdigit() and len(digits) <= _MOST_DIGITS else 0
            line = text[position : position + length]
            key, equals, value = line[len(digits) + 1 : -1].partition(b"=")
            if not equals or line[-1:] != b"\n":
                raise self._damaged(at, "an altered PAX header")
            found[_text(key)] = _text(value)
            position += length
        return found

    def _damaged(self, at: int, what: str) -> DamagedError:
        return DamagedError(f"{self._name}: at byte {at:,}: {what}")


def _name(header: bytes) -> str:
    name, prefix = _text(header[:100]), _text(header[345:500])
    # GNU keeps other things where USTAR keeps the beginning of a long name.
    return f"{prefix}/{name}" if prefix and header[257:263] == b"ustar\x00" else name


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode(errors="surrogateescape")
