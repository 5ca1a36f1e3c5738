"""What cannot be written is said, before the first step where it can be known."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from distill import storage
from tests import disks
from tests.cli.conftest import images
from tests.disks import Fault, Told
from tests.engine import processes
from tests.promises import Measured

r12 = pytest.mark.promise("R12")
broken = pytest.mark.skipif(
    not disks.breakable(), reason="knows the calls of Linux on two machines"
)

TEACHER = """
data: {name: digits, fraction: 0.1}
student: {model: mlp, width: 16, depth: 1}
objective: [{term: ce}]
optimizer: {name: sgd, lr: 0.05, momentum: 0.9}
train: {epochs: 2, batch_size: 30}
"""
STUDENT = """
data: {name: digits, fraction: 0.1, augment: [crop]}
teachers: [{recipe: teacher.yaml}]
student: {model: mlp, width: 16, depth: 1}
objective: [{term: ce}, {term: kd}]
cache: {path: cache, views: 4}
optimizer: {lr: 2e-3}
train: {epochs: 4, batch_size: 30}
"""
PHOTOS = """
data: {name: folder, root: photos, image_size: 16, augment: [resized_crop]}
student: {model: mlp, width: 16, depth: 1}
objective: [{term: ce}]
optimizer: {name: sgd, lr: 0.05}
train: {epochs: 4, batch_size: 10}
"""
LONG = ("--set", "train.epochs=100000", "--checkpoint-seconds", "0")
WRITES = ("write", "pwrite64", "writev")
RENAMES = ("rename", "renameat", "renameat2")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    (folder / "teacher.yaml").write_text(TEACHER)
    (folder / "student.yaml").write_text(STUDENT)
    (folder / "photos.yaml").write_text(PHOTOS)
    for split in ("train", "test"):
        images(folder / "photos" / split, "ant", "bee", count=20)
    train = ("train", "teacher.yaml", "--out", "teacher")
    assert disks.run(folder, *train, said=folder / "1").status == 0
    answers = ("teacher-cache", "student.yaml", "--run", "student")
    assert disks.run(folder, *answers, said=folder / "1").status == 0
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    """A folder with recipes, a trained teacher, its cache and images."""
    return Path(shutil.copytree(made, tmp_path / "place"))


def refused(told: Told, *words: str) -> bool:
    """Whether it is a sentence, and no step was made."""
    steps = "epoch 1 step" in told.text or "test top1" in told.text
    assert told.status == 6, told.text
    assert all(word in told.text for word in words), told.text
    assert not steps, told.text
    return True


WRITERS = (
    ("train", "student.yaml", "--out", "OUT"),
    ("teacher-cache", "student.yaml", "--run", "student", "--out", "OUT"),
    ("temperature-sweep", "student.yaml", "--temperatures", "1,4", "--out", "OUT"),
    ("evaluate", "teacher", "--suite", "clean", "--out", "OUT"),
    ("export", "teacher", "--format", "safetensors", "--no-latency", "--out", "OUT"),
    ("pack", "photos.yaml", "--out", "OUT"),
    ("evaluate", "teacher", "--suite", "clean", "--out", "scores", "--predictions", "OUT/a.csv"),
)


@r12
def test_a_folder_that_may_not_be_written_is_said_first(place: Path, measured: Measured) -> None:
    """By a user without root's rights; and on a disk that nobody may write."""
    shutil.copytree(place / "teacher", place / "locked" / "teacher")
    locked, count = place / "locked", 0
    locked.chmod(0o555)
    for arguments in WRITERS:
        words = [word.replace("OUT", "locked/out") for word in arguments]
        told = disks.run(place, *words, said=place / "said", plain=True)
        count += refused(told, "error: locked/out", ": cannot be written: permission denied")
    locked.chmod(0o755)
    assert [path.name for path in locked.iterdir()] == ["teacher"]
    measured("a read-only folder, as a user who is not root", f"{count} of {count} commands refuse")


@r12
def test_a_file_in_the_place_of_a_folder_and_names_that_are_none(
    place: Path, measured: Measured
) -> None:
    (place / "file").write_text("mine")
    count = 0
    for out in ("file", "file/below", "x" * 300):
        for arguments in WRITERS:
            words = [word.replace("OUT", out) for word in arguments]
            told = disks.run(place, *words, said=place / "said")
            count += refused(told, "error: ")
    into = ("evaluate", "teacher", "--suite", "clean", "--out", "s", "--predictions", "photos")
    count += refused(disks.run(place, *into, said=place / "said"), "photos: cannot be written")
    assert (place / "file").read_text() == "mine"
    measured("a file in a folder's place, a name too long", f"{count} of {count} commands refuse")


@r12
def test_folders_that_are_missing_are_made_whatever_their_names(
    place: Path, measured: Measured
) -> None:
    names = ("a/b/c", "two\nlines", "[red]x[/]", "ünï ☃ 'quoted\"", "n" * 255, "x/../y", "-o-")
    for name in names:
        told = disks.run(place, "train", "teacher.yaml", f"--out={name}", said=place / "said")
        assert told.status == 0, (name, told.text)
        for file in ("recipe.yaml", "result.json", "student.safetensors", "metrics.jsonl"):
            assert (place / name / file).stat().st_size > 0, name
    measured(
        "missing parents, and names of every kind", f"{len(names)} of {len(names)} are written"
    )


FAULTS = {
    "input/output error of write": (WRITES, errno.EIO),
    "input/output error of fsync": (("fsync",), errno.EIO),
    "a quota": (WRITES, errno.EDQUOT),
    "a quota of files": (("mkdir", "mkdirat"), errno.EDQUOT),
    "a disk that turns read-only": (RENAMES, errno.EROFS),
    "a stale network disk": (RENAMES, errno.ESTALE),
}


@r12
@broken
def test_a_disk_that_fails_from_the_beginning_is_said_first(
    place: Path, measured: Measured
) -> None:
    """The kernel refuses the calls themselves."""
    train = ("train", "student.yaml", "--out", "student")
    for calls, error in FAULTS.values():
        fault = Fault(calls, error)
        told = disks.run(place, *train, said=place / "said", fault=fault)
        refused(told, said_of(error), "error: student")
    count = len(FAULTS)
    measured("a disk that fails from the beginning", f"{count} of {count} said before step one")


@r12
@broken
@pytest.mark.parametrize("faults", [2, pytest.param(6, marks=pytest.mark.soak)])
def test_a_disk_that_fails_later_is_said_and_keeps_what_was_whole(
    place: Path, faults: int, measured: Measured
) -> None:
    straight = disks.run(place, "train", "student.yaml", "--out", "student", said=place / "said")
    assert straight.status == 0
    expected = processes.traces(place / "student")
    for name, (calls, error) in list(FAULTS.items())[:faults]:
        out = place / "runs" / "student"
        shutil.copytree(place / "teacher", out.parent / "teacher")
        train = ("train", "student.yaml", "--out", out, "--checkpoint-seconds", "0")
        fault = Fault(calls, error, "distill.storage.write_folder", 4)
        told = disks.run(place, *train, said=place / "said", fault=fault)
        assert told.status == 6, (name, told.text)
        assert said_of(error) in told.error, (name, told.text)
        assert str(out) in told.error
        kept = list(out.glob("checkpoint/step-*"))
        assert len(kept) == 2
        for path in kept:
            storage.read_folder(path)
        assert disks.run(place, *train, said=place / "said").status == 0, name
        assert disks.halves(out) == [], name
        assert processes.traces(out) == expected, name
        shutil.rmtree(out.parent)
    measured("a disk that fails later", f"{faults} of {faults} said, gone on with to the same bits")


def said_of(error: int) -> str:
    quota = error == errno.EDQUOT
    return "this user's quota is used up" if quota else os.strerror(error).lower()


@r12
@broken
def test_a_disk_without_a_second_name_for_a_file_takes_a_cache(
    place: Path, measured: Measured
) -> None:
    """FAT, and some that are shared, know no hard links."""
    answers = ("teacher-cache", "student.yaml", "--run", "student", "--out")
    nothing = Fault(("link", "linkat"), errno.EPERM)
    told = disks.run(place, *answers, "other", said=place / "said", fault=nothing)
    assert told.status == 0, told.text
    names = {str(path.relative_to(place / "cache")) for path in (place / "cache").rglob("*")}
    for name in names:
        one, other = place / "cache" / name, place / "other" / name
        assert one.is_dir() or one.read_bytes() == other.read_bytes(), name
    measured("a disk without hard links", "a cache with the same bytes")


def during(
    place: Path, *arguments: object, act: Callable[[Path], object], plain: bool = False
) -> Told:
    """A run in whose first steps something happens to a folder."""
    out, said = place / "student", place / "said"
    said.unlink(missing_ok=True)
    process = disks.begin(place, *arguments, "--out", out, *LONG, said=said, plain=plain)
    while not list(out.glob("checkpoint/step-*")):
        assert process.exitcode is None, said.read_text()
        time.sleep(0.002)
    act(out)
    return disks.ended(process, said)


def _remove(folder: Path) -> None:
    """As often as something is written to it meanwhile."""
    for _ in range(20):
        shutil.rmtree(folder, ignore_errors=True)


def _lock(folder: Path) -> None:
    for path in (folder / "checkpoint", folder):
        path.chmod(0o555)


@r12
def test_a_run_whose_folder_goes_away_ends_with_a_sentence(place: Path, measured: Measured) -> None:
    """It does not go on to fill another folder of that name, which would lack what was before."""
    train = ("train", "student.yaml")
    ways: dict[str, Callable[[Path], object]] = {
        "removed": _remove,
        "moved": lambda out: out.rename(out.with_name("moved")),
        "replaced": lambda out: (out.rename(out.with_name("first")), out.mkdir()),
        "locked": _lock,
    }
    for name, act in ways.items():
        told = during(place, *train, act=act, plain=name == "locked")
        # A checkpoint that is removed as it is read back is a damaged one.
        assert told.status in ((5, 6) if name == "removed" else (6,)), (name, told.text)
        assert str(place / "student") in told.error
        (place / "student").mkdir(exist_ok=True)
        (place / "student").chmod(0o755)
        left = {path.name for path in (place / "student").iterdir()}
        assert left <= {".lock"} or name == "locked", (name, left)
        for path in place.glob("*/checkpoint/step-*"):
            storage.read_folder(path)
        for path in (place / "student" / "checkpoint", place / "student"):
            if path.exists():
                path.chmod(0o755)
        shutil.rmtree(place / "student")
    measured("its folder removed, moved, replaced or locked in a run", "4 of 4 said, no half run")


@r12
def test_a_run_whose_sources_go_away_saves_or_says_so(place: Path, measured: Measured) -> None:
    """Images, in the process itself and in others; a teacher's run and its cache."""
    for workers in ("0", "2"):
        told = during(
            place,
            *("train", "photos.yaml", "--workers", workers),
            act=lambda _: (place / "photos").rename(place / "away"),
        )
        assert told.status == 6, told.text
        assert str(place / "photos") in told.error, told.text
        (place / "away").rename(place / "photos")
        shutil.rmtree(place / "student")
    for name in ("cache", "teacher"):
        said, out = place / "said", place / "student"
        process = disks.begin(place, "train", "student.yaml", "--out", out, *LONG, said=said)
        while len(list(out.glob("checkpoint/step-*"))) < 2:
            assert process.exitcode is None, said.read_text()
            time.sleep(0.002)
        (place / name).rename(place / "away")
        time.sleep(1)
        disks.stop(process)  # what was read of it is enough, or else it has ended
        told = disks.ended(process, said)
        assert told.status in (5, 75), told.text
        assert told.status == 75 or "error: cache/views/" in told.text
        (place / "away").rename(place / name)
        shutil.rmtree(out)
    measured("images, teacher or cache removed in a run", "4 of 4 said, or not needed any more")


@r12
def test_a_slow_disk_is_waited_for(place: Path, measured: Measured) -> None:
    """Everything is there in the end, and after a signal that comes while it is being written."""
    slow = processes.Slow("os.fsync", 0.05)
    train = ("train", "student.yaml", "--out", "slow/student", "--checkpoint-seconds", "0")
    shutil.copytree(place / "teacher", place / "slow" / "teacher")
    said = place / "said"
    process = disks.begin(place, *train, said=said, slow=slow)
    while not list((place / "slow/student").glob("checkpoint/.step-*")):
        assert process.exitcode is None
        time.sleep(0.001)
    disks.stop(process)
    told = disks.ended(process, said)
    assert told.status == 75, told.text
    assert disks.halves(place / "slow") == []
    assert disks.run(place, *train, said=said, slow=slow).status == 0
    assert disks.run(place, "train", "student.yaml", "--out", "student", said=said).status == 0
    assert processes.traces(place / "slow/student") == processes.traces(place / "student")
    measured(
        "a disk whose fsync takes 50 ms, and a signal", "saved, and gone on with to the same bits"
    )
