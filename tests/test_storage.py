"""Files are old or new at every instant, and damage never passes for data."""

from __future__ import annotations

import builtins
import hashlib
import io
import os
import random
import shutil
import socket
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from distill import storage
from distill.engine import checkpoint
from distill.engine.checkpoint import Checkpoint
from distill.errors import DamagedError, PreflightError
from tests.engine import processes

OLD, NEW = b"old" * 500, b"new!" * 1000
FILES = {"model.safetensors": b"m" * 3000, "ema.safetensors": b"e" * 2000, "state.json": b"{}"}
# Every call that changes a disk, or asks it to keep a change. A reader's calls are among them.
CALLS = ("mkdir", "open", "fsync", "replace", "rename", "unlink", "rmdir")


class _Torn(io.FileIO):
    """A file whose writes reach the disk in two halves, with a chance to die between them."""

    tick: Callable[[], None]

    def write(self, data: Any, /) -> int:
        half = len(data) // 2
        written = super().write(data[:half])
        type(self).tick()
        written += super().write(data[half:])
        type(self).tick()
        return written


def _instrument(tick: Callable[[], None]) -> None:
    """Call `tick` before and after every step of this process that reaches the disk."""

    def around(call: Callable[..., Any]) -> Callable[..., Any]:
        def stepped(*args: Any, **kwargs: Any) -> Any:
            tick()
            result = call(*args, **kwargs)
            tick()
            return result

        return stepped

    for name in CALLS:
        setattr(os, name, around(getattr(os, name)))
    plain = builtins.open

    def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if mode != "wb":
            return plain(file, mode, *args, **kwargs)
        _Torn.tick = staticmethod(tick)
        tick()
        handle = _Torn(file, "wb")
        tick()
        return handle

    io.open = opened


def _crash(action: Callable[[Path], None], prepare: Callable[[Path], None], root: Path) -> None:
    """In `root/N`, prepare and then act, and die at the N-th step; until there is none left."""
    point = status = 0
    while status == 0:
        point += 1
        folder = root / f"{point:03d}"
        folder.mkdir()
        prepare(folder)
        child = os.fork()
        if child == 0:
            left = iter(range(point - 1, -1, -1))

            def tick(left: Iterator[int] = left) -> None:
                if next(left) == 0:
                    os._exit(9)

            _instrument(tick)
            action(folder)
            os._exit(0)
        status = 9 - os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    (root / "done").write_text(str(status))


def _crashed_folders(
    action: Callable[[Path], None], prepare: Callable[[Path], None], root: Path
) -> list[Path]:
    """What every death left behind, and last what the action leaves when it is not disturbed."""
    process = processes.context.Process(target=_crash, args=(action, prepare, root))
    process.start()
    process.join()
    assert (root / "done").read_text() == "9"  # the last child ended by itself
    return sorted(path for path in root.iterdir() if path.is_dir())


def _write_old(folder: Path) -> None:
    storage.write(folder / "file", OLD)


def _write_new(folder: Path) -> None:
    storage.write(folder / "file", NEW)


def test_a_file_is_old_or_new_wherever_the_writer_dies(tmp_path: Path) -> None:
    folders = _crashed_folders(_write_new, _write_old, tmp_path)
    states = [(folder / "file").read_bytes() for folder in folders]
    assert len(states) >= 12
    assert set(states) == {OLD, NEW}
    assert states == sorted(states, key=[OLD, NEW].index)  # new once renamed, and never old again
    for folder in folders:
        with storage.lock(folder):  # the next owner sweeps what the dead one left
            assert {path.name for path in folder.iterdir()} == {".lock", "file"}


def _nothing(folder: Path) -> None:
    pass


def _write_files(folder: Path) -> None:
    storage.write_folder(folder / "sub" / "step", FILES)


def test_a_folder_is_whole_or_not_there_wherever_the_writer_dies(tmp_path: Path) -> None:
    folders = _crashed_folders(_write_files, _nothing, tmp_path)
    there = [(folder / "sub" / "step").exists() for folder in folders]
    assert len(there) >= 25
    assert there == sorted(there)
    assert there[0] is False
    assert there[-1] is True
    for folder in folders:
        with storage.lock(folder):
            assert [path.name for path in folder.glob("sub/*")] in (["step"], [])
        if (folder / "sub" / "step").exists():
            assert storage.read_folder(folder / "sub" / "step") == FILES


def _published(folder: Path) -> None:
    for name in ("mark", "kept", "stale"):
        (folder / name).write_bytes(OLD)


def _publish(folder: Path) -> None:
    with storage.staged(folder) as aside:
        for name in ("fresh", "kept", "mark"):
            (aside / name).write_bytes(NEW)
        storage.publish(aside, folder, first="mark", stale=("kept", "stale"))


def test_published_files_are_old_or_new_wherever_the_writer_dies(tmp_path: Path) -> None:
    states = []
    for folder in _crashed_folders(_publish, _published, tmp_path):
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


def _state(step: int) -> Checkpoint:
    return Checkpoint(step, {"model": {"w": torch.full((9,), float(step))}}, {"rows": step})


def _two_checkpoints(folder: Path) -> None:
    for step in (1, 2):
        checkpoint.save(folder, _state(step), identity={})


def _third_checkpoint(folder: Path) -> None:
    checkpoint.save(folder, _state(3), identity={})


def test_the_newest_whole_checkpoint_survives_wherever_the_writer_dies(tmp_path: Path) -> None:
    steps = []
    for folder in _crashed_folders(_third_checkpoint, _two_checkpoints, tmp_path):
        told: list[str] = []
        found = checkpoint.load(folder, identity={}, warn=told.append)
        assert found is not None
        assert not told
        assert found.values == {"rows": found.step}
        assert torch.equal(found.tensors["model"]["w"], torch.full((9,), float(found.step)))
        steps.append(found.step)
    assert set(steps) == {2, 3}
    assert steps == sorted(steps)
    assert steps.count(3) >= 6  # among them the deaths while the oldest was being removed


def _log(folder: Path) -> None:
    """Write a file; note what is synced and renamed, in order."""
    log = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        fsync(descriptor)
        log.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")

    def replaced(source: Any, target: Any) -> None:
        replace(source, target)
        log.append("rename")

    os.fsync, os.replace = synced, replaced  # type: ignore[assignment]
    storage.write(folder / "file", NEW)
    (folder / "log").write_text(" ".join(log))


def test_content_is_on_the_disk_before_its_name_is(tmp_path: Path) -> None:
    process = processes.context.Process(target=_log, args=(tmp_path,))
    process.start()
    process.join()
    assert (tmp_path / "log").read_text() == "file rename folder"


def test_the_manifest_tells_size_and_hash_of_every_file(tmp_path: Path) -> None:
    import json

    storage.write_folder(tmp_path / "step", FILES)
    assert {path.name for path in (tmp_path / "step").iterdir()} == {*FILES, storage.MANIFEST}
    manifest = json.loads((tmp_path / "step" / storage.MANIFEST).read_text())
    assert manifest == {
        name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in FILES.items()
    }
    assert storage.read_folder(tmp_path / "step") == FILES


def test_500_flipped_bytes_are_all_detected(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("manifest", ["[]", "3", '{"a": 3}', '{"a": {}}', '{"a": null}', "{"])
def test_a_manifest_of_another_shape_is_damage(tmp_path: Path, manifest: str) -> None:
    (tmp_path / storage.MANIFEST).write_text(manifest)
    (tmp_path / "a").write_text("")
    with pytest.raises(DamagedError):
        storage.read_folder(tmp_path)


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


def test_one_of_many_processes_owns_a_folder_and_kill_9_frees_it(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    crowd = [_holder(folder) for _ in range(8)]
    said = {process.pid: _said(process) for process in crowd}
    owner = next(process for process in crowd if said[process.pid] == "held")
    refused = f"{folder}: in use by process {owner.pid} on {socket.gethostname()}"
    del said[owner.pid]
    # One that came between the owner's lock and its name in the file cannot say who it is.
    assert set(said.values()) <= {refused, f"{folder}: in use by another process"}
    with pytest.raises(PreflightError) as caught, storage.lock(folder):
        pass
    assert str(caught.value) == refused
    assert "--out" in caught.value.hint
    owner.kill()
    for process in crowd:
        process.communicate()
    with storage.lock(folder):
        assert (folder / ".lock").read_text().startswith(f"process {os.getpid()} ")


def test_the_owner_sweeps_orphans_and_nothing_else(tmp_path: Path) -> None:
    kept = [tmp_path / "a.tmp", tmp_path / ".hidden", tmp_path / "checkpoint" / "step-1" / "x"]
    swept = [tmp_path / ".a.1.ff.tmp", tmp_path / "checkpoint" / ".step-2.1.ff.tmp" / "half"]
    for path in (*kept, *swept):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("content")
    with storage.lock(tmp_path):
        assert all(path.exists() for path in kept)
        assert not any(path.exists() for path in swept)
        assert not (tmp_path / "checkpoint" / ".step-2.1.ff.tmp").exists()


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
    orphan = small_disk / ".step.1.ff.tmp"
    with pytest.raises(OSError, match="No space"):
        orphan.write_bytes(bytes(2_000_000))
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
    for line in (b"one\n", b"two\n"):
        storage.append(tmp_path / "file", line)
    assert (tmp_path / "file").read_bytes() == b"one\ntwo\n"
