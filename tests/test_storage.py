"""Files are old or new at every instant, and damage never passes for data."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import random
import shutil
import socket
import stat
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from distill import console, storage
from distill.errors import DamagedError, PreflightError
from tests.crashes import Action, crash, nothing, unordered
from tests.promises import Measured

OLD, NEW = b"old" * 500, b"new!" * 1000
FILES = {"model.safetensors": b"m" * 3000, "ema.safetensors": b"e" * 2000, "state.json": b"{}"}


def _write_old(folder: Path) -> None:
    storage.write(folder / "file", OLD)


def _write_new(folder: Path) -> None:
    storage.write(folder / "file", NEW)


def _crashed(action: Action, prepare: Action, root: Path) -> list[Path]:
    """What each death left, and last what is left undisturbed."""
    found = crash(action, root, prepare=prepare, again=False)
    assert len(found.deaths) == found.points
    return [*(death.place for death in found.deaths), found.whole]


@pytest.mark.promise("R2")
def test_a_file_is_old_or_new_wherever_the_writer_dies(tmp_path: Path, measured: Measured) -> None:
    folders = _crashed(_write_new, _write_old, tmp_path)
    states = [(folder / "file").read_bytes() for folder in folders]
    assert len(states) >= 8
    assert set(states) == {OLD, NEW}
    assert states == sorted(states, key=[OLD, NEW].index)  # new once renamed, and never old again
    for folder in folders:
        with storage.lock(folder):  # the next owner sweeps what the dead one left
            assert {path.name for path in folder.iterdir()} == {".lock", "file"}
    measured("death at every step: a file", f"{len(states)} of {len(states)} old or new")


def _write_files(folder: Path) -> None:
    storage.make_folder(folder / "sub")
    storage.write_folder(folder / "sub" / "step", FILES)


@pytest.mark.promise("R2")
def test_a_folder_is_whole_or_not_there_wherever_the_writer_dies(
    tmp_path: Path, measured: Measured
) -> None:
    folders = _crashed(_write_files, nothing, tmp_path)
    there = [(folder / "sub" / "step").exists() for folder in folders]
    assert len(there) >= 20
    assert there == sorted(there)
    assert there[0] is False
    assert there[-1] is True
    for folder in folders:
        with storage.lock(folder):
            assert [path.name for path in folder.glob("sub/*")] in (["step"], [])
        if (folder / "sub" / "step").exists():
            assert storage.read_folder(folder / "sub" / "step") == FILES
    measured("death at every step: a folder", f"{len(there)} of {len(there)} whole or not there")


def _published(folder: Path) -> None:
    for name in ("mark", "kept", "stale"):
        (folder / name).write_bytes(OLD)


def _publish(folder: Path) -> None:
    with storage.staged(folder) as aside:
        for name in ("fresh", "kept", "mark"):
            (aside / name).write_bytes(NEW)
        storage.publish(aside, folder, first="mark", stale=("kept", "stale"))


@pytest.mark.parametrize("action", [_write_new, _write_files, _publish])
def test_content_is_on_the_disk_before_its_name_is(tmp_path: Path, action: Action) -> None:
    found = crash(action, tmp_path, most=2, again=False, prepare=_published)
    assert {step.call for step in found.steps} >= {"open", "fsync"}
    assert unordered(found.steps) == []


@pytest.mark.parametrize("lost", ["file", "folder"])
def test_a_write_that_is_not_brought_to_the_disk_would_be_found(tmp_path: Path, lost: str) -> None:
    found = crash(_write_new, tmp_path, most=2, again=False)
    syncs = [i for i, step in enumerate(found.steps) if step.call == "fsync"]
    del found.steps[syncs[0 if lost == "file" else 1]]
    assert len(unordered(found.steps)) == 1


@pytest.mark.promise("R2")
def test_published_files_are_old_or_new_wherever_the_writer_dies(
    tmp_path: Path, measured: Measured
) -> None:
    states = []
    for folder in _crashed(_publish, _published, tmp_path):
        with storage.lock(folder):  # the next owner sweeps what the dead one had made
            files = {path.name: path.read_bytes() for path in folder.iterdir()}
        del files[".lock"]
        assert set(files.values()) <= {OLD, NEW}
        assert set(files) >= {"mark", "kept"}
        if files["kept"] == NEW:
            assert files["mark"] == NEW  # it comes first: what it lists can be checked
        states.append((files["mark"], files["kept"], "fresh" in files, "stale" in files))
    assert states[0] == (OLD, OLD, False, True)
    assert states[-1] == (NEW, NEW, True, False)
    measured("death at every step: files together", f"{len(states)} of {len(states)} old or new")


def test_the_manifest_tells_size_and_hash_of_every_file(tmp_path: Path) -> None:
    storage.write_folder(tmp_path / "step", FILES)
    assert {path.name for path in (tmp_path / "step").iterdir()} == {*FILES, storage.MANIFEST}
    manifest = json.loads((tmp_path / "step" / storage.MANIFEST).read_text())
    assert manifest == {
        name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in FILES.items()
    }
    assert storage.read_folder(tmp_path / "step") == FILES


def test_500_flipped_bytes_are_all_detected(tmp_path: Path) -> None:
    """Those of the manifest too, where a blank becomes another that JSON does not mind."""
    folder, draw = tmp_path / "step", random.Random(0)
    storage.write_folder(folder, FILES)
    for name in [*FILES] * 150 + [storage.MANIFEST] * 50:
        whole = (folder / name).read_bytes()
        flipped = bytearray(whole)
        flipped[draw.randrange(len(whole))] ^= draw.randrange(1, 256)
        (folder / name).write_bytes(flipped)
        with pytest.raises(DamagedError, match="step"):
            storage.read_folder(folder)
        (folder / name).write_bytes(whole)
    manifest = (folder / storage.MANIFEST).read_bytes()
    for at in (i for i, byte in enumerate(manifest) if byte in b" \n"):
        for blank in b" \t\r\n":
            if manifest[at] != blank:
                (folder / storage.MANIFEST).write_bytes(
                    manifest[:at] + bytes([blank]) + manifest[at + 1 :]
                )
                with pytest.raises(DamagedError, match="its content changed"):
                    storage.read_folder(folder)
    (folder / storage.MANIFEST).write_bytes(manifest)
    assert storage.read_folder(folder) == FILES


def test_cut_and_missing_files_are_detected(tmp_path: Path) -> None:
    folder, draw = tmp_path / "step", random.Random(0)
    storage.write_folder(folder, FILES)
    for name in [*FILES, storage.MANIFEST] * 25:
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: draw.randrange(len(whole))])
        with pytest.raises(DamagedError):
            storage.read_folder(folder)
        (folder / name).unlink()
        with pytest.raises(DamagedError, match=r"(?i)no such file"):
            storage.read_folder(folder)
        (folder / name).write_bytes(whole)
    assert storage.read_folder(folder) == FILES


NONE = hashlib.sha256().hexdigest()  # of no content
ODD = [
    *([], 3, None, "a", [["a", 0]], {"a": 3}, {"a": {}}, {"a": None}, {"a": {"size": 0}}),
    *({"a": {"size": size, "sha256": NONE}} for size in ("0", 0.0, False, None, [0], -1)),
    *({"a": {"size": 0, "sha256": given}} for given in (None, 0, [NONE], NONE.upper(), "")),
]


@pytest.mark.parametrize("number", range(len(ODD)))
def test_a_manifest_of_another_shape_is_damage(tmp_path: Path, number: int) -> None:
    (tmp_path / storage.MANIFEST).write_text(json.dumps(ODD[number], indent=1))
    (tmp_path / "a").write_text("")
    with pytest.raises(DamagedError, match=f"{storage.MANIFEST}: |a: "):
        storage.read_folder(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\xff"], ids=["", "cut", "deep", "bytes"])
def test_a_manifest_that_is_no_json_is_damage(tmp_path: Path, text: str) -> None:
    (tmp_path / storage.MANIFEST).write_bytes(text.encode("latin-1"))
    with pytest.raises(DamagedError, match=rf"{storage.MANIFEST}: its content changed"):
        storage.read_folder(tmp_path)


@pytest.mark.promise("R4")
def test_nothing_outside_of_a_folder_is_read_whatever_its_manifest_names(
    tmp_path: Path, measured: Measured
) -> None:
    (tmp_path / "secret").write_bytes(b"of another")
    folder = tmp_path / "step"
    names = ["../secret", str(tmp_path / "secret"), "/etc/passwd", "sub/file", ".", "..", "", "a\0"]
    for name in names:
        folder.mkdir()
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_bytes(b"of another")
        _with_manifest(folder, name)
        with pytest.raises(DamagedError, match="is no file of this folder"):
            storage.read_folder(folder)
        shutil.rmtree(folder)
    links = {"link": tmp_path / "secret", "inside": Path("whole"), "nowhere": Path("nothing")}
    kinds = [*links, "folder", "pipe"]
    for name in kinds:
        folder.mkdir()
        (folder / "whole").write_bytes(b"of another")
        if name in links:
            (folder / name).symlink_to(links[name])
        elif name == "folder":
            (folder / name).mkdir()
        else:
            os.mkfifo(folder / name)
        _with_manifest(folder, name)
        with pytest.raises(DamagedError, match=f"step/{name}: is (a link|no plain file)"):
            storage.read_folder(folder)
        shutil.rmtree(folder)
    storage.write_folder(folder, FILES)
    (folder / storage.MANIFEST).rename(tmp_path / "manifest")
    (folder / storage.MANIFEST).symlink_to(tmp_path / "manifest")
    with pytest.raises(DamagedError, match="is a link"):
        storage.read_folder(folder)
    count = len(names) + len(kinds) + 1
    measured("names, links, folders and pipes that lead out of a checkpoint", f"{count} of {count}")


def _with_manifest(folder: Path, name: str) -> None:
    """As if `name` had been written with the others."""
    entry = {"size": 10, "sha256": hashlib.sha256(b"of another").hexdigest()}
    (folder / storage.MANIFEST).write_text(json.dumps({name: entry}, indent=1))


def test_files_that_the_manifest_does_not_name_are_left_out(tmp_path: Path) -> None:
    storage.write_folder(tmp_path / "step", FILES)
    (tmp_path / "step" / "other").write_text("of a user")
    assert storage.read_folder(tmp_path / "step") == FILES


HOLD = """
import sys
from pathlib import Path
from distill import storage
from distill.errors import PreflightError
try:
    with storage.lock(Path(sys.argv[1])):
        print("held", flush=True)
        sys.stdin.read()
except PreflightError as error:
    print(error, flush=True)
"""


def _holder(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.promise("R13")
def test_one_of_many_processes_owns_a_folder_and_kill_9_frees_it(
    tmp_path: Path, measured: Measured
) -> None:
    folder = tmp_path / "run"
    crowd = [_holder(folder) for _ in range(8)]
    said = {process.pid: _said(process) for process in crowd}
    owner = next(process for process in crowd if said[process.pid] == "held")
    refused = f"{folder}: in use by process {owner.pid} on {socket.gethostname()}"
    del said[owner.pid]
    assert list(said.values()) == [refused] * 7
    with pytest.raises(PreflightError) as caught, storage.lock(folder):
        pass
    assert str(caught.value) == refused
    assert "--out" in caught.value.hint
    owner.kill()
    for process in crowd:
        process.communicate()
    with storage.lock(folder):
        assert (folder / ".lock").read_text().startswith(f"process {os.getpid()} ")
    measured("8 processes on one folder at once", "1 owner, 7 of 7 others name it")


def test_the_name_of_an_owner_that_died_is_not_given(tmp_path: Path) -> None:
    """A new owner has the lock a moment before its name is there."""
    first = _holder(tmp_path)
    assert _said(first) == "held"
    first.kill()
    first.communicate()
    assert str(first.pid) in (tmp_path / ".lock").read_text()
    with (tmp_path / ".lock").open("ab") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(PreflightError, match="in use by another process"):
            storage.lock(tmp_path).__enter__()


def test_who_waits_gets_the_lock_when_it_is_free(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    owner = _holder(tmp_path)
    assert _said(owner) == "held"
    with pytest.raises(PreflightError, match=f"in use by process {owner.pid} "):
        storage.lock(tmp_path, seconds=0.1).__enter__()
    threading.Timer(0.3, owner.kill).start()
    began = time.monotonic()
    with storage.lock(tmp_path, seconds=60):
        assert 0.2 < time.monotonic() - began < 30
    owner.communicate()
    assert f"waiting for process {owner.pid} on " in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_disk_without_locks_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuses(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    told: list[str] = []
    monkeypatch.setattr(fcntl, "flock", refuses)
    monkeypatch.setattr(console, "warn", told.append)
    with storage.lock(tmp_path):
        storage.write(tmp_path / "file", NEW)
    assert told == [
        f"{tmp_path}/.lock: this disk knows no locks; mind that no other process works there"
    ]


def test_a_lock_that_fails_otherwise_is_not_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", refuses)
    with pytest.raises(PreflightError, match=r"\.lock: cannot be written: input/output error"):
        storage.lock(tmp_path).__enter__()


def _orphans_of(script: str, folder: Path) -> subprocess.Popen[str]:
    """A process that has begun to write, and waits in the midst of it."""
    code = f"""
    import sys
    from pathlib import Path
    from distill import storage
    folder = Path(sys.argv[1])
    {script}:
        print("begun", flush=True)
        sys.stdin.read()
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert _said(process) == "begun"
    return process


@pytest.mark.parametrize(
    "script",
    ["with storage.writing(folder / 'file', 9)", "with storage.staged(folder)"],
    ids=["file", "folder"],
)
def test_the_owner_sweeps_what_the_dead_left_and_not_what_the_living_write(
    tmp_path: Path, script: str
) -> None:
    writer = _orphans_of(script, tmp_path)
    (begun,) = tmp_path.glob(".*.tmp")
    with storage.lock(tmp_path):
        assert begun.exists()
    writer.kill()
    writer.communicate()
    with storage.lock(tmp_path):
        assert not begun.exists()


def test_what_nobody_touched_for_an_hour_is_swept_whoever_began_it(tmp_path: Path) -> None:
    """Its process may be one of another machine, whose number says nothing here."""
    old, young = (tmp_path / f".{name}.ffffff.1.ab12cd34.tmp" for name in ("old", "young"))
    earlier = tmp_path / ".earlier.1.ff.tmp"  # of a version that named no machine
    for path, age in ((old, 3660.0), (young, 3540.0), (earlier, 3660.0)):
        path.mkdir()
        (path / "part").write_bytes(OLD)
        for each in (path / "part", path):
            os.utime(each, (time.time() - age,) * 2)
    with storage.lock(tmp_path):
        assert [path.name for path in tmp_path.glob(".*.tmp")] == [young.name]


def test_nothing_else_is_swept(tmp_path: Path) -> None:
    names = ("a.tmp", ".hidden", ".notes.tmp", ".a.1.tmp", ".a.b.c.d.tmp", "checkpoint/step-1/x")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("content")
        os.utime(tmp_path / name, (0, 0))
    with storage.lock(tmp_path):
        assert all((tmp_path / name).exists() for name in names)


def test_files_get_the_mode_that_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        storage.write(tmp_path / "open", NEW)
        storage.write_folder(tmp_path / "step", FILES)
        os.umask(0o077)
        storage.write(tmp_path / "closed", NEW)
    finally:
        os.umask(before)
    modes = [
        stat.S_IMODE((tmp_path / name).stat().st_mode)
        for name in ("open", "step/state.json", f"step/{storage.MANIFEST}", "step", "closed")
    ]
    assert modes == [0o644, 0o644, 0o644, 0o755, 0o600]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user cannot mount a small file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_keeps_the_old_file_and_says_what_is_needed(small_disk: Path) -> None:
    old, new = bytes(200_000), bytes(range(200)) * 1000
    target, filler, draw = small_disk / "file", small_disk / "filler", random.Random(0)
    fits = 0
    for _ in range(50):
        target.write_bytes(old)
        filler.write_bytes(bytes(draw.randrange(300_000, 800_000)))
        free = shutil.disk_usage(small_disk).free
        if free > 210_000:
            storage.write(target, new)
            fits += 1
            assert target.read_bytes() == new
        elif free < 200_000:
            with pytest.raises(PreflightError) as caught:
                storage.write(target, new)
            assert str(caught.value) == (
                f"{target}: no room for 200.0 KB, {free / 1000:.1f} KB are free; "
                "nothing was replaced"
            )
            assert "make room" in caught.value.hint
            assert target.read_bytes() == old
        assert {path.name for path in small_disk.iterdir()} == {"file", "filler"}
    assert 10 <= fits <= 40


def test_a_full_disk_leaves_no_part_of_a_folder(small_disk: Path) -> None:
    files = {"a": bytes(500_000), "b": bytes(700_000)}
    with pytest.raises(PreflightError, match=r"step: no room for 1\.2 MB, "):
        storage.write_folder(small_disk / "step", files)
    assert not list(small_disk.iterdir())


def test_a_full_disk_publishes_nothing(small_disk: Path) -> None:
    (small_disk / "kept").write_bytes(OLD)

    def overfill() -> None:
        with storage.staged(small_disk) as aside:
            (aside / "kept").write_bytes(bytes(2_000_000))
            storage.publish(aside, small_disk, first="kept")

    with pytest.raises(PreflightError, match="disk: no room, "):
        overfill()
    assert [path.name for path in small_disk.iterdir()] == ["kept"]
    assert (small_disk / "kept").read_bytes() == OLD


def test_a_full_disk_does_not_stop_the_lock(small_disk: Path) -> None:
    """It may hold a finished run, or orphans whose sweeping makes room."""
    orphan = small_disk / f".step.{os.getpid()}.ff.tmp"
    with pytest.raises(OSError, match="No space"):
        orphan.write_bytes(bytes(2_000_000))
    os.utime(orphan, (0, 0))
    assert shutil.disk_usage(small_disk).free == 0
    with storage.lock(small_disk):
        assert not orphan.exists()
        storage.write(small_disk / "file", NEW)


def test_a_disk_that_turned_read_only_is_a_sentence(small_disk: Path) -> None:
    storage.write(small_disk / "file", OLD)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    actions: list[Callable[[], object]] = [
        lambda: storage.write(small_disk / "file", NEW),
        lambda: storage.write_folder(small_disk / "step", FILES),
        lambda: storage.append(small_disk / "file", NEW),
        lambda: storage.lock(small_disk).__enter__(),
    ]
    for action in actions:
        with pytest.raises(PreflightError, match="cannot be written: read-only file system"):
            action()
    assert (small_disk / "file").read_bytes() == OLD


def test_a_path_below_a_file_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(OLD)
    actions: list[Callable[[], object]] = [
        lambda: storage.write(tmp_path / "file" / "below", NEW),
        lambda: storage.write_folder(tmp_path / "file" / "below", FILES),
        lambda: storage.lock(tmp_path / "file").__enter__(),
    ]
    for action in actions:
        with pytest.raises(PreflightError, match="cannot be written: "):
            action()
    assert (tmp_path / "file").read_bytes() == OLD


def test_the_largest_file_a_user_may_write_is_met_as_a_full_disk(tmp_path: Path) -> None:
    code = """
    import resource, sys
    from pathlib import Path
    from distill import storage
    from distill.errors import PreflightError
    target = Path(sys.argv[1])
    storage.write(target, bytes(1000))
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
    try:
        storage.write(target, b"n" * 9000)
    except PreflightError as error:
        print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "file")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "file: no room for 9.0 KB, " in done.stdout
    assert (tmp_path / "file").read_bytes() == bytes(1000)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_too_little_room_is_said_before_the_run(tmp_path: Path) -> None:
    storage.require_room(tmp_path, 1)
    with pytest.raises(PreflightError, match=r"needs 1000\.0 TB of disk, .* are free") as caught:
        storage.require_room(tmp_path, 10**15)
    assert "--out" in caught.value.hint


def test_appended_lines_follow_what_is_there(tmp_path: Path) -> None:
    storage.write(tmp_path / "file", b"")
    for line in (b"one\n", b"two\n"):
        storage.append(tmp_path / "file", line)
    assert (tmp_path / "file").read_bytes() == b"one\ntwo\n"


def test_what_was_moved_away_is_not_begun_anew(tmp_path: Path) -> None:
    """Nothing of a run is written to another folder that has its name by now."""
    actions: list[Callable[[], object]] = [
        lambda: storage.append(tmp_path / "file", NEW),
        lambda: storage.write_folder(tmp_path / "checkpoint" / "step", FILES),
    ]
    for action in actions:
        with pytest.raises(PreflightError, match="no such file or directory") as caught:
            action()
        assert "was it removed" in caught.value.hint
    assert list(tmp_path.iterdir()) == []
