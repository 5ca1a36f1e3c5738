"""Processes that die before or after any step that reaches the disk, and what they leave."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.engine import processes

# Every call that changes a disk, or asks it to keep a change.
CALLS = ("mkdir", "open", "fsync", "replace", "rename", "link", "unlink", "rmdir")

Action = Callable[[Path], object]  # done in a folder


class Step(NamedTuple):
    """A call that reaches the disk; a process can die before it, or when it was the last."""

    call: str  # one of CALLS, or write
    path: str
    target: str = ""  # of a rename or a link


class Death(NamedTuple):
    """A process that died."""

    point: int  # from 1: before the first step; before the second, which is after the first; ...
    step: Step  # that was not taken; the last, where it was
    left: Path  # what it left, untouched
    place: Path  # the same folder after the action was done there once more


class Crashes(NamedTuple):
    """An action that was done undisturbed, and dying."""

    steps: list[Step]
    whole: Path  # what it leaves undisturbed
    deaths: list[Death]

    @property
    def points(self) -> int:
        """Where a process could die."""
        return len(self.steps) + 1


def nothing(folder: Path) -> None:
    """Prepares nothing."""


def crash(
    action: Action,
    root: Path,
    *,
    prepare: Action = nothing,
    most: int | None = None,
    again: bool = True,
) -> Crashes:
    """Do something in folders below `root`, and die at every point of it, each time at another.

    Args:
        action: What is done, in a process forked from one that has torch imported.
        root: Of the folders.
        prepare: Done in each folder before.
        most: Points that are tried, of all and of every kind; None: all of them.
        again: Whether the action is done once more where a process died, and must end well.
    """
    process = processes.context.Process(target=_crash, args=(action, prepare, root, most, again))
    process.start()
    process.join()
    assert process.exitcode == 0, (root / "said").read_text()[-4000:]
    steps = [Step(*step) for step in json.loads((root / "steps").read_text())]
    points = json.loads((root / "points").read_text())
    deaths = [
        Death(
            point,
            steps[min(point, len(steps)) - 1],
            root / f"{point:05d}-left",
            root / f"{point:05d}",
        )
        for point in points
    ]
    return Crashes(steps, root / "whole", deaths)


def _crash(action: Action, prepare: Action, root: Path, most: int | None, again: bool) -> None:
    said = os.open(root / "said", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(said, stream.fileno())

    def place(name: str) -> Path:
        folder = root / name
        folder.mkdir()
        prepare(folder)
        return folder

    warm = place("warm")  # so that no process begins with imports of its own
    os.chdir(warm)
    action(warm)
    assert _forked(action, place("whole"), log=root / "steps") == 0, "undisturbed"
    steps = [Step(*step) for step in json.loads((root / "steps").read_text())]
    died = []
    for point in _spread(steps, most):
        folder = place(f"{point:05d}")
        status = _forked(action, folder, point=point)
        if status == 0 and point > 0.95 * len(steps):
            continue  # where threads meet, there may be some steps fewer
        assert status == 9, f"point {point}"
        died.append(point)
        if again:
            shutil.copytree(folder, root / f"{point:05d}-left", symlinks=True)
            assert _forked(action, folder) == 0, f"point {point}: the second time"
    (root / "points").write_text(json.dumps(died))


def _forked(action: Action, folder: Path, *, point: int = 0, log: Path | None = None) -> int:
    """Do it in a process of its own, that dies at a point or logs its steps; its exit status."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    steps: list[Step] = []

    def tick(step: Step) -> None:
        steps.append(step)
        if len(steps) == point:
            os._exit(9)

    try:
        os.chdir(folder)
        if point or log:
            _instrument(tick)
        action(folder)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    if log is not None:
        log.write_text(json.dumps(steps))
    os._exit(9 if point == len(steps) + 1 else 0)


def _spread(steps: Sequence[Step], most: int | None) -> list[int]:
    """Points from 1: all, or so many at equal distances, and one of each kind of call."""
    last = len(steps) + 1
    if most is None or most >= last:
        return list(range(1, last + 1))
    points = {1 + i * (last - 1) // (most - 1) for i in range(most)}
    hit = {steps[point - 1].call for point in points - {last}}
    for call in {step.call for step in steps} - hit:
        points.add(1 + next(i for i, step in enumerate(steps) if step.call == call))
    return sorted(points)


class _Torn(io.FileIO):
    """A file whose writes reach the disk in two halves, with a chance to die between them."""

    tick: Callable[[Step], None]

    def write(self, data: Any, /) -> int:
        view, written = memoryview(data).cast("B"), 0
        half = len(view) // 2
        for part in (view[:half], view[half:]):
            type(self).tick(Step("write", str(self.name)))
            written += super().write(part)
        return written


def _instrument(tick: Callable[[Step], None]) -> None:
    """Call `tick` before every step of this process that reaches the disk."""

    def around(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def stepped(*args: Any, **kwargs: Any) -> Any:
            if name != "open" or args[1] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                path = Path(f"/proc/self/fd/{args[0]}").readlink() if name == "fsync" else args[0]
                names = [path, args[1]] if name in ("replace", "rename", "link") else [path]
                tick(Step(name, *(str(Path(each).absolute()) for each in names)))
            return call(*args, **kwargs)

        return stepped

    for name in CALLS:
        setattr(os, name, around(name, getattr(os, name)))
    plain = io.open

    def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if "b" not in mode or not set(mode) & set("wax+"):
            return plain(file, mode, *args, **kwargs)
        _Torn.tick = staticmethod(tick)
        path = str(Path(file).absolute())
        tick(Step("open", path))
        return _Torn(path, mode)

    io.open = opened


def unordered(steps: Sequence[Step]) -> list[str]:
    """What got its name before its content was on the disk, or whose name was never brought there.

    The rule is: fsync of the file, rename, fsync of the folder. What is appended to a file that has
    its name is brought there in the end.
    """
    last = {step.path: i for i, step in enumerate(steps) if step.call in ("write", "fsync")}
    faults = [
        f"what was appended to {path} is not brought to the disk"
        for path, i in last.items()
        if steps[i].call == "write" and ".tmp" not in path and not path.endswith("/.lock")
    ]
    for i, (call, path, target) in enumerate(steps):
        if call not in ("replace", "rename", "link") or target.endswith(".tmp"):
            continue
        synced = {step.path: at for at, step in enumerate(steps[:i]) if step.call == "fsync"}
        touched = {
            step.path: at
            for at, step in enumerate(steps[:i])
            if step.call in ("open", "write", "mkdir") and (step.path + "/").startswith(path + "/")
        }
        faults += [
            f"{each} has no content on the disk when {target} gets its name"
            for each, at in touched.items()
            if synced.get(each, -1) < at
        ]
        later = {step.path for step in steps[i:] if step.call == "fsync"}
        if str(Path(target).parent) not in later:
            faults.append(f"the name of {target} is not brought to the disk")
    return faults
