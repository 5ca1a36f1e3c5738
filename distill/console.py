"""What a user sees: results on stdout, everything else on stderr."""

from __future__ import annotations

import os
import re
import shlex
import sys
from contextlib import suppress
from typing import IO, Any, cast

from rich.console import Console
from rich.markup import escape

from distill.errors import PreflightError


class _Stderr:
    """stderr, whose reader may end first: a terminal that is closed, a `tee` that Ctrl-C ends too.

    What nobody reads is no reason to lose what is in work.
    """

    def write(self, text: str) -> int:
        """Say it, as far as it is heard."""
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        """Say it now."""
        self._try(self._stream.flush)

    def _try(self, act: Any, *arguments: str) -> None:
        try:
            act(*arguments)
        except OSError:
            with suppress(OSError):  # so that what is held back has somewhere to go in the end
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    @property
    def _stream(self) -> Any:
        return getattr(sys.stderr, "rich_proxied_file", sys.stderr)  # while a bar is shown

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Stdout:
    """stdout, where a result that could not be written must not pass for one that was."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Hand it over.

        Raises:
            PreflightError: If there is no room for it, or its disk fails.
        """
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        """Bring it to where it belongs.

        Raises:
            PreflightError: As `write`.
        """
        self._try(self._stream.flush)

    def _try(self, act: Any, *arguments: str) -> None:
        try:
            act(*arguments)
        except BrokenPipeError:
            raise  # `| head`: whoever reads has read enough
        except OSError as error:
            with suppress(OSError):  # so that what is held back has somewhere to go in the end
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            raise PreflightError(
                f"stdout: cannot be written: {(error.strerror or str(error)).lower()}",
                hint="what the command made is kept; run it again to read what it says",
            ) from None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


out = Console()
err = Console(file=cast("IO[str]", _Stderr()))


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
    return escape(visible(text))


def typed(name: object) -> str:
    """A name as it is typed in a command, where a shell gives it no other meaning."""
    return shlex.quote(str(name))


def visible(text: str) -> str:
    """The text with control characters spelled out, and without what addresses tell of secrets."""
    shown = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
    shown = re.sub(r"(://)[^/?#\s]*@", r"\1***@", shown)
    return re.sub(r"(://[^?#\s]*\?)\S+", r"\1***", shown)
