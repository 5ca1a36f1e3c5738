"""A disk that fills up at any moment loses nothing, and is said with its path and its numbers."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from distill import storage
from distill.cache import verify, write
from distill.cache.store import Folder
from distill.errors import PreflightError
from tests import disks
from tests.cli.conftest import images
from tests.disks import Disk
from tests.engine import processes
from tests.promises import Measured

r11 = pytest.mark.promise("R11")
LONG = [pytest.mark.soak, pytest.mark.timeout(3600)]
SIZE = 24_000_000  # bytes of a disk
SAID = r"no room( for [\d.]+ (bytes|KB|MB))?, [\d.]+ (bytes|KB|MB) are free; nothing"
LACKS = r"the run needs [\d.]+ (bytes|KB|MB) of disk, [\d.]+ (bytes|KB|MB) are free"

RECIPES = {
    "teacher": """
data: {name: digits, fraction: 0.2}
student: {model: mlp, width: 64, depth: 1}
objective: [{term: ce}]
optimizer: {name: sgd, lr: 0.05, momentum: 0.9}
train: {epochs: 5, batch_size: 30}
""",
    "student": """
data: {name: digits, fraction: 0.2, augment: [crop], val: 0.1}
teachers: [{recipe: teacher.yaml}]
student: {model: mlp, width: 32, depth: 1}
objective: [{term: ce}, {term: kd}]
cache: {views: 4}
optimizer: {lr: 2e-3}
train: {epochs: 40, batch_size: 20, ema: 0.9}
""",
    "photos": """
data: {name: folder, root: photos, image_size: 16}
student: {model: mlp}
objective: [{term: ce}]
optimizer: {name: sgd, lr: 0.05}
train: {epochs: 1, batch_size: 4}
""",
}


class Work(NamedTuple):
    """A command that writes, and what it must leave behind however often it met a full disk."""

    arguments: tuple[str, ...]  # OUT stands for where it writes
    traces: Callable[[Path], dict[str, bytes]]
    sound: Callable[[Path], None]  # of what lies there after it failed


def _checkpoints(out: Path) -> None:
    """Every folder that has a checkpoint's name is one, to the byte."""
    for path in out.rglob("step-*"):
        if path.is_dir():
            storage.read_folder(path)


def _units(out: Path) -> None:
    store = Folder(out)
    manifest = write.read_manifest(store)
    if manifest is not None:
        assert verify.full(store, manifest) == []


def _json(out: Path) -> None:
    for path in out.rglob("*.json"):
        json.loads(path.read_text())


def _trained(out: Path) -> dict[str, bytes]:
    return processes.traces(out)


def _files(out: Path) -> dict[str, bytes]:
    """All that is the same whenever and wherever it is made."""
    found = {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name[0] != "." and path.suffix not in (".html", ".svg", ".png")
    }
    clock = rb'"(seconds|images_per_second|data_wait|memory|waited)": [^,\n]*'
    for name, data in found.items():
        if name.endswith(("result.json", "evaluation.json", "state.json")):
            found[name] = re.sub(clock, b"", data)
    manifests = [name for name in found if name.endswith("MANIFEST.json")]  # with their digest
    return {name: data for name, data in found.items() if name not in manifests}


WORK = {
    "train": Work(
        ("train", "student.yaml", "--out", "OUT", "--checkpoint-seconds", "0", "--set",
         "cache=null"),
        _trained,
        _checkpoints,
    ),
    "teacher-cache": Work(
        ("teacher-cache", "student.yaml", "--out", "OUT", "--run", "student", "--unit-rows", "16",
         "--views", "8", "--workers", "0"),
        _files,
        _units,
    ),
    "temperature-sweep": Work(
        ("temperature-sweep", "student.yaml", "--temperatures", "1,4", "--out", "OUT", "--set",
         "train.epochs=8", "--workers", "0", "--checkpoint-seconds", "0"),
        _files,
        _checkpoints,
    ),
    "export": Work(
        ("export", "teacher", "--out", "OUT", "--format", "onnx,torch-export", "--no-latency"),
        _files,
        _json,
    ),
    "evaluate": Work(
        ("evaluate", "teacher", "--out", "OUT", "--suite", "clean,fidelity", "--predictions",
         "OUT/answers.csv"),
        _files,
        _json,
    ),
    "pack": Work(
        ("pack", "photos.yaml", "--out", "OUT", "--size", "16", "--shard-bytes", "20000",
         "--workers", "0"),
        _files,
        _json,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with recipes, images and a trained teacher."""
    folder = tmp_path_factory.mktemp("place")
    for name, text in RECIPES.items():
        (folder / f"{name}.yaml").write_text(text)
    for split in ("train", "test"):
        images(folder / "photos" / split, "ant", "bee", count=40)
    done = disks.run(folder, "train", "teacher.yaml", "--out", "teacher", said=folder / "said")
    assert done.status == 0, done.text
    return folder


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with disks.disk(tmp_path / "disk", SIZE) as made:
        yield made


def run(place: Path, work: Work, out: Path) -> disks.Told:
    words = [word.replace("OUT", str(out)) for word in work.arguments]
    out.mkdir(exist_ok=True)
    return disks.run(place, *words, said=place / f"{out.parent.name}.said")


def beside(place: Path, out: Path) -> None:
    """The teacher's run, where commands look for it: beside what they write."""
    if not (out.parent / "teacher").exists():
        shutil.copytree(place / "teacher", out.parent / "teacher")


def filled(
    place: Path, work: Work, out: Path, disk: Disk, *, written: int, wait: float, room: int
) -> disks.Told:
    """Run it on a disk that fills up once it holds so much more, and some seconds went by."""
    words = [word.replace("OUT", str(out)) for word in work.arguments]
    said = place / f"{out.parent.name}.said"
    said.unlink(missing_ok=True)
    out.mkdir(exist_ok=True)
    before = disk.used
    process = disks.begin(place, *words, said=said)
    while process.exitcode is None and disk.used < before + written:
        time.sleep(0.0005)
    time.sleep(wait)
    disk.leave(room)
    return disks.ended(process, said)


@r11
@pytest.mark.parametrize(
    ("name", "fills"),
    [
        ("train", 5),
        ("teacher-cache", 2),
        pytest.param("train", 50, marks=LONG),
        pytest.param("teacher-cache", 10, marks=LONG),
        pytest.param("temperature-sweep", 8, marks=LONG),
        pytest.param("export", 4, marks=LONG),
        pytest.param("evaluate", 8, marks=LONG),
        pytest.param("pack", 10, marks=LONG),
    ],
)
def test_a_disk_that_fills_up_at_any_moment_loses_nothing(
    place: Path, disk: Disk, tmp_path: Path, name: str, fills: int, measured: Measured
) -> None:
    work, straight = WORK[name], disk.path / "0" / "straight"
    straight.parent.mkdir()
    beside(place, straight)
    before = disk.used
    assert run(place, work, straight).status == 0
    size, expected = disk.used - before, work.traces(straight)
    shutil.rmtree(straight)
    draw, met, out = random.Random(fills), 0, straight
    for _ in range(8 * fills):
        room = draw.choice([0, draw.randrange(4096), draw.randrange(size)])
        # What training writes stays as large, and so it is the time that tells how far it is.
        wait = draw.uniform(0, 1.5) if name == "train" else 0
        written = draw.randrange(1, size) if not wait else 1
        told = filled(place, work, out, disk, written=written, wait=wait, room=room)
        if told.status:
            met += 1
            assert told.status == 6, told.text
            assert str(disk.path) in told.error, told.text
            assert re.search(f"{SAID}|{LACKS}", told.error), told.text
            assert "make room" in told.text
            assert disks.halves(disk.path) == []
            work.sound(out)
        disk.grow()
        if told.status == 0 or met == fills or draw.random() < 0.3:
            again = run(place, work, out)
            assert again.status == 0, again.text
            there = work.traces(out)
            assert there.keys() == expected.keys()
            assert [key for key in there if there[key] != expected[key]] == []
            shutil.rmtree(out)
        if met == fills:
            break
    assert met == fills
    measured(f"{name}: a disk that fills up at random points", f"{met} of {met}, equal to the bit")


@r11
def test_a_limit_on_files_is_met_like_a_full_disk(
    place: Path, tmp_path: Path, measured: Measured
) -> None:
    """`ulimit -f`, which every user can set, and some disks have of themselves."""
    out, said = tmp_path / "student", tmp_path / "said"
    beside(place, out)
    shorter = (*WORK["train"].arguments, "--set", "train.epochs=10")
    work = WORK["train"]._replace(arguments=shorter)
    words = [word.replace("OUT", str(out)) for word in shorter]
    process = disks.begin(place, *words, said=said)
    while not list(out.glob("checkpoint/step-*")):
        assert process.exitcode is None
        time.sleep(0.001)
    assert process.pid is not None
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
    told = disks.ended(process, said)
    assert told.status == 6
    assert "no file may be as large here (`ulimit -f`, or the disk's own limit)" in told.error
    assert disks.halves(out) == []
    _checkpoints(out)
    assert run(place, work, out).status == 0
    straight = tmp_path / "other" / "student"
    beside(place, straight.parent / "student")
    assert run(place, work, straight).status == 0
    assert _trained(out) == _trained(straight)
    measured("train: `ulimit -f` reached while it runs", "exit 6, gone on with, equal to the bit")


@r11
def test_what_a_disk_cannot_hold_is_said_before_the_first_step(
    place: Path, tmp_path: Path, measured: Measured
) -> None:
    """Bytes of all that will be written, and files: a disk has a number of those too."""
    refused = []
    for name in ("train", "teacher-cache", "temperature-sweep", "export", "pack"):
        out, said = tmp_path / name / "small" / "out", tmp_path / f"{name}.said"
        out.parent.mkdir(parents=True)
        words = [word.replace("OUT", str(out)) for word in WORK[name].arguments]
        words = [str(place / "student") if word == "student" else word for word in words]
        size = {"pack": 90_000, "export": 60_000}.get(name, 40_000)
        told = disks.run(place, *words, said=said, small=((out.parent, size),))
        if "unshare" in told.text:
            pytest.skip("this user cannot mount a small file system")
        if re.search(LACKS, told.error):
            refused.append(name)
            assert told.status == 6
        else:
            raise AssertionError((name, told))
    measured("too small a disk, before the first step", f"{len(refused)} of 5 commands refuse it")


@r11
def test_a_disk_without_room_for_more_files(
    place: Path, tmp_path: Path, measured: Measured
) -> None:
    """It has bytes left, and no inodes: said before the first step, and when it comes later."""
    folder = tmp_path / "disk"
    with disks.disk(folder, SIZE):
        disks._call("umount2", os.fsencode(folder), disks._MNT_DETACH)
        disks.mount(folder, SIZE, "nr_inodes=30")
        out = folder / "student"
        beside(place, out)
        told = run(place, WORK["train"], out)
        assert told.status == 6
        assert re.search(r"needs \d+ files, and the disk can hold \d+ more \(inodes", told.error)
        with pytest.raises(PreflightError, match=r"can hold no more files \(inodes: `df -i`\)"):
            storage.write_folder(folder / "many", {f"{number}": b"" for number in range(40)})
        assert disks.halves(folder) == []
    measured("a disk without inodes", "said with their number before the first step")


@r11
def test_a_full_disk_of_temporary_files_or_of_shared_memory_is_a_sentence(
    place: Path, tmp_path: Path, measured: Measured
) -> None:
    """What is not the run's own disk: TMPDIR, /dev/shm, the user's cache."""
    spare = tmp_path / "spare"
    spare.mkdir()
    small, env = ((spare, 4096),), {"TMPDIR": str(spare)}
    export = ("export", "teacher", "--out", tmp_path / "x", "--no-latency", "--format")
    told = disks.run(place, *export, "torch-export", said=tmp_path / "1", small=small, env=env)
    if "unshare" in told.text:
        pytest.skip("this user cannot mount a small file system")
    assert (told.status, f"{spare}: no room, " in told.error) == (6, True), told.text
    assert [path.name for path in (tmp_path / "x").iterdir()] == [".lock"]
    check = ("check", "student.yaml", "--set", "cache=null")
    told = disks.run(place, *check, said=tmp_path / "2", small=small, env=env)
    assert told.status == 6, told.text
    assert f"{spare}/" in told.error
    assert "no room" in told.error
    large = ("--set", "data.image_size=224", "--set", "train.batch_size=40", "--workers", "2")
    large += ("--set", "data.augment=[resized_crop]")
    train = ("train", "photos.yaml", "--out", tmp_path / "run", *large)
    told = disks.run(place, *train, said=tmp_path / "3", small=((Path("/dev/shm"), 65_536),))
    assert told.status == 6, told.text
    assert "shared memory" in told.text or "/dev/shm" in told.text
    measured("a full TMPDIR or /dev/shm", "3 of 3 exit 6, with the path")


@r11
def test_a_result_that_stdout_has_no_room_for_is_no_success(
    place: Path, tmp_path: Path, measured: Measured
) -> None:
    asked = [("list", "recipes", "--json"), ("--version",)]
    trained = ("train", place / "teacher.yaml", "--out", "run", "--json")
    with Path("/dev/full").open("w") as full:
        for arguments in (*asked, trained):
            done = disks.real(*arguments, cwd=tmp_path, stdout=full)
            assert done.returncode == 6, done.stderr
            *_, error, hint = done.stderr.splitlines()
            assert error == "error: stdout: cannot be written: no space left on device"
            assert "what the command made is kept" in hint
    assert json.loads((tmp_path / "run" / "result.json").read_text())["run"] == "run"
    measured("a result on a full stdout", f"{len(asked) + 1} of {len(asked) + 1} exit 6")


def test_a_closed_stdout_is_said_and_a_reader_that_has_enough_is_not(tmp_path: Path) -> None:
    for line, status, lines in (
        ("exec >&-; python -m distill list recipes", 6, 2),
        ("python -m distill list models | head -1", 0, 0),
        ("exec 2>&-; python -m distill train nowhere.yaml", 2, 0),
    ):
        done = subprocess.run(
            ["sh", "-c", line.replace("python", sys.executable)],
            cwd=tmp_path,
            env={**os.environ, "NO_COLOR": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, len(done.stderr.splitlines())) == (status, lines), done
