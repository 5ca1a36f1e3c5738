"""A cache in an object store, through the real client and over the wire to a real server."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import boto3
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from distill.cache.read import Reader
from distill.cache.store import Store, open_store
from distill.cache.write import read_manifest
from distill.errors import DamagedError
from tests.cli.conftest import ROOT, listing, process

BUCKET = "bucket"
VIEWS = 5  # more than a machine keeps
ONE, OTHER = "views/v0001/u00001.safetensors", "views/v0000/u00000.safetensors"

TEACHER = """
data: {name: digits, fraction: 0.2}
student: {model: resnet8}
objective: [{term: ce}]
optimizer: {name: sgd, lr: 0.1}
train: {epochs: 1, batch_size: 16}
"""
RECIPE = """
data: {name: digits, fraction: 0.1}
teachers: [{recipe: teacher.yaml}]
student: {model: vit, width: 16, depth: 1, heads: 2}
objective: [{term: ce, weight: 0.5}, {term: kd, weight: 0.5}]
optimizer: {lr: 1e-3}
train: {epochs: 5, batch_size: 16}
"""


class Server(NamedTuple):
    """An S3 server in a process of its own."""

    client: Any  # another one than the product's

    def objects(self, folder: str) -> dict[str, bytes]:
        """All objects below a folder of the bucket, with their content."""
        pages = self.client.get_paginator("list_objects_v2").paginate(
            Bucket=BUCKET, Prefix=f"{folder}/"
        )
        keys = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
        return {key.removeprefix(f"{folder}/"): self.object(key) for key in keys}

    def object(self, key: str) -> bytes:
        with self.client.get_object(Bucket=BUCKET, Key=key)["Body"] as body:
            return bytes(body.read())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server, named in the environment with its credentials, as a user would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # s3fs leaves these to botocore, which reads them itself; FSSPEC_S3_ENDPOINT_URL would name the
    # server to s3fs alone.
    env = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "user",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "NO_PROXY": "127.0.0.1",
    }
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("wb") as stream, pytest.MonkeyPatch.context() as patch:
        for name, value in env.items():
            patch.setenv(name, value)
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        running = subprocess.Popen(command, stdout=stream, stderr=stream)
        client = boto3.client("s3")
        try:
            while not _listens(port):
                assert running.poll() is None, log.read_text()
                time.sleep(0.05)
            client.create_bucket(Bucket=BUCKET)
            yield Server(client)
        finally:
            client.close()
            running.terminate()
            running.wait()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe and its teacher's."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "teacher.yaml").write_text(TEACHER)
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


Distill = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def distill(server: Server, work: Path) -> Distill:
    """Run `distill COMMAND recipe.yaml ARGUMENTS` in the folder, with the server at hand."""

    def run(
        command: str, *arguments: object, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        env = {"XDG_CACHE_HOME": str(work / "scratch"), **(env or {})}
        return process(command, "recipe.yaml", *arguments, cwd=work, env=env)

    return run


@pytest.fixture(scope="module")
def teacher_cache(distill: Distill) -> Distill:
    return partial(distill, "teacher-cache", "--views", VIEWS, "--unit-rows", 64)


@pytest.fixture(scope="module")
def local(work: Path, teacher_cache: Distill) -> Path:
    """The cache in a folder."""
    done = teacher_cache("--out", "local")
    assert done.returncode == 0, done.stderr
    return work / "local"


@pytest.fixture(scope="module")
def far(local: Path, teacher_cache: Distill) -> str:
    """The cache in the bucket, made by the same command."""
    done = teacher_cache("--out", f"s3://{BUCKET}/tc")
    assert done.returncode == 0, done.stderr
    assert "Unclosed" not in done.stderr
    return f"s3://{BUCKET}/tc"


# A store by itself.


def writes_replace(store: Store) -> None:
    store.write("deep/er/a", b"first")
    store.write("deep/er/a", b"second")
    assert store.read("deep/er/a") == b"second"


def reads_give_the_whole_or_its_beginning(store: Store) -> None:
    store.write("a", b"0123456789")
    assert store.read("a") == b"0123456789"
    assert store.read("a", 4) == b"0123"
    assert store.read("a", 10) == store.read("a", 1000) == b"0123456789"
    store.write("empty", b"")
    assert store.read("empty") == b""


def what_is_absent_reads_as_none(store: Store) -> None:
    assert store.read("a") is None
    assert store.read("a", 4) is None
    assert store.sizes() == {}


def what_another_wrote_since_the_listing_is_there(store: Store) -> None:
    store.write("deep/a", b"a")
    assert store.sizes() == {"deep/a": 1}
    open_store(store.origin).write("deep/b", b"bb")
    assert store.read("deep/b") == b"bb"
    assert store.sizes() == {"deep/a": 1, "deep/b": 2}


def creations_keep_the_first(store: Store) -> None:
    store.create("deep/a", b"first")
    store.create("deep/a", b"second")
    assert store.read("deep/a") == b"first"


def removals_can_be_repeated(store: Store) -> None:
    store.write("a", b"a")
    store.write("ab", b"ab")
    store.remove("a")
    store.remove("a")
    assert store.sizes() == {"ab": 2}
    store.create("a", b"again")
    assert store.read("a") == b"again"


def sizes_are_of_all_below_and_of_nothing_beside(store: Store) -> None:
    open_store(f"{store.origin}2").write("beside", b"1")
    for name in ("a", "views/v0000/u00000", "views/v0000/u00001", "viewsandmore"):
        store.write(name, name.encode())
    assert store.sizes() == {
        "a": 1,
        "views/v0000/u00000": 18,
        "views/v0000/u00001": 18,
        "viewsandmore": 12,
    }
    assert open_store(f"{store.origin}/").sizes() == store.sizes()


def a_folder_of_it_is_a_store(store: Store) -> None:
    store.below("views").write("v0000/u00000", b"123")
    assert store.read("views/v0000/u00000") == b"123"
    assert store.below("views").below("v0000").sizes() == {"u00000": 3}
    assert store.below("views").origin == f"{store.origin}/views"


BEHAVIOURS = [
    writes_replace,
    reads_give_the_whole_or_its_beginning,
    what_is_absent_reads_as_none,
    what_another_wrote_since_the_listing_is_there,
    creations_keep_the_first,
    removals_can_be_repeated,
    sizes_are_of_all_below_and_of_nothing_beside,
    a_folder_of_it_is_a_store,
]


@pytest.fixture(scope="module")
def aside(server: Server) -> Iterator[ProcessPoolExecutor]:
    """A process that takes the client's threads and connections with it when it ends."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        yield pool


def shown(behaviour: Callable[[Store], None], place: str) -> bool:
    behaviour(open_store(place))
    return True


@pytest.mark.parametrize("behaviour", BEHAVIOURS, ids=lambda each: each.__name__)
@pytest.mark.parametrize("kind", ["folder", "bucket"])
def test_a_bucket_behaves_as_a_folder(
    kind: str, behaviour: Callable[[Store], None], aside: ProcessPoolExecutor, tmp_path: Path
) -> None:
    below = str(tmp_path) if kind == "folder" else f"s3://{BUCKET}"
    place = f"{below}/{behaviour.__name__}"
    assert aside.submit(shown, behaviour, place).result()


def test_a_store_that_makes_no_write_conditional_is_asked_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = MemoryFileSystem.pipe_file

    def pipe_file(self: MemoryFileSystem, path: str, value: bytes, mode: str = "") -> None:
        if mode == "create":
            raise OSError(38, "A header you provided implies functionality that is not implemented")
        plain(self, path, value)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", pipe_file)
    creations_keep_the_first(open_store("memory://plain"))


# The commands.


def test_a_bucket_holds_what_a_folder_holds(server: Server, local: Path, far: str) -> None:
    found = server.objects("tc")
    assert {"manifest.json", "samples.safetensors", "canaries.safetensors", "index.json"} < {*found}
    assert ONE in found
    assert found == listing(local)


def test_it_is_complete_and_sound(teacher_cache: Distill, far: str) -> None:
    status = teacher_cache("--out", far, "--status", "--json")
    assert status.returncode == 0, status.stderr
    assert json.loads(status.stdout)["complete"]
    sound = teacher_cache("--out", far, "--verify", "full")
    assert sound.returncode == 0, sound.stdout
    assert "verdict: sound" in sound.stdout


def test_what_is_gone_or_bad_is_made_again_and_nothing_else(
    server: Server, teacher_cache: Distill, distill: Distill, local: Path, far: str
) -> None:
    server.client.delete_object(Bucket=BUCKET, Key=f"tc/{ONE}")
    status = teacher_cache("--out", far, "--status", "--json")
    assert status.returncode == 3
    assert [cache["missing"] for cache in json.loads(status.stdout)["caches"]] == [1]

    data = bytearray((local / OTHER).read_bytes())
    data[-1] ^= 1
    server.client.put_object(Bucket=BUCKET, Key=f"tc/{OTHER}", Body=bytes(data))
    arguments = ("--out", far, "--verify", "full", "--repair", "--json")
    verdict = teacher_cache(*arguments)
    assert verdict.returncode == 5
    (cache,) = json.loads(verdict.stdout)["caches"]
    assert {fault["name"] for fault in cache["faults"]} == {ONE, OTHER}
    assert OTHER not in server.objects("tc")

    mended = teacher_cache("--out", far, "--json")
    assert mended.returncode == 0, mended.stderr
    assert json.loads(mended.stdout)["units"] == 2
    assert server.objects("tc") == listing(local)


def test_several_writers_at_once_make_what_one_makes(
    server: Server, teacher_cache: Distill, local: Path
) -> None:
    shards = ["1/3", "2/3", "3/3", "2/3"]

    def write(shard: str) -> subprocess.CompletedProcess[str]:
        return teacher_cache("--out", f"s3://{BUCKET}/many", "--shard", shard)

    with ThreadPoolExecutor(len(shards)) as pool:
        done = list(pool.map(write, shards))
    assert {each.returncode for each in done} <= {0, 3}, [each.stderr for each in done]
    assert server.objects("many") == listing(local)
    assert teacher_cache("--out", f"s3://{BUCKET}/many", "--status").returncode == 0


def result(run: Path) -> list[bytes]:
    return [(run / name).read_bytes() for name in ("student.safetensors", "metrics.jsonl")]


def test_training_from_a_bucket_is_training_from_a_folder(
    work: Path, distill: Distill, local: Path, far: str, tmp_path: Path
) -> None:
    env = {"XDG_CACHE_HOME": str(tmp_path)}
    for place, out in ((local, "near"), (far, "far")):
        done = distill("train", "--cache", place, "--out", out, env=env)
        assert done.returncode == 0, done.stderr
    assert result(work / "far") == result(work / "near")
    assert len(views_in(tmp_path)) == 3 < VIEWS


# Reading, as training does.


def views_in(scratch: Path) -> set[str]:
    """The views that lie on this machine's disk."""
    return {path.parent.name for path in scratch.rglob("views/v*/*.safetensors")}


def told(place: str, scratch: Path, first: int = 0) -> list[bytes]:
    """All that a cache says, in turn from view `first` on, and of the test split."""
    store = open_store(place)
    manifest = read_manifest(store)
    assert manifest is not None
    reader = Reader(store, manifest, num_views=VIEWS, scratch=scratch)
    found = [reader.evaluation("test").tobytes()]
    for view in range(VIEWS):
        rows = reader.rows(reader.ids, (first + view) % VIEWS)
        found += [rows[name].tobytes() for name in sorted(rows)]
    reader.close()
    return found


def told_at_once(place: str, scratch: Path) -> list[list[bytes]]:
    """What several readers hear that share a disk, each of them somewhere else in the cache."""
    with ThreadPoolExecutor(VIEWS) as pool:
        return list(pool.map(partial(told, place, scratch), range(VIEWS)))


def test_a_bad_copy_on_this_machine_is_fetched_again(
    server: Server, aside: ProcessPoolExecutor, local: Path, far: str, tmp_path: Path
) -> None:
    expected = told(str(local), tmp_path)
    assert not listing(tmp_path)
    assert aside.submit(told, far, tmp_path).result() == expected

    files = list(tmp_path.rglob("*.safetensors"))
    assert len(views_in(tmp_path)) == 3
    for number, path in enumerate(files):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes((data, data[:100], b"")[number % 3])
    assert aside.submit(told, far, tmp_path).result() == expected
    objects = server.objects("tc")
    assert len(views_in(tmp_path)) == 3
    assert all(objects[name] == data for name, data in listing(tmp_path).items())


def test_readers_that_share_a_disk_do_not_disturb_each_other(
    aside: ProcessPoolExecutor, local: Path, far: str, tmp_path: Path
) -> None:
    found = aside.submit(told_at_once, far, tmp_path).result()
    for first, heard in enumerate(found):
        assert heard == told(str(local), tmp_path, first)


def test_an_object_that_is_bad_is_named(
    server: Server, aside: ProcessPoolExecutor, local: Path, far: str, tmp_path: Path
) -> None:
    for name, data in listing(local).items():
        content = bytearray(data)
        content[-1] ^= name == OTHER
        server.client.put_object(Bucket=BUCKET, Key=f"bad/{name}", Body=bytes(content))
    place = f"s3://{BUCKET}/bad"
    with pytest.raises(DamagedError, match=f"^{place}/{OTHER}: its content changed") as raised:
        aside.submit(told, place, tmp_path).result()
    assert "--repair" in raised.value.hint
    server.client.delete_object(Bucket=BUCKET, Key=f"bad/{OTHER}")
    with pytest.raises(DamagedError, match=f"^{place}/{OTHER}: is missing"):
        aside.submit(told, place, tmp_path).result()


# What stands in the way.


def refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """One sentence and a hint, after what was said before, and no traceback."""
    assert "Traceback" not in done.stderr
    assert "Unclosed" not in done.stderr
    for word in words:
        assert word in done.stderr
    assert done.stdout == ""


def test_a_bucket_that_does_not_exist(teacher_cache: Distill, local: Path) -> None:
    done = teacher_cache("--out", "s3://nowhere/tc")
    assert done.returncode == 6
    refused(done, "s3://nowhere/tc", "bucket does not exist")


@pytest.mark.timeout(90)  # its client tries five times within half a minute
def test_a_server_that_is_not_there(teacher_cache: Distill) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
        env = {"AWS_ENDPOINT_URL": address}
        done = teacher_cache("--out", f"s3://{BUCKET}/tc", "--status", env=env)
    assert done.returncode == 6
    refused(done, f"s3://{BUCKET}/tc/manifest.json", address, "mind the address")


def test_no_credentials(teacher_cache: Distill) -> None:
    env = {
        "AWS_ACCESS_KEY_ID": "",
        "AWS_SECRET_ACCESS_KEY": "",
        "AWS_CONFIG_FILE": "/dev/null",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    done = teacher_cache("--out", f"s3://{BUCKET}/tc", "--status", env=env)
    assert done.returncode == 6
    refused(done, f"s3://{BUCKET}/tc/manifest.json", "credentials")


@pytest.mark.parametrize("protocol", ["s3", "gs"])
def test_a_client_that_is_not_installed(
    protocol: str, teacher_cache: Distill, tmp_path: Path
) -> None:
    for client in ("s3fs", "gcsfs"):
        (tmp_path / f"{client}.py").write_text("raise ImportError")
    env = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = teacher_cache("--out", f"{protocol}://x", "--status", env=env)
    assert done.returncode == 6
    refused(done, f"{protocol}://x", f'pip install ".[{protocol}]"')


def test_a_protocol_that_nobody_knows(teacher_cache: Distill) -> None:
    done = teacher_cache("--out", "foo://x", "--status")
    assert done.returncode == 2
    refused(done, "foo://x", "Protocol not known")
