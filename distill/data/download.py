"""Files from their public homes: whole and verified, or not there at all."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import tarfile
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from distill import storage
from distill.errors import DamagedError, PreflightError

_TIMEOUT = 60.0  # seconds without a byte
_SLOWEST = 1000  # bytes a second; with fewer, after that time, nothing would come of it
_MOST_BYTES = 2**30  # of a file, packed or not; the largest set has a sixth of it
_MOST_MEMBERS = 1000  # of an archive; the largest has eight
_CHUNK = 2**20


class Remote(NamedTuple):
    """A file as it was published."""

    url: str
    sha256: str


def fetch(remotes: Sequence[Remote], folder: Path) -> None:
    """Put published files into `folder`.

    Each is stored and verified in a temporary folder beside its final place first, so that an
    interrupted or altered download leaves nothing there. Of a .tar.gz the files are kept, without
    the folders that it has them in.

    Raises:
        DamagedError: If what arrives is not what was published, or no plain archive of files.
        PreflightError: If the network or the disk stands in the way.
    """
    for remote in remotes:
        storage.make_folder(folder)
        storage.sweep(folder, below=False)
        with storage.staged(folder) as aside:
            path = aside / remote.url.rpartition("/")[2]
            try:
                _download(remote, path)
            except (OSError, http.client.HTTPException) as error:
                if isinstance(error, urllib.error.HTTPError):
                    error.close()  # it holds the connection
                raise PreflightError(
                    f"{remote.url}: could not be downloaded to {folder}: {error}",
                    hint=f"run again, or put the file's content into {folder} by hand",
                ) from None
            packed = path.name.endswith(".tar.gz")
            storage.publish(_unpacked(path) if packed else aside, folder)


def _download(remote: Remote, path: Path) -> None:
    digest, size, began = hashlib.sha256(), 0, time.monotonic()
    with urllib.request.urlopen(remote.url, timeout=_TIMEOUT) as response, path.open("wb") as file:
        while chunk := response.read1(_CHUNK):  # what there is: to wait for all could take forever
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
            seconds = time.monotonic() - began
            if seconds > _TIMEOUT and size < _SLOWEST * seconds:
                raise TimeoutError(f"{size:,} bytes in {seconds:.0f} seconds")
            if size > _MOST_BYTES:
                raise DamagedError(f"{remote.url}: more than {_MOST_BYTES:,} bytes arrived")
    if digest.hexdigest() != remote.sha256:
        raise DamagedError(
            f"{remote.url}: {size:,} bytes arrived that are not the published file: "
            f"SHA-256 {digest.hexdigest()}, expected {remote.sha256}",
            hint="run again; if it stays so, the server or a proxy sends something else",
        )


def _unpacked(archive: Path) -> Path:
    """A new folder beside a .tar.gz, with what it holds."""
    folder, plain, size = archive.parent / "unpacked", archive.with_suffix(".plain"), 0
    try:
        _unzip(archive, plain)
        with tarfile.open(plain, "r:") as tar:
            for number, member in enumerate(tar):
                name = PurePosixPath(member.name)
                size += member.size
                unsafe = name.is_absolute() or ".." in name.parts
                if unsafe or size > _MOST_BYTES or number >= _MOST_MEMBERS:
                    raise DamagedError(f"{archive.name}: unsafe to unpack: {member.name!r}")
                if not (member.isreg() or member.isdir()):
                    raise DamagedError(f"{archive.name}: {member.name!r} is a link or a device")
            # What the filter guards against was refused above; Python before 3.11.4 has none.
            filtered: Any = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
            tar.extractall(folder, **filtered)
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DamagedError(
            f"{archive.name}: not an archive that can be unpacked: {error}"
        ) from None
    return folder


def _unzip(packed: Path, plain: Path) -> None:
    """Unpack a .gz as far as it is no bomb: of 1 MB a header alone can take 1 GB of memory."""
    with gzip.open(packed) as source, plain.open("wb") as file:
        while chunk := source.read(_CHUNK):
            file.write(chunk)
            if file.tell() > _MOST_BYTES:
                raise DamagedError(f"{packed.name}: unsafe to unpack: {_MOST_BYTES:,} bytes")
