"""Errors as sentences and exit statuses; results as a line of JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import typer

from distill import console
from distill.errors import DistillError


@contextmanager
def reporting() -> Generator[None]:
    """Turn a DistillError into a sentence, a hint and an exit status.

    Every other error stays a traceback: it is a bug of ours. `DISTILL_DEBUG=1` shows the
    traceback of the first kind too.
    """
    try:
        yield
    except DistillError as error:
        if os.environ.get("DISTILL_DEBUG"):
            raise
        console.fail(str(error), hint=error.hint)
        raise typer.Exit(error.exit_status) from None
    except KeyboardInterrupt:
        console.say("interrupted; the last checkpoint is whole, and the same command goes on")
        raise typer.Exit(130) from None


def print_json(value: Mapping[str, Any]) -> None:
    """The one line of JSON on stdout."""
    print(json.dumps(value))
