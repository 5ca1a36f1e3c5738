"""Files from their public homes: whole and verified, or not there at all."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import tarfile
import tempfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from distill.errors import DamagedError, PreflightError

_TIMEOUT = 60.0  # seconds without a byte
_MAX_UNPACKED = 2**30  # bytes; the largest set has a sixth of it
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
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as temporary:
                path = Path(temporary, remote.url.rpartition("/")[2])
                _download(remote, path)
                for file in _unpack(path) if path.name.endswith(".tar.gz") else [path]:
                    file.replace(folder / file.name)
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, urllib.error.HTTPError):
                error.close()  # it holds the connection
            raise PreflightError(
                f"{remote.url}: could not be downloaded to {folder}: {error}",
                hint=f"run again, or put the file's content into {folder} by hand",
            ) from None


def _download(remote: Remote, path: Path) -> None:
    digest, size = hashlib.sha256(), 0
    with urllib.request.urlopen(remote.url, timeout=_TIMEOUT) as response, path.open("wb") as file:
        while chunk := response.read(_CHUNK):
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
    if digest.hexdigest() != remote.sha256:
        raise DamagedError(
            f"{remote.url}: {size:,} bytes arrived that are not the published file: "
            f"SHA-256 {digest.hexdigest()}, expected {remote.sha256}",
            hint="run again; if it stays so, the server or a proxy sends something else",
        )


def _unpack(archive: Path) -> list[Path]:
    """The files of a .tar.gz, unpacked into a new folder beside it."""
    folder = archive.parent / "unpacked"
    size = 0
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                name = PurePosixPath(member.name)
                size += member.size
                if name.is_absolute() or ".." in name.parts or size > _MAX_UNPACKED:
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
    return [path for path in folder.rglob("*") if path.is_file()]
