"""Who may work in a folder."""

from __future__ import annotations

import errno
import os
import re
import socket
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

from distill import console
from distill.errors import PreflightError
from distill.storage._files import is_alive, make_folder, sweep
from distill.storage._room import refuse

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)
_SECONDS = 2.0  # in which the owner of a lock has said who it is
_NAP = 0.02


@contextmanager
def lock(folder: Path, *, seconds: float = 0.0) -> Generator[None]:
    """Hold `folder` for this process; the kernel lets go when the process ends, however it ends.

    Args:
        folder: Made if it is not there. What killed processes left half written in it is removed.
        seconds: How long to wait for whoever holds it.

    Raises:
        PreflightError: If another process holds it, or the folder cannot be written.
    """
    path = folder / ".lock"
    with _opened(path) as file:
        end = time.monotonic() + seconds
        told = seconds == 0
        while not _holds(file, path):
            if time.monotonic() >= end:
                raise PreflightError(
                    f"{folder}: in use by {_owner(file)}",
                    hint="wait for it, or give another --out",
                )
            if not told:
                console.say(f"{folder}: waiting for {_owner(file)}")
                told = True
            time.sleep(_NAP)
        with suppress(OSError):  # a full disk: what is swept may be what fills it
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        sweep(folder)
        yield


@contextmanager
def alone(path: Path) -> Generator[None]:
    """Wait until no other process or thread holds the file at `path`, and hold it.

    Raises:
        PreflightError: If it cannot be made.
    """
    import fcntl

    with _opened(path) as file:
        _holds(file, path, wait=True)
        try:
            yield
        finally:
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_UN)  # a process that was forked meanwhile has it too


def _opened(path: Path) -> FileIO:
    """The file of a lock, in a folder that is made if it is not there."""
    make_folder(path.parent)
    try:
        return path.open("ab+", buffering=0)
    except OSError as error:
        refuse(path, error)


def _holds(file: FileIO, path: Path, *, wait: bool = False) -> bool:
    """Whether this process holds it from now on: always, where a disk knows no locks."""
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        if error.errno not in _NO_LOCKS:
            refuse(path, error)
        console.warn(f"{path}: this disk knows no locks; mind that no other process works there")
    return True


def _owner(file: FileIO) -> str:
    """Who holds a lock, who may be about to say so: what stands there may be the last one's."""
    end = time.monotonic() + _SECONDS
    while time.monotonic() < end:
        file.seek(0)
        text = file.read().decode(errors="replace")
        found = re.fullmatch(r"process (\d+) on (.+)", text)
        if found and (found[2] != socket.gethostname() or is_alive(int(found[1]))):
            return text
        time.sleep(_NAP)
    return "another process"
