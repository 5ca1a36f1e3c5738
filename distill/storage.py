"""Files that are either whole or not there, whatever kills the process."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Collection, Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from distill.errors import DamagedError, DistillError, PreflightError

MANIFEST = "MANIFEST.json"


def write(path: Path, data: bytes) -> None:
    """Put `data` at `path` so that a reader, now or after a crash, sees the old file or the new.

    Temporary file in the same folder, fsync, rename, fsync of the folder.

    Raises:
        PreflightError: If the disk is full, or the folder cannot be written.
    """
    temporary = _temporary(path)
    try:
        _write_synced(temporary, data)
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):  # where it could not be made, it cannot be removed either
            temporary.unlink()
        _refuse(path, error, len(data))


def create(path: Path, data: bytes) -> None:
    """Put `data` at `path` unless a file is there already, whoever is first; as whole as `write`.

    Raises:
        PreflightError: If the disk is full, or the folder cannot be written.
    """
    temporary = _temporary(path)
    try:
        _write_synced(temporary, data)
        with suppress(FileExistsError):
            os.link(temporary, path)  # fails where there is one, on network disks too
        _sync_folder(path.parent)
    except OSError as error:
        _refuse(path, error, len(data))
    finally:
        with suppress(OSError):
            temporary.unlink()


def append(path: Path, data: bytes) -> None:
    """Add `data` to the end of the file at `path`.

    A crash or a full disk can leave a part of it there, as `write` never does: this is for files
    whose true content is known elsewhere.

    Raises:
        PreflightError: If the disk is full, or the file cannot be written.
    """
    try:
        with path.open("ab") as handle:
            handle.write(data)
    except OSError as error:
        _refuse(path, error, len(data))


def write_folder(path: Path, files: Mapping[str, bytes]) -> None:
    """Make the folder `path` with `files` and a manifest of their SHA-256, all or nothing.

    Raises:
        PreflightError: If the disk is full, or the parent folder cannot be written.
    """
    temporary = _temporary(path)
    manifest = {
        name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in files.items()
    }
    try:
        temporary.mkdir(parents=True)
        for name, data in files.items():
            _write_synced(temporary / name, data)
        _write_synced(temporary / MANIFEST, json.dumps(manifest, indent=1).encode())
        _sync_folder(temporary)
        temporary.rename(path)
        _sync_folder(path.parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        _refuse(path, error, sum(map(len, files.values())))


def read_folder(path: Path) -> dict[str, bytes]:
    """The files of a folder that `write_folder` made, every byte checked.

    Raises:
        DamagedError: If a file is missing, or is not what was written.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        files = {}
        for name, entry in manifest.items():
            data = (path / name).read_bytes()
            if len(data) != entry["size"]:
                raise DamagedError(
                    f"{path / name}: {len(data)} bytes, written were {entry['size']}"
                )
            if hashlib.sha256(data).hexdigest() != entry["sha256"]:
                raise DamagedError(f"{path / name}: its content changed after it was written")
            files[name] = data
        return files
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, DamagedError):
            raise
        raise DamagedError(f"{path}: {error}") from None


@contextmanager
def staged(folder: Path) -> Generator[Path]:
    """A folder beside the files of `folder`, to make others in; it is gone in the end."""
    aside = _temporary(folder / "staged")
    try:
        aside.mkdir()
        yield aside
    except OSError as error:
        if isinstance(error, DistillError):
            raise
        _refuse(folder, error, 0)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def publish(aside: Path, folder: Path, *, first: str, stale: Collection[str] = ()) -> None:
    """Move the files of `aside` into `folder`, each whole, in place of those of the same name.

    Args:
        aside: A folder on the same disk; its files are written through before the first is moved.
        folder: Where they belong.
        first: The file that is moved before all others.
        stale: Files of an earlier time, that are removed unless they are replaced.

    Raises:
        PreflightError: If the disk is full, or the folder cannot be written.
    """
    names = sorted((path.name for path in aside.iterdir()), key=lambda name: (name != first, name))
    try:
        for name in names:
            with (aside / name).open("rb") as handle:
                os.fsync(handle.fileno())
        for name in set(stale) - set(names):
            (folder / name).unlink(missing_ok=True)
        for name in names:
            (aside / name).replace(folder / name)
        _sync_folder(folder)
    except OSError as error:
        _refuse(folder, error, 0)


@contextmanager
def lock(folder: Path) -> Generator[None]:
    """Hold `folder` for this process; the kernel lets go when the process ends, however it ends.

    Raises:
        PreflightError: If another process holds it, or the folder cannot be written.
    """
    import fcntl

    path = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = path.open("ab+", buffering=0)
    except OSError as error:
        _refuse(path, error, 0)
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            handle.seek(0)
            holder = handle.read().decode(errors="replace") or "another process"
            raise PreflightError(
                f"{folder}: in use by {holder}", hint="wait for it, or give another --out"
            ) from None
        with suppress(OSError):  # a full disk: the orphans may be what fills it
            handle.truncate(0)
            handle.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        for orphan in folder.rglob(".*.tmp"):  # left by a process that was killed while writing
            shutil.rmtree(orphan) if orphan.is_dir() else orphan.unlink()
        yield


def sweep(folder: Path, *, seconds: float) -> None:
    """Remove what killed processes left half written: all that is older than `seconds`.

    For folders that several processes write to, whose files in work are younger.
    """
    for orphan in folder.rglob(".*.tmp"):
        with suppress(OSError):  # another process may sweep too
            if time.time() - orphan.stat().st_mtime > seconds:
                orphan.unlink()


def require_room(folder: Path, needed: int) -> None:
    """Check that `folder` has `needed` bytes free.

    Raises:
        PreflightError: If it has not.
    """
    free = free_bytes(folder)
    if free < needed:
        raise PreflightError(
            f"{folder}: the run needs {size(needed)} of disk, {size(free)} are free",
            hint="make room, or give an --out on another disk",
        )


def free_bytes(path: Path) -> int:
    """Free space on the disk that `path` lies on, or would lie on."""
    return shutil.disk_usage(next(p for p in (path, *path.absolute().parents) if p.exists())).free


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


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as handle:
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _refuse(path: Path, error: OSError, needed: int) -> NoReturn:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        wanted = f" for {size(needed)}" if needed else ""  # 0: it is not known
        raise PreflightError(
            f"{path}: no room{wanted}, {size(free_bytes(path))} are free; nothing was replaced",
            hint="make room and run the same command again: it goes on where it stopped",
        ) from None
    raise PreflightError(
        f"{path}: cannot be written: {(error.strerror or str(error)).lower()}",
        hint="give another --out, or mend the permissions",
    ) from None
