"""The signals that ask for an end, and who hears them."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType

# Ctrl-C, a scheduler's two, and a terminal that was closed.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


@contextmanager
def heard_by(handler: Callable[[int, FrameType | None], None]) -> Generator[None]:
    """Have `handler` hear them, and afterwards whoever did before.

    What is ignored already stays so: SIGHUP under nohup, Ctrl-C in what a script runs beside
    itself. Threads but the main one hear no signals, and nothing happens there.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard = [signum for signum in STOP_SIGNALS if signal.getsignal(signum) != signal.SIG_IGN]
    before = {signum: signal.signal(signum, handler) for signum in heard}
    try:
        yield
    finally:
        for signum, previous in before.items():
            signal.signal(signum, previous)
