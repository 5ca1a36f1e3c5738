"""Several processes stop after the same step, whichever of them a signal meets, and go on."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import psutil
import pytest

from distill.engine.train import train
from distill.recipe import Recipe
from tests.engine import processes
from tests.engine.conftest import STUDENT, TEACHER
from tests.engine.processes import Slow, Strike
from tests.engine.test_signals import (
    ROOT,
    STATUS,
    TAKE,
    TOTAL,
    copied,
    ended,
    nothing_half_made,
    saved,
    wait_for,
    words,
)
from tests.promises import Measured

# By itself it ends at once on SIGUSR1, and leaves 30 s for saving.
TORCHRUN = [
    *("torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
    *("--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"),
    *("--shutdown-timeout", "600"),
]


def group(
    place: Path,
    *arguments: object,
    strikes: tuple[Strike | None, Strike | None] = (None, None),
    slow: Slow | None = None,
) -> list[ForkServerProcess]:
    """Begin a run as two processes of a group; they note their steps in `0.log`, `1.log`."""
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    shared["MASTER_PORT"] = str(processes.free_port())
    for rank in range(2):
        (place / f"{rank}.log").unlink(missing_ok=True)
        (place / f"{rank}.said").write_text("")
    return [
        processes.command(
            place,
            *words("run", *arguments),
            said=place / f"{rank}.said",
            log=place / f"{rank}.log",
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            strike=strikes[rank],
            slow=slow,
        )
        for rank in range(2)
    ]


def begun(place: Path, rank: int) -> int:
    """How many steps a process of the last start has begun."""
    log = place / f"{rank}.log"
    return len(log.read_text().splitlines()) if log.exists() else 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe, its teacher, and an uninterrupted run of two processes in `whole/run`."""
    found = tmp_path_factory.mktemp("together")
    (found / "teacher.yaml").write_text(TEACHER)
    (found / "student.yaml").write_text(STUDENT)
    train(Recipe.load(found / "teacher.yaml"), found / "teacher")
    place = copied(found, found / "whole")
    assert [ended(one) for one in group(place)] == [0, 0], (place / "0.said").read_text()
    return found


@pytest.mark.promise("R9")
@pytest.mark.parametrize(
    "stops", [4, pytest.param(50, marks=[pytest.mark.soak, pytest.mark.timeout(3600)])]
)
def test_a_signal_to_one_process_stops_all_after_the_same_step(
    folder: Path, tmp_path: Path, stops: int, measured: Measured
) -> None:
    """Or two signals to two processes, at different times."""
    expected = processes.traces(folder / "whole" / "run")
    draw = random.Random(stops)
    kinds = list(STATUS)
    done = runs = 0
    longest = 0.0
    while done < stops:
        runs += 1
        place = copied(folder, tmp_path / f"cut-{runs}")
        while done < stops:
            both = group(place, slow=Slow(TAKE, 0.02))
            wait_for(lambda place=place: all(begun(place, rank) for rank in range(2)))
            time.sleep(draw.uniform(0.0, 0.5))
            first = draw.randrange(2)
            signums = [kinds[done % 4], draw.choice([None, *kinds])]
            at = time.monotonic()
            for rank, signum in zip((first, 1 - first), signums, strict=True):
                if signum is not None and both[rank].is_alive():
                    os.kill(both[rank].pid or 0, signum)
                    time.sleep(draw.uniform(0.0, 0.1))
            statuses = [ended(one, 30) for one in both]
            longest = max(longest, time.monotonic() - at)
            said = [(place / f"{rank}.said").read_text() for rank in range(2)]
            assert not any("Traceback" in one for one in said), said
            if saved(place / "run") == TOTAL:  # they were evaluating
                break
            done += 1
            sent = {STATUS[one] for one in signums if one is not None}
            assert statuses[0] == statuses[1], said
            assert statuses[0] in sent, said
            assert begun(place, 0) == begun(place, 1)
            assert any("and saved" in one for one in said), said
            assert not list(place.rglob("*.tmp"))
        assert [ended(one) for one in group(place)] == [0, 0], (place / "0.said").read_text()
        assert processes.traces(place / "run") == expected
    measured(
        "a signal to one of two processes, or two at different times",
        f"{done} of {done} after the same step, 0 hangs, {longest:.1f} s at most; to the bit",
    )


@pytest.mark.promise("R9")
def test_slow_steps_are_not_waited_for_until_the_next_row(
    folder: Path, tmp_path: Path, measured: Measured
) -> None:
    """A row of metrics comes every 27 steps here, and a scheduler waits two minutes."""
    place = copied(folder, tmp_path / "place")
    both = group(place, "--set", "train.batch_size=4", slow=Slow(TAKE, 0.3))
    wait_for(lambda: begun(place, 1) >= 4)
    at = time.monotonic()
    before = begun(place, 1)
    os.kill(both[1].pid or 0, signal.SIGUSR1)
    assert [ended(one) for one in both] == [75, 75], (place / "0.said").read_text()
    seconds = time.monotonic() - at
    steps = saved(place / "run") - before
    assert begun(place, 0) == begun(place, 1) == saved(place / "run")
    assert steps <= 5
    for rank in range(2):
        nothing_half_made(place, place / f"{rank}.said")
    measured(
        "a signal to one of two processes, steps of 0.3 s, a row every 27",
        f"all stopped {steps} steps later, saved and gone after {seconds:.1f} s",
    )


@pytest.mark.promise("R9")
@pytest.mark.parametrize(
    ("signum", "status", "what"),
    [
        (signal.SIGKILL, -signal.SIGKILL, "kill -9 of"),
        pytest.param(signal.SIGINT, 130, "Ctrl-C to", marks=pytest.mark.soak),
        pytest.param(signal.SIGTERM, 75, "SIGTERM to", marks=pytest.mark.soak),
        pytest.param(signal.SIGUSR1, 75, "SIGUSR1 to", marks=pytest.mark.soak),
    ],
)
def test_the_processes_of_a_launcher_save_when_it_is_told_to_end_or_killed(
    folder: Path, tmp_path: Path, signum: int, status: int, what: str, measured: Measured
) -> None:
    """`distill train` on several GPUs, here on the CPU."""
    place, said = copied(folder, tmp_path / "place"), tmp_path / "said"
    command = ["train", "student.yaml", "--out", "run", "--workers", "0"]
    command += ["--set", "train.epochs=2000"]
    metrics = place / "run" / "metrics.jsonl"
    launcher = processes.launch(place, 2, command, said=said)
    wait_for(lambda: size(metrics) or not launcher.is_alive(), 120)
    assert launcher.is_alive(), said.read_text()
    workers = psutil.Process(launcher.pid).children()
    assert len(workers) == 2
    began = time.monotonic()
    os.kill(launcher.pid or 0, signum)
    assert ended(launcher) == status
    _, alive = psutil.wait_procs(workers, timeout=60)
    for worker in alive:
        worker.kill()
    assert not alive
    seconds = time.monotonic() - began
    assert saved(place / "run") > 0
    assert "and saved" in said.read_text()
    nothing_half_made(place, said)
    measured(
        f"{what} the process that `distill train` started the others from",
        f"they saved, none is left after {seconds:.1f} s",
    )


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


@pytest.mark.promise("R9")
@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_torchrun_passes_signals_on_where_it_is_told_to(
    folder: Path, tmp_path: Path, measured: Measured
) -> None:
    signums = [signal.SIGTERM, signal.SIGUSR1]
    place = copied(folder, tmp_path / "place")
    (place / "student.yaml").write_text(STUDENT.replace("epochs: 4", "epochs: 200"))
    shutil.copytree(place, tmp_path / "whole")
    assert [ended(one, 300) for one in group(tmp_path / "whole")] == [0, 0]
    run, said = place / "run", place / "said"

    def start() -> subprocess.Popen[bytes]:
        more = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with said.open("w") as handle:
            return subprocess.Popen(
                [sys.executable, "-m", *TORCHRUN, "-m", "distill", *map(str, words("run"))],
                cwd=place,
                env={**os.environ, **more},
                stdout=handle,
                stderr=handle,
            )

    for signum in signums:
        rows, started = size(run / "metrics.jsonl"), start()
        wait_for(lambda rows=rows: size(run / "metrics.jsonl") > rows, 120)
        started.send_signal(signum)
        assert started.wait(timeout=120) != 0
        assert f"stopped by {signum.name}" in said.read_text()
    assert start().wait(timeout=300) == 0, said.read_text()
    assert processes.traces(run) == processes.traces(tmp_path / "whole" / "run")
    measured(
        "SIGTERM and SIGUSR1 to torchrun --signals-to-handle ... --shutdown-timeout 600",
        f"{len(signums)} of {len(signums)} saved, the rest to the bit",
    )
