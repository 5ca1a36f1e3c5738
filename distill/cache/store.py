"""Where a cache lies: a folder, or a place in an object store."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from distill import remote, storage
from distill.errors import PreflightError
from distill.recipe import Teacher


class Store(ABC):
    """Files by name, each whole or absent."""

    origin: str  # as a user names it

    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """Bytes of every file, by its name relative to the store."""

    @abstractmethod
    def read(self, name: str, most: int | None = None) -> bytes | None:
        """The file, or its first `most` bytes; None where there is none."""

    @abstractmethod
    def write(self, name: str, data: bytes) -> None:
        """Put a file there, in place of one that may be there."""

    @abstractmethod
    def create(self, name: str, data: bytes) -> None:
        """Put a file there unless there is one."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""

    def below(self, name: str) -> Store:
        """The store of the folder `name`."""
        return open_store(f"{self.origin.rstrip('/')}/{name}")


class Folder(Store):
    """A folder on a disk of this machine, or one that looks like it."""

    def __init__(self, path: Path) -> None:
        self.path, self.origin = path, str(path)

    def sizes(self) -> dict[str, int]:
        with self._refusals(self.path):
            return {
                path.relative_to(self.path).as_posix(): path.stat().st_size
                for path in self.path.rglob("*")
                if not path.name.startswith(".") and path.is_file()
            }

    def read(self, name: str, most: int | None = None) -> bytes | None:
        try:
            with self._refusals(self.path / name), (self.path / name).open("rb") as file:
                return file.read(-1 if most is None else most)
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes) -> None:
        self._put(storage.write, name, data)

    def create(self, name: str, data: bytes) -> None:
        self._put(storage.create, name, data)

    def remove(self, name: str) -> None:
        storage.remove(self.path / name)

    def sweep(self) -> None:
        """Remove what killed writers left half written."""
        storage.sweep(self.path)

    def _put(self, put: Callable[[Path, bytes], None], name: str, data: bytes) -> None:
        path = self.path / name
        storage.make_folder(path.parent)
        put(path, data)

    @contextmanager
    def _refusals(self, path: Path) -> Generator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            raise PreflightError(f"{path}: {error.strerror or error}") from None


class Bucket(Store):
    """A place in an object store that fsspec reaches, such as s3://bucket/folder."""

    def __init__(self, url: str) -> None:
        self.origin = url
        self._files, self._root = remote.open_files(url)

    def sizes(self) -> dict[str, int]:
        with self._refusals(""):
            found: dict[str, Any] = self._files.find(self._root, detail=True)
        start = len(self._root.rstrip("/")) + 1
        return {path[start:]: entry["size"] for path, entry in found.items()}

    def read(self, name: str, most: int | None = None) -> bytes | None:
        with self._refusals(name):
            try:
                data: bytes = self._files.cat_file(self._path(name), end=most)
            except FileNotFoundError:
                return None
        return data

    def write(self, name: str, data: bytes) -> None:
        with self._refusals(name):
            self._files.pipe_file(self._path(name), data)  # a PUT is atomic

    def create(self, name: str, data: bytes) -> None:
        with self._refusals(name):
            try:
                self._files.pipe_file(self._path(name), data, mode="create")
            except Exception:  # there is one, or this kind of store knows no such condition
                if not self._files.exists(self._path(name)):
                    self._files.pipe_file(self._path(name), data)

    def remove(self, name: str) -> None:
        with self._refusals(name), suppress(FileNotFoundError):
            self._files.rm_file(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _refusals(self, name: str) -> AbstractContextManager[None]:
        return remote.refusals(self.origin, name)


def open_store(place: str) -> Store:
    """The store at a folder's path, or at an address such as s3://bucket/folder."""
    if remote.is_remote(place):
        return Bucket(place)
    return Folder(Path(place.removeprefix("file://")).expanduser())


class Place(NamedTuple):
    """Where the answers of one teacher lie."""

    name: str
    store: Store


def places(teachers: Sequence[Teacher], path: str) -> list[Place]:
    """A cache for each teacher: `path` itself for one, a folder below it for each of several.

    Where no teacher is named, the cache at `path` stands for one.
    """
    root = open_store(path)
    if len(teachers) < 2:
        return [Place(_label(spec), root) for spec in teachers] or [Place("cache", root)]
    found: list[Place] = []
    for spec in teachers:
        name, taken = _label(spec), {place.name for place in found}
        unique = next(n for n in (name, *(f"{name}-{i}" for i in range(2, 99))) if n not in taken)
        found.append(Place(unique, root.below(unique)))
    return found


def _label(spec: Teacher) -> str:
    name = spec.name or spec.model or str(spec.weights).rstrip("/").rpartition("/")[2]
    return name.replace("/", "-").replace(":", "-")
