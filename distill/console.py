"""What a user sees: results on stdout, everything else on stderr."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape

out = Console()
err = Console(stderr=True)


def say(text: str) -> None:
    """A line for the user, on stderr."""
    err.print(plain(text), soft_wrap=True, highlight=False)


def warn(text: str) -> None:
    """A line that the user should act on, on stderr."""
    err.print(f"[bold yellow]warning[/]: {plain(text)}", soft_wrap=True, highlight=False)


def fail(text: str, *, hint: str = "") -> None:
    """An error and what to do about it, on stderr."""
    err.print(f"[bold red]error[/]: {plain(text)}", soft_wrap=True, highlight=False)
    if hint:
        err.print(f"[bold]hint[/]: {plain(hint)}", soft_wrap=True, highlight=False)


def plain(text: str) -> str:
    """The text without a meaning to rich or to the terminal: names of files can be anything."""
    shown = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
    return escape(shown)
