"""Errors as sentences and exit statuses; results as a line of JSON."""

from __future__ import annotations

import json
import os
import sys
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
        _fail(str(error), error.hint)
        raise typer.Exit(error.exit_status) from None
    except RuntimeError as error:
        if os.environ.get("DISTILL_DEBUG") or not _has_lost_another(error):
            raise
        _fail(
            "another process of this run ended, or does not answer",
            "the same command goes on from the last checkpoint",
        )
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        console.say("interrupted; the last checkpoint is whole, and the same command goes on")
        raise typer.Exit(130) from None


def _fail(what: str, hint: str) -> None:
    """Say it; of several processes, in which one error becomes many, the first alone does."""
    if "torch.distributed" in sys.modules:
        from distill.engine import launch

        console.err.quiet = not launch.is_first_to_fail()
    console.fail(what, hint=hint)


def _has_lost_another(error: RuntimeError) -> bool:
    if "torch.distributed" not in sys.modules:
        return False
    from distill.engine import launch

    return launch.has_lost_another(error)


def print_json(value: Mapping[str, Any]) -> None:
    """The one line of JSON on stdout."""
    print(json.dumps(value))
