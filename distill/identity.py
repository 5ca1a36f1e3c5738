"""Whether what lies on disk was made from the same things as what is wanted now."""

from __future__ import annotations

import re
from typing import Any

from distill.errors import IdentityError

_LISTED = 8  # differences that an error names


def require_same(before: Any, now: Any, *, origin: str, hint: str) -> None:
    """Raise if two pieces of plain data differ.

    Raises:
        IdentityError: With every field in which they do, up to eight.
    """
    if changed := differences(before, now):
        more = f" and {len(changed) - _LISTED} more" if len(changed) > _LISTED else ""
        raise IdentityError(f"{origin}: " + "; ".join(changed[:_LISTED]) + more, hint=hint)


def require_known(found: Any, known: int, origin: str) -> None:
    """Raise if a newer version wrote a file, before the rest of it is looked at.

    Args:
        found: The number of its format; what is no number is for the reader to refuse.
        known: The newest that this version knows.
        origin: The file.

    Raises:
        IdentityError: If it did.
    """
    if isinstance(found, int) and found > known:
        raise IdentityError(
            f"{origin}: written by a newer version (format {found}, known is {known})",
            hint="update distill: pip install --upgrade distill-kd",
        )


def differences(before: Any, now: Any, at: str = "") -> list[str]:
    """The fields in which two pieces of plain data differ, as `a.b: old -> new`."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [*before, *(k for k in now if k not in before)]
        return [
            line
            for key in keys
            for line in differences(before.get(key), now.get(key), f"{at}.{key}" if at else key)
        ]
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        pairs = enumerate(zip(before, now, strict=True))
        return [line for i, (b, n) in pairs for line in differences(b, n, f"{at}.{i}")]
    return [] if before == now else [f"{at}: {_shown(before)} -> {_shown(now)}"]


def _shown(value: Any) -> str:
    """A value in an error; of a hash its beginning, which is all that anyone compares by eye."""
    if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value):
        return value[:12]
    return f"{value!r:.80}"
