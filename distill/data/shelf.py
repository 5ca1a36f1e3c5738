"""Where shards lie: a folder here, or an object store of which some copies are here."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol, TypeVar

from distill import remote, storage
from distill.errors import DamagedError, IncompatibleError, PreflightError

T = TypeVar("T")

PLACE, BYTES = "DISTILL_SHARDS", "DISTILL_SHARDS_BYTES"  # variables of the environment

_MOST_BYTES = 100 * 10**9  # of copies, where the disk has twice as much room
_PART = 2**23  # bytes that are fetched at once
_CONTENT = ("ETag", "etag", "generation", "md5Hash", "content_md5")  # of s3, gs, az
_FETCHING = 2  # shards that are fetched ahead at once


class File(NamedTuple):
    """What is known of a file without reading it."""

    size: int  # bytes
    changed: int  # nanoseconds, or a number for what a store calls this content; 0: not known


class Shelf(Protocol):
    """Files by their names, such as `train-00000.tar` or `train/a.tar`.

    Attributes:
        origin: Where they lie, as a user names it.
        keeps_open: Whether a file that was opened stays where it is.
    """

    origin: str
    keeps_open: bool

    def files(self) -> dict[str, File]:
        """All files, and those in folders here."""
        ...

    def path(self, name: str) -> Path:
        """A file on this machine, fetched if it must be."""
        ...


class Here:
    """A folder on this machine."""

    keeps_open = True

    def __init__(self, root: Path) -> None:
        self.origin, self._root = str(root), root

    def files(self) -> dict[str, File]:
        """All files, and those in folders here."""
        try:
            found = (*self._root.glob("*.*"), *self._root.glob("*/*.*"))
            return {
                path.relative_to(self._root).as_posix(): File(status.st_size, status.st_mtime_ns)
                for path in found
                if path.is_file() and (status := path.stat())
            }
        except OSError as error:
            raise PreflightError(f"{self.origin}: {error.strerror}") from None

    def path(self, name: str) -> Path:
        """A file."""
        return self._root / name


class There:
    """A place in an object store; copies of some files lie on this machine, up to so many bytes.

    Any number of processes share the copies. A file is fetched by one of them under a name of its
    own and is whole when it is seen; the copies that were not used for longest make room.

    Args:
        url: The place.
    """

    keeps_open = False  # a copy that is open takes room even when it is removed

    def __init__(self, url: str) -> None:
        self.origin = url.rstrip("/")
        base = Path(os.environ.get(PLACE) or storage.scratch("shards")).expanduser()
        self._base = base
        self._copies = base / hashlib.sha256(self.origin.encode()).hexdigest()[:16]
        self._files: dict[str, File] = {}
        self._client: tuple[int, Any, str] | None = None  # whose it is, and the path there

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_client": None}

    def files(self) -> dict[str, File]:
        """All files, and those in folders there."""
        files, root = self._connected()
        with remote.refusals(self.origin):
            found: dict[str, Any] = files.find(root, maxdepth=2, detail=True)
        start = len(root.rstrip("/")) + 1
        self._files = {path[start:]: _file(entry) for path, entry in found.items()}
        return self._files

    def path(self, name: str) -> Path:
        """A copy of a file, fetched if it is not here."""
        known = self._files[name]  # of another content, a copy of it has another name
        path = self._copies / f"{known.size:x}-{known.changed:x}-{name.replace('/', '%')}"
        with suppress(FileNotFoundError):
            os.utime(path)  # it is in use: others make room first
            return path
        with storage.alone(path.with_name(f".{path.name}.lock")):
            if not path.exists():  # nobody else has fetched it meanwhile
                self._fetch(name, path)
        return path

    def fetch(self, name: str, path: Path) -> None:
        """Put a file at `path`, whole or not at all, where it stays.

        Raises:
            PreflightError: If it cannot be fetched, or the disk is full.
        """
        with storage.writing(path) as file:
            self._download(name, file)

    def require_room(self, needed: int) -> None:
        """Refuse to work with too few copies.

        Raises:
            IncompatibleError: If so many bytes of copies may not lie here.
        """
        if needed > (most := _most_bytes(self._base, self._held())):
            raise IncompatibleError(
                f"data.shuffle_shards: the shards that are mixed and those that come next are "
                f"{storage.size(needed)}, and copies may take {storage.size(most)} of {self._base}",
                hint=f"mix fewer shards at a time, or raise {BYTES}; {PLACE} names another folder",
            )

    def _fetch(self, name: str, path: Path) -> None:
        size = self._files[name].size
        with ExitStack() as fetching:
            with storage.alone(self._base / ".lock"):
                self._make_room(size)
                # As large as it will be: others count it while it is fetched.
                file = fetching.enter_context(storage.writing(path, size))
            self._download(name, file)

    def _download(self, name: str, file: BinaryIO) -> None:
        """Fill a file here with what one there holds."""
        files, root = self._connected()
        known = self._files[name]
        for start in range(0, known.size, _PART):
            end = min(start + _PART, known.size)
            with remote.refusals(self.origin, name):
                data = files.cat_file(f"{root}/{name}", start=start, end=end)
            if len(data) < end - start:
                raise DamagedError(f"{self.origin}/{name}: cut short while it was fetched")
            file.write(data)
        with remote.refusals(self.origin, name):
            found = _file(files.info(f"{root}/{name}"))
        if found.size != known.size or found.changed not in (known.changed, 0):
            raise DamagedError(
                f"{self.origin}/{name}: changed since it was listed", hint="run again"
            )

    def _connected(self) -> tuple[Any, str]:
        """A client of this process: after a fork, that of the parent would wait without end."""
        if self._client is None or self._client[0] != os.getpid():
            files, root = remote.open_files(self.origin, skip_instance_cache=True)
            self._client = os.getpid(), files, root
        return self._client[1:]

    def _make_room(self, size: int) -> None:
        """Remove the copies that were not used for longest, until there is room for one more."""
        storage.sweep(self._base)
        held = self._held()
        free = _most_bytes(self._base, held) - sum(copy.size for copy in held)
        for copy in sorted(held):
            if free >= size:
                return
            if not copy.path.name.startswith("."):
                storage.remove(copy.path)
                free += copy.size

    def _held(self) -> list[_Copy]:
        """All copies, of this place and others, and those that are being fetched."""
        found = []
        for path in self._base.glob("*/*"):
            with suppress(FileNotFoundError):
                status = path.stat()
                found.append(_Copy(status.st_mtime_ns, status.st_size, path))
        return found


class _Copy(NamedTuple):
    used: int  # nanoseconds
    size: int  # bytes
    path: Path


def ahead(
    batches: Iterable[T],
    shards: Callable[[T], Iterable[int]],
    fetch: Callable[[int], object],
    *,
    most: int,
) -> Iterator[T]:
    """The batches, while the shards of those to come are fetched in the background.

    Args:
        batches: Read as far ahead as `most` allows.
        shards: The shards that a batch needs.
        fetch: Fetches one. What it raises is left to whoever needs the shard.
        most: Shards of the batches that are read ahead.
    """
    source, waiting, wanted = iter(batches), deque[tuple[T, list[int]]](), Counter[int]()
    pool = ThreadPoolExecutor(_FETCHING)
    try:
        while True:
            while len(wanted) < most:
                try:
                    batch = next(source)
                except StopIteration:
                    break
                needed = list(shards(batch))
                for shard in needed:
                    if shard not in wanted:
                        pool.submit(fetch, shard)
                wanted.update(needed)
                waiting.append((batch, needed))
            if not waiting:
                return
            batch, needed = waiting.popleft()
            yield batch
            wanted -= Counter(needed)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _file(about: Mapping[str, Any]) -> File:
    """What a store tells of a file. Each has a name of its own for what follows the content."""
    told = next((str(about[key]) for key in _CONTENT if about.get(key)), "")
    digest = hashlib.sha256(told.encode()).digest()
    return File(about["size"], int.from_bytes(digest[:7]) if told else 0)


def _most_bytes(base: Path, held: Iterable[_Copy]) -> int:
    """What copies may take: half of the disk's room, if nothing else is said."""
    if (given := os.environ.get(BYTES)) is None:
        room = storage.free_bytes(base) + sum(copy.size for copy in held)
        return min(_MOST_BYTES, room // 2)
    if not given.isdigit():
        raise IncompatibleError(f"{BYTES}={given}: must be a number of bytes")
    return int(given)
