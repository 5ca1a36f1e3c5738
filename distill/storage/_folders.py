"""A folder of files with a manifest: all of them as they were written, or none."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

from distill.errors import DamagedError
from distill.storage._files import move, sync_folder, temporary, write_synced
from distill.storage._room import refuse

MANIFEST = "MANIFEST.json"


def write_folder(path: Path, files: Mapping[str, bytes]) -> None:
    """Make the folder `path` with `files` and a manifest of their SHA-256, all or nothing.

    The folder that it lies in is not made: where somebody moved it away, nothing takes its place.

    Raises:
        PreflightError: If the disk is full, or the parent folder is missing or cannot be written.
    """
    aside = temporary(path)
    manifest = {
        name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in files.items()
    }
    try:
        aside.mkdir()
        for name, data in files.items():
            write_synced(aside / name, data)
        write_synced(aside / MANIFEST, _text(manifest))
        sync_folder(aside)
        move(aside, path)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        refuse(path, error, sum(map(len, files.values())))


def read_folder(path: Path) -> dict[str, bytes]:
    """The files of a folder that `write_folder` made, every byte checked.

    Nothing but plain files in the folder itself is opened, whatever its manifest names.

    Raises:
        DamagedError: If a file is missing, or is not what was written.
    """
    return _checked(path, keep=True)


def check_folder(path: Path) -> None:
    """Read a folder as `read_folder` does, and keep nothing of it in memory.

    Raises:
        DamagedError: As `read_folder`.
    """
    _checked(path, keep=False)


def _checked(path: Path, *, keep: bool) -> dict[str, bytes]:
    """The files of a folder; they are empty unless they are to be kept."""
    found = {}
    for name, (size, sha256) in _manifest(path).items():
        with _opened(path / name) as file:
            length = os.fstat(file.fileno()).st_size
            if length != size:
                raise DamagedError(f"{path / name}: {length} bytes, written were {size}")
            data = file.read() if keep else b""
            digest = hashlib.sha256(data) if keep else hashlib.file_digest(file, "sha256")
        if digest.hexdigest() != sha256:
            raise DamagedError(f"{path / name}: {_CHANGED}")
        found[name] = data
    return found


_CHANGED = "its content changed after it was written"


def _manifest(path: Path) -> dict[str, tuple[int, str]]:
    """Size and SHA-256 of the files of a folder by name, as its manifest says."""
    file = path / MANIFEST
    with _opened(file) as opened:
        data = opened.read()
    try:
        manifest: Any = json.loads(data)
        found = {name: (entry["size"], entry["sha256"]) for name, entry in manifest.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DamagedError(f"{file}: {_CHANGED}") from None
    for name, (size, sha256) in found.items():
        if type(size) is not int or type(sha256) is not str:
            raise DamagedError(f"{file}: says no size and SHA-256 of {name!r}")
        if Path(name).name != name or name in ("", "..") or "\0" in name:
            raise DamagedError(f"{file}: names {name!r}, which is no file of this folder")
    if data != _text(manifest):  # in a byte that JSON does not mind
        raise DamagedError(f"{file}: {_CHANGED}")
    return found


def _text(manifest: Mapping[str, Any]) -> bytes:
    return json.dumps(manifest, indent=1).encode()


@contextmanager
def _opened(path: Path) -> Generator[BufferedReader]:
    """A plain file to read; a link, a folder or a pipe in its place is damage."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise DamagedError(f"{path}: is no plain file")
        with os.fdopen(descriptor, "rb") as file:
            yield file
    except OSError as error:
        what = "is a link" if error.errno == errno.ELOOP else error.strerror or error
        raise DamagedError(f"{path}: {what}") from None
