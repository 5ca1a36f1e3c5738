"""Errors as sentences and exit statuses; results as a line of JSON."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

import typer

from distill import console
from distill.errors import DistillError, Stopped
from distill.signals import heard_by


class _Interrupt(KeyboardInterrupt):
    """A signal. Python itself ends with SIGINT where a plain one passed through an `exec`."""


@contextmanager
def reporting(
    left: str = "nothing was written, and the same command begins anew",
) -> Generator[None]:
    """Turn a DistillError into a sentence, a hint and an exit status, and so a signal.

    Every other error stays a traceback: it is a bug of ours. `DISTILL_DEBUG=1` shows the
    traceback of the first kind too.

    Args:
        left: What a signal leaves behind that comes where no step is in work.
    """
    try:
        with heard_by(_interrupt):
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
    except KeyboardInterrupt as interrupt:
        if stopped := _stopped_before(interrupt):
            _fail(str(stopped), stopped.hint)
            raise typer.Exit(stopped.exit_status) from None
        signum = signal.Signals(interrupt.args[0] if interrupt.args else signal.SIGINT)
        console.say(f"stopped by {signum.name}; {left}")
        raise typer.Exit(Stopped("", signum=signum).exit_status) from None


def _interrupt(signum: int, frame: FrameType | None) -> None:
    """Let every signal that asks for an end do what Ctrl-C does: what is half made is removed."""
    if signum != signal.SIGINT:
        signal.signal(signum, signal.SIG_IGN)  # once is enough: what follows is in a hurry
    raise _Interrupt(signum)


def _stopped_before(interrupt: BaseException) -> Stopped | None:
    """The end that was on its way already, for another signal, when this one came."""
    error = interrupt.__context__
    while error is not None and not isinstance(error, Stopped):
        error = error.__context__
    return error


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
