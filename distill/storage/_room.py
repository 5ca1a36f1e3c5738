"""Room on a disk, and words for what stands in a writer's way."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path
from typing import NoReturn

from distill.errors import PreflightError

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_AMPLE = 4_000_000  # bytes free, from which on it is not for them that a disk is full
_HINTS = {
    errno.EIO: "the disk itself fails: give an --out on another one",
    errno.ENAMETOOLONG: "give an --out with a shorter name",
    errno.ENOENT: "its folder is gone: was it removed while the command ran?",
}


def require_room(folder: Path, needed: int, *, files: int = 0) -> None:
    """Check that there is room in `folder`.

    Args:
        folder: Need not be there yet.
        needed: Bytes.
        files: How many there will be, folders counted too.

    Raises:
        PreflightError: If there is not.
    """
    free, more = free_bytes(folder), _free_files(folder)
    if free < needed or (more is not None and more < files):
        lacking = (
            f"{size(needed)} of disk, {size(free)} are free"
            if free < needed
            else f"{files:,} files, and the disk can hold {more:,} more (inodes: `df -i`)"
        )
        raise PreflightError(
            f"{folder}: the run needs {lacking}",
            hint="make room, or give an --out on another disk",
        )


def free_bytes(path: Path) -> int:
    """Free space on the disk that `path` lies on, or would lie on."""
    return shutil.disk_usage(_there(path)).free


def _free_files(path: Path) -> int | None:
    """How many files the disk can still hold; None where it keeps no count."""
    told = os.statvfs(_there(path))
    return told.f_favail if told.f_files else None


def _there(path: Path) -> Path:
    return next(p for p in (path, *path.absolute().parents) if p.exists())


def scratch(name: str) -> Path:
    """A folder for what can be made or fetched again: of the user's, or else of the machine's."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    if not os.access(base if base.exists() else base.parent, os.W_OK):
        base = Path(tempfile.gettempdir())
    return base / "distill" / name


def size(count: float) -> str:
    """Bytes as people read them: 16.4 MB."""
    for unit in ("bytes", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def refuse(path: Path, error: OSError, needed: int = 0) -> NoReturn:
    """Say why `path` cannot be written, and how much of it there is; 0: that is not known."""
    if error.errno in _NO_ROOM:
        wanted = f" for {size(needed)}" if needed else ""
        free = free_bytes(path)
        left = f"{size(free)} are free"
        if error.errno == errno.EDQUOT:
            left = "this user's quota is used up"
        elif error.errno == errno.EFBIG:
            left = "no file may be as large here (`ulimit -f`, or the disk's own limit)"
        elif _free_files(path) == 0 or free > max(2 * needed, _AMPLE):
            left += ", but the disk can hold no more files (inodes: `df -i`)"
        raise PreflightError(
            f"{path}: no room{wanted}, {left}; nothing was replaced",
            hint="make room and run the same command again: it goes on where it stopped",
        ) from None
    raise PreflightError(
        f"{path}: cannot be written: {(error.strerror or str(error)).lower()}",
        hint=_HINTS.get(error.errno or 0, "give another --out, or mend the permissions"),
    ) from None


def refuse_removal(path: Path, error: OSError) -> NoReturn:
    """Say why `path` cannot be removed."""
    raise PreflightError(
        f"{path}: cannot be removed: {(error.strerror or str(error)).lower()}",
        hint="remove it by hand, or mend the permissions",
    ) from None
