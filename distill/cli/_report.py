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

    def hear(signum: int, frame: FrameType | None) -> None:
        """Let every signal that asks for an end do what Ctrl-C does: what is half made is removed.

        But for one that comes within an import: libraries catch what is raised there, go on, and
        break later on what they lack, or are deaf to the end. Nothing is in work then, or what a
        kill may cut off too.
        """
        if _is_importing(frame):
            say(signum)
            os._exit(Stopped("", signum=signum).exit_status)
        if signum != signal.SIGINT:
            signal.signal(signum, _ignore)  # once is enough: what follows is in a hurry
        raise _Interrupt(signum)

    def say(signum: int) -> None:
        console.say(f"stopped by {signal.Signals(signum).name}; {left}")

    try:
        with heard_by(hear):
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
        signum = interrupt.args[0] if interrupt.args else signal.SIGINT
        say(signum)
        raise typer.Exit(Stopped("", signum=signum).exit_status) from None


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def _ignore(signum: int, frame: FrameType | None) -> None:
    """Unlike SIG_IGN it is replaced by whoever wants to hear the next one."""


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
