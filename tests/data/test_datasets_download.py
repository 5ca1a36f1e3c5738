"""A download is the published file, or nothing lies where it should be."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import tarfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote

import pytest

from distill.data import download
from distill.data.download import Remote, fetch
from distill.data.official import Files, locate
from distill.errors import DamagedError, PreflightError
from tests.promises import Measured

CONTENT = b"the published bytes" * 100_000
HTML = b"<!DOCTYPE html><html><body>Sign in to the network</body></html>"


class Handler(BaseHTTPRequestHandler):
    """Serves one file in several ways."""

    files: dict[str, bytes] = {}  # noqa: RUF012
    places: dict[str, str] = {}  # noqa: RUF012
    odd: dict[str, tuple[int, dict[str, str], bytes]] = {  # noqa: RUF012
        "/odd/part/set.bin": (206, {"Content-Range": "bytes 0-99/1900000"}, CONTENT[:100]),
        "/odd/gzip/set.bin": (200, {"Content-Encoding": "gzip"}, gzip.compress(CONTENT)),
        "/odd/nothing/set.bin": (204, {}, b""),
        "/odd/empty/set.bin": (200, {"Content-Length": "0"}, b""),
        "/odd/long/set.bin": (200, {"Content-Length": "9" * 30}, CONTENT[:100]),
        "/odd/negative/set.bin": (200, {"Content-Length": "-5"}, CONTENT[:100]),
        "/odd/chunks/set.bin": (200, {"Transfer-Encoding": "chunked"}, b"FFFFFFFFFF\r\nabc"),
        "/odd/no chunks/set.bin": (200, {"Transfer-Encoding": "chunked"}, b"zzz\r\nabc"),
        "/odd/lines/set.bin": (200, {f"X-{i}": "y" for i in range(200)}, CONTENT),
        "/odd/error/set.bin": (500, {}, CONTENT),
    }

    def do_GET(self) -> None:
        if self.path.startswith("/elsewhere/"):
            self.send_response(302)
            self.send_header("Location", self.places[self.path])
            self.end_headers()
        elif self.path.startswith("/endless/"):
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):  # the other side has had enough
                while self.path == "/endless/set.bin":
                    self.wfile.write(bytes(2**20))
                while True:
                    self.wfile.write(b"x")
                    time.sleep(0.05)
        elif self.path.startswith("/odd/"):
            status, headers, content = self.odd[self.path]
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)
        elif self.path.startswith("/moved/"):
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


@pytest.mark.promise("R22")
def test_nothing_but_the_published_file_arrives(
    home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: Measured
) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(CONTENT)
    Handler.places = {
        "/elsewhere/file/set.bin": secret.as_uri(),
        "/elsewhere/ftp/set.bin": "ftp://127.0.0.1:9/set.bin",
        "/elsewhere/data/set.bin": "data:,x",
        "/elsewhere/gopher/set.bin": "gopher://127.0.0.1:9/set.bin",
        "/elsewhere/host/set.bin": home.replace("127.0.0.1", "localhost") + "/altered/set.bin",
        "/elsewhere/itself/set.bin": "/elsewhere/itself/set.bin",
        "/elsewhere/nowhere/set.bin": "",
    }
    monkeypatch.setattr(download, "_MOST_BYTES", 10 * len(CONTENT))
    monkeypatch.setattr(download, "_TIMEOUT", 0.5)
    paths = [*Handler.places, *Handler.odd, "/endless/set.bin", "/endless/slow/set.bin"]
    paths += ["/altered/set.bin", "/truncated/set.bin", "/page/set.bin", "/missing/set.bin"]
    folder = tmp_path / "set"
    for path in paths:
        with pytest.raises((DamagedError, PreflightError)) as error:
            fetch([remote(home + quote(path))], folder)
        assert str(error.value).startswith(home), path
        assert list(folder.iterdir()) == [], path
    measured("downloads altered on the way", f"{len(paths)} of {len(paths)} refused, nothing left")


def stated(name: str, size: int, content: bytes = b"", kind: bytes = tarfile.REGTYPE) -> bytes:
    """A member with another size than it has."""
    info = member(name, kind)
    info.size = size
    return info.tobuf() + content


# An archive holds the second that it was made in, which each test process has its own of.
HOSTILE: dict[str, tuple[bytes, str]] = {
    "above": (archive((member("../a.bin"), b"x")), "unsafe"),
    "above, inside": (archive((member("batches/../../a.bin"), b"x")), "unsafe"),
    "from the root": (archive((member("/etc/a.bin"), b"x")), "unsafe"),
    "a second file from the root": (
        archive((member("a.bin"), b"x"), (member("//etc/a.bin"), b"x")), "unsafe"),
    "link": (archive((member("a.bin", tarfile.SYMTYPE, "/etc/passwd"), b"")), "link"),
    "link, then through it": (
        archive((member("d", tarfile.SYMTYPE, "/tmp"), b""), (member("d/a.bin"), b"x")), "link"),
    "hard link": (archive((member("a.bin", tarfile.LNKTYPE, "../b.bin"), b"")), "link"),
    "hard link to nothing": (archive((member("a.bin", tarfile.LNKTYPE, "a.bin"), b"")), "link"),
    "pipe": (archive((member("a.bin", tarfile.FIFOTYPE), b"")), "device"),
    "device": (archive((member("a.bin", tarfile.CHRTYPE), b"")), "device"),
    "block device": (archive((member("a.bin", tarfile.BLKTYPE), b"")), "device"),
    "stated 2 GiB": (gzip.compress(stated("a.bin", 2**31)), "unsafe"),
    "1000 to 1": (
        gzip.compress(stated("a.bin", 2**28, bytes(2**28)), compresslevel=1), "unsafe"),
    "a header of 200 MB": (
        gzip.compress(stated("x", 2**28, bytes(2**28), tarfile.XHDTYPE), compresslevel=1),
        "unsafe"),
    "many members": (archive(*((member(f"{i}.bin"), b"") for i in range(1001))), "unsafe"),
    "cut short": (archive((member("a.bin"), bytes(100_000)))[:-60], "can be unpacked"),
    "altered": (
        archive((member("a.bin"), CONTENT))[:-5] + b"12345", "can be unpacked"),
    "a page": (HTML, "can be unpacked"),
    "nothing": (b"", "can be unpacked"),
    "a zip": (b"PK\3\4" + bytes(100), "can be unpacked"),
}  # fmt: skip


@pytest.mark.promise("R22")
def test_hostile_archives_are_refused(
    home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: Measured
) -> None:
    monkeypatch.setattr(download, "_MOST_BYTES", 2**27)
    folder = tmp_path / "root" / "set"
    for name, (content, what) in HOSTILE.items():
        Handler.files["/set.tar.gz"] = content
        with pytest.raises(DamagedError, match=what):
            fetch([remote(f"{home}/set.tar.gz", content)], folder)
        assert [path.name for path in tmp_path.rglob("*")] == ["root", "set"], name
    measured("hostile archives", f"{len(HOSTILE)} of {len(HOSTILE)} refused, nothing left")


def test_files_are_fetched_only_if_they_may_be(home: str, tmp_path: Path) -> None:
    files = Files("set", ("set.bin",), (), (remote(f"{home}/set.bin"),))
    with pytest.raises(PreflightError, match=r"set.bin not there"):
        locate(files, tmp_path, download=False)
    expected = {"set.bin": tmp_path / "set" / "set.bin"}
    assert locate(files, tmp_path, download=True) == expected
    Handler.files.clear()
    assert locate(files, tmp_path, download=True) == expected
