"""Disks that are small, full, slow or broken, for processes that write to them."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import re
import signal
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.engine import processes

PAGE = 4096
_MS_REMOUNT, _MS_PRIVATE, _MNT_DETACH, _CLONE_NEWNS = 0x20, 0x4_4000, 2, 0x2_0000

# Of the system calls that a writer makes, by the machine; see unistd.h.
_NUMBERS = {
    "x86_64": {
        "write": 1, "pwrite64": 18, "writev": 20, "fsync": 74, "rename": 82, "mkdir": 83,
        "link": 86, "linkat": 265, "renameat": 264, "renameat2": 316,
    },
    "aarch64": {
        "write": 64, "pwrite64": 68, "writev": 66, "fsync": 82, "mkdirat": 34, "linkat": 37,
        "renameat": 38, "renameat2": 276,
    },
}  # fmt: skip
_libc = ctypes.CDLL(None, use_errno=True)


class Fault(NamedTuple):
    """System calls that fail, from the n-th call of a function on, or from the beginning."""

    calls: tuple[str, ...]
    error: int  # errno
    where: str = ""  # distill.storage.write_folder
    call: int = 1


class Told(NamedTuple):
    """How a command ended, and all that it said."""

    status: int
    text: str

    @property
    def error(self) -> str:
        """The sentence, without what to do about it."""
        return self.text.partition("error: ")[2].partition("\nhint: ")[0]


def begin(
    folder: Path,
    *arguments: object,
    said: Path,
    fault: Fault | None = None,
    slow: processes.Slow | None = None,
    small: tuple[tuple[Path, int], ...] = (),
    read_only: Path | None = None,
    plain: bool = False,
    env: dict[str, str] | None = None,
) -> ForkServerProcess:
    """Begin `distill ARGUMENTS` in a process that imports nothing heavy any more.

    Args:
        folder: Where it works.
        arguments: Of the command line.
        said: Takes what it prints.
        fault: Of its disk.
        slow: What takes it longer.
        small: Folders in whose place it sees empty disks of so many bytes.
        read_only: A folder that it sees on a disk that cannot be written.
        plain: Whether it has no rights that root has and others do not.
        env: More variables.
    """
    words = [str(word) for word in arguments]
    said.touch()
    said.chmod(0o666)
    process = processes.context.Process(
        target=_begin,
        args=(folder, words, said, fault, slow, small, read_only, plain, env or {}),
    )
    process.start()
    return process


def _begin(
    folder: Path,
    words: list[str],
    said: Path,
    fault: Fault | None,
    slow: processes.Slow | None,
    small: tuple[tuple[Path, int], ...],
    read_only: Path | None,
    plain: bool,
    env: dict[str, str],
) -> None:
    if small or read_only:
        _call("unshare", _CLONE_NEWNS)
        _call("mount", b"none", b"/", None, _MS_PRIVATE, None)
    for path, size in small:
        mount(path, size)
    if read_only is not None:
        target = os.fsencode(read_only)
        _call("mount", target, target, None, 0x1000, None)  # MS_BIND
        _call("mount", target, target, None, 0x1000 | _MS_REMOUNT | 1, None)  # MS_RDONLY
    if plain:
        head = struct.pack("Ii", 0x2008_0522, 0)  # of capset(2), version 3, this process
        _call("capset", ctypes.create_string_buffer(head), ctypes.create_string_buffer(24))
    tempfile.tempdir = None  # it is looked for again
    if fault is not None and fault.where:
        processes._replace(fault.where, lambda call: call == fault.call and _break(fault))
    elif fault is not None:
        _break(fault)
    processes._command(folder, words, said, None, slow, None, env, None)


def ended(process: ForkServerProcess, said: Path) -> Told:
    """Wait for a command; whatever it met, it says no traceback."""
    process.join(timeout=120)
    assert process.exitcode is not None, "it hangs"
    text = said.read_text() if said.exists() else ""
    assert "Traceback" not in text, text
    return Told(process.exitcode, text)


def run(folder: Path, *arguments: object, said: Path, **conditions: object) -> Told:
    """`begin`, and wait."""
    said.unlink(missing_ok=True)
    return ended(begin(folder, *arguments, said=said, **conditions), said)  # type: ignore[arg-type]


class Disk:
    """A disk in memory that can be filled to the brim at any moment."""

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size = path, size

    @property
    def used(self) -> int:
        """Bytes that are taken."""
        told = os.statvfs(self.path)
        return (told.f_blocks - told.f_bfree) * told.f_frsize

    def leave(self, room: int) -> None:
        """Let so many bytes be free from now on, to the page."""
        for more in range(0, 1_000_000, PAGE):  # what is written meanwhile
            try:
                return _resize(self.path, (self.used + room) // PAGE * PAGE + more)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.ENOSPC):
                    raise

    def grow(self) -> None:
        """Be as large as in the beginning."""
        _resize(self.path, self.size)


@contextmanager
def disk(path: Path, size: int) -> Iterator[Disk]:
    """A disk at `path`; the test is skipped where none can be mounted."""
    path.mkdir(exist_ok=True)
    try:
        mount(path, size)
    except OSError as error:
        pytest.skip(f"this user cannot mount a small file system: {error.strerror}")
    try:
        yield Disk(path, size)
    finally:
        _call("umount2", os.fsencode(path), _MNT_DETACH)


def mount(path: Path, size: int, *more: str) -> None:
    """Mount a file system of `size` bytes in memory."""
    options = ",".join((f"size={size}", "mode=1777", *more))
    _call("mount", b"tmpfs", os.fsencode(path), b"tmpfs", 0, options.encode())


def _resize(path: Path, size: int) -> None:
    _call("mount", b"tmpfs", os.fsencode(path), b"tmpfs", _MS_REMOUNT, f"size={size}".encode())


def _call(name: str, *arguments: object) -> None:
    wide = [ctypes.c_ulong(a) if isinstance(a, int) else a for a in arguments]
    if getattr(_libc, name)(*wide) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


def breakable() -> bool:
    """Whether faults can be made here."""
    return platform.machine() in _NUMBERS


def _break(fault: Fault) -> None:
    """Let the kernel refuse these calls of this process; but for writes to its terminal.

    A program of seccomp: see seccomp(2) and linux/bpf_common.h.
    """
    numbers = _NUMBERS[platform.machine()]
    load, equal, greater, give = 0x20, 0x15, 0x25, 0x06
    refused, allowed = 0x5_0000 | fault.error, 0x7FFF_0000
    program = []
    for number in (numbers[name] for name in fault.calls if name in numbers):
        writes = number in (numbers["write"], numbers["writev"])
        program += [(load, 0, 0, 0), (equal, 0, 3 if writes else 1, number)]
        if writes:  # the first argument is the file's number
            program += [(load, 0, 0, 16), (greater, 0, 1, 2)]
        program += [(give, 0, 0, refused)]
    program += [(give, 0, 0, allowed)]
    filters = b"".join(struct.pack("HBBI", *line) for line in program)
    buffer = ctypes.create_string_buffer(filters)
    head = struct.pack("HxxxxxxP", len(program), ctypes.addressof(buffer))
    _call("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    number = {"x86_64": 317, "aarch64": 277}[platform.machine()]
    if _libc.syscall(number, 1, 1, ctypes.create_string_buffer(head)):  # all threads
        raise OSError(ctypes.get_errno(), "seccomp")


def halves(folder: Path) -> list[Path]:
    """Files that somebody began and nobody ended."""
    return [
        path
        for path in folder.rglob("*")
        if re.fullmatch(r"\..+\.tmp|\.download-.*|tmp.*", path.name)
    ]


def stop(process: ForkServerProcess) -> None:
    """Ask for an end, if it has not come."""
    assert process.pid is not None
    with suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGTERM)


def real(*arguments: object, cwd: Path, **options: object) -> subprocess.CompletedProcess[str]:
    """Run `python -m distill` from the beginning to the end of a process."""
    import sys

    env = {**os.environ, "NO_COLOR": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(  # type: ignore[call-overload, no-any-return]
        [sys.executable, "-m", "distill", *map(str, arguments)],
        cwd=cwd,
        env=env,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        **options,
    )
