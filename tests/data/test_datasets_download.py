"""A download is the published file, or nothing lies where it should be."""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from distill.data.download import Remote, fetch
from distill.data.official import Files, locate
from distill.errors import DamagedError, PreflightError

CONTENT = b"the published bytes" * 100_000
HTML = b"<!DOCTYPE html><html><body>Sign in to the network</body></html>"


class Handler(BaseHTTPRequestHandler):
    """Serves one file in several ways."""

    files: dict[str, bytes] = {}  # noqa: RUF012

    def do_GET(self) -> None:
        if self.path.startswith("/moved/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/moved"))
            self.end_headers()
        elif self.path == "/truncated/set.bin":
            self.send_response(200)
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            self.wfile.write(CONTENT[:1_000_000])
        elif self.path in self.files:
            self.send_response(200)
            self.send_header("Content-Length", str(len(self.files[self.path])))
            self.end_headers()
            self.wfile.write(self.files[self.path])
        else:
            self.send_error(404)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def home() -> Iterator[str]:
    """The URL of a server on this machine."""
    Handler.files = {
        "/set.bin": CONTENT,
        "/altered/set.bin": CONTENT[:-1] + b"!",
        "/page/set.bin": HTML,
    }
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def remote(url: str, content: bytes = CONTENT) -> Remote:
    return Remote(url, hashlib.sha256(content).hexdigest())


def archive(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for member, content in members:
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@pytest.mark.parametrize("path", ["/set.bin", "/moved/set.bin"])
def test_the_published_file_arrives(home: str, tmp_path: Path, path: str) -> None:
    fetch([remote(home + path)], tmp_path / "new" / "folder")
    found = list((tmp_path / "new" / "folder").iterdir())
    assert [file.name for file in found] == ["set.bin"]
    assert found[0].read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("path", "error", "what"),
    [
        ("/truncated/set.bin", DamagedError, "1,000,000 bytes arrived"),
        ("/altered/set.bin", DamagedError, "not the published file"),
        ("/page/set.bin", DamagedError, "63 bytes arrived"),
        ("/moved/altered/set.bin", DamagedError, "not the published file"),
        ("/missing/set.bin", PreflightError, "404"),
    ],
)
def test_anything_else_is_refused(
    home: str, tmp_path: Path, path: str, error: type[Exception], what: str
) -> None:
    with pytest.raises(error, match=what) as raised:
        fetch([remote(home + path)], tmp_path)
    assert str(raised.value).startswith(home + path)
    assert list(tmp_path.iterdir()) == []


def test_no_server(tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match="could not be downloaded"):
        fetch([remote("http://127.0.0.1:9/set.bin")], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_older_file_stays_until_the_new_one_is_whole(home: str, tmp_path: Path) -> None:
    (tmp_path / "set.bin").write_bytes(b"old")
    with pytest.raises(DamagedError):
        fetch([remote(f"{home}/altered/set.bin")], tmp_path)
    assert (tmp_path / "set.bin").read_bytes() == b"old"


def test_an_archive_is_unpacked_without_its_folders(home: str, tmp_path: Path) -> None:
    content = archive(
        (member("batches", tarfile.DIRTYPE), b""),
        (member("batches/a.bin"), b"first"),
        (member("batches/readme.html"), b"second"),
    )
    Handler.files["/set.tar.gz"] = content
    fetch([remote(f"{home}/set.tar.gz", content)], tmp_path)
    found = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert found == {"a.bin": b"first", "readme.html": b"second"}


def bomb() -> bytes:
    """An archive whose only file announces 2 GiB."""
    info = member("a.bin")
    info.size = 2**31
    return gzip.compress(info.tobuf())


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (archive((member("../a.bin"), b"x")), "unsafe"),
        (archive((member("batches/../../a.bin"), b"x")), "unsafe"),
        (archive((member("/etc/a.bin"), b"x")), "unsafe"),
        (archive((member("a.bin", tarfile.SYMTYPE, "/etc/passwd"), b"")), "link"),
        (archive((member("a.bin", tarfile.LNKTYPE, "../b.bin"), b"")), "link"),
        (archive((member("a.bin", tarfile.FIFOTYPE), b"")), "device"),
        (bomb(), "unsafe"),
        (archive((member("a.bin"), bytes(100_000)))[:-60], "can be unpacked"),
        (HTML, "can be unpacked"),
    ],
    # An archive holds the second that it was made in, which each test process has its own of.
    ids=["above", "above-inside", "root", "link", "hard-link", "pipe", "bomb", "short", "page"],
)  # fmt: skip
def test_a_hostile_archive_is_refused(home: str, tmp_path: Path, content: bytes, what: str) -> None:
    Handler.files["/set.tar.gz"] = content
    folder = tmp_path / "root" / "set"
    with pytest.raises(DamagedError, match=what):
        fetch([remote(f"{home}/set.tar.gz", content)], folder)
    assert [path.name for path in tmp_path.rglob("*")] == ["root", "set"]


def test_files_are_fetched_only_if_they_may_be(home: str, tmp_path: Path) -> None:
    files = Files("set", ("set.bin",), (), (remote(f"{home}/set.bin"),))
    with pytest.raises(PreflightError, match=r"set.bin not there"):
        locate(files, tmp_path, download=False)
    expected = {"set.bin": tmp_path / "set" / "set.bin"}
    assert locate(files, tmp_path, download=True) == expected
    Handler.files.clear()
    assert locate(files, tmp_path, download=True) == expected
