"""A signal, whenever it comes, saves what is in work; and the same command goes on."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest

from distill.engine.train import train
from distill.recipe import Recipe
from tests.engine import processes
from tests.engine.conftest import STUDENT, TEACHER
from tests.engine.processes import Slow, Strike
from tests.promises import Measured

ROOT = Path(__file__).parents[2]
STATUS = {signal.SIGTERM: 75, signal.SIGINT: 130, signal.SIGUSR1: 75, signal.SIGHUP: 75}
TAKE = "distill.engine.fit.Training.take"
STEPS = 5  # of an epoch of STUDENT
TOTAL = 4 * STEPS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe, its teacher, and an uninterrupted run in `whole`."""
    found = tmp_path_factory.mktemp("signals")
    (found / "teacher.yaml").write_text(TEACHER)
    (found / "student.yaml").write_text(STUDENT)
    train(Recipe.load(found / "teacher.yaml"), found / "teacher")
    process = processes.command(found, *words("whole"), said=found / "said")
    process.join()
    assert process.exitcode == 0, (found / "said").read_text()
    return found


@pytest.fixture
def place(folder: Path, tmp_path: Path) -> Path:
    """A copy of the folder without the run."""
    return copied(folder, tmp_path / "place")


def copied(folder: Path, place: Path) -> Path:
    place.mkdir()
    for name in ("teacher.yaml", "student.yaml"):
        shutil.copy(folder / name, place)
    shutil.copytree(folder / "teacher", place / "teacher")
    return place


def words(out: object, *more: object) -> list[object]:
    return ["train", "student.yaml", "--out", out, "--workers", 0, *more]


def saved(run: Path) -> int:
    """The step of the newest checkpoint; 0 where there is none."""
    found = [int(path.name.partition("-")[2]) for path in run.glob("checkpoint/step-????????")]
    return max(found, default=0)


def wait_for(done: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def ended(process: ForkServerProcess, seconds: float = 60) -> int:
    process.join(timeout=seconds)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


def nothing_half_made(place: Path, said: Path) -> None:
    assert not [path for path in place.rglob("*.tmp") if path != said]
    assert "Traceback" not in said.read_text()
    assert "Exception ignored" not in said.read_text()


class Steps:
    """What a process noted of its steps."""

    def __init__(self, log: Path) -> None:
        lines = log.read_text().splitlines() if log.exists() else []
        self.lines = [[float(word) for word in line.split()] for line in lines]

    def in_work(self, at: float) -> set[int]:
        """The steps that a signal at a time may have met: between two of them it is either."""
        for step, began, *rest in self.lines:
            if at < began:
                return {int(step) - 1, int(step)}
            if rest and at <= rest[0]:
                return {int(step)}
        return {int(self.lines[-1][0])}

    @property
    def last_ended(self) -> float:
        return self.lines[-1][2]


@pytest.mark.promise("R9")
@pytest.mark.parametrize(
    "signals", [8, pytest.param(100, marks=[pytest.mark.soak, pytest.mark.timeout(3600)])]
)
def test_a_signal_at_a_random_time_saves_the_very_step(
    folder: Path, tmp_path: Path, signals: int, measured: Measured
) -> None:
    expected = processes.traces(folder / "whole")
    draw = random.Random(signals)
    kinds = list(STATUS)
    sent = steps = runs = 0
    longest = last = 0.0
    while sent < signals:
        runs += 1
        place = copied(folder, tmp_path / f"cut-{runs}")
        for start in range(10**6):
            log, said = tmp_path / f"{runs}-{start}.log", tmp_path / f"{runs}-{start}.said"
            slow = Slow(TAKE, 0.03)
            process = processes.command(place, *words("run"), said=said, log=log, slow=slow)
            # Its first line is its first step's; what it says begins when the command does.
            begun = log if draw.random() < 0.75 else said
            wait_for(lambda begun=begun, one=process: begun.exists() or not one.is_alive())
            process.join(timeout=draw.uniform(0, 0.7) if sent < signals else None)
            if process.exitcode is not None:
                assert process.exitcode == 0, said.read_text()
                break
            signum = kinds[sent % len(kinds)]
            assert process.pid is not None
            at = time.monotonic()
            os.kill(process.pid, signum)
            status = ended(process)
            now = time.monotonic()
            if status == 0:  # it came as the last line was printed
                break
            sent += 1
            nothing_half_made(place, said)
            if status == -signum and (place / "run" / "result.json").exists():
                break  # the command had ended, and the interpreter was about to
            if status == -signum:  # before the command began
                assert not log.exists()
                continue
            assert status == STATUS[signum], said.read_text()
            found = Steps(log)
            longest = max(longest, now - at)
            if found.lines and "and saved" in said.read_text():
                steps += 1
                last = max(last, now - found.last_ended)
                assert saved(place / "run") in found.in_work(at)
        assert processes.traces(place / "run") == expected
    assert last < 5
    measured(
        "SIGTERM, SIGINT, SIGUSR1, SIGHUP at random times of training",
        f"{sent} of {sent}: status as documented, the rest to the bit; {steps} in steps",
    )
    measured(
        "from a signal to the end of the process",
        f"{longest:.2f} s at most, {last:.2f} s after the step's end",
    )


MOMENTS = {
    "before a step is made": (signal.SIGTERM, "distill.engine.train.prepare", 1, 0),
    "while the run is prepared": (signal.SIGINT, "distill.engine.train.prepare", 2, 0),
    "in the first step": (signal.SIGHUP, TAKE, 1, 1),
    "in a validation": (signal.SIGUSR1, "distill.engine.fit.answers", 2, 2 * STEPS),
    "in the last step": (signal.SIGTERM, TAKE, TOTAL, TOTAL),
    "in the final evaluation": (signal.SIGINT, "distill.engine.finish.answers", 1, TOTAL),
    "as the result is written": (signal.SIGUSR1, "distill.engine.run.Run.finish", 1, TOTAL),
}


@pytest.mark.promise("R9")
def test_a_signal_at_a_named_moment_loses_nothing(
    folder: Path, tmp_path: Path, measured: Measured
) -> None:
    for name, (signum, where, call, step) in MOMENTS.items():
        place, said = copied(folder, tmp_path / name), tmp_path / "said"
        said.write_text("")
        strike = Strike(where, call, signum)
        process = processes.command(place, *words("run"), said=said, strike=strike)
        assert ended(process) == STATUS[signum], (name, said.read_text())
        assert f"stopped by {signal.Signals(signum).name}" in said.read_text()
        assert saved(place / "run") == step, name
        nothing_half_made(place, said)
        assert ended(processes.command(place, *words("run"), said=said)) == 0, said.read_text()
        assert processes.traces(place / "run") == processes.traces(folder / "whole"), name
    measured(
        "a signal at named moments, from the first line to the result",
        f"{len(MOMENTS)} of {len(MOMENTS)}: stopped there, the rest to the bit",
    )


@pytest.mark.promise("R9")
def test_a_signal_while_a_checkpoint_is_written_waits_for_that_one_alone(
    folder: Path, place: Path, tmp_path: Path, measured: Measured
) -> None:
    said = tmp_path / "said"
    process = processes.command(
        place,
        *words("run", "--checkpoint-seconds", 0),
        said=said,
        strike=Strike("distill.engine.checkpoint.save", 3, signal.SIGTERM),
        slow=Slow("os.fsync", 0.1),
    )
    assert ended(process) == 75
    assert saved(place / "run") == 3  # and no other step was made, whose checkpoint takes as long
    nothing_half_made(place, said)
    assert ended(processes.command(place, *words("run"), said=said)) == 0
    assert processes.traces(place / "run") == processes.traces(folder / "whole")
    measured(
        "a signal while a checkpoint is written to a slow disk", "that one is kept, to the bit"
    )


@pytest.mark.promise("R9")
def test_a_second_ctrl_c_ends_at_once(
    folder: Path, place: Path, tmp_path: Path, measured: Measured
) -> None:
    said, log = tmp_path / "said", tmp_path / "log"
    process = processes.command(
        place,
        *words("run", "--checkpoint-seconds", 0),
        said=said,
        log=log,
        slow=Slow("distill.engine.fit.train_step", 2.0),
    )
    wait_for(lambda: saved(place / "run") == 1)
    time.sleep(0.2)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    wait_for(lambda: "Ctrl-C again" in said.read_text())
    began = time.monotonic()
    os.kill(process.pid, signal.SIGINT)
    assert ended(process) == 130
    seconds = time.monotonic() - began
    assert "stopped by SIGINT; the last checkpoint is whole" in said.read_text()
    nothing_half_made(place, said)
    assert saved(place / "run") == 1
    assert ended(processes.command(place, *words("run"), said=said)) == 0
    assert processes.traces(place / "run") == processes.traces(folder / "whole")
    measured("a second Ctrl-C, in a step of two seconds", f"ended after {seconds:.2f} s")
    assert seconds < 1.5


@pytest.mark.promise("R9")
def test_a_terminal_that_is_closed_saves_the_step(
    folder: Path, place: Path, tmp_path: Path, measured: Measured
) -> None:
    """The bar of progress, and every line, are then written to nowhere."""
    main, other = os.openpty()
    log = tmp_path / "log"
    process = processes.command(
        place, *words("run"), said=Path(os.ttyname(other)), log=log, slow=Slow(TAKE, 0.05)
    )
    wait_for(lambda: log.exists() and log.read_text().count("\n") > 2)
    os.close(other)
    os.close(main)
    assert ended(process) == 75
    assert saved(place / "run") in (3, 4, 5, 6)
    said = tmp_path / "said"
    assert ended(processes.command(place, *words("run"), said=said)) == 0, said.read_text()
    assert processes.traces(place / "run") == processes.traces(folder / "whole")
    measured("a terminal that is closed (SIGHUP)", "saved, status 75, the rest to the bit")


@pytest.mark.promise("R9")
def test_nohup_is_heeded(folder: Path, place: Path, tmp_path: Path, measured: Measured) -> None:
    said = tmp_path / "said"
    process = processes.command(
        place,
        *words("run"),
        said=said,
        strike=Strike(TAKE, 4, signal.SIGHUP),
        ignored=signal.SIGHUP,
    )
    assert ended(process) == 0
    assert processes.traces(place / "run") == processes.traces(folder / "whole")
    measured("a terminal that is closed, under nohup", "the run goes on to its end")


@pytest.mark.promise("R9")
def test_a_reader_of_the_log_that_ends_first_ends_no_run(
    folder: Path, place: Path, tmp_path: Path, measured: Measured
) -> None:
    """`distill train ... 2>&1 | tee log`: Ctrl-C is given to tee, too."""
    pipe, log, said = tmp_path / "pipe", tmp_path / "log", tmp_path / "said"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    process = processes.command(place, *words("run"), said=pipe, log=log, slow=Slow(TAKE, 0.05))
    wait_for(lambda: log.exists() and log.read_text().count("\n") > 2)
    os.close(reader)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    assert ended(process) == 130
    assert saved(place / "run") in (3, 4, 5)
    assert ended(processes.command(place, *words("run"), said=said)) == 0, said.read_text()
    assert processes.traces(place / "run") == processes.traces(folder / "whole")
    measured("Ctrl-C where the reader of the log (`| tee`) ends first", "saved, status 130")


@pytest.mark.promise("R9")
@pytest.mark.parametrize(
    "starts", [2, pytest.param(24, marks=[pytest.mark.soak, pytest.mark.timeout(3600)])]
)
def test_a_signal_while_the_program_starts_is_no_traceback(
    place: Path, starts: int, measured: Measured
) -> None:
    """A real start, with all of its imports."""
    draw = random.Random(starts)
    kinds = [signal.SIGINT, *STATUS]
    done = 0
    while done < starts:
        signum = kinds[done % len(kinds)]
        process = subprocess.Popen(
            [sys.executable, "-m", "distill", *map(str, words("run"))],
            cwd=place,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        time.sleep(draw.uniform(0.1, 4.0))  # Python itself takes a few hundredths of a second
        through = (place / "run" / "result.json").exists()
        process.send_signal(signum)
        _, said = process.communicate(timeout=60)
        assert "Traceback" not in said
        if process.returncode == 0:
            assert through
            shutil.rmtree(place / "run")
            continue
        assert process.returncode in (STATUS[signum], -signum), said
        done += 1
    measured(
        "a signal while the program starts (imports, data)",
        f"{done} of {done}: status as documented, no traceback, nothing half made",
    )


@pytest.fixture(scope="module")
def studio(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pictures, a finished run, and all that the other commands work on."""
    from tests.engine.test_kill import FOLDER, photos

    found = tmp_path_factory.mktemp("studio")
    copied(folder, found / "place")
    shutil.copytree(folder / "whole", found / "place" / "run")
    photos(found / "place" / "photos")
    lines = TEACHER.strip().splitlines()
    (found / "place" / "photos.yaml").write_text("\n".join([FOLDER, *lines[1:]]) + "\n")
    return found / "place"


# Command; where the signal comes, and at which call; what is said to be left.
COMMANDS: dict[str, tuple[list[object], str, int, str]] = {
    "teacher-cache": (
        ["teacher-cache", "student.yaml", "--out", "tc", "--views", 2, "--unit-rows", 16],
        "distill.engine.precompute.tell",
        7,
        "all units that were made are kept",
    ),
    "temperature-sweep": (
        ["temperature-sweep", "student.yaml", "--temperatures", "1,4", "--out", "made"],
        TAKE,
        9,
        "and saved",
    ),
    "temperature-sweep, at its end": (
        ["temperature-sweep", "student.yaml", "--temperatures", "1,4", "--out", "made"],
        "distill.sweep._tested",
        1,
        "what was trained is kept",
    ),
    "sample-efficiency": (
        ["sample-efficiency", "student.yaml", "--sizes", "60,110", "--out", "made"],
        TAKE,
        9,
        "and saved",
    ),
    "rank-teachers": (
        ["rank-teachers", "student.yaml", "--proxy-epochs", 2, "--out", "made"],
        TAKE,
        7,
        "and saved",
    ),
    "pack": (
        ["pack", "photos.yaml", "--out", "made", "--size", 8, "--shard-bytes", 2000],
        "distill.data.packed.make",
        3,
        "all shards that were made are kept",
    ),
    "evaluate": (["evaluate", "run"], "distill.evaluate.scores", 1, "nothing was written"),
    "export": (
        ["export", "run", "--format", "safetensors", "--no-latency"],
        "distill.export.companions.write",
        1,
        "nothing was written",
    ),
    "check": (["check", "student.yaml"], "distill.engine.preflight.rehearse", 1, "nothing was"),
    "init": (["init", "photos", "--out", "made.yaml"], "distill.advise.propose", 1, "nothing was"),
}


@pytest.mark.promise("R9")
@pytest.mark.parametrize("name", COMMANDS)
def test_a_signal_in_another_command_leaves_nothing_half_made(
    studio: Path, tmp_path: Path, name: str, measured: Measured
) -> None:
    command, where, call, left = COMMANDS[name]
    if command[0] not in ("check", "init"):
        command = [*command, "--workers", 0]
    kinds = list(STATUS)
    signum = kinds[list(COMMANDS).index(name) % len(kinds)]
    place, said = tmp_path / "place", tmp_path / "said"
    shutil.copytree(studio, place)
    before = files(place)
    strike = Strike(where, call, signum)
    process = processes.command(place, *command, said=said, strike=strike)
    assert ended(process) == STATUS[signum], said.read_text()
    text = said.read_text()
    assert left in text, text
    nothing_half_made(place, said)
    if "nothing was" in left:
        assert files(place) == before
    said.write_text("")
    assert ended(processes.command(place, *command, said=said)) == 0, said.read_text()
    nothing_half_made(place, said)
    measured(f"a signal in {name}", "stopped with its status, nothing half made, it goes on")


def files(place: Path) -> dict[str, int]:
    return {
        str(path.relative_to(place)): path.stat().st_mtime_ns
        for path in place.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


@pytest.mark.promise("R9")
def test_the_time_limit_of_a_cache_is_kept(
    studio: Path, tmp_path: Path, measured: Measured
) -> None:
    place, said = tmp_path / "place", tmp_path / "said"
    shutil.copytree(studio, place)
    command: list[Any] = ["teacher-cache", "student.yaml", "--out", "tc", "--views", 4]
    command += ["--unit-rows", 16, "--views-per-read", 1, "--workers", 0]
    slow = Slow("distill.engine.precompute.tell", 0.1)
    began = time.monotonic()
    process = processes.command(place, *command, "--time-limit", "1s", said=said, slow=slow)
    assert ended(process) == 75
    seconds = time.monotonic() - began
    assert "the time is up; all units that were made are kept" in said.read_text()
    units = len(list((place / "tc").rglob("u*.safetensors")))
    assert units > 0
    nothing_half_made(place, said)
    assert ended(processes.command(place, *command, "--json", said=said)) == 0
    found = json.loads(said.read_text().splitlines()[-1])
    assert found["complete"]
    assert found["units"] < len(list((place / "tc").rglob("u*.safetensors")))
    measured("teacher-cache --time-limit 1s", f"ended {seconds:.1f} s after its start, status 75")


DEAF = """
import os, signal
for _ in range(2):
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except BaseException:
        pass  # as numpy does with what is raised while a part of it is imported
"""


@pytest.mark.parametrize("imported", [True, False])
def test_a_signal_that_a_library_swallows_is_heard(tmp_path: Path, imported: bool) -> None:
    """In an import at once; elsewhere the next one is."""
    (tmp_path / "deaf.py").write_text(DEAF)
    begin = "from distill.cli._report import reporting"
    body = "import deaf" if imported else f"exec({DEAF!r}); os.kill(os.getpid(), signal.SIGUSR1)"
    code = f"import os, signal\n{begin}\nwith reporting():\n    {body}\n    print('deaf')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout == ""
    if imported:
        assert done.returncode == 75
        assert done.stderr.startswith("stopped by SIGTERM; ")
    else:  # typer turns the exit of `reporting` into a status
        assert "stopped by SIGUSR1; " in done.stderr
