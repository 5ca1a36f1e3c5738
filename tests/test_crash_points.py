"""Whole commands die before and after every step that reaches the disk: nothing is ever half there.

After each death every file is whole, as it was before or as it will be; the same command then ends
well, and leaves what one leaves that nothing happened to.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors

from distill import storage, yamlio
from tests.cli.conftest import images
from tests.crashes import Crashes, crash, unordered
from tests.engine import processes
from tests.promises import Measured

TEACHER = """
data: {name: digits, fraction: 0.1}
student: {model: mlp, width: 8, depth: 1}
objective: [{term: ce}]
optimizer: {name: sgd, lr: 0.05}
train: {epochs: 1, batch_size: 48}
"""
STUDENT = """
data: {name: digits, fraction: 0.1, val: 0.1}
teachers: [{weights: ../given/teacher}]
student: {model: mlp, width: 8, depth: 1}
objective: [{term: ce, weight: 0.5}, {term: kd, weight: 0.5}]
optimizer: {lr: 1e-3}
train: {epochs: 3, batch_size: 48, ema: 0.9}
"""
PHOTOS = """
data: {name: folder, root: ../given/photos, image_size: 8}
student: {model: mlp, width: 8, depth: 1}
objective: [{term: ce}]
optimizer: {lr: 1e-3}
train: {epochs: 1, batch_size: 8}
"""
# What tells how long something took, or which process did it.
CLOCKS = {"seconds", "images_per_second", "data_wait", "memory", "waited", "environment"}


class Command(NamedTuple):
    """What is done in an empty folder beside `given`."""

    arguments: str
    some: int = 10  # points that are tried in the short form
    many: int | None = None  # in the long one; None: all


COMMANDS = {
    "train": Command("train ../given/student.yaml --out run --checkpoint-seconds 0"),
    "train --baseline": Command(
        "train ../given/student.yaml --out run --checkpoint-seconds 0 --baseline",
        some=3,
        many=80,
    ),
    "teacher-cache": Command(
        "teacher-cache ../given/cached.yaml --out answers --views 2 --unit-rows 64"
    ),
    "export": Command(
        "export ../given/timm --out exported --format safetensors,timm --no-latency", some=4
    ),
    "evaluate": Command(
        "evaluate ../given/teacher --out found --suite clean --predictions found.csv"
    ),
    "temperature-sweep": Command(
        "temperature-sweep ../given/student.yaml --temperatures 1,4 --out sweep "
        "--checkpoint-seconds 0",
        some=4,
        many=80,
    ),
    "pack": Command("pack ../given/photos.yaml --out packed --shard-bytes 20000", many=150),
}


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every command finds what it needs, in `given`."""
    root = tmp_path_factory.mktemp("crash")
    folder = root / "given"
    folder.mkdir()
    (folder / "teacher.yaml").write_text(TEACHER)
    (folder / "student.yaml").write_text(STUDENT)
    (folder / "cached.yaml").write_text(STUDENT + "cache: {path: answers, views: 2}\n")
    (folder / "photos.yaml").write_text(PHOTOS)
    timm = yamlio.load(TEACHER)[0] | {"student": {"model": "timm/test_resnet"}}
    (folder / "timm.yaml").write_text(yamlio.dump(timm))
    images(folder / "photos", "train/bee", "train/cat", "test/bee", "test/cat", count=6)
    for command in (
        "train teacher.yaml --out teacher",
        "train timm.yaml --out timm",
        "pack photos.yaml --out packed --shard-bytes 12000",
    ):
        process = processes.command(folder, *command.split(), said=root / "said")
        process.join()
        assert process.exitcode == 0, (root / "said").read_text()
    (folder / "shards").mkdir()
    for path in (folder / "packed").glob("*.tar"):
        path.rename(folder / "shards" / path.name)
    return root


def run(arguments: str, folder: Path) -> None:
    """`distill ARGUMENTS` in the folder, where this process is."""
    import torch

    from distill.cli import app

    torch.set_num_threads(1)
    os.environ.update(
        {"COLUMNS": "200", "XDG_CACHE_HOME": str(folder / "own"), "HOME": str(folder)}
    )
    status = app([*arguments.split(), "--workers", "0"], prog_name="distill", standalone_mode=False)
    assert not status


def settled(folder: Path) -> dict[str, Any]:
    """All files below a folder, without what a clock decides."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and path.name not in (".lock", storage.MANIFEST):
            found[name] = _without_clocks(path)
    return found


def _without_clocks(path: Path) -> Any:
    if path.suffix == ".html":  # numbers with a unit of time, and rates
        return re.sub(r"[\d.,]+", "", path.read_text())
    if path.suffix == ".json":
        return _plain(json.loads(path.read_text()))
    return path.read_bytes()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items() if key not in CLOCKS}
    return [_plain(one) for one in value] if isinstance(value, list) else value


def require_whole(left: Path, whole: Path) -> None:
    """Every file that has its own name is all there, and every checkpoint."""
    for path in left.rglob("*"):
        parts = path.relative_to(left).parts
        if not path.is_file() or path.name == ".lock" or any(p.endswith(".tmp") for p in parts):
            continue
        if path.name == "metrics.jsonl":  # rows are appended; a checkpoint holds those that count
            continue
        data = path.read_bytes()
        match path.suffix:
            case ".json":
                json.loads(data)
            case ".html":
                assert data.endswith(b"</html>"), path
            case ".safetensors":
                safetensors.deserialize(data)
            case ".section":  # there is none in the end
                continue
            case ".tar":  # a copy may make room for others
                originals = whole.parent.rglob(f"*{path.name[-14:]}")
                assert data in {one.read_bytes() for one in originals}, path
            case _:  # no clock in it
                assert data == (whole / path.relative_to(left)).read_bytes(), path
    for path in left.rglob("step-*"):
        storage.check_folder(path)


def require_all_well(found: Crashes) -> None:
    """Whole files after every death, and no trace of it in the end."""
    expected = settled(found.whole)
    sections = {}
    for death in found.deaths:
        require_whole(death.left, found.whole)
        for path in death.left.glob("packed/.*.section"):
            assert sections.setdefault(path.name, path.read_bytes()) == path.read_bytes()
        end = settled(death.place)
        assert not list(death.place.rglob("*.tmp")), death
        # One that was about to be removed stays until the next is saved.
        older = {name for name in set(end) - set(expected) if "/checkpoint/step-" in name}
        assert {name: end[name] for name in set(end) - older} == expected, death


LONG = [False, pytest.param(True, marks=[pytest.mark.soak, pytest.mark.timeout(3600)])]


@pytest.mark.promise("R2")
@pytest.mark.parametrize("long", LONG, ids=["some", "many"])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_may_die_at_any_step_to_the_disk(
    given: Path, tmp_path: Path, name: str, long: bool, measured: Measured
) -> None:
    command = COMMANDS[name]
    (tmp_path / "given").symlink_to(given / "given")
    most = command.many if long else command.some
    found = crash(partial(run, command.arguments), tmp_path, most=most)
    _measure(found, name, measured)


def _measure(found: Crashes, name: str, measured: Measured) -> None:
    require_all_well(found)
    assert unordered(found.steps) == []
    count = len(found.deaths)
    measured(
        f"death before and after every step to the disk: {name}",
        f"{count} of {count} whole, then as undisturbed ({found.points} points)",
    )


def _shards(folder: Path) -> None:
    shutil.copytree(folder.parent / "given" / "shards", folder / "set")


def _index(folder: Path) -> None:
    from distill.data import datasets
    from distill.recipe import Data

    data = {"name": "webdataset", "root": "set", "image_size": 8}
    datasets.load(Data.model_validate(data))


def _far(folder: Path) -> None:
    """The shards in a store that this process has, and all that are forked from it."""
    from fsspec.implementations.memory import MemoryFileSystem

    for path in (folder.parent / "given" / "shards").iterdir():
        MemoryFileSystem().pipe_file(f"/set/{path.name}", path.read_bytes())


def _fetch(folder: Path) -> None:
    """All shards of a place elsewhere, of which two may lie here."""
    from distill.data import shelf

    place = folder.parent / "given" / "shards"
    most = max(path.stat().st_size for path in place.iterdir())
    os.environ |= {shelf.PLACE: "copies", shelf.BYTES: str(2 * most)}
    there = shelf.There("memory://set")
    assert len(there.files()) == len(list(place.iterdir())) > 3
    for name in there.files():
        assert there.path(name).read_bytes() == (place / name).read_bytes()


@pytest.mark.promise("R2")
@pytest.mark.parametrize("long", LONG, ids=["some", "many"])
@pytest.mark.parametrize("name", ["index of tar shards", "copies of shards"])
def test_what_is_kept_of_shards_is_whole_wherever_its_writer_dies(
    given: Path, tmp_path: Path, name: str, long: bool, measured: Measured
) -> None:
    act, prepare = {
        "index of tar shards": (_index, _shards),
        "copies of shards": (_fetch, _far),
    }[name]
    (tmp_path / "given").symlink_to(given / "given")
    _measure(crash(act, tmp_path, prepare=prepare, most=None if long else 10), name, measured)
