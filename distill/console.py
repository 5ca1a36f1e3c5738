"""What a user sees: results on stdout, everything else on stderr."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape

out = Console()
err = Console(stderr=True)


def say(text: str) -> None:
    """A line for the user, on stderr."""
    err.print(escape(text), soft_wrap=True, highlight=False)


def warn(text: str) -> None:
    """A line that the user should act on, on stderr."""
    err.print(f"[bold yellow]warning[/]: {escape(text)}", soft_wrap=True, highlight=False)


def fail(text: str, *, hint: str = "") -> None:
    """An error and what to do about it, on stderr."""
    err.print(f"[bold red]error[/]: {escape(text)}", soft_wrap=True, highlight=False)
    if hint:
        err.print(f"[bold]hint[/]: {escape(hint)}", soft_wrap=True, highlight=False)
