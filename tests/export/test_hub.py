"""A push sends exactly what was planned, in one commit, and nothing that is secret."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from distill.errors import DistillError, IdentityError, PreflightError, RecipeError
from distill.export import hub

# The client's own way of sending large files.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

TOKEN = "hf_" + "s3cr3t" * 6
FILES = {
    "README.md": b"---\nlicense: unknown\n---\n\n# student\n",
    "export.json": b"{}\n",
    "model.safetensors": bytes(range(256)) * 40,
    "model.mlpackage/Data/weights.bin": b"\x00weights",
}


class Hub(ThreadingHTTPServer):
    """The part of the hub that a push speaks to, on loopback."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.asked: list[str] = []  # method and path of every request
        self.created: list[dict[str, Any]] = []
        self.tokens: set[str | None] = set()
        self.stored: dict[str, bytes] = {}  # large files by digest
        self.commits: list[dict[str, bytes]] = []
        self.refusals: dict[str, tuple[int, str]] = {}  # by a part of method and path

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def commit(self, body: bytes) -> None:
        files: dict[str, bytes] = {}
        for row in map(json.loads, body.splitlines()):
            value = row["value"]
            if row["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif row["key"] == "lfsFile":
                files[value["path"]] = self.stored[value["oid"]]
        self.commits.append(files)


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def say(self, status: int, told: Any) -> None:
        body = json.dumps(told).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def refuses(self) -> bool:
        asked = f"{self.command} {self.path}"
        self.server.asked.append(asked)
        for place, (status, said) in self.server.refusals.items():
            if place in asked:
                self.say(status, {"error": said})
                return True
        return False

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        hub, path = self.server, self.path
        hub.tokens.add(self.headers["Authorization"])
        if self.refuses():
            return
        if path == "/api/repos/create":
            hub.created.append(json.loads(body))
            self.say(200, {"url": f"{hub.address}/me/student"})
        elif path == "/api/validate-yaml":
            self.say(200, {"warnings": [], "errors": []})
        elif path == "/api/models/me/student/preupload/main":
            modes = {True: "lfs", False: "regular"}
            files = [
                {
                    "path": file["path"],
                    "uploadMode": modes[file["path"].endswith((".safetensors", ".bin"))],
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self.say(200, {"files": files})
        elif path == "/me/student.git/info/lfs/objects/batch":
            objects = [
                {**one, "actions": {"upload": {"href": f"{hub.address}/lfs/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            self.say(200, {"transfer": "basic", "objects": objects})
        elif path == "/api/models/me/student/commit/main":
            hub.commit(body)
            self.say(200, {"commitUrl": f"{hub.address}/me/student/commit/1", "commitOid": "1"})
        else:
            self.say(404, {"error": "no such page"})

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.refuses():
            return
        self.server.stored[self.path.rpartition("/")[2]] = body
        self.say(200, {})

    def do_GET(self) -> None:
        if not self.refuses():
            self.say(404, {"error": "no such page"})


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session, disable_progress_bars

    server = Hub()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    disable_progress_bars()
    close_session()  # another test's may have been made for being offline
    yield server
    close_session()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "export"
    for name, data in {**FILES, ".lock": b"", "checkpoint/step": b"", "notes.txt": b"mine"}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def planned(folder: Path) -> hub.Plan:
    names = ["README.md", "export.json", "model.safetensors", "model.mlpackage"]
    return hub.plan(folder, "me/student", names)


@pytest.mark.parametrize("private", [True, False])
def test_a_push_sends_exactly_the_planned_files_in_one_commit(
    folder: Path, server: Hub, private: bool
) -> None:
    found = planned(folder)._replace(private=private)
    assert hub.push(found) == f"{server.address}/me/student"
    assert server.commits == [FILES]
    assert server.tokens == {f"Bearer {TOKEN}"}
    (created,) = server.created
    assert (created["organization"], created["name"]) == ("me", "student")
    visibility = {"visibility": "private" if private else "public"}
    assert visibility.items() <= created.items() or created["private"] is private


def test_a_repository_that_is_there_is_committed_to(folder: Path, server: Hub) -> None:
    hub.push(planned(folder))
    (folder / "export.json").write_bytes(b'{"format": 1}\n')
    hub.push(planned(folder))
    assert [commit["export.json"] for commit in server.commits] == [b"{}\n", b'{"format": 1}\n']


def test_a_plan_touches_no_network(folder: Path, server: Hub) -> None:
    found = planned(folder)
    assert server.asked == []
    assert found.private
    assert {file.name: (file.size, file.sha256) for file in found.files} == {
        name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in FILES.items()
    }
    told = hub.lines(found)
    assert told[0] == "me/student on the Hugging Face hub (private, if it is new):"
    assert [line.split()[0] for line in told[1:-1]] == list(FILES)
    assert all(file.sha256[:16] in line for file, line in zip(found.files, told[1:-1], strict=True))
    assert told[-1] == "4 files, 10.29 kB"


@pytest.mark.parametrize(
    "name",
    [".lock", "checkpoint", "checkpoint/step", "../export/README.md", "link", "linked/README.md",
     "a.ckpt", "token", "/etc/hostname"],
)  # fmt: skip
def test_some_files_are_never_sent(folder: Path, name: str) -> None:
    (folder / "link").symlink_to(folder / "README.md")
    (folder / "linked").symlink_to(folder, target_is_directory=True)
    for other in ("a.ckpt", "token"):
        (folder / other).write_bytes(b"x")
    with pytest.raises(RecipeError, match="never sent"):
        hub.plan(folder, "me/student", ["README.md", name])


def test_what_is_not_there_is_named(folder: Path) -> None:
    with pytest.raises(PreflightError, match="absent: No such file"):
        hub.plan(folder, "me/student", ["absent"])


@pytest.mark.parametrize(
    "name", ["", "student", "me/a/b", "me/..", "me/a b", "me/a.git", "hf-hub:me/a"]
)
def test_a_name_that_is_none_is_refused(folder: Path, name: str) -> None:
    with pytest.raises(RecipeError) as refused:
        hub.plan(folder, name, ["README.md"])
    assert "OWNER/" in refused.value.hint


@pytest.mark.parametrize(
    ("secret", "kind"),
    [
        ("hf_" + "Ab3" * 12, "a token of the hub"),
        ("hf_oauth_" + "eyJ.a-_" * 6, "a token of the hub"),
        ("api_org_" + "Ab3" * 12, "a token of the hub"),
        ("correct horse battery", r"the value of \$HF_TOKEN"),
        ("tracker-0123456789", r"the value of \$WANDB_API_KEY"),
    ],
)
@pytest.mark.parametrize("before", [0, 2**20 - 8], ids=["start", "between chunks"])
def test_a_file_that_holds_a_secret_is_not_sent(
    folder: Path, monkeypatch: pytest.MonkeyPatch, secret: str, kind: str, before: int
) -> None:
    monkeypatch.setenv("HF_TOKEN", "correct horse battery")
    monkeypatch.setenv("WANDB_API_KEY", "tracker-0123456789")
    (folder / "notes.txt").write_bytes(b" " * before + secret.encode() + b" ")
    with pytest.raises(
        PreflightError, match=f"notes.txt: holds .*{kind}; nothing was sent"
    ) as told:
        hub.plan(folder, "me/student", ["README.md", "notes.txt"])
    assert secret not in str(told.value) + told.value.hint


def test_words_that_only_look_so_are_sent(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setenv("EMPTY_TOKEN", "student")
    text = b"hf-hub:timm/resnet18 hf_hub_download hf_transfer # student xhf_" + b"a" * 40
    (folder / "notes.txt").write_bytes(text)
    assert hub.plan(folder, "me/student", ["notes.txt"]).files[0].size == len(text)


def test_a_file_that_changed_since_is_not_sent(folder: Path, server: Hub) -> None:
    found = planned(folder)
    (folder / "export.json").write_bytes(b"other")
    with pytest.raises(IdentityError, match="changed since"):
        hub.push(found)
    assert server.asked == []


CREATE, COMMIT = "/api/repos/create", "/commit/main"


@pytest.mark.parametrize(
    ("where", "status", "kind", "sentence", "hint"),
    [
        (CREATE, 401, PreflightError, "does not know the token", "hf auth login"),
        (CREATE, 403, PreflightError, "may not write there", "check that me is you"),
        (CREATE, 404, RecipeError, "no such place", "check the name me"),
        (CREATE, 429, PreflightError, "fewer requests", "try again later"),
        (CREATE, 500, PreflightError, r"the hub failed \(500\)", "run the same command again"),
        (CREATE, 402, DistillError, r"the hub refused \(402\)", ""),
        (COMMIT, 403, PreflightError, "may not write there", "check that me is you"),
        (COMMIT, 409, PreflightError, "another commit came in between", "run the same"),
        (COMMIT, 503, PreflightError, r"the hub failed \(503\)", "no commit was made"),
        ("/lfs/objects/batch", 403, PreflightError, "may not write there", "check that me is you"),
        ("PUT /lfs/", 403, PreflightError, "may not write there", "check that me is you"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence_without_the_token(
    folder: Path,
    server: Hub,
    where: str,
    status: int,
    kind: type[DistillError],
    sentence: str,
    hint: str,
) -> None:
    server.refusals[where] = status, f"because of {TOKEN},\n told in two lines"
    with pytest.raises(kind, match=sentence) as refused:
        hub.push(planned(folder))
    error = refused.value
    assert type(error) is kind
    assert hint in error.hint
    assert str(error).startswith("me/student: ")
    assert "because of ***, told in two lines" in str(error)
    assert "\n" not in str(error)
    assert TOKEN not in str(error) + error.hint
    assert server.commits == []


def test_a_card_that_the_hub_finds_wrong_is_told(folder: Path, server: Hub) -> None:
    server.refusals["/validate-yaml"] = 400, "license must be known"
    with pytest.raises(DistillError, match="Invalid metadata in README"):
        hub.push(planned(folder))


def test_nobody_is_logged_in(folder: Path, server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PreflightError, match="nobody is logged in") as refused:
        hub.push(planned(folder))
    assert "hf auth login" in refused.value.hint
    assert server.asked == []


def test_a_hub_that_cannot_be_reached(folder: Path, server: Hub) -> None:
    server.server_close()  # the port is free, and nobody answers there
    with pytest.raises(PreflightError, match="cannot be reached") as refused:
        hub.push(planned(folder))
    assert TOKEN not in str(refused.value)


def test_a_hub_that_is_switched_off(
    folder: Path, server: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    close_session()  # it was made for being online
    with pytest.raises(PreflightError, match="HF_HUB_OFFLINE"):
        hub.push(planned(folder))
    close_session()
    assert server.asked == []
