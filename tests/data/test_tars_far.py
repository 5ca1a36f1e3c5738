"""Shards in an object store, over the wire from a real server: the same batches, bounded copies."""

from __future__ import annotations

import hashlib
import json
import random
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from shards import samples, tar

from distill import yamlio
from distill.data import datasets, shelf
from distill.data.loader import Loader, evaluation_batches
from distill.data.packed import Settings
from distill.data.shelf import There
from distill.engine.machine import StopRequest
from distill.errors import (
    DamagedError,
    IncompatibleError,
    IncompleteError,
    PreflightError,
    RecipeError,
)
from distill.pack import pack
from distill.recipe import Data, Recipe
from tests.cache.test_object_store import BUCKET, Server, server  # noqa: F401 (a fixture)
from tests.cli.conftest import process
from tests.promises import Measured

CPU = torch.device("cpu")
SHARDS, IMAGES = 8, 10  # training shards, and images of each
URL = f"s3://{BUCKET}/set"


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight training shards and two test shards."""
    root = tmp_path_factory.mktemp("local")
    for i in range(SHARDS):
        labels = [(i + j) % 2 for j in range(IMAGES)]
        tar(root / f"train-{i:02d}.tar", samples(IMAGES * i, *labels))
    for i in range(2):
        tar(root / f"test-{i}.tar", samples(900 + IMAGES * i, *([0, 1] * (IMAGES // 2))))
    (root / "classes.txt").write_text("bee\ncat\n")
    return root


@pytest.fixture(scope="module")
def size(local: Path) -> int:
    """Bytes of the largest shard."""
    return max(path.stat().st_size for path in local.glob("*.tar"))


@pytest.fixture
def copies(
    server: Server,  # noqa: F811
    local: Path,
    size: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """Where copies lie, at most five of them; the shards are in the store."""
    for path in local.iterdir():
        if path.suffix in (".tar", ".txt"):
            server.client.upload_file(str(path), BUCKET, f"set/{path.name}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv(shelf.PLACE, str(tmp_path / "copies"))
    monkeypatch.setenv(shelf.BYTES, str(5 * size))
    return tmp_path / "copies"


def data(root: object, **keys: object) -> Data:
    keys = {"image_size": 8, "augment": ["resized_crop", "flip"], "shuffle_shards": 2} | keys
    return Data.model_validate({"name": "webdataset", "root": str(root), **keys})


def digests(recipe: Data, *, workers: int, start: int = 0) -> list[str]:
    """Of the batches of two epochs, and of the test images."""
    dataset = datasets.load(recipe)
    loader = Loader(dataset, recipe, batch_size=8, train_seed=3, device=CPU, workers=workers)
    found = []
    for epoch in range(2):
        for batch in loader.epoch(epoch, start=start):
            parts = (batch.images, batch.labels, batch.ids)
            content = b"".join(part.contiguous().numpy().tobytes() for part in parts)
            found.append(hashlib.sha256(content).hexdigest())
    loader.close()
    ids = np.arange(len(dataset.test))
    for images, _, _ in evaluation_batches(
        dataset, dataset.test, ids, recipe, batch_size=8, device=CPU, workers=workers
    ):
        found.append(hashlib.sha256(images.contiguous().numpy().tobytes()).hexdigest())
    return found


class Watch:
    """The most bytes that a folder ever held; one shard more where it changed meanwhile."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.most, self.ends = folder, 0, threading.Event()
        self.thread = threading.Thread(target=self._look)

    def __enter__(self) -> Watch:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ends.set()
        self.thread.join()

    def _look(self) -> None:
        while not self.ends.is_set():
            found = {}
            for path in self.folder.rglob("*"):
                with suppress(FileNotFoundError):
                    status = path.stat()  # a file is renamed while this looks
                    found[status.st_ino] = status.st_size if path.is_file() else 0
            self.most = max(self.most, sum(found.values()))
            time.sleep(0.002)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_shards_here_and_copies_are_bounded(
    copies: Path, local: Path, size: int, workers: int
) -> None:
    with Watch(copies) as watch:
        far = digests(data(URL), workers=workers)
    near = digests(data(local), workers=0)
    assert far == near
    assert len(near) == 2 * (SHARDS * IMAGES // 8) + 3
    assert 3 * size < watch.most <= 6 * size < (SHARDS + 2) * size
    assert not list(copies.rglob("*.tmp"))
    assert digests(data(URL), workers=0, start=7)[:3] == far[7:10]


def test_an_index_is_made_once_and_kept_here(
    copies: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = datasets.load(data(URL))
    assert first.classes == ("bee", "cat")
    assert capsys.readouterr().err.count("looking once through") == 2
    for path in copies.rglob("*.tar"):
        path.unlink()
    assert datasets.load(data(URL)).fingerprint == first.fingerprint
    assert capsys.readouterr().err == ""
    assert not list(copies.rglob("*.tar"))


def test_what_cannot_work_is_said(copies: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(IncompatibleError, match=r"shuffle_shards: the shards .* copies may take"):
        datasets.load(data(URL, shuffle_shards=3))
    monkeypatch.setenv(shelf.BYTES, "5 GB")
    with pytest.raises(IncompatibleError, match="must be a number of bytes"):
        datasets.load(data(URL))
    monkeypatch.delenv(shelf.BYTES)
    assert len(datasets.load(data(URL, shuffle_shards=3)).train) == SHARDS * IMAGES
    with pytest.raises(PreflightError, match="s3://nobody/set"):
        datasets.load(data("s3://nobody/set"))
    with pytest.raises(PreflightError, match="no shards of the train split"):
        datasets.load(data(f"s3://{BUCKET}/elsewhere"))
    with pytest.raises(RecipeError, match="nosuch"):
        datasets.load(data("nosuch://bucket/set"))


def test_a_shard_that_is_gone_is_named(
    copies: Path,
    server: Server,  # noqa: F811
) -> None:
    recipe = data(URL)
    dataset = datasets.load(recipe)
    for path in copies.rglob("*.tar"):
        path.unlink()
    server.client.delete_object(Bucket=BUCKET, Key="set/train-05.tar")
    loader = Loader(dataset, recipe, batch_size=8, train_seed=3, device=CPU, workers=2)
    with pytest.raises(PreflightError, match=f"{URL}.*train-05.tar"):
        list(loader.epoch(0))
    loader.close()


@pytest.mark.promise("R22")
def test_a_shard_that_was_replaced_or_cut_there_is_found(
    copies: Path,
    local: Path,
    server: Server,  # noqa: F811
    tmp_path: Path,
    measured: Measured,
) -> None:
    recipe, found = data(URL), 0
    first = datasets.load(recipe)
    digests(recipe, workers=0)  # copies of what there was lie here
    other = tar(tmp_path / "other.tar", samples(50, *(i % 2 for i in range(IMAGES))))
    whole = (local / "train-05.tar").read_bytes()
    same_size = other.read_bytes().ljust(len(whole), b"\0")
    same_labels = bytearray(whole)
    same_labels[same_labels.index(b"IDAT") + 30] ^= 1
    for content, is_sound in (
        (same_size, True),
        (bytes(same_labels), True),  # it is another shard, not a damaged one
        (whole[: len(whole) // 2], False),
        (whole[:700] + b"<html>" + whole[706:], True),
        (b"<html>Sign in</html>", False),
        (b"", False),
    ):
        server.client.put_object(Bucket=BUCKET, Key="set/train-05.tar", Body=content)
        for path in copies.rglob("*.tar"):
            path.unlink()
        loader = Loader(first, recipe, batch_size=8, train_seed=3, device=CPU)
        with pytest.raises((DamagedError, PreflightError), match=r"train-05\.tar: "):
            list(loader.epoch(0))
        loader.close()
        assert not list(copies.rglob("*train-05.tar"))
        if is_sound:
            again = datasets.load(recipe)  # looked through anew
            assert again.train.files is not None
            assert len(again.train.files.read(50)) > 100
        else:
            with pytest.raises(DamagedError, match=r"train-05\.tar"):
                datasets.load(recipe)
        found += 1
    server.client.put_object(Bucket=BUCKET, Key="set/train-05.tar", Body=same_size)
    assert datasets.load(recipe).train.labels[50:60].tolist() == [0, 1] * 5
    measured("shards in an object store, replaced or cut short", f"{found} of {found} found")


def _read(seed: int, sizes: dict[str, int]) -> dict[str, str]:
    place, found = There(URL), {}
    place.files()
    names = sorted(sizes)
    random.Random(seed).shuffle(names)
    for name in names:
        while True:
            try:
                content = place.path(name).read_bytes()
                break
            except FileNotFoundError:  # another process needed its room
                continue
        found[name] = hashlib.sha256(content).hexdigest()
    return found


def test_processes_share_the_copies(copies: Path, local: Path, size: int) -> None:
    sizes = {path.name: path.stat().st_size for path in local.glob("train-*.tar")}
    known = {name: hashlib.sha256((local / name).read_bytes()).hexdigest() for name in sizes}
    copies.mkdir()
    with Watch(copies) as watch, ProcessPoolExecutor(3, get_context("spawn")) as pool:
        for found in pool.map(_read, range(3), [sizes] * 3):
            assert found == known
    assert watch.most <= 6 * size


def test_a_pack_is_read_from_far_away_and_checked(
    copies: Path,
    local: Path,
    server: Server,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = Recipe.model_validate(RECIPE | {"data": {"name": "webdataset", "root": str(local)}})
    settings = Settings(size=16, shard_bytes=20_000)
    pack(recipe, tmp_path / "pack", settings, workers=0, stop=StopRequest())
    names = [path.name for path in (tmp_path / "pack").iterdir() if path.name != ".lock"]
    for name in names:
        server.client.upload_file(str(tmp_path / "pack" / name), BUCKET, f"pack/{name}")
    capsys.readouterr()
    url = f"s3://{BUCKET}/pack"
    assert digests(data(url), workers=0) == digests(data(tmp_path / "pack"), workers=0)
    assert "looking" not in capsys.readouterr().err
    altered = bytearray((tmp_path / "pack/train-00000.tar").read_bytes())
    altered[700] ^= 4
    server.client.put_object(Bucket=BUCKET, Key="pack/train-00000.tar", Body=bytes(altered))
    for path in copies.rglob("*.tar"):
        path.unlink()
    with pytest.raises(DamagedError, match=f"{url}/train-00000.tar/00000000: its content changed"):
        digests(data(url), workers=0)
    server.client.delete_object(Bucket=BUCKET, Key="pack/test.index")
    with pytest.raises(IncompleteError, match=f"{url}: a pack that is not finished"):
        datasets.load(data(url))


RECIPE = {
    "data": {
        "name": "webdataset",
        "image_size": 8,
        "shuffle_shards": 2,
        "augment": ["resized_crop"],
    },
    "student": {"model": "resnet8"},
    "objective": [{"term": "ce"}],
    "optimizer": {"name": "sgd", "lr": 0.05},
    "train": {"epochs": 2, "batch_size": 8},
}


def test_a_student_learns_the_same_from_far_away(copies: Path, local: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(yamlio.dump(RECIPE))
    results = []
    for out, root in (("near", local), ("far", URL)):
        keys = ["--set", f"data.root={root}", "--out", out, "--workers", "1", "--json"]
        done = process("train", "recipe.yaml", *keys, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        results.append({k: json.loads(done.stdout)[k] for k in ("nll", "top1", "steps")})
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        (
            {"data.root": "s3://a/b", "data.shuffle_shards": None},
            "required for shards in an object",
        ),
        ({"data.root": "s3://a/b", "data.name": "folder"}, "only the shards of webdataset"),
        ({"data.root": "a", "data.name": "folder"}, "only webdataset has shards"),
        ({"data.root": "a", "data.mixup": 0.2}, "an image's partner from the whole set"),
        ({"data.root": "a", "data.cutmix": 0.2}, "an image's partner from the whole set"),
        ({"data.root": "a", "data.split_file": "b"}, "only a folder of images has one"),
    ],
)
def test_keys_of_another_kind_of_set(tmp_path: Path, keys: dict[str, object], what: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yamlio.dump(RECIPE | {"data": {**RECIPE["data"], "root": "a"}}))
    with pytest.raises(RecipeError, match=what):
        Recipe.load(path).changed(keys)
