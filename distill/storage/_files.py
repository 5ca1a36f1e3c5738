"""One file at a time: to write, to move, to remove; and what is left of those half written."""

from __future__ import annotations

import errno
import functools
import hashlib
import os
import re
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Collection, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from distill.errors import DistillError
from distill.storage._room import refuse, refuse_removal

_ORPHAN_SECONDS = 3600.0  # after which a half-written file is nobody's: no writer rests so long
# Earlier versions named no place.
_TEMPORARY = re.compile(r"\..+?(\.(?P<place>[0-9a-f]{6}))?\.(?P<pid>\d+)\.[0-9a-f]+\.tmp")
# Of disks that give a file one name alone: FAT, some that are shared.
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)
# Of disks that keep no order of names that could be asked for: fsync of a folder is unknown there.
_UNKNOWN = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)


def write(path: Path, data: bytes) -> None:
    """Put `data` at `path` so that a reader, now or after a crash, sees the old file or the new.

    Raises:
        PreflightError: If the disk is full, or the folder cannot be written.
    """
    with writing(path, len(data)) as file:
        file.write(data)


@contextmanager
def writing(path: Path, size: int = 0) -> Generator[BinaryIO]:
    """A file to be filled piece by piece, which takes its place at `path` in the end.

    Temporary file in the same folder, fsync, rename, fsync of the folder. Where an error leaves
    the block, `path` is what it was.

    Args:
        path: The file.
        size: Bytes that it will have, as far as is known: a file that may not be as large is
            refused before the first of them.

    Raises:
        PreflightError: If the disk is full, or the folder cannot be written.
    """
    aside = temporary(path)
    try:
        with aside.open("wb") as file:
            if size:
                file.truncate(size)
            yield file
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
        sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):  # where it could not be made, it cannot be removed either
            aside.unlink()
        if isinstance(error, DistillError) or not isinstance(error, OSError):
            raise
        refuse(path, error, size)


def create(path: Path, data: bytes) -> None:
    """Put `data` at `path` unless a file is there already, whoever is first; as whole as `write`.

    Raises:
        PreflightError: If the disk is full, or the folder cannot be written.
    """
    aside = temporary(path)
    try:
        write_synced(aside, data)
        try:
            os.link(aside, path)  # fails where there is one, on network disks too
        except FileExistsError:
            pass
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            if not path.exists():  # as near as such a disk lets it be
                aside.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        refuse(path, error, len(data))
    finally:
        with suppress(OSError):
            aside.unlink()


def append(path: Path, data: bytes) -> None:
    """Add `data` to the end of the file at `path`, which is there: none is begun in its place.

    A crash or a full disk can leave a part of it there, as `write` never does: this is for files
    whose true content is known elsewhere. `sync` brings it to the disk.

    Raises:
        PreflightError: If the disk is full, or the file is missing or cannot be written.
    """
    try:
        with path.open("r+b") as file:
            file.seek(0, os.SEEK_END)
            file.write(data)
    except OSError as error:
        refuse(path, error, len(data))


def sync(path: Path) -> None:
    """Bring what was appended to a file, if there is one, to the disk.

    Raises:
        PreflightError: If that fails.
    """
    try:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    except FileNotFoundError:
        return
    except OSError as error:
        refuse(path, error)


def make_folder(path: Path) -> None:
    """Make a folder and those above it that are missing, each on the disk before the next.

    Raises:
        PreflightError: If it cannot be made.
    """
    try:
        for folder in reversed([path, *path.parents]):
            if not folder.exists():
                folder.mkdir(exist_ok=True)
                sync_folder(folder.parent)
    except OSError as error:
        refuse(path, error)


def move(path: Path, target: Path) -> None:
    """Give a file or a folder another name beside it, for good.

    Raises:
        OSError: If that fails.
    """
    path.rename(target)
    sync_folder(target.parent)


def remove(*paths: Path) -> None:
    """Remove files, those that are there, one after the other.

    Raises:
        PreflightError: If one cannot be removed.
    """
    for path in paths:
        try:
            path.unlink()
            sync_folder(path.parent)
        except FileNotFoundError:
            continue
        except OSError as error:
            refuse_removal(path, error)


def remove_folder(path: Path) -> None:
    """Remove a folder, if it is there: it is whole as long as it has its name.

    Raises:
        PreflightError: If it cannot be removed.
    """
    aside = temporary(path)
    try:
        if path.exists() and not os.access(path, os.W_OK):  # which moving it would not notice
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        move(path, aside)
        shutil.rmtree(aside)
    except FileNotFoundError:
        return
    except OSError as error:
        refuse_removal(path, error)


@contextmanager
def staged(folder: Path) -> Generator[Path]:
    """A folder beside the files of `folder`, to make others in; it is gone in the end.

    Raises:
        PreflightError: If the disk is full, or the folder cannot be written.
    """
    aside = temporary(folder / "staged")
    try:
        aside.mkdir()
        yield aside
    except OSError as error:
        if isinstance(error, DistillError):
            raise
        refuse(folder, error)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def passing() -> Generator[Path]:
    """A folder for what is gone in the end, where TMPDIR says.

    Raises:
        PreflightError: If that disk is full, or cannot be written.
    """
    try:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
    except OSError as error:
        if isinstance(error, DistillError):
            raise
        refuse(Path(os.environ.get("TMPDIR") or tempfile.gettempdir()), error)


def require_writable(path: Path) -> None:
    """Find out before the work, and not after it, that a file could not be written in the end.

    Raises:
        PreflightError: If it is a folder, or the folder that it lies in cannot be made or written.
    """
    make_folder(path.parent)
    for number, stands in (
        (errno.ENOTDIR, not path.parent.is_dir()),
        (errno.EISDIR, path.is_dir()),
        (errno.EACCES, not os.access(path.parent, os.W_OK)),
    ):
        if stands:
            refuse(path, OSError(number, os.strerror(number)))


def publish(aside: Path, folder: Path, *, first: str = "", stale: Collection[str] = ()) -> None:
    """Move the files below `aside` into `folder`, each whole, in place of those of the same name.

    Args:
        aside: A folder on the same disk; its files are written through before the first is moved.
        folder: Where they belong.
        first: The file that is moved before all others.
        stale: Files of an earlier time, that are removed unless they are replaced.

    Raises:
        PreflightError: If the disk is full, or the folder cannot be written.
    """
    files = sorted(
        (path for path in aside.rglob("*") if path.is_file()),
        key=lambda path: (path.name != first, path.name),
    )
    try:
        for path in files:
            sync(path)
        for name in sorted(set(stale) - {path.name for path in files}):
            (folder / name).unlink(missing_ok=True)
        for path in files:
            path.replace(folder / path.name)
        sync_folder(folder)
    except OSError as error:
        if isinstance(error, DistillError):
            raise
        refuse(folder, error)


def sweep(folder: Path, *, below: bool = True) -> None:
    """Remove what killed processes left half written, and nothing that a living one works on.

    Args:
        folder: Which other processes may write to meanwhile.
        below: Whether the folders in it are swept too.
    """
    for orphan in list(folder.rglob(".*.tmp") if below else folder.glob(".*.tmp")):
        with suppress(OSError):  # another process may sweep too
            if _is_orphan(orphan):
                shutil.rmtree(orphan) if orphan.is_dir() else orphan.unlink()


def temporary(path: Path) -> Path:
    """A name beside `path` that tells whose it is."""
    return path.with_name(f".{path.name}.{_place()}.{os.getpid()}.{secrets.token_hex(4)}.tmp")


def write_synced(path: Path, data: bytes) -> None:
    """Write a file through to the disk, under the name that it has."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNKNOWN:
            raise
    finally:
        os.close(descriptor)


def is_alive(pid: int) -> bool:
    """Whether there is a process of this number here."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True  # another user's
    return True


def _is_orphan(path: Path) -> bool:
    """Whether nobody will finish it: its process is gone, or did nothing to it for long."""
    name = _TEMPORARY.fullmatch(path.name)
    if name is None:
        return False
    if name["place"] == _place() and not is_alive(int(name["pid"])):
        return True
    touched = max(each.lstat().st_mtime for each in (path, *path.rglob("*")))
    return time.time() - touched > _ORPHAN_SECONDS


@functools.cache
def _place() -> str:
    """Where the number of a process means the same process: a machine, or a container on it."""
    numbers = Path("/proc/self/ns/pid")
    known = f"{socket.gethostname()} {numbers.readlink() if numbers.is_symlink() else ''}"
    return hashlib.sha256(known.encode()).hexdigest()[:6]
